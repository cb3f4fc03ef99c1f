"""How fast a champion ages, and whether another training is worth a night.

Every night scores base, champion and candidate on the test examples that are newer than the champion's
training data, which neither champion nor candidate was trained on. The candidate shows what a training
gains over the base on them, and the champion how much of that is left at its age.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Annotated

import numpy as np
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from pydantic import Field

from nightshift.core.config import StageParams, load_params
from nightshift.core.files import iterate_rows, read_json
from nightshift.core.paths import CHAMPION_RECORD, CLEAN_TRAIN, PACKED, VALIDATION
from nightshift.pipeline.graph import changed_paths
from nightshift.registry.versions import find_alias, open_registry
from nightshift.tracking.runs import experiment_id

# Metric: age in days of the champion that the candidate was compared with.
CHAMPION_AGE = "eval/test/champion_age"
MILLISECONDS_PER_DAY = 86_400_000
# Nights that the half-life is measured on, at most and at least, and those that show the level of the loss.
NIGHTS, MIN_NIGHTS, LAST = 365, 5, 10
# Half-lives, in days, that are tried. The longest means that no advantage was lost.
HALF_LIVES = np.geomspace(0.1, 3650, 1000)
log = logging.getLogger(__name__)


class NightlyParams(StageParams):
    """When a night trains, where its results go, and who is told.

    Attributes:
        keep_runs: Newest branches of runs that stay, with their data in DVC's cache; None keeps all.
        min_expected_gain: Expected reduction of the loss on new examples, as a share of the champion's, below
            which a night does not train; 0 always trains on new data.
        notify: Prefect blocks that send a message when a night has ended, `type/name`.
        push: Git remote to which a run of a deployment pushes its branch after `dvc push`, or None.
    """

    keep_runs: int | None = Field(default=None, ge=1)
    min_expected_gain: float = Field(ge=0, lt=1)
    notify: list[Annotated[str, Field(pattern=r"^[a-z0-9-]+/[A-Za-z0-9_-]+$")]] = Field(default=[])
    # No option of git.
    push: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w./-]*$")


@dataclass(frozen=True, slots=True)
class Night:
    """Losses on the test examples that were newer than the champion, in nats per token.

    Attributes:
        version: Version of the candidate.
        age: Age of the champion in days.
        base: Loss of the base.
        champion: Loss of the champion.
        candidate: Loss of the candidate.
    """

    version: int
    age: float
    base: float
    champion: float
    candidate: float


def age_in_days(champion: ModelVersion, moment: float) -> float:
    """Return the age of a version at a time, in milliseconds since 1970."""
    return (moment - float(champion.creation_timestamp)) / MILLISECONDS_PER_DAY


def read_nights(client: MlflowClient) -> list[Night]:
    """Read the nights that had new test examples and a champion from MLflow, oldest first."""
    keys = (CHAMPION_AGE, "eval/test/new_loss_base", "eval/test/new_loss_champion", "eval/test/new_loss")
    runs = client.search_runs(
        [experiment_id(client)],
        f"metrics.`{CHAMPION_AGE}` > 0",
        order_by=["attributes.start_time DESC"],
        max_results=NIGHTS,
    )
    nights = dict[int, Night]()
    for run in reversed(runs):
        values = [run.data.metrics.get(key) for key in keys]
        if None not in values:
            version = int(run.data.tags["nightshift.version"])
            nights[version] = Night(version, *values)
    return list(nights.values())


def find_half_life(nights: Sequence[Night]) -> float | None:
    """Return the age, in days, at which a champion has half of its advantage over the base on new examples.

    It is the least-squares fit of `champion = base - (base - candidate) * 2 ** (-age / half_life)`.

    Returns:
        The half-life; None after fewer than `MIN_NIGHTS` nights, or if champions lost no advantage.

    Example:
        >>> nights = [Night(n, age, 3.0, 3.0 - 2 ** (-age / 8), 2.0) for n, age in enumerate([1, 1, 2, 4, 9])]
        >>> round(find_half_life(nights), 1)
        8.0
        >>> find_half_life([Night(n, 1.0, 3.0, 2.0, 2.0) for n in range(9)])
    """
    if len(nights) < MIN_NIGHTS:
        return None
    _, age, base, champion, candidate = np.array([astuple(night) for night in nights]).T[:, :, None]
    expected = base - (base - candidate) * 2 ** (-age / HALF_LIVES)
    best = int(((champion - expected) ** 2).sum(axis=0).argmin())
    return None if best == len(HALF_LIVES) - 1 else float(HALF_LIVES[best])


def expect_gain(nights: Sequence[Night], half_life: float, age: float) -> float:
    """Return the expected reduction of the loss on new examples, as a share of the champion's loss.

    Args:
        nights: Nights, oldest first; the last ones tell the losses of base and candidate.
        half_life: Result of `find_half_life`.
        age: Age of the champion in days.

    Example:
        >>> round(expect_gain([Night(1, 1.0, 3.0, 2.5, 2.0)], half_life=8.0, age=8.0), 3)
        0.2
    """
    base = float(np.mean([night.base for night in nights[-LAST:]]))
    candidate = float(np.mean([night.candidate for night in nights[-LAST:]]))
    return 1 - candidate / (base - (base - candidate) * 2 ** (-age / half_life))


def find_reason_to_skip(now: float) -> str | None:
    """Return why a training is not worth this night, or None if it is, or may be.

    Only a night on which nothing but the data changed can be skipped.

    Args:
        now: Seconds since 1970.
    """
    least = load_params(NightlyParams, "nightly").min_expected_gain
    changed = changed_paths("sft") if least else set()
    if not changed or not changed <= {str(PACKED), str(VALIDATION)}:
        return None
    arrival = read_json(CHAMPION_RECORD)["arrival"]
    client, name = open_registry()
    try:
        champion, nights = find_alias(client, name, "champion"), read_nights(client)
    except MlflowException as err:
        log.warning("MLflow: what a training would gain is unknown: %s; the night trains", err)
        return None
    half_life = find_half_life(nights)
    if champion is None or arrival is None or half_life is None:
        return None
    age = age_in_days(champion, now * 1000)
    gain = expect_gain(nights, half_life, age)
    if gain >= least:
        return None
    new = sum(row["arrival"] > arrival for row in iterate_rows(CLEAN_TRAIN, ["arrival"]))
    return (
        f"a training on {new:,} new examples is expected to lower the loss on new examples by {gain:.1%}, "
        f"less than nightly.min_expected_gain ({least:.1%}): version {champion.version}, the champion, is "
        f"{age:.1f} days old, and champions lose half of their advantage over the base in {half_life:.1f} "
        f"days (measured over {len(nights)} nights)"
    )
