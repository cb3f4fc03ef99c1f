"""What the packed rows ask of the model, checked before any process starts."""

from collections.abc import Iterator, Mapping
from typing import Any

from nightshift.core.errors import ConfigError
from nightshift.core.paths import PACKED
from tasks.sft import SftParams
from tasks.sft.machine import Machine
from tasks.sft.rows import Sizes


def require_rows_fit(sizes: Sizes, config: Mapping[str, Any], params: SftParams, machine: Machine) -> None:
    """Check that the model can train on the rows; report all problems at once.

    Args:
        sizes: Sizes of the packed rows.
        config: The model's config.json.
        params: `sft` section of params.yaml.
        machine: Properties of this machine.

    Raises:
        ConfigError: A token has no embedding, or the model cannot keep the examples of a row apart.
    """
    if faults := [*find_unknown_tokens(sizes, config), *find_mixed_rows(sizes, params, machine)]:
        raise ConfigError("\n  ".join(["these rows do not fit the base:", *faults]))


def find_unknown_tokens(sizes: Sizes, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a token has no embedding; on a GPU it would end in a device-side assert."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if size is not None and sizes.largest_token >= size:
        yield (
            f"{PACKED}: token {sizes.largest_token}, but the base has embeddings for {size} tokens; list the "
            "tokens that its chat template adds in base.added_tokens, which extends the embeddings"
        )


def find_mixed_rows(sizes: Sizes, params: SftParams, machine: Machine) -> Iterator[str]:
    """Yield which rows of several examples the model would mix."""
    if machine.leak is None:
        return
    why = f"which this model cannot keep apart with attn_implementation={machine.attention} ({machine.leak})"
    if any(len(lengths) > 1 for lengths in sizes.lengths):
        yield f"{PACKED}: rows contain several examples, {why}; set pack.packing to false, which pads them"
    if params.eval_packing and params.eval_steps:
        yield f"sft.eval_packing=true: rows contain several examples, {why}; set it to false"
