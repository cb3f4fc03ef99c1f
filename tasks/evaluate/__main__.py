"""Run the stage: compute the missing scores, then write all scores to one table."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nightshift.core.code_digest import MODEL_ENGINES, code_digest
from nightshift.core.config import config_error, load_params
from nightshift.core.errors import DataError
from nightshift.core.files import (
    file_digest,
    iterate_rows,
    read_json,
    read_rows,
    text_digest,
    tree_digest,
    write_figures,
    write_json,
    write_rows,
)
from nightshift.core.paths import (
    BASE,
    BASE_RECORD,
    BENCHMARKS,
    BEST,
    CHAMPION,
    CHAMPION_RECORD,
    CLEAN_TRAIN,
    CLUSTERS,
    METRICS,
    MODELS,
    SCORES,
    TEST,
)
from nightshift.core.stage import run_main, write_summary
from nightshift.core.state import state_dir
from nightshift.core.trained import trained_model
from nightshift.data.benchmarks import HELDOUT, OF_TEST_EXAMPLES, TEST_ANSWERS, read_benchmarks, task_digests
from nightshift.data.schemas import ALL_SCORES, ItemScore, Score
from nightshift.registry.bases import base_digest, is_base
from tasks.evaluate import EvaluateParams
from tasks.evaluate.answers import Answers, choose_answers
from tasks.evaluate.jobs import EvaluatedModel, device, digest, find_problems, score_missing
from tasks.evaluate.scores import metrics
from tasks.evaluate.servers import read_server, server_key
from tasks.evaluate.vllm import find_vllm, vllm_python

ENGINES = (*MODEL_ENGINES, "bm25s", "lm-eval", "nltk", "rouge-score")
RETRIEVAL = "retrieval"
log = logging.getLogger(__name__)


def main() -> None:
    """Write the per-item scores of every model, their aggregates, and the models' digests."""
    params = load_params(EvaluateParams, "evaluate")
    answers = choose_answers(TEST, BASE, params.exact_match) if params.exact_match else None
    models = find_models(params, answers)
    memo = {name: memo_files(model, params, answers) for name, model in models.items()}
    missing = find_missing(memo)
    if missing and (found := find_problems({name: models[name] for name in missing}, params)):
        raise config_error(found)
    score_missing(models, missing, params, answers)
    rows: list[Any] = [
        {"model": name, **row} for name in memo for file in memo[name].values() for row in read_rows(file)
    ]
    rows += [{"model": "best", **row} for row in best_scores(rows)]
    rows = list(relate(rows))
    write_rows(SCORES, rows, ALL_SCORES)
    write_figures(METRICS, metrics(rows))
    write_json(MODELS, digest_models(models))
    asked: dict[str, Any] = {TEST_ANSWERS: answers.counts} if answers else {}
    write_summary("evaluate", rows_in=len(rows), rows_out=len(rows), models=sorted(models), **asked)


def best_scores(rows: Sequence[Score]) -> Iterator[ItemScore]:
    """Yield the scores of the best champion so far on items that are still asked in the same way.

    The id of a test example is a digest of its text, which no lineage has.
    """
    now = task_digests(BENCHMARKS)
    known = {name for name, one in read_json(CHAMPION_RECORD)["best"].items() if one["task"] == now.get(name)}

    def identify(row: ItemScore) -> tuple[str | None, ...]:
        is_test = row["benchmark"] in OF_TEST_EXAMPLES
        return row["benchmark"], row["item"], *(() if is_test else (row["question"], row["expected"]))

    asked = {identify(row) for row in rows if row["model"] == "candidate"}
    yield from (row for row in read_rows(BEST) if row["benchmark"] in known and identify(row) in asked)


def relate(rows: Iterable[Score]) -> Iterator[Score]:
    """Yield the scores with the cluster and the original of their item, and whether a test example is new.

    A champion that was trained elsewhere may have seen any example: none is too old to compare with it.
    """
    clusters = {(row["benchmark"], row["item"]): row["cluster"] for row in read_rows(CLUSTERS)}
    trained_on = read_json(CHAMPION_RECORD)["arrival"] or 0
    new = {row["id"]: row["arrival"] > trained_on for row in iterate_rows(TEST, ["id", "arrival"])}
    paraphrases = {
        (benchmark.name, item["id"]): item.get("paraphrase_of")
        for benchmark in read_benchmarks(BENCHMARKS)
        for item in benchmark.items
    }
    for row in rows:
        benchmark = HELDOUT if row["benchmark"] in OF_TEST_EXAMPLES else row["benchmark"]
        yield {
            **row,
            "cluster": clusters.get((benchmark, row["item"])),
            "is_new": new[row["item"]] if benchmark == HELDOUT else None,
            "paraphrase_of": paraphrases.get((row["benchmark"], row["item"])),
        }


def find_models(params: EvaluateParams, answers: Answers | None = None) -> dict[str, EvaluatedModel]:
    """Return the models to compare; the champion is missing if there is none or its base is lost.

    Raises:
        DataError: A benchmark has an invalid format, or the kept base of the champion has changed.
    """
    known = [benchmark.name for benchmark in read_benchmarks(BENCHMARKS)]
    if answers and answers.ids:
        known.append(TEST_ANSWERS)
    everything = [*known, HELDOUT]
    base = (BASE, base_digest(read_json(BASE_RECORD)["files"]))
    found = {
        "base": EvaluatedModel(*base, None, 0, everything),
        "candidate": EvaluatedModel(*base, trained_model(), 0, everything),
    }
    champion = read_json(CHAMPION_RECORD)
    if champion["version"] is not None:
        of_champion = base_digest(champion["base"]["files"])
        if folder := BASE if of_champion == base[1] else find_kept_base(champion):
            found["champion"] = EvaluatedModel(folder, of_champion, CHAMPION / "model", 0, everything)
    if params.retrieval:
        asked = [name for name in params.retrieval.benchmarks if name in known]
        for name in sorted(set(params.retrieval.benchmarks) - set(known)):
            log.warning("ignored: evaluate.retrieval.benchmarks lists %s, which is no benchmark", name)
        if asked:
            found[RETRIEVAL] = EvaluatedModel(*base, None, params.retrieval.documents, asked)
    return found


def find_kept_base(champion: dict[str, Any]) -> Path | None:
    """Return the kept base of a champion on another base; None if snapshot did not find it.

    Raises:
        DataError: The base that snapshot kept is missing or has changed.
    """
    base = champion["base"]
    if base["kept"] is None:
        log.warning("the champion is not scored: its base %s was not found", base["model"])
        return None
    folder = state_dir() / str(base["kept"])
    if is_base(folder, base["files"]):
        return folder
    raise DataError(
        f"{folder}: does not contain the base {base['model']} of the champion, version "
        f"{champion['version']}; run `nightshift snapshot` to look for it again"
    )


def digest_models(models: dict[str, EvaluatedModel]) -> dict[str, str | None]:
    """Return the adapter digest of each model for the gate; a champion on another base adds its base."""
    digests = {name: digest(model) for name, model in models.items() if name != RETRIEVAL}
    champion = read_json(CHAMPION_RECORD)
    if champion["version"] is not None:
        base = base_digest(champion["base"]["files"])
        is_same = base == models["candidate"].base_digest
        adapter = tree_digest(CHAMPION / "model")
        digests["champion"] = adapter if is_same else f"{adapter} on the base {base}"
    return digests


def memo_files(
    model: EvaluatedModel, params: EvaluateParams, answers: Answers | None = None
) -> dict[str, Path]:
    """Return the cache file of each benchmark, keyed by code, engine, model, items and limit."""
    parts = [
        code_digest("evaluate", ENGINES),
        *engine_key(params),
        model.base_digest,
        digest(model) or "",
        f"{model.documents} {file_digest(CLEAN_TRAIN)}" if model.documents else "",
    ]
    files = {}
    for name in model.benchmarks:
        if name == HELDOUT:
            items = [file_digest(TEST)]
        elif answers and name == TEST_ANSWERS:
            items = [file_digest(TEST), str(answers.max_new_tokens), *answers.ids]
        else:
            items = [tree_digest(BENCHMARKS / name), str(params.limit)]
        files[name] = state_dir() / "memo" / "scores" / f"{text_digest(*parts, *items)}.parquet"
    return files


def engine_key(params: EvaluateParams) -> list[str]:
    """Return what scores depend on, beside code, models and items: the engine, its version and its device."""
    if params.engine == "transformers":
        return [device()]
    if params.engine == "vllm":
        return [device(), str(find_vllm(vllm_python())), str(params.vllm.max_model_len)]
    return [json.dumps(server_key(params.endpoint, read_server(params.endpoint)))]


def find_missing(memo: dict[str, dict[str, Path]]) -> dict[str, dict[str, str]]:
    """Return model -> benchmark -> cache file, of the scores that are not cached."""
    missing: dict[str, dict[str, str]] = {}
    for name, files in memo.items():
        # A candidate that is identical to the champion is scored once.
        known = {target for targets in missing.values() for target in targets.values()}
        targets = {key: str(file) for key, file in files.items() if not file.is_file()}
        if targets := {key: target for key, target in targets.items() if target not in known}:
            missing[name] = targets
    return missing


if __name__ == "__main__":
    run_main(main)
