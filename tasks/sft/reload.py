"""Load a saved model and compare it with the live one: first its weights, then its logits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed as integration

from nightshift.core.errors import StageError
from tasks.sft.job import Job
from tasks.sft.loss import pick, summed_loss
from tasks.sft.model import HALF, weight_dtype
from tasks.sft.strategy import ZERO
from tasks.sft.trainer import Trainer


def load_saved(folder: Path, job: Job) -> Any:
    """Load a saved model, in the precision of the live one, with transformers' eager attention.

    DeepSpeed computes in half precision throughout; the other strategies keep the adapter in full
    precision and use autocast.
    """
    params, backend = job.params, job.backend
    loaded = AutoModelForCausalLM.from_pretrained(
        job.base if params.adapter else folder,
        dtype=weight_dtype(params, backend.strategy, backend.precision),
        attn_implementation="eager",
        trust_remote_code=False,
    )
    if params.adapter:
        loaded = PeftModel.from_pretrained(loaded, folder)
    half = HALF.get(backend.precision)
    return loaded.to(half) if half and backend.strategy in ZERO and params.adapter else loaded


@torch.no_grad()
def load_logits(loaded: Any, job: Job, inputs: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Compute the logits of a loaded model at the labelled positions, shape (n, vocab)."""
    half = HALF.get(job.backend.precision)
    loaded = loaded.to(device).eval()
    given = {key: value.to(device) for key, value in inputs.items()}
    with torch.autocast(
        device.type, half or torch.bfloat16, enabled=bool(half) and job.backend.strategy not in ZERO
    ):
        outputs = summed_loss(loaded, given)[1]
    return pick(outputs.logits, given["labels"]).float().cpu()


def check_weights(trainer: Trainer, job: Job, folder: Path) -> int:
    """Compare every trained weight with the saved one; every rank calls this.

    On disk the names may differ: transformers 5 renames weights when it saves, and splits experts. A full
    model is therefore compared as it is loaded.

    Returns:
        Number of weights; 0 on other ranks than the first.

    Raises:
        StageError: A weight is missing or differs.
    """
    live = find_trained(trainer)
    saved: Mapping[str, torch.Tensor] = {}
    if trainer.is_world_process_zero():
        saved = read_weights(folder, job)
    lost = []
    for name, weight in live.items():
        # Collective where the weights are sharded.
        whole = gather(weight)
        if trainer.is_world_process_zero() and not is_same(saved.get(name), whole):
            lost.append(name)
    if lost:
        raise StageError(
            f"self-test: the saved model lacks {len(lost)} of {len(live)} weights, or has other values, such "
            f"as {lost[0]}; the saved weights differ from the trained ones"
        )
    return len(live) if trainer.is_world_process_zero() else 0


def find_trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the trained weights with the names that they have once loaded: both of a tied weight."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = model.named_parameters(remove_duplicate=False)
    named = {name: weight for name, weight in parameters if weight.requires_grad}
    return get_peft_model_state_dict(model, state_dict=named) if trainer.params.adapter else named


def read_weights(folder: Path, job: Job) -> dict[str, torch.Tensor]:
    """Read an adapter's weights from its file, or those of a full model as transformers loads them."""
    if job.params.adapter:
        file = folder / "adapter_model.safetensors"
        return load_file(file) if file.is_file() else {}
    with no_sharding():
        return dict(load_saved(folder, job).state_dict())


@contextmanager
def no_sharding() -> Iterator[None]:
    """Load a model whole within the block, although DeepSpeed's ZeRO-3 is on."""
    reference = integration._hf_deepspeed_config_weak_ref
    config = reference() if reference else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def gather(weight: torch.Tensor) -> torch.Tensor:
    """Return a copy of a whole weight, which ZeRO-3 or FSDP2 may have sharded."""
    if hasattr(weight, "full_tensor"):
        whole: torch.Tensor = weight.full_tensor()
        return whole
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()


def is_same(saved: torch.Tensor | None, live: torch.Tensor) -> bool:
    """Return whether a saved weight has the values of the live one."""
    return saved is not None and saved.shape == live.shape and torch.equal(saved.float(), live.float().cpu())
