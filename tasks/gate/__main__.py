"""Run the stage: read the scores, look for overlaps with the training data, write the verdict."""

from pathlib import Path

from tasks.config import load_params
from tasks.decontaminate import evaluation_questions, questions_of
from tasks.files import iterate_rows, read_json, read_rows, write_figures
from tasks.gate import GateParams
from tasks.gate.decision import decide
from tasks.stage import DATA, run_main, write_summary
from tasks.text import canonical

SCORES = DATA / "evaluate" / "scores.parquet"
MODELS = DATA / "evaluate" / "models.json"
CHAMPION = DATA / "champion" / "champion.json"
TRAIN = DATA / "decontaminate" / "train.parquet"
TEST = DATA / "split" / "test.parquet"
BENCHMARKS = DATA / "benchmarks"
TARGET = DATA / "gate" / "gate.json"


def main() -> None:
    """Compare and write the verdict with its evidence."""
    params = load_params(GateParams, "gate")
    rows = read_rows(SCORES)
    overlaps = find_overlaps(TRAIN, TEST, BENCHMARKS)
    decision = decide(rows, read_json(MODELS), read_json(CHAMPION)["looks"], overlaps, params)
    write_figures(TARGET, decision)
    write_summary("gate", rows_in=len(rows), rows_out=len(rows), verdict=decision["verdict"])


def find_overlaps(train: Path, test: Path, benchmarks: Path) -> list[str]:
    """Name the training rows that ask an evaluation question word for word.

    The stage decontaminate removes them, and looser overlaps too; a benchmark that was put in after it, or a
    train set from elsewhere, is found here.
    """
    asked = {canonical(text): f"{name}/{item}" for name, item, text in evaluation_questions(test, benchmarks)}
    return [
        f"{row['origin']} asks {asked[text]}"
        for row in iterate_rows(train, ["origin", "messages"])
        for question in questions_of(row)
        if (text := canonical(question)) in asked and text
    ]


if __name__ == "__main__":
    run_main(main)
