"""The stage sft with a fault in its ranks, named by POISON: a broken kernel, a hard row, a bad chip.

Without an argument it is the stage, with one the rank of that job.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.stage import run_main

# A label of the row that is poisoned.
LABEL = 2500


def main(job_file: Path | None) -> None:
    """Run the stage, whose ranks come back here, or be one of them."""
    if job_file:
        rank(job_file)
        return
    from tasks.sft import __main__ as stage
    from tasks.sft import launch

    launcher = launch.launcher

    def poisoned(*arguments: Any) -> list[str]:
        return [part.replace("tasks.sft.worker", "tests.poisoned") for part in launcher(*arguments)]

    launch.launcher = poisoned
    stage.main()


def rank(job_file: Path) -> None:
    """Plant the fault, and train."""
    from tasks.sft import worker

    FAULTS[os.environ["POISON"]]()
    worker.main(job_file)


def poison_loss(gradient: float | None, loss: float = 0.0) -> None:
    """Give the loss of the poisoned row another gradient, and add to its value."""
    from tasks.sft import trainer

    real = trainer.cross_entropy

    def cross_entropy(logits: Any, labels: Any, **more: Any) -> Any:
        if not (labels == LABEL).any():
            return real(logits, labels, **more)
        if gradient is not None and logits.requires_grad:
            logits.register_hook(lambda given: given * gradient)
        return real(logits, labels, **more) + loss

    trainer.cross_entropy = cross_entropy  # type: ignore[assignment]


def poison_state() -> None:
    """Spoil the optimiser's state in memory after the third step."""
    from tasks.sft.guard import Guard

    on_step_end = Guard.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, optimizer: Any, **more: Any) -> None:
        if state.global_step == 3:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
        on_step_end(self, args, state, control, **more)

    Guard.on_step_end = spoil  # type: ignore[method-assign, assignment]


def poison_file() -> None:
    """Spoil a weight while the trained model is written."""
    from safetensors.torch import load_file, save_file

    from tasks.sft import worker

    tidy = worker.tidy

    def spoil(model: Any) -> None:
        tidy(model)
        for path in model.glob("*.safetensors"):
            weights = load_file(path)
            weights[min(weights)].view(-1)[-1] = float("-inf")
            save_file(weights, path)

    worker.tidy = spoil


FAULTS: dict[str, Callable[[], None]] = {
    "gradient is NaN": lambda: poison_loss(float("nan")),
    "gradient is infinite": lambda: poison_loss(float("inf")),
    "loss is infinite": lambda: poison_loss(None, float("inf")),
    "state": poison_state,
    "file": poison_file,
}

if __name__ == "__main__":
    run_main(main, lambda parser: parser.add_argument("job_file", type=Path, nargs="?"))
