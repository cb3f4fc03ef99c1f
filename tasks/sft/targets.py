"""The adapter on the structure of the base: which names match, and what PEFT refuses, before weights load."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from nightshift.core.config import suggestion
from nightshift.core.files import read_json
from nightshift.core.paths import START_MODEL
from nightshift.registry.start import ADAPTER_CONFIG
from tasks.sft import SftParams
from tasks.sft.model import ADAPTER_WEIGHTS, adapter_weights, add_adapter, is_tied, layer_number
from tasks.sft.probe import build_config


def find_adapter_faults(config: Mapping[str, Any], params: SftParams) -> list[str]:
    """Return why the adapter of the section, or its patterns, do not fit the base; empty if they do.

    Args:
        config: The base model's config.json.
        params: `sft` section of params.yaml.
    """
    if params.adapter is None and not params.unfrozen_parameters:
        return []
    model = build_structure(config)
    if params.adapter is None:
        return list(find_unmatched_patterns(model, params))
    faults = [*find_unmatched(model, params), *find_untrainable(model, params)]
    if faults:
        return faults
    try:
        add_adapter(model, params)
    # PEFT refuses combinations of a layer and an option with errors of several types.
    except Exception as err:  # noqa: BLE001
        return [f"sft: PEFT cannot add this adapter: {str(err).strip()}; change the lora_ options it names"]
    return []


def build_structure(config: Mapping[str, Any]) -> Any:
    """Build a base on torch's meta device: all modules, and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(config), trust_remote_code=False)


def find_other_weights(
    config: Mapping[str, Any], params: SftParams, start: int, unreached: Sequence[str]
) -> Iterator[str]:
    """Yield how the adapter of the section differs from that of the version from which training starts.

    Args:
        config: The base model's config.json.
        params: `sft` section of params.yaml, with an adapter that fits the base.
        start: The version.
        unreached: Names of modules that get no adapter.
    """
    model = add_adapter(build_structure(config), params, unreached)
    own = {name: list(weight.shape) for name, weight in adapter_weights(model).items()}
    with safe_open(START_MODEL / ADAPTER_WEIGHTS, "pt") as file:
        known = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    if own == known:
        return
    targets = read_json(START_MODEL / ADAPTER_CONFIG)["target_modules"]
    different = sorted(name for name in own.keys() | known.keys() if own.get(name) != known.get(name))
    first = different[0]
    yield (
        f"sft.lora_target_modules is {params.lora_target_modules}, but version {start}, from which training "
        f"starts (sft.start_from: champion), has an adapter on {targets}: {len(different)} weights differ, "
        f"such as {first} with the shape {own.get(first, 'none')} instead of {known.get(first, 'none')}; set "
        "the same modules, or set sft.start_from to base, which trains a new model"
    )


def find_unmatched_patterns(model: Any, params: SftParams) -> Iterator[str]:
    """Yield every pattern of full fine-tuning that no parameter of the base matches."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in params.unfrozen_parameters:
        if not any(re.match(pattern, name) for name in names):
            yield (
                f"sft.unfrozen_parameters: {pattern!r} matches no parameter of the base; names are matched "
                f"from their start, such as {names[-1]}"
            )


def find_unmatched(model: Any, params: SftParams) -> Iterator[str]:
    """Yield every name of the section that no module, or no parameter, of the base has."""
    everything = [name for name, _ in model.named_modules() if name]
    layers = params.lora_layers_to_transform
    found = (layer_number(f"{name}.") for name in everything)
    numbers = {number for number in found if number is not None}
    if unknown := sorted(set(layers or ()) - numbers):
        yield (
            f"sft.lora_layers_to_transform: {', '.join(map(str, unknown))}: no such layer; the base has "
            f"layers 0 to {max(numbers, default=0)}"
        )
        return
    names = [name for name in everything if layers is None or layer_number(name) in layers]
    where = "the base" if layers is None else f"layers {', '.join(map(str, layers))} of the base"
    words = sorted({part for name in everything for part in name.split(".") if not part.isdigit()})
    targets = params.lora_target_modules
    if isinstance(targets, list):
        for target in targets:
            if not any(is_named(name, target) for name in names):
                yield (
                    f"sft.lora_target_modules: {target}: no such module in {where}; "
                    f"{suggestion(target, words)}"
                )
    elif targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
        example = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        yield (
            f"sft.lora_target_modules: {targets!r} matches no module of {where}; whole names are matched, "
            f"such as {example}"
        )
    parameters = [name for name, _ in model.named_parameters()]
    for end in params.lora_target_parameters:
        if not any(is_named(name, end) for name in parameters):
            yield (
                f"sft.lora_target_parameters: {end}: no parameter of the base has a name that ends so; names "
                f"are such as {parameters[-1]}"
            )
    for target in params.lora_modules_to_save:
        if not any(is_named(name, target) for name in everything):
            yield (
                f"sft.lora_modules_to_save: {target}: no such module in the base; {suggestion(target, words)}"
            )


def find_untrainable(model: Any, params: SftParams) -> Iterator[str]:
    """Yield the embeddings and heads that an adapter cannot train as they are."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for name, module in model.named_modules():
        if module not in (head, embeddings) or not is_target(name, params):
            continue
        last = name.rpartition(".")[2]
        remedy = f"remove it, or set sft.lora_modules_to_save: [{last}], which trains it whole"
        if is_tied(model):
            yield (
                f"sft.lora_target_modules: {last}: the base ties embeddings and head, and an adapter on one "
                f"could not be merged into weights that are both; {remedy}"
            )
        elif module is head:
            yield f"sft.lora_target_modules: {last}: TRL trains no adapter on the head; {remedy}"


def is_target(name: str, params: SftParams) -> bool:
    """Return whether the section names a module, other than by `all-linear`, which means the blocks."""
    targets = params.lora_target_modules
    if isinstance(targets, list):
        return any(is_named(name, target) for target in targets)
    return targets != "all-linear" and re.fullmatch(targets, name) is not None


def is_named(name: str, end: str) -> bool:
    """Return whether a name is `end`, or ends with it as whole words.

    Example:
        >>> is_named("layers.0.q_proj", "q_proj"), is_named("layers.0.q_proj", "proj")
        (True, False)
    """
    return name == end or name.endswith(f".{end}")
