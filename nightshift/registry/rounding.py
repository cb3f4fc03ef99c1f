"""Cast a model's weights to the stored dtype, except those that must not be rounded."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Parameters of state space models whose exponential or recurrence amplifies rounding.
RECURRENT = ("A_log", "D")


def cast_weights(model: Any, dtype: Any, stored: Mapping[str, str]) -> Any:
    """Cast a model, loaded without rounding, in place; return it.

    In float32 stay the weights that the checkpoint has in float32 and that must not be rounded: those of
    `RECURRENT`, those that transformers computes in float32, such as the bias of a router, and, in a
    checkpoint in half precision, all others that its authors left in float32.

    Args:
        model: Loaded transformers model.
        dtype: torch dtype of the stored weights.
        stored: Name of each weight -> its dtype in the checkpoint; empty for quantized checkpoints.
    """
    half = sum(kind in ("BF16", "F16") for kind in stored.values())
    full = {tail(name) for name, kind in stored.items() if kind == "F32"}
    is_half = half > len(stored) / 2
    computed = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        is_delicate = is_half or name.rpartition(".")[2] in RECURRENT or is_part(name, computed)
        if tensor.is_floating_point() and not (tail(name) in full and is_delicate):
            tensor.data = tensor.data.to(dtype)
    return model


def tail(name: str) -> str:
    """Return a weight's name from its layer on: what comes before differs between files and memory.

    Example:
        >>> tail("model.language_model.layers.3.mixer.A_log"), tail("lm_head.weight")
        ('layers.3.mixer.A_log', 'lm_head.weight')
    """
    return name[max(0, name.find("layers.")) :]


def is_part(name: str, parts: Collection[str]) -> bool:
    """Return whether a name contains one of the parts as whole words."""
    return any(f".{part}." in f".{name}." for part in parts)


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Return the dtype of each weight in a folder's safetensors, such as BF16 or F32."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return found
