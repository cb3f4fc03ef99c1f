"""The first lines of the report: whether to ship the new model, and why, in plain sentences."""

import math
from collections.abc import Iterator, Sequence

from nightshift.data.gain import describe_loss_change, format_share
from nightshift.data.statistics import seed_band
from tasks.gate.checks import format_points
from tasks.report.advice import Outcome, advise, describe_outcome
from tasks.report.compare import Benchmark, Line
from tasks.report.evidence import Evidence, join
from tasks.report.filters import cut

# Verdict of the gate -> headline.
HEADLINES = {
    "promote": "Ship it: the new model is better",
    "hold": "Do not ship it yet: the result is inconclusive",
    "reject": "Do not ship it: the new model is not good enough",
    "error": "Do not ship it: the scores cannot be used",
}
# Characters of a slice's name.
NAME_LENGTH = 60


def headline(evidence: Evidence) -> str:
    """Say in a few words whether to ship the new model."""
    if evidence.is_identical:
        return f"Nothing new: the {evidence.gate['reference']} is kept"
    return HEADLINES[evidence.gate["verdict"]]


def summarize(evidence: Evidence, outcome: Outcome) -> list[str]:
    """Say what got better and worse, what retrieval would do, how sure that is, and what to do next."""
    next_step = f"{describe_outcome(outcome)} {advise(evidence, outcome)}"
    if evidence.gate["verdict"] == "error":
        return [f"The gate could not decide: {cut(evidence.gate['reason'])}.", next_step]
    if evidence.is_identical:
        return [f"The new model is identical to the {evidence.gate['reference']}.", next_step]
    return [
        *describe_loss(evidence),
        *describe_changes(evidence),
        *describe_retrieval(evidence.benchmarks),
        " ".join([describe_gain(evidence), *describe_obstacles(evidence)]),
        next_step,
    ]


def describe_loss(evidence: Evidence) -> Iterator[str]:
    """Describe the change of the loss if the gate judged by it."""
    if evidence.is_by_loss and evidence.gate["gain"]:
        text = describe_loss_change(evidence.gate, evidence.unit)
        yield f"Against the {evidence.gate['reference']}, {text}."


def describe_changes(evidence: Evidence) -> Iterator[str]:
    """Say what got better and worse; the loss is left out if the gate judged by it."""
    named = [one for one in evidence.benchmarks if not (one.is_loss and evidence.is_by_loss)]
    if named:
        better, worse = ([one for one in named if sign * one.gain > 0] for sign in (1, -1))
        yield f"The new model is better {list_changes(evidence, better)}."
        yield " ".join([f"It is worse {list_changes(evidence, worse)}.", *describe_slices(evidence)])


def list_changes(evidence: Evidence, benchmarks: Sequence[Benchmark]) -> str:
    """List the scores of the new model and their changes, the largest first, by the model compared with."""
    found: dict[str, list[str]] = {evidence.gate["reference"]: [], "base": []}
    for one in sorted(benchmarks, key=lambda one: (one.is_loss, -abs(one.gain))):
        if one.change:
            found[evidence.reference(one.name)].append(
                describe_change(one, one.change, evidence.params.alpha)
            )
    groups = [f"than the {model} on {join(changes)}" for model, changes in found.items() if changes]
    return ", and ".join(groups) or "on no benchmark"


def describe_change(benchmark: Benchmark, change: Line, alpha: float) -> str:
    """Describe the new model's score on a benchmark, and its change."""
    score = benchmark.mean("candidate")
    note = "" if benchmark.p_value <= alpha else ", not significant"
    if benchmark.is_loss:
        return f"the held-out examples (loss {score:.3f}, {change.mean:+.3f} nats per token{note})"
    return f"{benchmark.name} ({score:.1%}, {format_points(change.mean, '+')}{note})"


def describe_slices(evidence: Evidence) -> Iterator[str]:
    """Name the slices that got worse, those with a significant loss first."""
    slices = [change for one in evidence.benchmarks for change in one.changes]
    # The gate does not test the slices of retention benchmarks.
    is_worse = {one["name"]: one["is_worse"] for one in evidence.gate["slices"]}
    notes = {True: "significant", False: "not significant", None: "significance not tested"}
    worse = [one for one in slices if one.mean < 0]
    named = [
        f"{cut(one.name, NAME_LENGTH)} ({format_points(one.mean, '+')} on {one.items:,} "
        f"item{'s' if one.items > 1 else ''}, {notes[is_worse.get(one.name)]})"
        for one in sorted(worse, key=lambda one: (not is_worse.get(one.name), one.mean))
    ]
    if worse:
        yield f"Of {len(slices)} slices, {len(worse)} got worse: {join(named)}."
    elif slices:
        yield "No slice is worse."


def describe_retrieval(benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    """Compare the new model with the base that has training documents in its prompt, if it was scored."""
    found = []
    for one in benchmarks:
        theirs, ours = (round(one.mean(model), 3) for model in ("retrieval", "candidate"))
        if math.isfinite(theirs) and math.isfinite(ours):
            relation = "as much as" if theirs == ours else "more than" if theirs > ours else "less than"
            found.append(f"{theirs:.1%} on {one.name}, {relation} the new model's {ours:.1%}")
    if found:
        yield f"A search over the training data, without training, reaches {join(found)}."


def describe_gain(evidence: Evidence) -> str:
    """Say whether the gain on the benchmarks that count for it, or on the test set, is proven."""
    if evidence.has_few:
        return describe_few(evidence)
    verdict, names = evidence.verdicts["gain"], evidence.primary
    if evidence.is_by_loss:
        if verdict == "hold":
            return f"A lower loss is not proven: {describe_doubt(evidence)}."
        return f"The {'lower' if verdict == 'promote' else 'higher'} loss is proven."
    what = {"promote": "The gain", "hold": "A gain", "reject": "The loss"}[verdict]
    if verdict == "hold":
        proof = f"is not proven: {describe_doubt(evidence)}"
    else:
        proof = f"is proven: {describe_range(evidence)}"
    limit = evidence.describe_limit(names)
    return f"{what} on {join(names)} {proof}{f'; {limit}' if limit else ''}."


def describe_few(evidence: Evidence) -> str:
    """Say that there are too few items, or test examples, to judge the gain."""
    gain, least = evidence.gate["gain"], evidence.params.min_items
    what = evidence.unit if evidence.is_by_loss else f"items on {join(evidence.primary)}"
    count = gain["clusters"] if gain else 0
    return f"There are too few {what} for a verdict: {count} of {least} (gate.min_items)."


def describe_range(evidence: Evidence) -> str:
    """Describe the confidence interval of the gain; an end that is not finite is stored as null."""
    gain = evidence.gate["gain"]
    if gain["low"] is None or gain["high"] is None:
        return "its confidence interval could not be computed"
    low, high = (f"{100 * gain[end]:+.1f}" for end in ("low", "high"))
    return f"with {100 * (1 - gain['alpha']):g}% confidence, the change is between {low} and {high} points"


def describe_doubt(evidence: Evidence) -> str:
    """Say why a gain is not proven."""
    gain, params = evidence.gate["gain"], evidence.params
    if gain["p_value"] <= gain["level"]:
        band = format_points(seed_band(params.seed_noise, params.alpha))
        return f"another training seed alone may change the accuracy by {band}"
    if evidence.is_by_loss:
        change = format_share(gain["mean"], evidence.gate["reference_loss"])
    else:
        change = format_points(gain["mean"], "+")
    change += f" on {gain['items']:,} {evidence.unit}"
    if gain["mean"] <= 0:
        return f"the change is {change}"
    if gain["p_value"] <= gain["alpha"]:
        return (
            f"{change} are not enough for one of {params.nights} candidates, as more tries make luck likelier"
        )
    return f"{change} may be chance"


def describe_obstacles(evidence: Evidence) -> Iterator[str]:
    """Name the checks other than the gain that hold or reject the new model."""
    verdict = evidence.gate["verdict"]
    checks = [one for one in evidence.gate["checks"] if one["verdict"] == verdict and one["name"] != "gain"]
    if verdict != "promote" and checks:
        plain = explain_checks(evidence)
        reasons = join([plain.get(one["name"], cut(one["message"])) for one in checks])
        also = "also " if evidence.verdicts["gain"] == verdict else ""
        yield f"The gate {also}{verdict}s the new model because {reasons}."


def explain_checks(evidence: Evidence) -> dict[str, str]:
    """Return name of a check -> why it holds or rejects, in plain words."""
    params = evidence.params
    rose = f"the loss on held-out examples rose by more than {params.max_loss_increase:.0%}"
    is_unknown = evidence.verdicts.get("held-out loss") == "hold"
    found = {
        "slices": f"a slice is significantly worse by more than {format_points(params.margin)}",
        "held-out loss": "no test example has a loss to compare" if is_unknown else rose,
    }
    for name in evidence.small:
        found[name] = f"{name} has fewer than {params.min_items} items (gate.min_items)"
    for name, floor in params.floors.items():
        found[f"{name}, floor"] = f"the accuracy on {name} is below its minimum of {floor:.1%}"
    for check, (name, allowed) in evidence.margins.items():
        # The items of the other benchmarks are given with the gain.
        limit = evidence.describe_limit([name]) if name in params.retention else ""
        may = f"may have been lost on {name}{f', where {limit}' if limit else ''}"
        lost = f"were lost on {name}" if evidence.verdicts.get(check) == "reject" else may
        found[check] = f"more than the allowed {format_points(allowed)} {lost}"
    return found


def describe_statistics(evidence: Evidence) -> str:
    """Return the statistics of the gain, for a footnote; empty if there are none."""
    gain = evidence.gate.get("gain")
    if not gain or gain["p_value"] is None:
        return ""
    text = (
        f"Gain: p = {gain['p_value']:.2g} in a one-sided paired test. The limit is {gain['level']:.2g} = "
        f"gate.alpha / gate.nights: among {evidence.params.nights} candidates that are no better, one is "
        f"promoted with a probability of at most {gain['alpha']:g}."
    )
    if gain["power"] is not None:
        text += (
            f" {gain['items']:,} {evidence.unit} show {evidence.target} with a probability of "
            f"{gain['power']:.0%}."
        )
    return text
