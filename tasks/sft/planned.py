"""What all trainers here have in common, whatever their loss: the plan, checks, and verified checkpoints."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin
from safetensors import SafetensorError
from torch.optim.lr_scheduler import LambdaLR

from nightshift.core.errors import StageError, TrainingError
from nightshift.core.paths import PACKED
from tasks.sft import SftParams, checkpoints
from tasks.sft.failures import is_out_of_memory
from tasks.sft.guard import is_any
from tasks.sft.history import best_step, plateau_scale
from tasks.sft.muon import build_muon
from tasks.sft.plan import Plan, format_rows


class Planned(transformers.Trainer):
    """A trainer that executes a plan. A subclass names TRL's trainer after it, and calls `follow`.

    Attributes:
        params: `sft` section of params.yaml.
        plan: Compiled plan.
        data: Data that the rows come from, for messages.
        filler: Row without labels that completes a batch.
        total_loss: Sum over all steps so far, shape (1,): one non-finite loss makes it non-finite for good.
        saved: Step of the last checkpoint.
    """

    # Set by transformers, which has no types for them.
    optimizer: Any
    lr_scheduler: Any
    control: Any
    params: SftParams
    plan: Plan
    data: Path = PACKED
    filler: dict[str, Any]
    total_loss: torch.Tensor
    saved: int

    def follow(self, params: SftParams, plan: Plan) -> None:
        """Start at step 1 of a plan, or at that of the checkpoint from which training resumes."""
        self.params, self.plan = params, plan
        self.total_loss = torch.zeros(1, device=self.args.device)
        self.saved = 0

    def where(self, steps: range) -> str:
        """Return steps, counted from 1, and their rows for a message."""
        return format_rows(self.plan, steps, self.data)

    def create_accelerator_and_postprocess(self) -> None:
        """Enable FSDP2 on a CPU, where accelerate would silently train with DDP."""
        if self.args.fsdp_plugin_args and self.args.device.type == "cpu":
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            precision = "bf16" if self.args.bf16 else "no"
            state = AcceleratorState(
                precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
            )
            if self.args.bf16:
                plugin.set_mixed_precision(precision)
            state.fsdp_plugin = plugin
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        super().create_accelerator_and_postprocess()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the gradient norm of a step, which must be finite before a weight changes."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None:
            self.require_finite(float(norm))
        return norm

    def require_finite(self, norm: float) -> None:
        """Check the gradient norm of the current step; every rank sees the same value.

        DeepSpeed skips a step with a non-finite norm, and continues.

        Raises:
            TrainingError: The norm is not finite.
        """
        # In fp16 the scaler finds its scale through overflows.
        if math.isfinite(norm) or self.args.fp16:
            return
        step = self.state.global_step + 1
        loss = self.accelerator.reduce(self.total_loss, reduction="sum").item()
        what = f"gradient norm {norm:.4g} of a finite loss" if math.isfinite(loss) else f"loss {loss:.4g}"
        raise TrainingError("loss", f"{what} at {self.where(range(step, step + 1))}", [step])

    def create_optimizer(self, model: Any = None) -> Any:
        """Build the optimizer: transformers', Muon, or LoRA+, whose B matrices learn faster than A."""
        if self.optimizer is not None:
            return self.optimizer
        params = self.params
        if params.optim == "muon":
            self.optimizer = build_muon(
                self.model,
                set(self.get_decay_parameter_names(self.model)),
                params.learning_rate,
                params.weight_decay,
                betas=(params.adam_beta1, params.adam_beta2),
                eps=params.adam_epsilon,
            )
        elif params.loraplus_lr_ratio is None:
            super().create_optimizer(model)
        else:
            from peft.optimizers import create_loraplus_optimizer

            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = create_loraplus_optimizer(
                self.model,
                kind,
                loraplus_lr_ratio=params.loraplus_lr_ratio,
                loraplus_weight_decay=params.weight_decay,
                **options,
            )
        plugin = self.accelerator.state.deepspeed_plugin
        optimizer: Any = self.optimizer
        if plugin and plugin.zero_stage == 0:
            # ZeRO-0 steps within the backward pass, and reports no norm in full precision.
            optimizer.register_step_pre_hook(lambda used, *_: self.require_finite(gradient_norm(used)))
        return optimizer

    def create_scheduler(
        self,
        num_training_steps: int,  # noqa: ARG002 - transformers' signature
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Any:
        """Take learning rates from the plan; only plateau reductions are computed during training."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.planned_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def planned_factor(self, step: int) -> float:
        """Return the learning rate of one step, from 0, as a fraction of the peak."""
        rates = self.plan.learning_rate
        # The step after the last one is requested but never used.
        share: float = rates[min(step, len(rates) - 1)] / self.params.learning_rate
        if self.params.lr_scheduler_type != "reduce_lr_on_plateau":
            return share
        numbers = self.params.lr_scheduler_kwargs
        scale = plateau_scale(
            self.state.log_history,
            0.1 if numbers.factor is None else numbers.factor,
            1 if numbers.patience is None else numbers.patience,
            1e-4 if numbers.threshold is None else numbers.threshold,
        )
        return share * max(scale, numbers.min_lr_rate or 0.0)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint under a temporary name; rename it once it is completely on disk.

        Raises:
            TrainingError: A loss since the last checkpoint, or a value to be saved, is not finite.
        """
        steps, self.saved = range(self.saved + 1, self.state.global_step + 1), self.state.global_step
        if not math.isfinite(self.accelerator.reduce(self.total_loss, reduction="sum").item()):
            raise TrainingError("loss", f"loss was not finite at {self.where(steps)}", steps)
        if is_any(not has_finite_state(self.optimizer), self.args.device):
            what = "non-finite optimizer state or weights"
            raise TrainingError("loss", f"{what} at {self.where(steps)}", steps)
        folder = Path(self.args.output_dir)
        if self.accelerator.is_main_process:
            shutil.rmtree(folder / checkpoints.SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(folder / checkpoints.SAVING)
        with writing(f"the checkpoint of step {self.state.global_step}"):
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(folder)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                written = folder / checkpoints.SAVING / f"checkpoint-{self.state.global_step}"
                checkpoints.require_finite(written)
                checkpoints.finalize(written, folder)
                checkpoints.rotate(folder, self.params.save_total_limit, best_step(self.state.log_history))
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the validation set, as `measure` defines it; log the metrics, and tell the callbacks."""
        self.model_wrapped.eval()
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        metrics = self.measure()
        self.model_wrapped.train()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Return the metrics of the validation set; names start with `eval_`."""
        raise NotImplementedError

    def eval_batches(self, rows: Any = None) -> Iterator[list[dict[str, Any]]]:
        """Yield this rank's batches of some rows, or of the validation set.

        They are as many as on other ranks: gathering shards is collective.
        """
        rows = self.eval_dataset if rows is None else rows
        size = self.args.per_device_eval_batch_size
        step = size * self.accelerator.num_processes
        for start in range(self.accelerator.process_index * size, math.ceil(len(rows) / step) * step, step):
            yield [rows[i] if i < len(rows) else self.filler for i in range(start, start + size)]


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise a clear error if writing fails; torch and safetensors raise errors of several types.

    Raises:
        StageError: Writing failed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as err:
        if is_out_of_memory(err):
            raise
        raise StageError(
            f"{what} cannot be written: {type(err).__name__}: {str(err).partition(chr(10))[0]}; free disk "
            "space or fix permissions, then run again to resume from the last complete checkpoint"
        ) from err


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    """Return the norm of all gradients that an optimizer is about to use."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]).item()


def has_finite_state(optimizer: Any) -> bool:
    """Return whether this rank's shard of the trained weights and optimizer state is finite.

    The keys of the state are the weights that the optimizer updates: full-precision copies under ZeRO.
    """
    state = optimizer.state.items()
    tensors = [
        part for weight, values in state for part in (weight, *values.values()) if torch.is_tensor(part)
    ]
    # FSDP2 weights are DTensors with a local shard.
    shards = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return all(checkpoints.is_finite(shard.detach()) for shard in shards)
