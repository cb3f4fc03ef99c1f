"""Simulate a year of nights with the gate's tests and with simpler rules: false promotions, power, slow rot.

Each night another candidate is compared with the champion on the same benchmark. A rule that promotes
ends the series, except in the scenario of slow rot, where each candidate gains on one benchmark and loses a
little on another.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.record import Record, record, require_bounds, write_records
from nightshift.core.stage import run_main
from nightshift.data.statistics import Clusters, margin_p_value, p_value
from tasks.gate import GateParams

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
PACKAGES = ("numpy", "scipy", "matplotlib")
NIGHTS = (1, 7, 30, 90, 365)
# Items of the benchmark, of larger ones, and share of items on which two equally good models differ.
ITEMS, MORE_ITEMS, DIFFERING = 240, (640, 2000), 0.3
CLUSTER_SIZES = (1, 2, 4, 8)
# Gain of a rule that promotes whatever measures better by this much.
THRESHOLD = 0.02
# Slow rot: items of both benchmarks, all questions that could be asked, first accuracy and loss of the small
# benchmark, and first accuracy and gain of the large one, per promotion. Models of one recipe differ on
# fewer items.
LARGE, SMALL, POPULATION = 4000, 800, 20_000
START, SMALL_LOSS, ROT_DIFFERING = 0.9, 0.01, 0.1
ROTS = {"slow rot": (0.3, 0.04), "slow rot, larger gains": (0.05, 0.06)}
PARAMS = GateParams(**yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["gate"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Clusters of a size that a candidate won and lost, all items of a cluster alike."""

    won: int
    lost: int
    size: int
    items: int

    @property
    def gain(self) -> float:
        """Measured gain of accuracy."""
        return (self.won - self.lost) * self.size / self.items


# Returns whether a candidate is promoted, given the number of candidates since the last promotion.
Rule = Callable[[Comparison, int], bool]


def by_threshold(found: Comparison, _: int) -> bool:
    """Promote what measures better."""
    return found.gain >= THRESHOLD


def by_nightly_test(found: Comparison, _: int) -> bool:
    """Test each candidate at alpha, item by item."""
    return tail(found.won * found.size, found.lost * found.size, 1) <= PARAMS.alpha


def by_spending(found: Comparison, look: int) -> bool:
    """Spend alpha over all candidates since the last promotion, item by item, two-sided: the rule before."""
    p = 2 * tail(found.won * found.size, found.lost * found.size, 1)
    return found.gain > 0 and p <= spent(look)


def spent(look: int) -> float:
    """Return the share of alpha for one candidate; over all candidates the shares sum to alpha."""
    return PARAMS.alpha * 6 / (math.pi * look) ** 2


def by_lord(found: Comparison, look: int) -> bool:
    """LORD++ before the first promotion: control of the false discovery rate, cluster by cluster.

    Source: Ramdas et al., NeurIPS 2017; the sequence of Javanmard and Montanari, Annals of Statistics 46
    (2018) 526-554, normalized to a sum of 1.
    """
    share = 0.0722 * math.log(max(look, 2)) / (look * math.exp(math.sqrt(math.log(look))))
    return tail(found.won, found.lost, found.size) <= PARAMS.alpha * share


def by_gate(found: Comparison, _: int) -> bool:
    """Test clusters, each candidate at the same level: the gate."""
    return tail(found.won, found.lost, found.size) <= PARAMS.level


RULES: dict[str, Rule] = {
    "threshold of 2 points": by_threshold,
    "nightly test": by_nightly_test,
    "alpha spending": by_spending,
    "LORD++": by_lord,
    "gate": by_gate,
}


@cache
def tail(won: int, lost: int, size: int) -> float:
    """Return the gate's p-value for a gain."""
    sums = np.repeat([float(size), -float(size)], [won, lost])
    return p_value(sums, PARAMS.n_resamples, PARAMS.seed, PARAMS.level)


def draw(gain: float, size: int, items: int, count: int) -> list[Comparison]:
    """Draw candidates with a true gain; each rule gets the same."""
    shares = [(DIFFERING + gain) / 2, (DIFFERING - gain) / 2, 1 - DIFFERING]
    found = np.random.default_rng((size, items)).multinomial(items // size, shares, count)
    return [Comparison(won, lost, size, items) for won, lost, _ in found.tolist()]


def promoted_by_night(rule: Rule, gain: float, size: int, series: int) -> dict[int, float]:
    """Return the share of series in which a candidate is promoted on one of the first nights."""
    nights = max(NIGHTS)
    drawn = draw(gain, size, ITEMS, series * nights)
    firsts = [
        next((look for look, one in enumerate(drawn[i : i + nights], 1) if rule(one, look)), np.inf)
        for i in range(0, len(drawn), nights)
    ]
    return {night: float(np.mean(np.array(firsts) <= night)) for night in NIGHTS}


def promoted_on_night(rule: Rule, gain: float, size: int, items: int, series: int) -> dict[int, float]:
    """Return the share of candidates that are promoted on a night, if none was before."""
    drawn = draw(gain, size, items, series)
    return {night: float(np.mean([rule(one, night) for one in drawn])) for night in NIGHTS}


class Pair:
    """Answers of the champion and of the best champion so far to all questions of two benchmarks.

    The benchmarks are the first `LARGE` and `SMALL` questions.
    """

    def __init__(self, chance: np.random.Generator, start: float, gain: float) -> None:
        self.chance = chance
        self.gain = gain
        self.champion = [chance.random(POPULATION) < share for share in (start, START)]
        self.best = list(self.champion)

    def train(self) -> list[NDArray[np.bool_]]:
        """Return the answers of a candidate that is better on the first benchmark and worse on the second."""
        return [
            self.change(answers, gain)
            for answers, gain in zip(self.champion, (self.gain, -SMALL_LOSS), strict=True)
        ]

    def change(self, answers: NDArray[np.bool_], gain: float) -> NDArray[np.bool_]:
        """Change some of the answers, so that the accuracy is expected to change by `gain`."""
        right = answers.mean()
        won = min(1.0, (ROT_DIFFERING + gain) / 2 / max(1 - right, 1e-9))
        lost = min(1.0, (ROT_DIFFERING - gain) / 2 / max(right, 1e-9))
        flips: NDArray[np.bool_] = self.chance.random(len(answers)) < np.where(answers, lost, won)
        return np.logical_xor(answers, flips)

    def promote(self, candidate: list[NDArray[np.bool_]]) -> None:
        """Make a candidate the champion."""
        self.champion = candidate
        asked = (LARGE, SMALL)
        self.best = [
            new if new[:n].sum() >= old[:n].sum() else old
            for new, old, n in zip(candidate, self.best, asked, strict=True)
        ]


def rot(rule: str, scenario: str, seed: int) -> list[float]:
    """Return the lowest true accuracy of a champion on the small benchmark so far, by night."""
    pair = Pair(np.random.default_rng(seed), *ROTS[scenario])
    look, lowest, found = 1, START, []
    for _ in range(max(NIGHTS)):
        candidate = pair.train()
        if is_promoted(rule, candidate, pair, look):
            pair.promote(candidate)
            look = 0
        look += 1
        lowest = min(lowest, float(pair.champion[1].mean()))
        found.append(lowest)
    return found


def is_promoted(rule: str, candidate: list[NDArray[np.bool_]], pair: Pair, look: int) -> bool:
    """Return whether a rule promotes a candidate that was scored on both benchmarks."""
    against = {
        name: [difference(new, old, n) for new, old, n in zip(candidate, models, (LARGE, SMALL), strict=True)]
        for name, models in (("champion", pair.champion), ("best", pair.best))
    }
    large, small = against["champion"]
    pooled = np.concatenate([large, small])
    if rule == "threshold of 2 points":
        return float(pooled.mean()) >= THRESHOLD
    p = p_value(pooled, PARAMS.n_resamples, PARAMS.seed, PARAMS.level)
    if rule == "nightly test":
        return p <= PARAMS.alpha
    if rule == "alpha spending":
        kept = all(is_kept(one, PARAMS.alpha / 2) for one in against["champion"])
        return kept and 2 * p <= spent(look)
    gain = np.concatenate([large, small * (LARGE / SMALL)])
    p = p_value(gain, PARAMS.n_resamples, PARAMS.seed, PARAMS.level)
    return (
        p <= PARAMS.level
        and all(is_kept(one, PARAMS.alpha) for one in against["champion"])
        and all(
            is_kept(one, PARAMS.level)
            for one, best, old, n in zip(
                against["best"], pair.best, pair.champion, (LARGE, SMALL), strict=True
            )
            if best[:n].sum() > old[:n].sum()
        )
    )


def difference(ours: NDArray[np.bool_], theirs: NDArray[np.bool_], asked: int) -> NDArray[np.float64]:
    """Return the differences of the scores on the items of a benchmark."""
    return ours[:asked].astype(np.float64) - theirs[:asked]


def is_kept(found: NDArray[np.float64], level: float) -> bool:
    """Return whether a loss of the gate's margin is excluded."""
    return margin_p_value(Clusters(found, np.ones(len(found))), PARAMS.margin) <= level


def measure(series: int, years: int) -> list[Record]:
    """Simulate all rules and scenarios.

    Args:
        series: Series of nights, or candidates, per rule and scenario.
        years: Years of slow rot per rule.
    """
    records = []
    for rule in RULES:
        is_gate = rule == "gate"
        for size in CLUSTER_SIZES:
            false = promoted_by_night(RULES[rule], 0.0, size, series)
            records.append(
                record(
                    f"{rule}: false promotions in 365 nights, clusters of {size}",
                    false[365],
                    "share of series",
                    at_most=PARAMS.alpha if is_gate else None,
                    **about(rule, "no gain", size, false),
                )
            )
            for points, items in product((5, 10), (ITEMS, *MORE_ITEMS)):
                found = promoted_on_night(RULES[rule], points / 100, size, items, series)
                records.append(
                    record(
                        f"{rule}: +{points} points, {items} items, clusters of {size}: power on night 30 / 1",
                        found[30] / found[1] if found[1] else 1.0,
                        "ratio",
                        at_least=0.8 if is_gate else None,
                        **about(rule, f"+{points} points, {items} items", size, found),
                    )
                )
            by_night = promoted_by_night(RULES[rule], 0.1, size, series)
            records.append(
                record(
                    f"{rule}: a lasting gain of 10 points, clusters of {size}: promoted within 7 nights",
                    by_night[7],
                    "share of series",
                    **about(rule, "+10 points, lasting", size, by_night),
                )
            )
        # LORD++ is a level, not a rule for several benchmarks.
        for scenario in ROTS if rule != "LORD++" else ():
            by_year = np.array([rot(rule, scenario, seed) for seed in range(years)])
            lowest = np.quantile(by_year, 0.05, axis=0)
            records.append(
                record(
                    f"{rule}: {scenario}: accuracy of a benchmark that was 90% after 365 nights, 5% quantile",
                    float(lowest[-1]),
                    "accuracy",
                    at_least=START - PARAMS.margin - 0.02 if is_gate else None,
                    years_below_the_margin=float((by_year[:, -1] < START - PARAMS.margin).mean()),
                    **about(rule, scenario, 1, {night: float(lowest[night - 1]) for night in NIGHTS}),
                )
            )
    return records


def about(rule: str, scenario: str, size: int, by_night: dict[int, float]) -> dict[str, Any]:
    """Return what a record describes, for the plots."""
    return {"rule": rule, "scenario": scenario, "cluster_size": size, "by_night": by_night}


def plot(records: Sequence[Record], folder: Path) -> None:
    """Draw false promotions, power and slow rot, one line per rule."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "nightshift"
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    titles = {
        "no gain": ("false promotions: at least one so far", "share of series"),
        **{
            f"+10 points, {items} items": (
                f"power: a gain of 10 points on {items} items is promoted on this night",
                "share of candidates",
            )
            for items in (ITEMS, MORE_ITEMS[0])
        },
        "+10 points, lasting": ("a lasting gain of 10 points was promoted so far", "share of series"),
        **{name: (f"{name}: lowest accuracy so far, 5% quantile of years", "accuracy") for name in ROTS},
    }
    for number, (scenario, (title, unit)) in enumerate(titles.items(), 1):
        found = [one for one in records if one["scenario"] == scenario]
        sizes = sorted({one["cluster_size"] for one in found})
        figure, axes = plt.subplots(
            1, len(sizes), figsize=(3 * len(sizes) + 2, 3), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, size in zip(axes[0], sizes, strict=True):
            for one in found:
                if one["cluster_size"] == size:
                    color = f"C{list(RULES).index(one['rule'])}"
                    points = zip(*one["by_night"].items(), strict=True)
                    axis.plot(*points, marker="o", color=color, label=one["rule"])
            axis.set(xscale="log", xticks=NIGHTS, xticklabels=NIGHTS, xlabel="night")
            if len(sizes) > 1:
                axis.set_title(f"clusters of {size}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if scenario == "no gain":
                axis.axhline(PARAMS.alpha, color="black", linestyle=":", label=f"alpha {PARAMS.alpha:g}")
        axes[0][0].set_ylabel(unit)
        axes[0][-1].legend(fontsize="small")
        figure.suptitle(title)
        figure.savefig(folder / f"gate-{number}.svg", metadata={"Date": None})
        plt.close(figure)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("--series", type=int, default=2000, help="series of nights per scenario")
    parser.add_argument("--years", type=int, default=60, help="years of slow rot")


def main(series: int, years: int) -> None:
    """Write results/gate.json and the plots."""
    records = measure(series, years)
    write_records("gate", records, PACKAGES)
    plot(records, IMAGES)
    require_bounds(records)


if __name__ == "__main__":
    run_main(main, declare)
