"""What the packed rows ask of the model, checked before any process starts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nightshift.core.errors import ConfigError
from nightshift.core.paths import PACKED
from tasks.sft import SftParams
from tasks.sft.machine import Machine


def require_rows_fit(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], params: SftParams, machine: Machine
) -> None:
    """Check that the model can train on the rows; report all problems at once.

    Args:
        rows: Packed rows.
        config: The model's config.json.
        params: `sft` section of params.yaml.
        machine: Properties of this machine.

    Raises:
        ConfigError: A token has no embedding, or the model cannot keep the examples of a row apart.
    """
    if faults := [*find_unknown_tokens(rows, config), *find_mixed_rows(rows, params, machine)]:
        raise ConfigError("\n  ".join(["these rows do not fit the base:", *faults]))


def find_unknown_tokens(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a token has no embedding; on a GPU it would end in a device-side assert."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if size is not None and largest >= size:
        yield (
            f"{PACKED}: token {largest}, but the base has embeddings for {size} tokens; list the tokens that "
            "its chat template adds in base.added_tokens, which extends the embeddings"
        )


def find_mixed_rows(rows: Sequence[Mapping[str, Any]], params: SftParams, machine: Machine) -> Iterator[str]:
    """Yield which rows of several examples the model would mix."""
    if machine.leak is None:
        return
    why = f"which this model cannot keep apart with attn_implementation={machine.attention} ({machine.leak})"
    if any(len(row["seq_lengths"]) > 1 for row in rows):
        yield f"{PACKED}: rows contain several examples, {why}; set pack.packing to false, which pads them"
    if params.eval_packing and params.eval_steps:
        yield f"sft.eval_packing=true: rows contain several examples, {why}; set it to false"
