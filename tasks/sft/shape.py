"""Model sizes from config.json, and the parameter counts that follow from them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams

NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Linears = dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama-like model, as in config.json; `biases` is the number of biases per block."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    is_tied: bool
    biases: int

    @property
    def query(self) -> int:
        """Total width of all query heads."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Total width of all key heads, equal to that of the value heads."""
        return self.kv_heads * self.head_size


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Read the model sizes from config.json.

    Raises:
        ConfigError: A size is missing, or the model is a mixture of experts.
    """
    if experts := [key for key in config if "experts" in key]:
        raise ConfigError(f"config.json: {experts[0]}: a mixture of experts; its memory cannot be estimated")
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        return Shape(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", True)),
            biases=_count_biases(config),
        )
    except KeyError as err:
        raise ConfigError(
            f"config.json: {err.args[0]} is missing; memory can be estimated only for Llama-like "
            f"models, got model_type {config.get('model_type')!r}"
        ) from err


def linears(shape: Shape) -> Linears:
    """Return name -> (inputs, outputs) of the linear layers of one block."""
    return {
        "q_proj": (shape.hidden, shape.query),
        "k_proj": (shape.hidden, shape.key),
        "v_proj": (shape.hidden, shape.key),
        "o_proj": (shape.query, shape.hidden),
        "gate_proj": (shape.hidden, shape.intermediate),
        "up_proj": (shape.hidden, shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
    }


def count_linear(shape: Shape) -> int:
    """Count the weights of all linear layers except the head, without biases."""
    return shape.layers * sum(inputs * outputs for inputs, outputs in linears(shape).values())


def count_parameters(shape: Shape) -> int:
    """Count all parameters; a head tied to the embeddings adds none.

    Example:
        >>> count_parameters(Shape(576, 1536, 30, 9, 3, 64, 49152, True, 0))
        134515008
    """
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2)
    return embeddings + count_linear(shape) + shape.layers * (shape.biases + 2 * shape.hidden) + shape.hidden


def parameters(shape: Shape) -> dict[str, int]:
    """Return name -> size of the parameters of a Llama-like model, without biases."""
    table = shape.vocabulary * shape.hidden
    sizes = {"model.embed_tokens.weight": table, "model.norm.weight": shape.hidden}
    if not shape.is_tied:
        sizes["lm_head.weight"] = table
    for i in range(shape.layers):
        for name, (inputs, outputs) in linears(shape).items():
            sizes[f"model.layers.{i}.{part_of(name)}.{name}.weight"] = inputs * outputs
        for name in NORMS:
            sizes[f"model.layers.{i}.{name}.weight"] = shape.hidden
    return sizes


def part_of(name: str) -> str:
    """Return the part of a block that a linear layer is in."""
    return "self_attn" if name in ATTENTION else "mlp"


def count_trained(shape: Shape, params: SftParams) -> int:
    """Count the weights that train: an adapter, all parameters, or those that the patterns match.

    Raises:
        ConfigError: A target module is unknown.
    """
    if params.adapter:
        return count_adapter(shape, params)
    if not params.unfrozen_parameters:
        return count_parameters(shape)
    found = parameters(shape)
    return sum(
        size
        for name, size in found.items()
        if any(re.match(pattern, name) for pattern in params.unfrozen_parameters)
    )


def targets(shape: Shape, params: SftParams) -> Linears:
    """Return the linear layers of a block that get an adapter; for a regular expression, of any block.

    Raises:
        ConfigError: A target module is unknown.
    """
    known = linears(shape)
    if params.lora_target_modules == "all-linear":
        return known
    if isinstance(params.lora_target_modules, str):
        return _matches(shape, params.lora_target_modules)
    names = [name.rpartition(".")[2] for name in params.lora_target_modules]
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(
            f"params.yaml: sft.lora_target_modules: {', '.join(unknown)}: not a linear layer of a "
            f"block; use {', '.join(known)}"
        )
    return {name: known[name] for name in names}


def _matches(shape: Shape, pattern: str) -> Linears:
    """Return the linear layers whose name in a Llama-like model matches a regular expression.

    Raises:
        ConfigError: There is none.
    """
    found = {
        name: size
        for name, size in linears(shape).items()
        if any(re.fullmatch(pattern, f"model.layers.{i}.{part_of(name)}.{name}") for i in range(shape.layers))
    }
    if not found:
        raise ConfigError(
            f"params.yaml: sft.lora_target_modules: {pattern!r} matches no linear layer; whole names are "
            "matched, such as model.layers.0.self_attn.q_proj"
        )
    return found


def count_whole(shape: Shape, params: SftParams) -> int:
    """Count the weights of the modules that are trained whole; tied embeddings and head count once.

    Raises:
        ConfigError: A module is unknown.
    """
    table = shape.vocabulary * shape.hidden
    sizes = {name: shape.layers * inputs * outputs for name, (inputs, outputs) in linears(shape).items()}
    sizes |= dict.fromkeys(NORMS, shape.layers * shape.hidden)
    sizes |= {"norm": shape.hidden, "embed_tokens": table, "lm_head": table}
    names = set(params.lora_modules_to_save)
    if unknown := sorted(names - sizes.keys()):
        raise ConfigError(
            f"params.yaml: sft.lora_modules_to_save: {', '.join(unknown)}: unknown; use {', '.join(sizes)}"
        )
    if shape.is_tied and {"embed_tokens", "lm_head"} <= names:
        names.remove("lm_head")
    return sum(sizes[name] for name in names)


def count_adapter(shape: Shape, params: SftParams) -> int:
    """Count the trained parameters of an adapter.

    These are two low-rank matrices per target module, DoRA's magnitudes, and modules that are trained whole.

    Raises:
        ConfigError: A target module is unknown.
    """
    sizes = targets(shape, params).values()
    dora = sum(outputs for _, outputs in sizes) if params.use_dora else 0
    layers = shape.layers if params.lora_layers_to_transform is None else len(params.lora_layers_to_transform)
    blocks = layers * (params.lora_r * sum(inputs + outputs for inputs, outputs in sizes) + dora)
    return blocks + count_whole(shape, params)


def _count_biases(config: Mapping[str, Any]) -> int:
    """Count the biases of one block; Qwen2 has them on q, k and v without a config entry."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    keys = 2 * (config.get("num_key_value_heads") or heads) * size
    attention = heads * size + keys
    if config.get("model_type") != "qwen2":
        attention = attention + hidden if config.get("attention_bias") else 0
    return int(attention + (2 * config["intermediate_size"] + hidden if config.get("mlp_bias") else 0))
