"""Callbacks that stop training early: non-finite loss, hung step, SIGTERM, early stopping."""

import faulthandler
import logging
import math
import os
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from nightshift.core.errors import StageError, TrainingError
from tasks.sft.failures import HANG
from tasks.sft.history import is_diverged, is_exhausted, is_spike
from tasks.sft.job import Job
from tasks.sft.plan import format_rows

# The fp16 gradient scaler halves its scale at each overflow. After this many in a row, from 2**16, the
# scale is below 2**-3, and the gradients themselves exceed fp16.
MAX_OVERFLOWS = 20
log = logging.getLogger(__name__)


class Guard(TrainerCallback):
    """Watch every step, and stop training with the reason."""

    def __init__(self, job: Job) -> None:
        """Handle SIGTERM from now on by saving after the current step."""
        self.plan, self.params, self.stage, self.data = job.plan, job.params, job.stage, job.data
        self.is_preempted = False
        self.checked = 0
        # Steps skipped by the fp16 scaler, in total and in a row; a skipped step does not advance the
        # schedule.
        self.skipped = self.skipped_in_a_row = 0
        self.rate_index = 0
        # Written by a C thread, which keeps running when the interpreter hangs.
        self.hang = (job.folder / HANG.format(rank=os.environ.get("RANK", "0"))).open("w")
        signal.signal(signal.SIGTERM, self.on_sigterm)

    def on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        """Record the request to stop."""
        self.is_preempted = True

    def watch(self) -> None:
        """Restart the step timeout; a step that exceeds it ends this process with a traceback."""
        faulthandler.dump_traceback_later(self.params.step_timeout_seconds, exit=True, file=self.hang)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, lr_scheduler: Any, **_: Any) -> None:
        """Start the step timeout."""
        self.checked = state.global_step
        self.skipped = state.global_step - lr_scheduler.state_dict()["last_epoch"]
        self.watch()

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Record which planned learning rate the step must use."""
        self.rate_index = state.global_step - self.skipped

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        """Count a step skipped by the scaler; save and stop if any rank received SIGTERM.

        Raises:
            StageError: The scaler skipped too many steps in a row.
        """
        self.watch()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if optimizer.step_was_skipped else 0
        if optimizer.step_was_skipped:
            self.skipped += 1
            log.info(
                "step %d skipped: gradients overflowed in fp16; the scaler halves its scale "
                "(%d skipped so far)",
                *(state.global_step, self.skipped),
            )
        if self.skipped_in_a_row == MAX_OVERFLOWS:
            raise StageError(
                f"the gradients of the last {MAX_OVERFLOWS} steps, up to step {state.global_step}, "
                "overflowed in fp16; set sft.precision to bf16 or fp32"
            )
        if is_any(self.is_preempted, args.device):
            self.is_preempted = True
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, _args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Stop if the loss no longer improves; the step is saved like any other.

        Raises:
            StageError: The loss is not finite.
        """
        self.watch()
        if not math.isfinite(metrics["eval_loss"]):
            raise StageError(
                f"evaluation loss {metrics['eval_loss']} at step {state.global_step}; lower "
                f"{self.stage}.learning_rate"
            )
        if is_exhausted(
            state.log_history, self.params.early_stopping_patience, self.params.early_stopping_min_delta
        ):
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Restart the step timeout, so that saving does not count."""
        self.watch()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Cancel the step timeout."""
        faulthandler.cancel_dump_traceback_later()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        """Check loss and learning rate.

        Raises:
            TrainingError: The loss is not finite, or is a spike.
            StageError: The losses stay above the watchdog's threshold, or the learning rate differs from
                the plan.
        """
        if "loss" not in logs:
            return
        step, loss, rate = state.global_step, logs["loss"], logs["learning_rate"]
        steps, self.checked = range(self.checked + 1, step + 1), step
        spike = is_spike(loss, state.log_history[:-1], self.params.max_loss_ratio)
        if spike or not math.isfinite(loss):
            what = "loss spike to" if spike else "loss"
            raise TrainingError(
                "loss", f"{what} {loss:.4g} at {format_rows(self.plan, steps, self.data)}", steps
            )
        threshold, patience = self.params.loss_watchdog_threshold, self.params.loss_watchdog_patience
        if is_diverged(state.log_history, threshold, patience):
            raise StageError(
                f"the last {patience} logged losses, up to {loss:.4g} at step {step}, are above "
                f"sft.loss_watchdog_threshold={threshold}; lower {self.stage}.learning_rate, or raise the "
                "threshold"
            )
        planned = self.plan.learning_rate[self.rate_index]
        if self.params.lr_scheduler_type == "reduce_lr_on_plateau":
            planned = min(planned, rate)
        if not math.isclose(rate, planned, rel_tol=1e-6, abs_tol=1e-12):
            raise StageError(f"learning rate {rate} at step {step}, but {planned} was planned")


def is_any(flag: bool, device: torch.device) -> bool:  # noqa: FBT001 - a value, not a mode
    """Return whether a flag is set on any rank; all ranks get the same result."""
    if not torch.distributed.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value.item())
