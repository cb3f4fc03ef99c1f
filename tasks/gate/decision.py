"""The verdict of the gate: all checks, and the most severe verdict."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score
from nightshift.data.statistics import is_broken
from tasks.gate import GateParams
from tasks.gate.checks import (
    Check,
    Verdict,
    check_floors,
    check_loss,
    check_non_inferiority,
    check_slices,
    check_unread,
    compare_slices,
)
from tasks.gate.gain import check_gain, measure_gain
from tasks.gate.pairs import by_benchmark, compare_losses, differences, key, pair

# In order of increasing severity.
VERDICTS: tuple[Verdict, ...] = ("promote", "hold", "reject", "error")


def decide(
    rows: Sequence[Score],
    digests: dict[str, str | None],
    looks: Sequence[str],
    overlaps: Sequence[str],
    params: GateParams,
    *,
    is_same_base: bool = True,
) -> dict[str, Any]:
    """Run all checks and return the verdict.

    Args:
        rows: Scores of all models.
        digests: Model -> digest of its adapter.
        looks: Digests of the candidates judged since the last promotion, oldest first.
        overlaps: Training rows that contain an evaluation question.
        params: Thresholds.
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
    look = count_look(str(digests["candidate"]), looks)
    pairs = pair(rows, reference)
    answered = [both for both in pairs if both[0]["benchmark"] != HELDOUT]
    learned = [both for both in answered if both[0]["benchmark"] not in params.retention]
    primary = [both for both in learned if both[0]["benchmark"] not in params.behaviour]
    heldout = [both for both in pairs if both[0]["benchmark"] == HELDOUT]
    losses = compare_losses(heldout)
    found = differences(primary)
    gain = measure_gain(found, look, params)
    gain["benchmarks"] = [name for name, _ in by_benchmark(primary)]
    slices = compare_slices(learned, params)
    retained = pair([row for row in rows if row["benchmark"] in params.retention], "base")
    checks = [
        check_gain(gain, params),
        *check_floors(answered, params),
        *(
            check_non_inferiority(name, reference, group, params.margin, params)
            for name, group in by_benchmark(primary)
        ),
        *(
            check_non_inferiority(name, "base", group, params.retention[name], params)
            for name, group in by_benchmark(retained)
        ),
        *check_slices(slices, params),
        check_loss(*losses, params.max_loss_increase),
        *check_unread(rows, reference),
    ]
    figures = {"gain": gain, "slices": [asdict(one) for one in slices]}
    return {**known, **conclude(checks), **figures, "loss": losses[0], "reference_loss": losses[1]}


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
    counts: dict[str, int] = defaultdict(int)
    for benchmark, _ in keys["candidate"]:
        counts[benchmark] += 1
    if not counts.pop(HELDOUT, 0):
        yield Check("scores", "error", "the held-out split is empty; raise split.test_share or add data")
    if not counts.keys() - {*params.retention, *params.behaviour}:
        yield Check("scores", "error", "no benchmark has a score; see snapshot.benchmarks")
    for name in sorted({*params.floors, *params.retention, *params.behaviour} - counts.keys()):
        yield Check(name, "error", "listed in gate, but no benchmark with this name was scored")
    for name, count in sorted(counts.items()):
        if count < params.min_items:
            yield Check(
                name, "error", f"{count} items, fewer than gate.min_items={params.min_items}; add items"
            )


def count_look(candidate: str, looks: Sequence[str]) -> int:
    """Return the number of this look, from 1; a candidate that was judged before keeps its number.

    Example:
        >>> count_look("b", ["a", "b", "c"]), count_look("d", ["a", "b", "c"])
        (2, 4)
    """
    return looks.index(candidate) + 1 if candidate in looks else len(looks) + 1
