"""Load the model to train: base weights in the precision of the job, plus the adapter."""

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tasks.sft.attention  # noqa: F401 - registers kernels
from nightshift.core.config import suggestion
from nightshift.core.errors import ConfigError
from tasks.sft import SftParams
from tasks.sft.strategy import keeps_half, uses_autocast

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(base: str, params: SftParams, strategy: str, precision: str, attention: str) -> Any:
    """Load the base model and add the adapter.

    Args:
        base: Folder with config.json and safetensors.
        params: Adapter and memory parameters.
        strategy: Distributed strategy; ZeRO keeps its own full-precision weights.
        precision: bf16, fp16, tf32 or fp32.
        attention: Attention implementation.
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
    return model if params.adapter is None else adapt(model, params, strategy, precision)


def adapt(model: Any, params: SftParams, strategy: str, precision: str) -> Any:
    """Add the adapter to a base model; see `load_model`."""
    if params.adapter == "qlora":
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=params.activation_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": params.use_reentrant},
        )
    require_modules(model, params)
    model = get_peft_model(model, lora_config(params, model))
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


def require_modules(model: Any, params: SftParams) -> None:
    """Check that the model has the modules that the parameters name.

    Raises:
        ConfigError: A regular expression, or a name, matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    pattern = params.lora_target_modules
    is_pattern = isinstance(pattern, str) and pattern != "all-linear"
    if is_pattern and not any(re.fullmatch(str(pattern), name) for name in names):
        example = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        raise ConfigError(
            f"params.yaml: sft.lora_target_modules: {pattern!r} matches no module of the base; whole "
            f"names are matched, such as {example}"
        )
    parameters = [name for name, _ in model.named_parameters()]
    for end in params.lora_target_parameters:
        if not any(name == end or name.endswith(f".{end}") for name in parameters):
            raise ConfigError(
                f"params.yaml: sft.lora_target_parameters: {end}: no parameter of the base has a name that "
                f"ends so; names are such as {parameters[-1]}"
            )
    known = {name.rpartition(".")[2] for name in names}
    if unknown := [name for name in params.lora_modules_to_save if name not in known]:
        raise ConfigError(
            f"params.yaml: sft.lora_modules_to_save: {', '.join(unknown)}: no such module in the base; "
            f"{suggestion(unknown[0], sorted(name for name in known if name and not name.isdigit()))}"
        )


def is_tied(model: Any) -> bool:
    """Return whether the head of a model uses the weights of its embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight


def lora_config(params: SftParams, model: Any) -> LoraConfig:
    """Convert the parameters to PEFT's.

    Tied weights stay tied: otherwise, the merged model would have two matrices where its config has one.
    """
    ties = bool(params.lora_modules_to_save) and is_tied(model)
    return LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=params.lora_target_modules,
        target_parameters=params.lora_target_parameters or None,
        modules_to_save=params.lora_modules_to_save or None,
        ensure_weight_tying=ties,
        use_dora=params.use_dora,
        use_rslora=params.use_rslora,
        task_type="CAUSAL_LM",
    )
