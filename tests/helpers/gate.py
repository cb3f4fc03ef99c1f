"""Gate parameters for tests: the shipped ones with fewer resamples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nightshift.data.statistics import Clusters
from tasks.gate import GateParams

PARAMS = GateParams(
    objective="superiority",
    alpha=0.05,
    nights=365,
    detectable_gain=0.1,
    detectable_loss_gain=0.02,
    power=0.8,
    margin=0.05,
    floors={},
    retention={},
    behaviour=[],
    seed_noise=0.0,
    max_loss_increase=0.05,
    min_items=50,
    n_resamples=2000,
    seed=0,
)


def unrelated(differences: Sequence[float] | Any) -> Clusters:
    """Return the differences of items that are each a cluster."""
    return Clusters(np.asarray(differences, dtype=np.float64), np.ones(len(differences)))
