"""Convert an Axolotl config file: `nightshift import axolotl.yml`.

Every key of the file gets a finding: what it sets, why it is not needed, or why it cannot be mapped and
what to do. For a missing key, Axolotl's default is applied if it changes the training result: otherwise
a full fine-tune would become the LoRA that params.yaml configures.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from infra.importers.axolotl import data, groups, keys, schema_keys
from infra.importers.axolotl.sharding import SHARDING_KEYS, map_sharding
from infra.importers.findings import (
    Config,
    Finding,
    Findings,
    convert_value,
    default,
    essential,
    match,
    not_needed,
    split_empty,
    unknown,
    unmapped,
)
from infra.importers.fit import fit
from infra.importers.hub import Lookup
from infra.importers.result import finish, values_of
from infra.importers.schedule import SCHEDULE_KEYS, map_schedule

# Keys that are interpreted together -> the function that maps them.
GROUPS: dict[tuple[str, ...], Callable[[Config], Findings]] = {
    data.TEXT_KEYS: data.map_text,
    groups.BATCH_KEYS: groups.map_batches,
    groups.NOISE_KEYS: groups.map_noise,
    SCHEDULE_KEYS: map_schedule,
    groups.PRECISION_KEYS: groups.map_precision,
    groups.ATTENTION_KEYS: groups.map_attention,
    groups.CHECKPOINTING_KEYS: groups.map_checkpointing,
    groups.ADAPTER_KEYS: groups.map_adapter,
    groups.PLUGIN_KEYS: groups.map_plugins,
    groups.EVALUATION_KEYS: groups.map_evaluation,
}
GROUPED = {key for group in (*GROUPS, data.MODEL_KEYS, data.DATA_KEYS, SHARDING_KEYS) for key in group}
NAMED = {
    *GROUPED,
    *keys.DIRECT,
    *schema_keys.CONFIG,
    *schema_keys.PLUGINS,
    *(name for name in (*keys.NOT_NEEDED, *keys.UNMAPPED) if "*" not in name),
}


def translate(config: Config, folder: Path, hub: Lookup) -> list[Finding]:
    """Return the findings for every key.

    Args:
        config: Axolotl config, key -> value.
        folder: Folder of the Axolotl file.
        hub: Where commits are looked up.

    Example:
        >>> from infra.importers.hub import Offline
        >>> found = translate({"learning_rate": "1e-4", "sequence_length": 8}, Path(), Offline())
        >>> [(one.key, one.value) for one in found if one.key == "learning_rate"]
        [('learning_rate', 0.0001)]
        >>> [(one.kind, one.note) for one in found if one.key == "sequence_length"]
        [('unmapped', 'unknown to Axolotl; did you mean sequence_len?')]
    """
    given, empty = split_empty(config)
    deciders: list[Callable[[Config], Findings]] = [
        partial(data.map_model, hub=hub),
        partial(data.map_data, hub=hub),
        *GROUPS.values(),
        partial(map_sharding, folder=folder),
        _direct,
    ]
    found = [finding for decide in deciders for finding in decide(given)]
    decided = GROUPED | keys.DIRECT.keys()
    found += [_alone(key, given[key]) for key in given if key not in decided]
    not_known = [key for key in empty if key not in NAMED and not match(key, keys.NOT_NEEDED | keys.UNMAPPED)]
    found += [_alone(key, None) for key in not_known]
    found = fit(finish(given, found), values_of)
    if unset := [key for key in empty if key not in not_known]:
        found.append(not_needed(", ".join(unset), "empty: Axolotl's default applies"))
    return found


def _direct(given: Config) -> Findings:
    for key, (target, converter) in keys.DIRECT.items():
        if key in given:
            yield convert_value(key, target, given[key], converter, keys.NOTES.get(str(given[key]), ""))
        elif key in keys.DEFAULTS:
            yield default(key, target, keys.DEFAULTS[key], "Axolotl's default")
        elif key in keys.REQUIRED:
            yield unmapped(key, f"not set, and Axolotl requires it; set {target}", target)


def _alone(key: str, value: Any) -> Finding:
    """Return the finding for a key that no group and no converter reads."""
    if (why := match(key, keys.NOT_NEEDED)) is not None:
        return not_needed(key, why)
    is_off = value is False or value == 0
    why = match(key, keys.UNMAPPED)
    is_essential = any(fnmatchcase(key, name) for name in keys.ESSENTIAL)
    if is_off and (why is not None or key in NAMED):
        return not_needed(key, "off, as in Nightshift")
    if why is None and key not in NAMED:
        return unknown(key, "Axolotl", NAMED)
    why = why or "has no counterpart; remove it"
    return essential(key, why) if is_essential else unmapped(key, why)
