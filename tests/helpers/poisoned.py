"""The sft stage with a fault in its ranks, selected by POISON: broken kernel, hard row, faulty chip.

Without an argument, run the stage; with a job file, run as a rank of that job.
"""

import itertools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nightshift.core.stage import run_main

# A label that only the poisoned row has.
LABEL = 2500


def main(job_file: Path | None) -> None:
    """Run the stage with ranks that start this module, or run as one of these ranks."""
    if job_file:
        rank(job_file)
        return
    from tasks.sft import __main__ as stage
    from tasks.sft import launch

    build_command = launch.build_command

    def poisoned(*arguments: Any) -> list[str]:
        return [
            part.replace("tasks.sft.worker", "tests.helpers.poisoned") for part in build_command(*arguments)
        ]

    launch.build_command = poisoned
    stage.main()


def rank(job_file: Path) -> None:
    """Inject the fault and train."""
    from tasks.sft import worker

    FAULTS[os.environ["POISON"]]()
    worker.main(job_file)


def poison_loss(gradient: float | None, loss: float = 0.0) -> None:
    """Scale the gradient of the poisoned row's loss and add to its value."""
    from tasks.sft.fused import LossHead

    real = LossHead.__call__

    def poisoned(self: LossHead, hidden: Any) -> Any:
        if self.labels is None or not (self.labels == LABEL).any():
            return real(self, hidden)
        if gradient is not None and hidden.requires_grad:
            hidden.register_hook(lambda given: given * gradient)
        return real(self, hidden) + loss

    LossHead.__call__ = poisoned  # type: ignore[method-assign]


def poison_state() -> None:
    """Corrupt the optimizer state in memory after the third step."""
    from tasks.sft.guard import Guard

    on_step_end = Guard.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, optimizer: Any, **more: Any) -> None:
        if state.global_step == 3:
            second = next(iter(optimizer.state.values()))["exp_avg_sq"]
            # FSDP2 shards the state; a rank can corrupt only its own shard.
            shard = second.to_local() if hasattr(second, "to_local") else second
            shard.view(-1)[0] = float("inf")
        on_step_end(self, args, state, control, optimizer=optimizer, **more)

    Guard.on_step_end = spoil  # type: ignore[method-assign, assignment]


def poison_file() -> None:
    """Corrupt a weight while the trained model is written."""
    from safetensors.torch import load_file, save_file

    from tasks.sft import worker

    remove_extra_files = worker.remove_extra_files

    def spoil(model: Any) -> None:
        remove_extra_files(model)
        for path in model.glob("*.safetensors"):
            weights = load_file(path)
            weights[min(weights)].view(-1)[-1] = float("-inf")
            save_file(weights, path)

    worker.remove_extra_files = spoil


def poison_scaler(skips: Collection[int]) -> None:
    """Skip optimizer steps, counted from 1, as the fp16 scaler does when gradients overflow."""
    from accelerate.optimizer import AcceleratedOptimizer

    step, steps = AcceleratedOptimizer.step, itertools.count(1)

    def skip(self: Any, closure: Any = None) -> None:
        self._is_overflow = next(steps) in skips
        if not self._is_overflow:
            step(self, closure)

    AcceleratedOptimizer.step = skip


FAULTS: dict[str, Callable[[], None]] = {
    "gradient is NaN": lambda: poison_loss(float("nan")),
    "gradient is infinite": lambda: poison_loss(float("inf")),
    "loss is infinite": lambda: poison_loss(None, float("inf")),
    "state": poison_state,
    "file": poison_file,
    "overflow": lambda: poison_scaler((1, 2, 5)),
    "overflows": lambda: poison_scaler(range(4, 100)),
}

if __name__ == "__main__":
    run_main(main, lambda parser: parser.add_argument("job_file", type=Path, nargs="?"))
