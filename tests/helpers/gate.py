"""Gate parameters for tests: the shipped ones with fewer resamples."""

from tasks.gate import GateParams

PARAMS = GateParams(
    alpha=0.05,
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
