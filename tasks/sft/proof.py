"""Run the self-test on the trainer once, when the model is wrapped and about to train."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, TrainerCallback

from nightshift.core.errors import StageError
from nightshift.core.files import write_figures
from tasks.sft import selftest
from tasks.sft.attention import boundaries, lengths_from_positions
from tasks.sft.job import Job
from tasks.sft.model import HALF, weight_dtype
from tasks.sft.selftest import PackedRow
from tasks.sft.strategy import GIB, ZERO
from tasks.sft.trainer import Trainer, summed_loss

# Memory for the activations and logits of the self-test, in a model that is loaded a second time.
RELOAD_BYTES = 2 * GIB
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class Proof(TrainerCallback):
    """Refuse to train a model that would silently learn something else."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.trainer: Trainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Run all checks and write their results; restore the random state."""
        assert self.trainer
        # The checks draw random numbers, which must not affect a resumed run.
        with torch.random.fork_rng():
            results = run_checks(self.trainer, self.job)
        if self.job.backend.device == "cpu":
            # glibc keeps memory freed by loading and self-test, in fragments that training hardly
            # reuses.
            ctypes.CDLL(None).malloc_trim(0)
        else:
            # The reported peak is that of training.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if self.trainer.is_world_process_zero():
            write_figures(self.job.folder / "output" / "selftest.json", results)


def run_checks(trainer: Trainer, job: Job) -> dict[str, Any]:
    """Run all checks on two examples that share a packed row.

    Raises:
        StageError: A check fails; training must not start.
    """
    # Both are enabled in the model only when training starts.
    runs = {
        "activation_checkpointing": trainer.model.is_activation_checkpointing,
        "fp8_base": any(hasattr(module, "float8") for module in trainer.model.modules()),
    }
    for key, actual in runs.items():
        if actual != (requested := getattr(trainer.params, key)):
            raise StageError(
                f"self-test: {key}={requested} was requested, but {key}={actual} is active; this is a "
                "bug, report it"
            )
    folder = job.folder / "rehearsal"
    row = selftest.find_row(trainer.train_dataset)
    if row is None:
        return {
            "saving": check_saving(trainer, job, None, folder),
            "isolation": "no row contains two examples",
        }
    batch = collate(trainer, row)
    trainer.model_wrapped.eval()
    length, vocab_size = row["seq_lengths"][0], trainer.model.config.vocab_size
    has_experts = any("experts" in key for key in trainer.model.config.to_dict())
    tolerance = selftest.TOLERANCE[job.backend.precision] if has_experts else 0.0
    sizes = (length, vocab_size, tolerance)
    isolation = selftest.check_isolation(lambda inputs: forward(trainer, inputs), batch, *sizes)
    selftest.check_isolation(lambda inputs: forward_by_positions(trainer, inputs), batch, *sizes)
    loss = None
    if trainer.head:
        with torch.no_grad():
            values = forward(trainer, batch)[0].item(), training_loss(trainer, batch).item()
        loss = selftest.check_loss(*values, job.backend.precision)
    batches = [batch, *(collate(trainer, selftest.take(row, i, i + 1)) for i in (0, 1))]
    if job.backend.strategy == "zero3":
        gradients: dict[str, Any] = {
            "weights": len(trainable(trainer)),
            "not_compared": "zero3 shards the weights",
        }
    else:
        # On a CPU, bitsandbytes multiplies 4-bit weights in bf16, whatever the requested precision.
        precision = "bf16" if trainer.params.adapter == "qlora" else job.backend.precision
        gradients = selftest.check_gradients(
            lambda inputs: backward(trainer, inputs, job), batches, precision
        )
    saving = check_saving(trainer, job, batch, folder)
    trainer.model_wrapped.train()
    return {"isolation": isolation, "loss": loss, "gradients": gradients, "saving": saving}


def collate(trainer: Trainer, row: PackedRow) -> dict[str, Any]:
    """Collate one row into a batch, as in training."""
    batch: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator([row]))
    return batch


def forward(trainer: Trainer, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Compute loss and outputs of the wrapped model; the loss is a plain sum, so losses add up."""
    one = torch.ones(1, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss, outputs = trainer.compute_loss(
            trainer.model_wrapped, dict(batch), return_outputs=True, num_items_in_batch=one
        )
    return loss, outputs


def training_loss(trainer: Trainer, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the loss of the wrapped model with the training function itself, as a plain sum."""
    one = torch.ones(1, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model_wrapped, dict(batch), num_items_in_batch=one)
    return loss


def forward_by_positions(trainer: Trainer, batch: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """Compute the loss without passing the example boundaries to the kernel.

    Some kernels use only the boundaries, so a wrong mask or position would show only with another one.
    """
    kept = {key: value for key, value in batch.items() if key not in BOUNDARIES}
    if trainer.model.config._attn_implementation == "flash_attention_4":
        # It needs them; transformers would derive them with the longest length as a tensor, which fails.
        lengths = lengths_from_positions(batch["position_ids"])
        kept |= boundaries(lengths, batch["position_ids"].device)
    with trainer.compute_loss_context_manager():
        return summed_loss(trainer.model_wrapped, kept)


def backward(trainer: Trainer, batch: dict[str, Any], job: Job) -> list[torch.Tensor | None]:
    """Compute the gradients of the trainable weights, and leave none in the model."""
    parameters = list(trainable(trainer).values())
    if job.backend.strategy == "fsdp2":
        # FSDP2's sharded weights are in no autograd graph; hooks write their gradients.
        torch.autograd.backward(training_loss(trainer, batch))
        found = [p.grad.full_tensor() if p.grad is not None else None for p in parameters]  # type: ignore[attr-defined]
        trainer.model_wrapped.zero_grad(set_to_none=True)
        return found
    # Unwrapped model: DDP and ZeRO count every backward pass as part of a training step.
    with trainer.compute_loss_context_manager():
        loss, _ = summed_loss(trainer.model, dict(batch), trainer.params.label_smoothing_factor, trainer.head)
    if not (parameters and loss.requires_grad):
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def trainable(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """Return name -> weight of all trainable weights."""
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def named_weights(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """Return name -> trainable weight like `trainable`, with both names of a tied weight."""
    parameters = trainer.model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in parameters if p.requires_grad}


def check_saving(trainer: Trainer, job: Job, batch: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Save as at the end of training, and load the result.

    Logits are not compared if ZeRO-3 shards the weights or the live base is quantized. The check that
    every weight was saved in full always runs.
    """
    params, model = trainer.params, trainer.model
    if job.backend.strategy == "zero3" or params.adapter == "qlora" or params.fp8_base:
        batch = None
    weights = trainable(trainer)
    perturbed = [p for name, p in weights.items() if "lora_B" in name and batch]
    with selftest.perturbed(perturbed), torch.no_grad():
        trainer.save_model(str(folder))
        live = forward(trainer, batch)[1].logits[0].float().cpu() if batch else None
        base = torch.zeros(())
        if batch and params.adapter:
            with model.disable_adapter():
                base = forward(trainer, batch)[1].logits[0].float().cpu()
    result: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        names = (
            get_peft_model_state_dict(model, state_dict=named_weights(trainer)) if params.adapter else weights
        )
        result["weights"] = selftest.require_saved(folder, list(names))
        if batch and live is not None:
            if device := find_reload_device(trainer):
                loaded = load_logits(folder, job, batch, device)
                result |= selftest.check_reloaded(live, base, loaded, job.backend.precision)
            else:
                result["not_compared"] = "the GPU cannot hold the model twice, and Liger's kernels need it"
        shutil.rmtree(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def find_reload_device(trainer: Trainer) -> torch.device | None:
    """Return the device for a second copy of the model: that of training if it fits there, else the CPU.

    Liger replaces parts of transformers, so with it no model runs on a CPU; then the result may be None.
    """
    device: torch.device = trainer.args.device
    if device.type == "cpu":
        return device
    size = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
    if torch.cuda.mem_get_info(device)[0] >= size + RELOAD_BYTES:
        return device
    return None if trainer.params.use_liger_kernel else torch.device("cpu")


@torch.no_grad()
def load_logits(folder: Path, job: Job, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Load a saved model and compute its logits, in the precision of the live model.

    DeepSpeed computes in half precision throughout; the other strategies keep the adapter in full
    precision and use autocast.
    """
    params, backend = job.params, job.backend
    half = HALF.get(backend.precision)
    loaded = AutoModelForCausalLM.from_pretrained(
        job.base if params.adapter else folder,
        dtype=weight_dtype(params, backend.strategy, backend.precision),
        attn_implementation="sdpa",
        trust_remote_code=False,
    )
    if params.adapter:
        loaded = PeftModel.from_pretrained(loaded, folder)
    if half and backend.strategy in ZERO:
        loaded = loaded.to(half)
    loaded = loaded.to(device).eval()
    inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    is_mixed = bool(half) and backend.strategy not in ZERO
    with torch.autocast(device.type, half or torch.bfloat16, enabled=is_mixed):
        logits: torch.Tensor = summed_loss(loaded, inputs)[1].logits
    return logits[0].float().cpu()
