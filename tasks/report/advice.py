"""The last sentences of the summary: what became of the new model, and what to type next."""

from collections.abc import Sequence
from dataclasses import dataclass

from nightshift.data.benchmarks import HELDOUT, OF_TEST_EXAMPLES
from nightshift.pipeline.outcome import promote_command
from tasks.report.evidence import Evidence, join


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the candidate in the registry.

    Attributes:
        version: Version of the candidate; None if it is not registered.
        champion: Version that the gate compared with; None before the first champion.
        is_champion: Whether the candidate is now the champion.
        waits: Why the version waits for approval, or None.
    """

    version: int | None
    champion: int | None
    is_champion: bool
    waits: str | None


def describe_outcome(outcome: Outcome) -> str:
    """Say which version is the champion now."""
    version, champion = outcome.version, outcome.champion
    kept = f"version {champion} remains the champion" if champion else "there is no champion yet"
    if version is None:
        return f"The new model is not registered; {kept}."
    if version == champion:
        return f"Version {champion} remains the champion."
    if outcome.is_champion:
        replaced = f", replacing version {champion}" if champion else ""
        return f"Version {version} is now the champion{replaced}."
    if outcome.waits:
        return f"Version {version} waits for approval ({outcome.waits}); {kept}."
    return f"Version {version} is registered, but not promoted; {kept}."


def advise(evidence: Evidence, outcome: Outcome) -> str:
    """Say what to type next."""
    if outcome.is_champion and outcome.version != outcome.champion:
        undo = "`nightshift rollback --reason TEXT` undoes this; " if outcome.champion else ""
        return f"{undo}`nightshift history` lists all promotions."
    if outcome.is_champion or evidence.is_identical:
        return "Add data or change params.yaml, then type `make run`."
    if outcome.waits and outcome.version:
        return f"To ship it, type `{promote_command(outcome.version)}`."
    if evidence.gate["verdict"] == "hold":
        return advise_hold(evidence)
    return {
        "promote": "The run did not finish: read its log, then type `make run`.",
        "reject": "The report shows what got worse; change the data or params.yaml, then type `make run`.",
        "error": "Correct the cause, then type `make run`.",
    }[evidence.gate["verdict"]]


def advise_hold(evidence: Evidence) -> str:
    """Say how to get a clear result: more items where there are too few, otherwise a better model."""
    gain, verdicts = evidence.gate["gain"], evidence.verdicts
    names = {name for check, (name, _) in evidence.margins.items() if verdicts.get(check) == "hold"}
    names.update(evidence.small)
    is_without_loss = verdicts.get("held-out loss") == "hold"
    if is_without_loss or (evidence.is_by_loss and evidence.has_few):
        names.add(HELDOUT)
    size = shown = ""
    # A number that is not finite is stored as null.
    is_unproven = not evidence.has_few and gain["p_value"] > gain["level"] and gain["items_needed"]
    if is_unproven and gain["items_needed"] > gain["items"]:
        names.update([HELDOUT] if evidence.is_by_loss else evidence.primary)
        size = f" (about {gain['items_needed']:,.0f} would show {evidence.target})"
    elif is_unproven:
        items = evidence.unit
        shown = f"These {items} would have shown {evidence.target}. "
    if not names:
        return f"{shown}Change the data or params.yaml, then type `make run`."
    return f"{describe_remedies(evidence, sorted(names), size)}, then type `make run`."


def describe_remedies(evidence: Evidence, names: Sequence[str], size: str) -> str:
    """Say how to get more items of some benchmarks, and more test examples."""
    own = set(OF_TEST_EXAMPLES).intersection(names)
    others = [name for name in names if name not in own]
    if not others:
        return f"For more test examples{size}, add data or raise split.test_share"
    text = f"Add items to {join(others)}{size}"
    if evidence.describe_limit(others):
        text = f"To ask more items{size}, raise evaluate.limit"
    return f"{text}, and for more test examples, add data or raise split.test_share" if own else text
