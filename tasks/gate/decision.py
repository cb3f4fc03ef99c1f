"""The verdict of the gate: all checks, and the most severe verdict."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.gain import Gain
from nightshift.data.schemas import Score
from nightshift.data.statistics import is_broken
from tasks.gate import GateParams
from tasks.gate.checks import (
    Check,
    Verdict,
    check_best,
    check_floors,
    check_heldout,
    check_items,
    check_margins,
    check_memorised,
    check_saturation,
    check_slices,
    check_unread,
    check_written,
    compare_slices,
    count_clusters,
    find_ignored,
)
from tasks.gate.gain import check_gain, check_loss_gain, measure_gain, measure_loss_gain
from tasks.gate.pairs import Pairs, compare_losses, find_best, key, pair

# In order of increasing severity.
VERDICTS: tuple[Verdict, ...] = ("promote", "hold", "reject", "error")


def decide(
    rows: Sequence[Score],
    digests: Mapping[str, str | None],
    overlaps: Sequence[str],
    params: GateParams,
    best: Mapping[str, int] | None = None,
    *,
    is_same_base: bool = True,
) -> dict[str, Any]:
    """Run all checks and return the verdict.

    Args:
        rows: Scores of all models.
        digests: Model -> digest of its adapter.
        overlaps: Training rows that contain an evaluation question.
        params: Thresholds.
        best: Benchmark -> version whose scores the model `best` has.
        is_same_base: Whether candidate and reference share a base, so that they can read the same items.

    Returns:
        verdict, reason, reference, candidate, all checks, and the figures of gain, slices and loss.
    """
    reference = "champion" if "champion" in digests else "base"
    known = {"reference": reference, "candidate": digests.get("candidate")}
    if digests.get("candidate") == digests.get(reference):
        return {
            **known,
            **conclude([Check("candidate", "hold", f"the candidate is identical to the {reference}")]),
        }
    if faults := list(find_faults(rows, reference, overlaps, params, is_same_base=is_same_base)):
        return {**known, **conclude(faults)}
    asked = [*check_written(rows, ("candidate", reference)), *check_memorised(rows, reference, params)]
    if asked:
        return {**known, **conclude(asked)}
    groups = group_by_benchmark(rows, reference, params)
    heldout = groups.pop(HELDOUT, [])
    losses = compare_losses(heldout)
    checked, gain, judged = judge_gain(groups, heldout, params)
    learned = [both for name in groups if name not in params.retention for both in groups[name]]
    slices = compare_slices(learned, params)
    checks = [
        checked,
        *check_items(groups, params),
        *check_floors(groups, params),
        *check_margins(groups, reference, params),
        *check_slices(slices, params),
        # Without a benchmark, the held-out loss is the gain.
        *(() if judged is heldout else check_heldout(heldout, losses, params.max_loss_increase)),
        *check_best(find_best_pairs(rows, groups, reference, params), best or {}, params),
        *check_saturation({name: groups[name] for name in find_counted(groups, params)}),
        *check_unread(rows, reference),
        *find_ignored(groups, params),
    ]
    figures = {"gain": gain, "slices": [asdict(one) for one in slices]}
    shown = compare_losses(judged) if judged else losses
    return {**known, **conclude(checks), **figures, "loss": shown[0], "reference_loss": shown[1]}


def judge_gain(
    groups: Mapping[str, Pairs], heldout: Pairs, params: GateParams
) -> tuple[Check, Gain | None, Pairs]:
    """Measure and check the gain: of accuracy, or of the loss on the test set or its new examples.

    Returns:
        The check; the gain; and the test examples that it is measured on, if it is one of the loss.
    """
    counted = find_counted(groups, params)
    if counted and not params.judges_new:
        gain = measure_gain([both for name in counted for both in groups[name]], params)
        return check_gain(gain, params), gain, []
    judged = [both for both in heldout if both[0].get("is_new")] if params.judges_new else heldout
    losses = compare_losses(judged)
    gain = measure_loss_gain(judged, losses, params)
    return check_loss_gain(gain, judged, losses, params), gain, judged


def find_counted(groups: Collection[str], params: GateParams) -> list[str]:
    """Return the benchmarks that count for the gain."""
    return [name for name in groups if name not in (*params.retention, *params.behaviour)]


def find_best_pairs(
    rows: Sequence[Score], groups: Mapping[str, Pairs], reference: str, params: GateParams
) -> dict[str, Pairs]:
    """Pair the scores of each benchmark, and the losses, with those of the best champion so far.

    Only where that is not the reference, and with enough items that are still the same.
    """
    found = {name: find_best(rows, name, reference) for name in (*groups, HELDOUT)}
    return {name: pairs for name, pairs in found.items() if count_clusters(pairs) >= params.min_items}


def group_by_benchmark(rows: Sequence[Score], reference: str, params: GateParams) -> dict[str, Pairs]:
    """Pair the scores of each benchmark with the reference's, or with the base's if it guards retention.

    A benchmark of which no item could be paired is empty.
    """
    by_name: dict[str, list[Score]] = defaultdict(list)
    for row in rows:
        by_name[row["benchmark"]].append(row)
    return {
        name: pair(group, "base" if name in params.retention else reference)
        for name, group in sorted(by_name.items())
        if any(row["model"] == "candidate" for row in group)
    }


def conclude(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the most severe verdict, its reasons, and all checks.

    Example:
        >>> conclude([Check("a", "promote", "fine"), Check("b", "hold", "unclear")])["reason"]
        'b: unclear'
    """
    verdict = max((check.verdict for check in checks), key=VERDICTS.index)
    reason = "; ".join(f"{check.name}: {check.message}" for check in checks if check.verdict == verdict)
    if verdict == "promote":
        # All checks agree; the first one gives the reason.
        reason = f"{checks[0].name}: {checks[0].message}"
    return {"verdict": verdict, "reason": reason, "checks": [asdict(check) for check in checks]}


def find_faults(
    rows: Sequence[Score],
    reference: str,
    overlaps: Sequence[str],
    params: GateParams,
    *,
    is_same_base: bool,
) -> Iterator[Check]:
    """Yield the faults that make the scores unusable."""
    if overlaps:
        message = f"{len(overlaps)} training rows contain an evaluation question, first: {overlaps[0]}"
        yield Check("contamination", "error", f"{message}; rerun decontaminate")
    compared = ("candidate", reference)
    skipped = {key(row) for row in rows if row["model"] in compared and row["status"] == "skipped"}
    keys = {
        name: {key(row) for row in rows if row["model"] == name and row["status"] != "skipped"}
        - (set() if is_same_base else skipped)
        for name in (*compared, "base")
    }
    unpaired = keys["candidate"] ^ keys[reference]
    unpaired |= {one for one in keys["candidate"] ^ keys["base"] if one[0] in params.retention}
    if unpaired:
        yield Check("scores", "error", f"{len(unpaired)} items are scored for only one model; rerun evaluate")
    counted = [
        row
        for row in rows
        if row["model"] in ("candidate", reference)
        or (row["model"] == "base" and row["benchmark"] in params.retention)
    ]
    if bad := [row for row in counted if is_broken(row)]:
        first = f"{bad[0]['model']}, {'/'.join(key(bad[0]))}: {bad[0]['answer'] or bad[0]['score']}"
        yield Check(
            "scores", "error", f"{len(bad)} scores are not numbers, first: {first}; the model is broken"
        )
