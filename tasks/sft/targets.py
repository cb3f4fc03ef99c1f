"""The adapter on the structure of the base: which names match, and what PEFT refuses, before weights load."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from nightshift.core.config import suggestion
from tasks.sft import SftParams
from tasks.sft.model import add_adapter, is_tied
from tasks.sft.probe import build_config


def find_adapter_faults(config: Mapping[str, Any], params: SftParams) -> list[str]:
    """Return why the adapter of the section does not fit the base; empty if it does.

    The model is built on torch's meta device: all modules, and no memory.

    Args:
        config: The base model's config.json.
        params: `sft` section of params.yaml.
    """
    if params.adapter is None:
        return []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(config), trust_remote_code=False)
    faults = [*find_unmatched(model, params), *find_untrainable(model, params)]
    if faults:
        return faults
    try:
        add_adapter(model, params)
    # PEFT refuses combinations of a layer and an option with errors of several types.
    except Exception as err:  # noqa: BLE001
        return [f"sft: PEFT cannot add this adapter: {str(err).strip()}; change the lora_ options it names"]
    return []


def find_unmatched(model: Any, params: SftParams) -> Iterator[str]:
    """Yield every name of the section that no module, or no parameter, of the base has."""
    names = [name for name, _ in model.named_modules() if name]
    words = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    targets = params.lora_target_modules
    if isinstance(targets, list):
        for target in targets:
            if not any(is_named(name, target) for name in names):
                yield (
                    f"sft.lora_target_modules: {target}: no such module in the base; "
                    f"{suggestion(target, words)}"
                )
    elif targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
        example = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        yield (
            f"sft.lora_target_modules: {targets!r} matches no module of the base; whole names are matched, "
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
        if not any(is_named(name, target) for name in names):
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
