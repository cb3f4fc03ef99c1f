"""What the sentences of the report are made from: verdict, scores and thresholds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.gate import GateParams
from tasks.gate.checks import format_points
from tasks.gate.gain import name_examples
from tasks.report.compare import Benchmark

# Names that a sentence lists; it counts the others.
NAMED = 3


@dataclass(frozen=True, slots=True)
class Evidence:
    """Verdict of the gate, and what it is based on.

    Attributes:
        gate: Content of data/gate/gate.json.
        benchmarks: Scores of all models.
        available: Benchmark -> number of its items, with those that evaluate.limit left out.
        params: Thresholds of the gate.
    """

    gate: Mapping[str, Any]
    benchmarks: Sequence[Benchmark]
    available: Mapping[str, int]
    params: GateParams

    @property
    def is_identical(self) -> bool:
        """Whether the new model is the one that it would be compared with."""
        return bool(self.gate["checks"][0]["name"] == "candidate")

    @property
    def is_by_loss(self) -> bool:
        """Whether the gate judged by the loss on the test set, or on its new examples."""
        return not self.primary or self.params.judges_new

    @property
    def unit(self) -> str:
        """What the gain is measured on, in words."""
        return name_examples(self.params) if self.is_by_loss else "items"

    @property
    def target(self) -> str:
        """Gain that is worth detecting, in words."""
        if self.is_by_loss:
            return f"a loss lower by {self.params.detectable_loss_gain:.1%}"
        return f"a gain of {format_points(self.params.detectable_gain)}"

    @property
    def has_few(self) -> bool:
        """Whether there are too few items, or test examples, to judge the gain."""
        gain = self.gate["gain"]
        few = not gain or gain["clusters"] < self.params.min_items
        return few and self.verdicts["gain"] == "hold"

    @property
    def small(self) -> list[str]:
        """Benchmarks with too few items for a verdict; each has a check of its name."""
        return [one.name for one in self.benchmarks if self.verdicts.get(one.name) == "hold"]

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdict of each check."""
        return {check["name"]: check["verdict"] for check in self.gate["checks"]}

    @property
    def primary(self) -> list[str]:
        """Benchmarks whose gain counts."""
        others = {*self.params.retention, *self.params.behaviour}
        return [one.name for one in self.benchmarks if not one.is_loss and one.name not in others]

    @property
    def margins(self) -> dict[str, tuple[str, float]]:
        """Check -> its benchmark and the loss of accuracy that it allows, 0 to 1."""
        allowed = {**dict.fromkeys(self.primary, self.params.margin), **self.params.retention}
        return {f"{name}, against {self.reference(name)}": (name, loss) for name, loss in allowed.items()}

    def reference(self, name: str) -> str:
        """Return the model that a benchmark is compared with."""
        return "base" if name in self.params.retention else str(self.gate["reference"])

    def describe_limit(self, names: Sequence[str]) -> str:
        """Say how many items of some benchmarks were asked; empty if that is all of them."""
        asked = {one.name: one.asked for one in self.benchmarks if one.name in names}
        every = sum(max(number, self.available.get(name, 0)) for name, number in asked.items())
        some = sum(asked.values())
        return f"{some:,} of {every:,} items were asked (evaluate.limit)" if some < every else ""


def join(texts: Sequence[str]) -> str:
    """Join the first texts, and count the others.

    Example:
        >>> join(["a"]), join(["a", "b", "c"]), join(["a", "b", "c", "d", "e"])
        ('a', 'a, b and c', 'a, b, c and 2 more')
    """
    more = [f"{len(texts) - NAMED} more"] if len(texts) > NAMED else []
    *first, last = [*texts[:NAMED], *more]
    return f"{', '.join(first)} and {last}" if first else last
