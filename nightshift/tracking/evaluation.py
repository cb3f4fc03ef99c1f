"""Evaluation results as MLflow metrics, so that MLflow's charts and tables compare nights."""

import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nightshift.core.files import text_digest
from nightshift.data.benchmarks import HELDOUT
from nightshift.data.gain import is_loss_gain

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Characters that MLflow does not accept in the name of a metric, and its maximum length.
REFUSED, LONGEST = re.compile(r"[^\w\-. :/]"), 250
METRICS_PER_REQUEST = 1000


def log_evaluation(
    client: "MlflowClient",
    run: str,
    metrics: Mapping[str, Any],
    gate: Mapping[str, Any],
    version: int | None = None,
    model_id: str | None = None,
) -> None:
    """Log scores, gain and verdict to a run, and to the logged model of the candidate.

    Args:
        client: MLflow client.
        run: Id of the run.
        metrics: Content of data/evaluate/metrics.json.
        gate: Content of data/gate/gate.json.
        version: Version of the candidate, which is the step of the metrics; None if it is not registered.
        model_id: Logged model of that version, or None.
    """
    from mlflow.entities import Metric, RunTag

    now, step = int(time.time() * 1000), version or 0
    found = [
        Metric(key, value, now, step, model_id=model_id) for key, value in evaluation_metrics(metrics, gate)
    ]
    tags = [RunTag("nightshift.verdict", gate["verdict"]), RunTag("nightshift.version", str(version))]
    for first in range(0, len(found), METRICS_PER_REQUEST):
        client.log_batch(run, metrics=found[first : first + METRICS_PER_REQUEST], tags=tags)


def evaluation_metrics(metrics: Mapping[str, Any], gate: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each metric; those of the candidate have no suffix.

    Example:
        >>> scored = {"facts": {"accuracy": 0.75, "chance": 0.25, "slices": {"a": 0.5, "b": 1.0}}}
        >>> for pair in evaluation_metrics({"candidate": scored}, {"gain": {"mean": 0.1}}):
        ...     print(*pair)
        eval/facts/accuracy 0.75
        eval/facts/a/accuracy 0.5
        eval/facts/b/accuracy 1.0
        eval/facts/chance 0.25
        eval/gain 0.1
    """
    for name, value in _all_metrics(metrics, gate):
        if isinstance(value, int | float) and math.isfinite(value):
            yield metric_name(name), float(value)


def metric_name(name: str) -> str:
    """Return a name that MLflow accepts; a long one ends with its digest.

    Example:
        >>> metric_name("facts/what?/accuracy"), len(metric_name("x" * 300))
        ('eval/facts/what_/accuracy', 250)
    """
    accepted = REFUSED.sub("_", f"eval/{name}")
    if len(accepted) <= LONGEST:
        return accepted
    digest = text_digest(name)
    return f"{accepted[: LONGEST - len(digest) - 1]}-{digest}"


def _all_metrics(metrics: Mapping[str, Any], gate: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for model, scored in metrics.items():
        suffix = "" if model == "candidate" else f"_{model}"
        for benchmark, values in scored.items():
            if benchmark == HELDOUT:
                yield f"test/loss{suffix}", values["loss"]
                yield f"test/perplexity{suffix}", values["perplexity"]
                # Of the champion, it shows how the data moves away from a model that is not retrained.
                yield f"test/new_loss{suffix}", values["new"]["loss"]
                continue
            yield f"{benchmark}/accuracy{suffix}", values["accuracy"]
            yield f"{benchmark}/new_accuracy{suffix}", values.get("new")
            if not suffix:
                slices = values["slices"] if len(values["slices"]) > 1 else {}
                for slice_, accuracy in slices.items():
                    yield f"{benchmark}/{slice_}/accuracy", accuracy
                yield f"{benchmark}/chance", values["chance"]
    gain = gate.get("gain") or {}
    # Points of accuracy and nats per token do not belong into one chart.
    name = "test/gain" if is_loss_gain(gate) else "gain"
    yield name, gain.get("mean")
    yield f"{name}_low", gain.get("low")
    yield f"{name}_high", gain.get("high")
