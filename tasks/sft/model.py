"""Load the model to train: base weights in the precision of the job, plus the adapter."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tasks.sft.attention  # noqa: F401 - registers kernels
from nightshift.core.errors import StageError
from tasks.sft import SftParams
from tasks.sft.strategy import keeps_half, uses_autocast

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Modules whose weights a kernel reads directly, past an adapter. PEFT refuses one on the first two, in these
# model types; one on the third would silently never train.
MAMBA_KINDS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
MAMBA_MODULES = ("out_proj", "conv1d")
STEP_MODULE = "dt_proj"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_model(
    base: str,
    params: SftParams,
    strategy: str,
    precision: str,
    attention: str,
    unreached: Sequence[str] = (),
) -> Any:
    """Load the base model and add the adapter.

    Args:
        base: Folder with config.json and safetensors.
        params: Adapter and memory parameters.
        strategy: Distributed strategy; ZeRO keeps its own full-precision weights.
        precision: bf16, fp16, tf32 or fp32.
        attention: Attention implementation.
        unreached: Names of modules that stay frozen, since text does not reach them.
    """
    dtype = weight_dtype(params, strategy, precision)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        attn_implementation=attention,
        quantization_config=nf4_config(dtype) if params.adapter == "qlora" else None,
        trust_remote_code=False,
        use_safetensors=True,
    )
    # Training never reads the KV cache, and a cache would let packed examples attend to each other.
    model.config.use_cache = False
    for name in unreached:
        model.get_submodule(name).requires_grad_(requires_grad=False)
    freeze_others(model, params.unfrozen_parameters)
    return model if params.adapter is None else adapt(model, params, strategy, precision, unreached)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the adapter of a model by the names with which they are saved."""
    parameters = model.named_parameters(remove_duplicate=False)
    named = {name: weight for name, weight in parameters if weight.requires_grad}
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=named)
    return weights


def load_adapter(model: Any, folder: Path) -> None:
    """Give the adapter of a model the weights of a saved one.

    Raises:
        StageError: The two have different weights; PEFT would skip those that do not fit.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    set_peft_model_state_dict(model, saved)
    live = adapter_weights(model)
    different = [
        name
        for name in sorted(live.keys() | saved.keys())
        if not (name in live and name in saved and torch.equal(live[name], saved[name].to(live[name])))
    ]
    if different:
        raise StageError(
            f"{folder}: {len(different)} weights are not those of the adapter to train, such as "
            f"{different[0]}; set sft.start_from to base"
        )


def freeze_others(model: Any, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names no pattern matches; without patterns, none."""
    for name, weight in model.named_parameters():
        if patterns and not any(re.match(pattern, name) for pattern in patterns):
            weight.requires_grad_(requires_grad=False)


def adapt(model: Any, params: SftParams, strategy: str, precision: str, unreached: Sequence[str] = ()) -> Any:
    """Add the adapter to a base model; see `load_model`."""
    if params.adapter == "qlora":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=params.activation_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": params.use_reentrant},
        )
        keep_unpacked(model)
    model = add_adapter(model, params, unreached)
    if uses_autocast(strategy, precision):
        # Autocast casts the adapter input to half precision; PEFT would needlessly upcast it first.
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    return model


def weight_dtype(params: SftParams, strategy: str, precision: str) -> torch.dtype:
    """Return the dtype of the stored weights; see `keeps_half`."""
    return HALF[precision] if keeps_half(params, strategy, precision) else torch.float32


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's 4-bit quantization config (Dettmers et al., arXiv 2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP2 can shard only weights of one dtype.
        bnb_4bit_quant_storage=dtype,
    )


def keep_unpacked(model: Any) -> None:
    """Keep 4-bit layers in training mode: in evaluation mode on a CPU, bitsandbytes packs their weights.

    No gradient passes a packed layer, and it stays packed.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train(mode=True)
            module.train = partial(stay_in_training, module)


def stay_in_training(module: Any, mode: bool = True) -> Any:  # noqa: ARG001, FBT001, FBT002 - torch's signature
    """Replace a module's `train`: return the module as it is."""
    return module


def add_adapter(model: Any, params: SftParams, unreached: Sequence[str] = ()) -> Any:
    """Return the model with the adapter of the section.

    Args:
        model: Base model, on the meta device if only its structure is needed.
        params: `sft` section of params.yaml.
        unreached: Names of modules that get none.
    """
    return get_peft_model(model, lora_config(params, model, unreached))


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a module is in, or None outside the layers.

    Example:
        >>> layer_number("model.layers.3.mlp.experts.7.up_proj"), layer_number("model.embed_tokens")
        (3, None)
    """
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def find_excluded(model: Any, unreached: Sequence[str], layers: Sequence[int] | None = None) -> Iterator[str]:
    """Yield the names of modules that get no adapter, since it would break them, or never train.

    Args:
        model: Base model.
        unreached: Names of modules that text does not reach.
        layers: Numbers of the layers that get an adapter, or None for all.
    """
    is_mamba = model.config.model_type in MAMBA_KINDS
    for name, module in model.named_modules():
        # Some routers are linear layers that return a tuple, which no adapter expects.
        is_router = isinstance(module, torch.nn.Linear) and "Router" in type(module).__name__
        is_unreached = isinstance(module, torch.nn.Linear) and name.startswith(
            tuple(f"{part}." for part in unreached)
        )
        last = name.rpartition(".")[2]
        is_read = last == STEP_MODULE or (is_mamba and last in MAMBA_MODULES)
        is_elsewhere = layers is not None and layer_number(name) not in layers
        if is_router or is_unreached or is_read or (is_elsewhere and has_matrix(module)):
            yield name


def has_matrix(module: torch.nn.Module) -> bool:
    """Return whether a module has a matrix of its own, to which an adapter could be added."""
    # ZeRO-3 has replaced the weights by their shards.
    shapes = (getattr(weight, "ds_shape", weight.shape) for weight in module.parameters(recurse=False))
    return any(len(shape) > 1 for shape in shapes)


def is_tied(model: Any) -> bool:
    """Return whether the head of a model uses the weights of its embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def lora_config(params: SftParams, model: Any, unreached: Sequence[str] = ()) -> LoraConfig:
    """Convert the parameters to PEFT's.

    Tied weights stay tied: otherwise, the merged model would have two matrices where its config has one.
    """
    ties = bool(params.lora_modules_to_save) and is_tied(model)
    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.lora_target_modules,
        exclude_modules=sorted(find_excluded(model, unreached, params.lora_layers_to_transform)) or None,
        target_parameters=params.lora_target_parameters or None,
        # A copy: for tied weights, PEFT changes the list.
        modules_to_save=[*params.lora_modules_to_save] or None,
        ensure_weight_tying=ties,
        use_dora=params.use_dora,
        use_rslora=params.use_rslora,
        task_type="CAUSAL_LM",
    )
