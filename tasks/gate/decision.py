"""The checks of the gate, each with a verdict and a reason, and the most severe verdict."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from nightshift.data.benchmarks import HELDOUT
from nightshift.data.schemas import Score
from nightshift.data.statistics import (
    Differences,
    holm,
    interval,
    is_broken,
    items_needed,
    p_value,
    power,
    seed_band,
    spent_alpha,
)
from tasks.gate import GateParams

Verdict = Literal["promote", "hold", "reject", "error"]
# In order of increasing severity.
VERDICTS: tuple[Verdict, ...] = ("promote", "hold", "reject", "error")
Pairs = list[tuple[Score, Score]]


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check.

    Attributes:
        name: Name of the check.
        verdict: Verdict of the check.
        message: Reason, with figures.
    """

    name: str
    verdict: Verdict
    message: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Test of a slice for a loss.

    Attributes:
        name: `benchmark/slice`.
        items: Number of paired items.
        mean: Change of the accuracy, -1 to 1.
        p_value: One-sided p-value.
        is_worse: Whether the slice is significantly worse, with Holm's correction over all slices.
    """

    name: str
    items: int
    mean: float
    p_value: float
    is_worse: bool


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


def check_figures(name: str, verdict: Verdict, message: str, *figures: float) -> Check:
    """Build a check from figures; a figure that is not finite makes the verdict an error.

    Example:
        >>> check_figures("gain", "promote", "better: +nan%", math.nan).verdict
        'error'
    """
    if all(math.isfinite(figure) for figure in figures):
        return Check(name, verdict, message)
    return Check(name, "error", f"not a finite number: {message}; check the scores in data/evaluate")


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


def key(row: Score) -> tuple[str, str]:
    """Return the key of a score: benchmark and item."""
    return row["benchmark"], row["item"]


def pair(rows: Sequence[Score], reference: str) -> Pairs:
    """Pair the candidate's scores with another model's by benchmark and item, in a fixed order."""
    scored = [row for row in rows if row["status"] == "ok"]
    other = {key(row): row for row in scored if row["model"] == reference}
    candidates = sorted((row for row in scored if row["model"] == "candidate"), key=key)
    # With different bases, one of the two models may have skipped an item.
    return [(row, other[key(row)]) for row in candidates if key(row) in other]


def by_benchmark(pairs: Pairs, *, and_slice: bool = False) -> list[tuple[str, Pairs]]:
    """Group pairs by benchmark, or by benchmark and slice."""
    groups: dict[str, Pairs] = defaultdict(list)
    for both in pairs:
        row = both[0]
        groups[f"{row['benchmark']}/{row['slice']}" if and_slice else row["benchmark"]].append(both)
    return sorted(groups.items())


def differences(pairs: Pairs) -> Differences:
    """Return candidate minus reference per item, shape (n,)."""
    return np.asarray([candidate["score"] - other["score"] for candidate, other in pairs], dtype=np.float64)


def count_look(candidate: str, looks: Sequence[str]) -> int:
    """Return the number of this look, from 1; a candidate that was judged before keeps its number.

    Example:
        >>> count_look("b", ["a", "b", "c"]), count_look("d", ["a", "b", "c"])
        (2, 4)
    """
    return looks.index(candidate) + 1 if candidate in looks else len(looks) + 1


def measure_gain(found: Differences, look: int, params: GateParams) -> dict[str, Any]:
    """Measure the gain over the reference on all items.

    Args:
        found: Candidate minus reference per item, shape (n,).
        look: Number of this look, from 1.
        params: Thresholds.

    Returns:
        mean; low and high of the interval at alpha; p_value, and spent, its limit at this look; power to
        detect `detectable_gain`; items, and items_needed to detect it with the required power.
    """
    low, high = interval(found, params.alpha, params.n_resamples, params.seed)
    spent = spent_alpha(params.alpha, look)
    values = {
        "mean": float(found.mean()),
        "low": low,
        "high": high,
        "alpha": params.alpha,
        "spent": spent,
        "power": power(found, params.detectable_gain, spent),
        "items_needed": items_needed(found, params.detectable_gain, spent, params.power),
        "p_value": p_value(found, params.n_resamples, params.seed, alpha=spent),
    }
    # Significant digits: the level of the hundredth look has five zeros after the point.
    rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
    return rounded | {"look": look, "items": len(found)}


def check_gain(gain: dict[str, Any], params: GateParams) -> Check:
    """Check whether the gain is significant at the level that this look may spend."""
    message = f"{format_change(gain['mean'], gain['low'], gain['high'], params)} on {gain['items']:,} items"
    band = seed_band(params.seed_noise, params.alpha)
    figures = (gain["p_value"], gain["spent"], gain["mean"], band)
    if gain["p_value"] > gain["spent"]:
        message += f"; p {gain['p_value']:.3g} exceeds {gain['spent']:.3g}"
        if gain["look"] > 1:
            message += f", the limit for candidate {gain['look']} since the last promotion"
        message += (
            f"; a gain of {format_points(params.detectable_gain)} would be found with probability "
            f"{gain['power']:.0%}"
        )
        if gain["power"] < params.power:
            message += f", with {gain['items_needed']:,.0f} items with probability {params.power:.0%}"
        return check_figures("gain", "hold", f"not shown: {message}", *figures)
    if gain["mean"] < 0:
        return check_figures("gain", "reject", f"worse: {message}", *figures)
    if gain["mean"] <= band:
        return check_figures(
            "gain", "hold", f"within seed noise ({format_points(band)}): {message}", *figures
        )
    return check_figures("gain", "promote", f"better: {message}", *figures)


def check_floors(pairs: Pairs, params: GateParams) -> Iterator[Check]:
    """Compare the candidate with the lowest allowed accuracy."""
    for name, group in by_benchmark(pairs):
        if name in params.floors:
            accuracy, floor = (
                sum(candidate["score"] for candidate, _ in group) / len(group),
                params.floors[name],
            )
            verdict: Verdict = "promote" if accuracy >= floor else "reject"
            yield check_figures(f"{name}, floor", verdict, f"{accuracy:.1%}, minimum {floor:.1%}", accuracy)


def check_non_inferiority(
    name: str, reference: str, pairs: Pairs, margin: float, params: GateParams
) -> Check:
    """Check non-inferiority: the whole confidence interval must be at or above minus the margin."""
    found = differences(pairs)
    low, high = interval(found, params.alpha, params.n_resamples, params.seed)
    message = format_change(float(found.mean()), low, high, params)
    name, allowed = f"{name}, against {reference}", format_points(margin)
    if low >= -margin:
        return check_figures(name, "promote", f"{message}; within the allowed loss of {allowed}", low, high)
    if high < -margin:
        return check_figures(name, "reject", f"{message}; lost more than the allowed {allowed}", low, high)
    why = f"the loss may exceed the allowed {allowed}"
    return check_figures(name, "hold", f"{message}; {why}", low, high)


def compare_slices(pairs: Pairs, params: GateParams) -> list[Slice]:
    """Test each slice for a loss, with Holm's correction; a single slice is the whole benchmark."""
    found = {name: differences(group) for name, group in by_benchmark(pairs, and_slice=True)}
    if len(found) < 2:
        return []
    # Holm's correction compares the lowest p-value with this level.
    alpha = params.alpha / len(found)
    p_values = [p_value(one, params.n_resamples, params.seed, "less", alpha) for one in found.values()]
    are_worse = holm(p_values, params.alpha)
    return [
        Slice(name, len(one), float(one.mean()), p, is_worse)
        for (name, one), p, is_worse in zip(found.items(), p_values, are_worse, strict=True)
    ]


def check_slices(slices: Sequence[Slice], params: GateParams) -> Iterator[Check]:
    """Find slices that are significantly worse by more than the margin."""
    if not slices:
        return
    # A large loss on few items need not be significant; it is named all the same.
    low = [one for one in slices if one.mean < -params.margin]
    worse = [one for one in low if one.is_worse]
    verdict: Verdict = "reject" if worse else "promote"
    message = (
        f"{len(worse) or 'none'} of {len(slices)} significantly worse by more than "
        f"{format_points(params.margin)}"
    )
    if named := worse or low:
        shown = (
            f"{one.name} {format_points(one.mean, '+')} on {one.items} items (p {one.p_value:.2g})"
            for one in named
        )
        message += f"; {'' if worse else 'not significant: '}{', '.join(shown)}"
    figures = (figure for one in slices for figure in (one.p_value, one.mean))
    yield check_figures("slices", verdict, message, *figures)


def format_change(mean: float, low: float, high: float, params: GateParams) -> str:
    """Format a change of the accuracy with its confidence interval.

    Example:
        >>> format_change(0.175, 0.1, 0.2583, GateParams.model_construct(alpha=0.05))
        '+17.5 points of accuracy (95% interval +10.0 to +25.8)'
    """
    interval = f"{100 * (1 - params.alpha):g}% interval {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{100 * mean:+.1f} points of accuracy ({interval})"


def format_points(share: float, sign: str = "") -> str:
    """Format a difference of accuracies in percentage points, with its sign if `sign` is "+".

    Example:
        >>> format_points(0.1), format_points(-0.2, "+")
        ('10.0 points', '-20.0 points')
    """
    return f"{100 * share:{sign}.1f} points"


def check_loss(loss: float, reference_loss: float, max_increase: float) -> Check:
    """Compare the held-out losses.

    Example:
        >>> check_loss(2.0, 2.1, 0.05).verdict, check_loss(2.3, 2.1, 0.05).verdict
        ('promote', 'reject')
    """
    message = f"{loss:.3f} nats per token, reference {reference_loss:.3f}"
    verdict: Verdict = "reject" if loss > reference_loss * (1 + max_increase) else "promote"
    return check_figures("held-out loss", verdict, message, loss, reference_loss)


def compare_losses(pairs: Pairs) -> tuple[float, float]:
    """Return the losses of candidate and reference on the same texts, in nats per candidate token.

    NaN without tokens. The tokenizer of another base splits the texts into a different number of tokens,
    so means over each model's own tokens are not comparable.

    Example:
        >>> compare_losses([({"score": 6.0, "tokens": 4}, {"score": 8.0, "tokens": 2})])
        (1.5, 2.0)
    """
    tokens = sum(candidate["tokens"] for candidate, _ in pairs)
    if not tokens:
        return math.nan, math.nan
    loss, reference_loss = (sum(both[i]["score"] for both in pairs) / tokens for i in (0, 1))
    return round(float(loss), 6), round(float(reference_loss), 6)


def check_unread(rows: Sequence[Score], reference: str) -> Iterator[Check]:
    """Find items that the reference answered and the candidate, on another base, cannot read."""
    read = {key(row) for row in rows if row["model"] == reference and row["status"] == "ok"}
    unread = [row for row in rows if row["model"] == "candidate" and row["status"] == "skipped"]
    if lost := [row for row in unread if key(row) in read]:
        first = f"{'/'.join(key(lost[0]))}: {lost[0]['answer']}"
        message = (
            f"{len(lost)} items that the {reference} answered were skipped for both models, first: {first}"
        )
        yield Check("unread", "hold", message)
