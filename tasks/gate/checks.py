"""The checks of the gate besides the gain, each with a verdict and a reason."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binom

from nightshift.data.benchmarks import HELDOUT, TEST_ANSWERS
from nightshift.data.schemas import Score
from nightshift.data.statistics import cluster, cluster_of, estimate_mean, holm, margin_p_value, p_value
from tasks.gate import GateParams
from tasks.gate.pairs import Pairs, by_benchmark, compare_losses, key

Verdict = Literal["promote", "hold", "reject", "error"]
# Remedies for too few test examples, and too few of them whose answers are compared.
MORE_EXAMPLES = "add data or raise split.test_share"
MORE_ANSWERS = f"{MORE_EXAMPLES}, or raise the limits in evaluate.exact_match"
# Accuracy of both models from which a benchmark is saturated.
SATURATED = 0.95
# Items that a message names.
SHOWN_ITEMS = 3
# Probability below which a difference of two ways of asking is not by chance.
UNLIKELY = 0.001


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


def check_figures(name: str, verdict: Verdict, message: str, *figures: float) -> Check:
    """Build a check from figures; a figure that is not finite makes the verdict an error.

    Example:
        >>> check_figures("gain", "promote", "better: +nan%", math.nan).verdict
        'error'
    """
    if all(math.isfinite(figure) for figure in figures):
        return Check(name, verdict, message)
    return Check(name, "error", f"not a finite number: {message}; check the scores in data/evaluate")


def check_items(groups: Mapping[str, Pairs], params: GateParams) -> Iterator[Check]:
    """Find benchmarks that have too few unrelated items for a verdict."""
    for name, group in groups.items():
        if (count := count_clusters(group)) < params.min_items:
            what = "items" if count == len(group) else "unrelated items"
            remedy = MORE_ANSWERS if name == TEST_ANSWERS else "add items or raise evaluate.limit"
            yield check_few(name, count, what, remedy, params)


def check_few(name: str, count: int, what: str, remedy: str, params: GateParams) -> Check:
    """Hold because there are too few items; the number includes only what both models have scores for."""
    message = f"too few {what}: {count} of the {params.min_items} that gate.min_items requires; {remedy}"
    return Check(name, "hold", message)


def check_saturation(groups: Mapping[str, Pairs]) -> Iterator[Check]:
    """Note benchmarks on which both models are nearly perfect; they do not change the verdict."""
    for name, group in groups.items():
        if (
            group
            and min(np.mean([row["score"] for row in side]) for side in zip(*group, strict=True)) >= SATURATED
        ):
            message = (
                f"saturated: both models answer more than {SATURATED:.0%} right, so it can hardly show a "
                "gain; add harder items, or move it to gate.retention"
            )
            yield Check(f"{name}, saturation", "promote", message)


def check_floors(groups: Mapping[str, Pairs], params: GateParams) -> Iterator[Check]:
    """Compare the candidate with the lowest allowed accuracy."""
    for name, group in groups.items():
        if group and name in params.floors:
            accuracy, floor = (
                sum(candidate["score"] for candidate, _ in group) / len(group),
                params.floors[name],
            )
            verdict: Verdict = "promote" if accuracy >= floor else "reject"
            yield check_figures(f"{name}, floor", verdict, f"{accuracy:.1%}, minimum {floor:.1%}", accuracy)


def check_margins(groups: Mapping[str, Pairs], reference: str, params: GateParams) -> Iterator[Check]:
    """Check non-inferiority on the benchmarks of the gain and of retention that have enough items."""
    enough = {name: group for name, group in groups.items() if count_clusters(group) >= params.min_items}
    for name, group in enough.items():
        if name not in (*params.retention, *params.behaviour):
            yield check_non_inferiority(
                f"{name}, against {reference}", group, params.margin, params.alpha, params
            )
    for name, group in enough.items():
        if name in params.retention:
            margin = params.retention[name]
            yield check_non_inferiority(f"{name}, against base", group, margin, params.alpha, params)


def check_best(best: Mapping[str, Pairs], versions: Mapping[str, int], params: GateParams) -> Iterator[Check]:
    """Compare with the best champion so far, where that is not the reference.

    With the reference alone, each promotion could lose a little: 15 promotions took a benchmark from 90% to
    53%, each of them no worse than the margin. Such a benchmark has lost something already, and every
    candidate tries again, so the test has the level of one of `nights` candidates.

    Args:
        best: Benchmark -> scores of the candidate and of the best champion, with enough items.
        versions: Benchmark -> version of that champion.
        params: Thresholds.
    """
    for name, pairs in best.items():
        where = f"version {versions[name]}, the best so far"
        if name == HELDOUT:
            yield check_loss(
                f"held-out loss, against {where}", *compare_losses(pairs), params.max_loss_increase
            )
            continue
        margin = params.retention.get(name, params.margin)
        check = check_non_inferiority(f"{name}, against {where}", pairs, margin, params.level, params)
        # A benchmark that only guards may be too small to prove that nothing was lost.
        if not (check.verdict == "hold" and name in params.behaviour):
            yield check


def check_non_inferiority(name: str, pairs: Pairs, margin: float, level: float, params: GateParams) -> Check:
    """Check non-inferiority: a one-sided test must exclude a loss of the margin or more."""
    found = cluster(pairs)
    message = format_change(*estimate_mean(found, params, is_loss=False), params)
    allowed = format_points(margin)
    p, p_lost = margin_p_value(found, margin), margin_p_value(found.swap(), -margin)
    if p <= level:
        return check_figures(name, "promote", f"{message}; within the allowed loss of {allowed}", p, p_lost)
    if p_lost <= params.alpha:
        return check_figures(name, "reject", f"{message}; lost more than the allowed {allowed}", p, p_lost)
    why = f"the loss may exceed the allowed {allowed} (p {p:.2g} exceeds {level:.2g})"
    return check_figures(name, "hold", f"{message}; {why}", p, p_lost)


def compare_slices(pairs: Pairs, params: GateParams) -> list[Slice]:
    """Test each slice for a loss, with Holm's correction; a single slice is the whole benchmark."""
    groups = by_benchmark(pairs, and_slice=True)
    if len(groups) < 2:
        return []
    found = [cluster(group) for _, group in groups]
    # Holm's correction compares the lowest p-value with this level.
    alpha = params.alpha / len(found)
    p_values = [p_value(-one.sums, params.n_resamples, params.seed, alpha) for one in found]
    are_worse = holm(p_values, params.alpha)
    return [
        Slice(name, len(group), one.mean, p, is_worse)
        for (name, group), one, p, is_worse in zip(groups, found, p_values, are_worse, strict=True)
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


def check_heldout(pairs: Pairs, losses: tuple[float, float], max_increase: float) -> Iterator[Check]:
    """Guard the held-out loss; without test examples it cannot be compared."""
    if pairs:
        yield check_loss("held-out loss", *losses, max_increase)
    else:
        message = f"no test example has a loss of both models; {MORE_EXAMPLES}"
        yield Check("held-out loss", "hold", message)


def check_loss(name: str, loss: float, reference_loss: float, max_increase: float) -> Check:
    """Compare the held-out losses.

    Example:
        >>> check_loss("loss", 2.0, 2.1, 0.05).verdict, check_loss("loss", 2.3, 2.1, 0.05).verdict
        ('promote', 'reject')
    """
    message = f"{loss:.3f} nats per token, reference {reference_loss:.3f}"
    verdict: Verdict = "reject" if loss > reference_loss * (1 + max_increase) else "promote"
    return check_figures(name, verdict, message, loss, reference_loss)


def count_clusters(pairs: Pairs) -> int:
    """Count the unrelated items: those of a cluster count as one."""
    return len({cluster_of(ours) for ours, _ in pairs})


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


def check_written(rows: Sequence[Score], compared: Collection[str]) -> Iterator[Check]:
    """Find models that write the right answers to questions whose right choice they find unlikely.

    Then the choices do not follow what the model was trained on, and their scores do not say what it knows.
    """
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)
    for row in rows:
        if row["model"] in compared and row.get("written") is not None:
            groups[row["model"], row["benchmark"]].append(row)
    for (model, benchmark), group in sorted(groups.items()):
        written, chosen = ([float(row[key] or 0) for row in group] for key in ("written", "score"))
        changes = np.subtract(written, chosen)
        only_written, only_chosen = int((changes > 0).sum()), int((changes < 0).sum())
        if not only_written:
            continue
        p = float(binom.sf(only_written - 1, only_written + only_chosen, 0.5))
        if p <= UNLIKELY:
            yield Check(
                f"{benchmark}, written",
                "error",
                f"the {model} writes {sum(written):.0f} of {len(group)} right answers, but only "
                f"{sum(chosen):.0f} of these are its likeliest choice (p {p:.2g}): the choices do not follow "
                "what the model was trained on; check base.chat_template and the benchmark's task.yaml",
            )


def check_memorised(rows: Sequence[Score], reference: str, params: GateParams) -> Iterator[Check]:
    """Find benchmarks whose questions the candidate answers in their own wording only.

    If it gained more on them than on their paraphrases, it knows the questions, not what they ask for: they
    were trained on in some form that decontaminate did not find.
    """
    scores = {(row["model"], *key(row)): row["score"] for row in rows if row["status"] == "ok"}
    gaps: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        original = (row["benchmark"], row.get("paraphrase_of") or "")
        asked = [(model, *one) for one in (original, key(row)) for model in ("candidate", reference)]
        if row["model"] == "candidate" and all(one in scores for one in asked):
            ours, theirs, ours_reworded, theirs_reworded = (scores[one] for one in asked)
            gaps[row["benchmark"]][original[1]] = (ours - theirs) - (ours_reworded - theirs_reworded)
    for name, found in sorted(gaps.items()):
        p = p_value(np.array(list(found.values())), params.n_resamples, params.seed, UNLIKELY)
        if p <= UNLIKELY:
            items = [item for item, gap in found.items() if gap > 0]
            yield Check(
                f"{name}, paraphrases",
                "error",
                f"the candidate gained {format_points(float(np.mean([*found.values()])))} more on "
                f"{len(found)} questions than on their paraphrases (p {p:.2g}): it was trained on the "
                f"questions; look for them in the sources, first {', '.join(items[:SHOWN_ITEMS])}",
            )


def find_ignored(scored: Collection[str], params: GateParams) -> Iterator[Check]:
    """Note the names in `gate` of benchmarks that were not scored; they do not change the verdict."""
    for setting in ("floors", "retention", "behaviour"):
        for name in sorted({*getattr(params, setting)}.difference(scored)):
            message = f"ignored: gate.{setting} lists it, but no benchmark with this name was scored"
            yield Check(name, "promote", message)


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
