"""Settings of a file that work in its tool but not together here: the nearest ones, with the reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from infra.importers.findings import Finding, default, unmapped
from tasks.sft.conflicts import EIGHT_BIT, PAGED, WHOLE


class Rule(NamedTuple):
    """A conflict between mapped values.

    Attributes:
        target: Parameter that changes.
        applies: Function from all values to whether the conflict exists.
        value: Value that fits.
        why: Reason.
    """

    target: str
    applies: Callable[[Mapping[str, Any]], bool]
    value: Any
    why: str


def _is_quantized(values: Mapping[str, Any]) -> bool:
    return bool(values.get("sft.adapter") == "qlora")


def _offloads(values: Mapping[str, Any]) -> bool:
    return bool(values.get("sft.offload_optimizer", "none") != "none")


OFF = False
RULES = (
    Rule(
        "sft.offload_param",
        lambda values: _is_quantized(values) and values.get("sft.offload_param", "none") != "none",
        "none",
        "4-bit weights cannot be offloaded; they take a quarter of the memory",
    ),
    Rule(
        "sft.strategy",
        lambda values: _is_quantized(values) and values.get("sft.strategy") == "zero3",
        "fsdp2",
        "zero3 cannot shard 4-bit weights",
    ),
    Rule(
        "sft.offload_optimizer",
        lambda values: _offloads(values) and values.get("sft.strategy") == "fsdp2",
        "none",
        "fsdp2 keeps the optimizer state with the weights",
    ),
    Rule(
        "sft.optim",
        lambda values: (
            (values.get("sft.strategy") == "fsdp2" and values.get("sft.optim") in (*EIGHT_BIT, *PAGED))
            or (
                _offloads(values)
                and values.get("sft.optim") not in ("adamw_torch", "adamw_torch_fused", None)
            )
        ),
        "adamw_torch",
        "its state cannot be sharded by fsdp2, nor offloaded: then DeepSpeed's AdamW runs on the CPU",
    ),
    Rule(
        "sft.strategy",
        lambda values: (
            values.get("sft.optim") in WHOLE and values.get("sft.strategy") not in ("single", "ddp", None)
        ),
        "ddp",
        "the optimizer needs whole weights on each device",
    ),
    Rule(
        "sft.torch_compile",
        lambda values: bool(values.get("sft.torch_compile")) and values.get("sft.use_liger_kernel") is True,
        OFF,
        "Liger's kernels replace the same operators",
    ),
    Rule(
        "sft.strategy",
        lambda values: (
            bool(values.get("sft.lora_modules_to_save") or values.get("sft.lora_target_parameters"))
            and values.get("sft.strategy") in ("zero3", "fsdp2")
        ),
        "zero2",
        "whole modules and adapters of parameters need unsharded weights; zero2 needs more memory",
    ),
)


def fit(found: Sequence[Finding], values: Callable[[Sequence[Finding]], Mapping[str, Any]]) -> list[Finding]:
    """Replace settings that exclude each other here; the others stay.

    Args:
        found: Findings.
        values: Function from findings to the values that they set.
    """
    result = list(found)
    for rule in RULES:
        current = values(result)
        if not rule.applies(current):
            continue
        given = [one for one in result if one.target == rule.target and one.kind == "mapped"]
        key = next((one.key for one in given if not one.is_default), rule.target)
        wanted = current.get(rule.target)
        result = [one for one in result if one not in given]
        result.append(unmapped(key, f"{wanted}: {rule.why}; {rule.target} becomes {rule.value}"))
        result.append(replace(default(key, rule.target, rule.value), note=rule.why))
    return result
