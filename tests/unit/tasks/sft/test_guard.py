"""The guard stops training, with the reason."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nightshift.core.errors import StageError
from tasks.sft.guard import Guard
from tests.helpers.sft import make_job, sft_params


@pytest.fixture
def keep_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_losses_above_the_threshold_stop_training(in_tmp: Path, keep_sigterm: None) -> None:
    Path("training").mkdir()
    guard = Guard(make_job(sft_params(loss_watchdog_threshold=5.0, loss_watchdog_patience=2)))
    history: list[dict[str, float]] = []
    for step, loss in enumerate([6.0, 4.0, 6.0, 7.0], start=1):
        logs = {"loss": loss, "learning_rate": 0.1, "step": step}
        history.append(logs)
        state = SimpleNamespace(global_step=step, log_history=history)
        if step < 4:
            guard.on_log(None, state, None, logs)
    with pytest.raises(StageError) as caught:
        guard.on_log(None, state, None, logs)
    assert str(caught.value) == (
        "the last 2 logged losses, up to 7 at step 4, are above sft.loss_watchdog_threshold=5.0; lower "
        "sft.learning_rate, or raise the threshold"
    )
    guard.hang.close()
