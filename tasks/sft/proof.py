"""Run the self-test on the trainer once, when the model is wrapped and about to train."""

import ctypes
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nightshift.core.errors import StageError
from nightshift.core.files import write_figures
from nightshift.data.encode import IGNORED
from tasks.sft import selftest
from tasks.sft.attention import boundaries, lengths_from_positions
from tasks.sft.job import Job
from tasks.sft.layers import unfused
from tasks.sft.loss import pick, summed_loss
from tasks.sft.reload import check_weights, load_logits, load_saved
from tasks.sft.selftest import PackedRow
from tasks.sft.strategy import GIB
from tasks.sft.trainer import Trainer

# Memory for the activations and logits of the self-test, in a model that is loaded a second time.
RELOAD_BYTES = 2 * GIB
# Tokens at the start, and at the end, of an example whose logits are compared.
SCORED = 32
# Weights that are 0 in a new adapter.
ADAPTER_ZERO = re.compile("lora_B|lora_embedding_A")
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
    """Run all checks on two examples in one batch.

    Raises:
        StageError: A check fails; training must not start.
    """
    require_options(trainer)
    folder = job.folder / "rehearsal"
    text = trainer.model.config.get_text_config()
    longest = min(selftest.EXAMPLE_TOKENS, (getattr(text, "max_position_embeddings", None) or 10**9) // 2)
    pair = selftest.find_pair(trainer.train_dataset, longest)
    if pair is None:
        return {
            "saving": check_saving(trainer, job, None, folder),
            "isolation": "only one example has labels",
        }
    batch, examples = collate(trainer, pair), selftest.split(pair)
    trainer.model_wrapped.eval()
    with torch.no_grad():
        isolation = check_isolation(trainer, job, batch, examples)
        loss = check_loss(trainer, job, batch) if trainer.head else None
    gradients = check_gradients(trainer, job, batch, examples)
    saving = check_saving(trainer, job, examples[1], folder)
    trainer.model_wrapped.train()
    return {"isolation": isolation, "loss": loss, "gradients": gradients, "saving": saving}


def require_options(trainer: Trainer) -> None:
    """Check options that become active in the model only when training starts.

    Raises:
        StageError: One is not as requested.
    """
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


def check_isolation(
    trainer: Trainer, job: Job, batch: dict[str, Any], examples: Sequence[PackedRow]
) -> dict[str, Any]:
    """Change the first example of a batch, and compare the logits of the second; see `selftest`."""
    first, second = (score_ends(plain(trainer, example)) for example in examples)
    length, end = first["input_ids"].shape[1], second["input_ids"].shape[1]
    size = trainer.model.config.get_text_config().vocab_size
    # In a flattened row the second example follows the first one, in padded rows it has its own row.
    row, start = (0, length) if job.backend.batches == "flattened" else (1, 0)
    batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
    batch["labels"][row, start : start + end] = second["labels"][0]
    changed = batch["input_ids"].clone()
    changed[0, :length] = (changed[0, :length] + 1) % size
    other = {**batch, "input_ids": changed}
    logits = label_logits(trainer, batch)
    found = {"moved": selftest.distance(label_logits(trainer, other), logits)}
    if job.backend.batches == "flattened":
        by_positions = [without_boundaries(trainer, one) for one in (batch, other)]
        one, two = (label_logits(trainer, given) for given in by_positions)
        found["moved_by_positions"] = selftest.distance(two, one)
    with eager(trainer):
        alone = reference_logits(trainer, second)
        beside = [reference_logits(trainer, stack(second, shift, size)) for shift in (1, 2, 3)]
        joined = reference_logits(trainer, join(first, second))
    found["eager"] = selftest.distance(logits, alone)
    noise = max(selftest.distance(one, beside[0]) for one in beside)
    return selftest.check_isolation(found, noise, selftest.distance(joined, alone), job.backend.precision)


def plain(trainer: Trainer, example: PackedRow) -> dict[str, torch.Tensor]:
    """Return one example as transformers gets it without a collator: tokens and labels, shape (1, n)."""
    values = {"input_ids": example["input_ids"], "labels": example["labels"]}
    return {key: torch.tensor(value, device=trainer.args.device)[None] for key, value in values.items()}


def score_ends(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an example with labels at its start, where a leak shows most, and at its end."""
    labels = inputs["input_ids"].clone()
    labels[:, 0] = labels[:, SCORED:-SCORED] = IGNORED
    return {**inputs, "labels": labels}


def join(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return two examples as one, in which the second attends to the first, without labels of the first."""
    labels = torch.cat([torch.full_like(first["labels"], IGNORED), second["labels"]], 1)
    return {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "labels": labels}


def stack(example: dict[str, torch.Tensor], shift: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return a batch of two separate rows of equal length: other tokens without labels, and the example."""
    other = (example["input_ids"] + shift) % vocab_size
    labels = torch.cat([torch.full_like(example["labels"], IGNORED), example["labels"]])
    return {"input_ids": torch.cat([other, example["input_ids"]]), "labels": labels}


@contextmanager
def eager(trainer: Trainer) -> Iterator[None]:
    """Use transformers' eager attention, norms and gates within the block."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if trainer.params.adapter else model
    chosen = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with unfused(model):
            yield
    finally:
        model.set_attn_implementation(chosen)


def collate(trainer: Trainer, rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Collate rows into a batch, as in training."""
    batch: dict[str, Any] = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    return batch


def label_logits(trainer: Trainer, inputs: dict[str, Any], model: Any = None) -> torch.Tensor:
    """Compute the logits of a model, or the wrapped one, at the labelled positions, shape (n, vocab)."""
    with trainer.compute_loss_context_manager():
        outputs = summed_loss(model or trainer.model_wrapped, dict(inputs))[1]
    return pick(outputs.logits, inputs["labels"]).float()


def reference_logits(trainer: Trainer, inputs: dict[str, Any]) -> torch.Tensor:
    """Compute logits like `label_logits` in `eager` attention, for which a compiled model is not compiled."""
    return label_logits(trainer, inputs, trainer.model if trainer.params.torch_compile else None)


def without_boundaries(trainer: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with positions alone.

    Some kernels use only the boundaries, so a wrong mask or position would show only with another one.
    """
    kept = {key: value for key, value in batch.items() if key not in BOUNDARIES}
    if trainer.model.config._attn_implementation == "flash_attention_4":
        # It needs them; transformers would derive them with the longest length as a tensor, which fails.
        lengths = lengths_from_positions(batch["position_ids"])
        kept |= boundaries(lengths, batch["position_ids"].device)
    return kept


def check_loss(trainer: Trainer, job: Job, batch: dict[str, Any]) -> dict[str, Any]:
    """Compare the loss in chunks with the loss of all logits, both as a plain sum."""
    one = torch.ones(1, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        given, _ = trainer.compute_loss(
            trainer.model_wrapped, dict(batch), return_outputs=True, num_items_in_batch=one
        )
    return selftest.check_loss(given.item(), training_loss(trainer, batch).item(), job.backend.precision)


def training_loss(trainer: Trainer, batch: dict[str, Any]) -> torch.Tensor:
    """Compute the loss of the wrapped model with the training function itself, as a plain sum."""
    one = torch.ones(1, device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(trainer.model_wrapped, dict(batch), num_items_in_batch=one)
    return loss


def check_gradients(
    trainer: Trainer, job: Job, batch: dict[str, Any], examples: Sequence[PackedRow]
) -> dict[str, Any]:
    """Compare the gradients of the batch with those of its examples alone, in eager attention."""
    names = list(trainable(trainer))
    if job.backend.strategy == "zero3":
        return {"weights": len(names), "not_compared": "zero3 shards the weights"}
    # On a CPU, bitsandbytes multiplies 4-bit weights in bf16, whatever the requested precision.
    precision = "bf16" if trainer.params.adapter == "qlora" else job.backend.precision
    # While one factor of the adapter is 0, no gradient reaches the other.
    with randomized(trainer):
        together = backward(trainer, batch, job)
        with eager(trainer):
            alone = [backward(trainer, plain(trainer, example), job) for example in examples]
    return selftest.check_gradients(together, alone, precision, names)


@contextmanager
def randomized(trainer: Trainer) -> Iterator[None]:
    """Give the adapter an effect within the block, about a tenth of that of the weights, at any rank."""
    params = trainer.params
    scale = params.lora_alpha / (params.lora_r**0.5 if params.use_rslora else params.lora_r)
    weights = [p for name, p in trainable(trainer).items() if ADAPTER_ZERO.search(name)]
    with selftest.perturbed(weights, 0.2 / (scale * params.lora_r**0.5)):
        yield


def backward(trainer: Trainer, batch: dict[str, Any], job: Job) -> list[torch.Tensor | None]:
    """Compute the gradients of the trainable weights, and leave none in the model."""
    if job.backend.strategy == "fsdp2":
        # FSDP2's sharded weights are in no autograd graph; hooks write their gradients. A pass without
        # gradients leaves the embeddings unsharded until a backward pass.
        torch.autograd.backward(training_loss(trainer, batch))
        parameters = list(trainable(trainer).values())
        found = [p.grad.full_tensor() if p.grad is not None else None for p in parameters]  # type: ignore[attr-defined]
        trainer.model_wrapped.zero_grad(set_to_none=True)
        return found
    parameters = list(trainable(trainer).values())
    # Unwrapped model: DDP and ZeRO count every backward pass as part of a training step.
    with trainer.compute_loss_context_manager():
        loss, _ = summed_loss(trainer.model, dict(batch), trainer.params.label_smoothing_factor, trainer.head)
    if not (parameters and loss.requires_grad):
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def trainable(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    """Return name -> weight of all trainable weights."""
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}


def check_saving(trainer: Trainer, job: Job, example: PackedRow | None, folder: Path) -> dict[str, Any]:
    """Save as at the end of training, load the result, and compare the weights, then the logits.

    Logits are not compared if ZeRO-3 shards the weights or the live base is quantized.
    """
    params, model = trainer.params, trainer.model
    is_sharded = job.backend.strategy == "zero3"
    inputs = None
    if example and not (is_sharded or params.adapter == "qlora" or params.fp8_base):
        inputs = plain(trainer, example)
    with nullcontext() if is_sharded else randomized(trainer), torch.no_grad():
        trainer.save_model(str(folder))
        result: dict[str, Any] = {"weights": check_weights(trainer, job, folder)}
        if inputs:
            with eager(trainer):
                live = reference_logits(trainer, inputs).cpu()
                base = torch.zeros_like(live)
                if params.adapter:
                    with model.disable_adapter():
                        base = reference_logits(trainer, inputs).cpu()
    if trainer.is_world_process_zero():
        if inputs:
            if device := find_reload_device(trainer):
                loaded = load_logits(load_saved(folder, job), job, inputs, device)
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
