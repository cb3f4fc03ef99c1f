"""Convert an Axolotl config file to params.yaml: `nightshift import axolotl.yml`.

Every key of the file gets a finding: what it sets, why it is not needed, or why it cannot be mapped and
what to do. For a missing key, Axolotl's default is applied if it changes the training result: otherwise
a full fine-tune would become the LoRA that params.yaml configures. Nothing is written unless the whole
result is valid.
"""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from infra.importers.axolotl import data, groups, keys
from infra.importers.axolotl.findings import (
    Config,
    Finding,
    Findings,
    contradiction,
    convert_value,
    default,
    not_needed,
    unmapped,
)
from infra.importers.axolotl.memory import MEMORY_KEYS, map_memory
from infra.importers.axolotl.schedule import SCHEDULE_KEYS, map_schedule
from nightshift.core.config import PARAMS, config_error, read_params, suggestion
from nightshift.core.errors import ConfigError
from nightshift.core.files import write_text
from nightshift.pipeline.params_yaml import edit
from tasks.check import check

# Keys that are interpreted together -> the function that maps them.
GROUPS: dict[tuple[str, ...], Callable[[Config], Findings]] = {
    data.MODEL_KEYS: data.map_model,
    data.DATA_KEYS: data.map_data,
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
HEADINGS = {
    "mapped": ("Mapped", "Axolotl", "params.yaml", "note"),
    "not_needed": ("Not needed", "Axolotl", "reason"),
    "unmapped": ("Could not be mapped", "Axolotl", "reason and remedy"),
}


def read_config(path: Path) -> dict[str, Any]:
    """Read an Axolotl config file.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    values = read_params(path)
    return {str(key): value for key, value in values.items()}


def translate(config: Config, folder: Path) -> list[Finding]:
    """Return the findings for every key.

    Args:
        config: Axolotl config, key -> value.
        folder: Folder of the Axolotl file.

    Example:
        >>> found = translate({"learning_rate": "1e-4", "sequence_length": 8, "output_dir": "out"}, Path())
        >>> [(one.key, one.value) for one in found if one.key == "learning_rate"]
        [('learning_rate', 0.0001)]
        >>> [(one.kind, one.note) for one in found if one.key == "sequence_length"]
        [('unmapped', 'unknown to Axolotl; did you mean sequence_len?')]
    """
    empty = [key for key, value in config.items() if value is None or value in ("", [], {})]
    given = {key: value for key, value in config.items() if key not in empty}
    deciders: list[Callable[[Config], Findings]] = [*GROUPS.values(), partial(map_memory, folder=folder)]
    found = [finding for decide in deciders for finding in decide(given)]
    found += _direct(given)
    decided = {key for group in (*GROUPS, MEMORY_KEYS) for key in group} | keys.DIRECT.keys()
    found += [_alone(key, given[key]) for key in given if key not in decided]
    unknown = [
        key for key in empty if key not in decided and _lookup(key, keys.NOT_NEEDED | keys.UNMAPPED) is None
    ]
    found += [_alone(key, None) for key in unknown]
    found += _clashes(found)
    found += _unmatched(given, found)
    if unset := [key for key in empty if key not in unknown]:
        found.append(not_needed(", ".join(unset), "empty: Axolotl's default applies"))
    return found


def _clashes(found: Sequence[Finding]) -> list[Finding]:
    """Return the contradictions: two keys of the file set the same parameter to different values."""
    given = [one for one in found if one.kind == "mapped" and not one.is_default]
    first: dict[str, Finding] = {}
    for one in given:
        first.setdefault(one.target, one)
    return [
        contradiction(
            first[one.target].key,
            one.key,
            f"{one.target} would be {show(first[one.target].value)} and {show(one.value)}; remove one",
        )
        for one in given
        if first[one.target].value != one.value
    ]


def _unmatched(given: Config, found: Sequence[Finding]) -> list[Finding]:
    """Return findings for the keys that no rule matched, because their value has an unexpected form."""
    matched = {word for one in found if not one.is_default for word in re.split(r" and |, |[.\[]", one.key)}
    return [
        unmapped(key, f"{show(given[key])} is not a valid value; correct it")
        for key in given
        if key not in matched
    ]


def values_of(found: Sequence[Finding]) -> dict[str, Any]:
    """Return `section.key` -> value of all mapped findings; keys of the file override defaults."""
    ordered = sorted((one for one in found if one.kind == "mapped"), key=lambda one: not one.is_default)
    return {one.target: one.value for one in ordered}


def convert(path: Path, params: Path = PARAMS) -> tuple[list[Finding], str]:
    """Translate a file, and return the findings and the resulting text of params.yaml.

    Raises:
        ConfigError: A file cannot be read, or the Axolotl file has contradictions; all are listed.
    """
    found = translate(read_config(path), path.parent)
    if wrong := [f"{one.key}: {one.note}" for one in found if one.kind == "contradiction"]:
        raise config_error(wrong, path)
    read_params(params)
    return found, edit(params.read_text(encoding="utf-8"), values_of(found))


def require_valid(text: str) -> None:
    """Validate the complete text of a new params.yaml.

    Raises:
        ConfigError: The parameters are invalid; every problem is listed.
    """
    try:
        check(yaml.safe_load(text))
    except ConfigError as err:
        raise ConfigError(
            f"{err}\nThe resulting params.yaml is invalid; nothing was written. Correct the Axolotl file, or "
            "the other keys of params.yaml, and import again"
        ) from err


def write(text: str, params: Path = PARAMS) -> None:
    """Validate and write a new params.yaml.

    Raises:
        ConfigError: The parameters are invalid; every problem is listed and nothing is written.
    """
    require_valid(text)
    write_text(params, text)


def tables(found: Sequence[Finding], config: Config, present: dict[str, Any]) -> Group:
    """Render the findings as tables, one for each kind.

    Args:
        found: Findings; defaults that params.yaml already has are not shown.
        config: Axolotl config, key -> value.
        present: Current parameters, section -> key -> value.
    """
    shown: list[Table | Text] = []
    for kind, (title, *columns) in HEADINGS.items():
        table = Table(title=title, title_justify="left", box=None)
        for column in columns:
            table.add_column(column, overflow="fold")
        for one in (one for one in found if one.kind == kind):
            section, _, key = one.target.partition(".")
            now = present.get(section, {}).get(key) if one.target else None
            if one.is_default and now == one.value:
                continue
            key_text = f"({one.key})" if one.is_default else _with_value(one.key, config)
            cells = (
                [key_text, f"{one.target} = {show(one.value)}", one.note]
                if one.target
                else [key_text, one.note]
            )
            table.add_row(*map(Text, cells))
        if table.row_count:
            shown += [table, Text()]
    processes = present.get("sft", {}).get("num_processes")
    stays = Text(f"sft.num_processes = {processes} is kept: in Axolotl, the launcher sets it")
    return Group(*shown, stays)


def show(value: Any) -> str:
    """Format a value as YAML on one line.

    Example:
        >>> show(None), show(True), show(0.0002), show({"min_lr_rate": 0.1})
        ('null', 'true', '0.0002', '{min_lr_rate: 0.1}')
    """
    text: str = yaml.safe_dump(value, default_flow_style=True, width=4096, sort_keys=False)
    return text.removesuffix("...\n").strip()


def _with_value(key: str, config: Config) -> str:
    """Return the key, with its value if that is a scalar."""
    value = config.get(key)
    return key if value is None or isinstance(value, dict | list) else f"{key}: {show(value)}"


def _direct(given: Config) -> Findings:
    for key, (target, converter) in keys.DIRECT.items():
        if key in given:
            yield convert_value(key, target, given[key], converter, keys.NOTES.get(str(given[key]), ""))
        elif key in keys.DEFAULTS:
            yield default(key, target, keys.DEFAULTS[key])


def _alone(key: str, value: Any) -> Finding:
    """Return the finding for a key that no group and no converter reads."""
    if (why := _lookup(key, keys.NOT_NEEDED)) is not None:
        return not_needed(key, why)
    if (why := _lookup(key, keys.UNMAPPED)) is not None:
        is_off = value is False or value == 0
        return not_needed(key, "off, as in Nightshift") if is_off else unmapped(key, why)
    known = [*(name for group in (*GROUPS, MEMORY_KEYS) for name in group), *keys.DIRECT, *keys.NOT_NEEDED]
    near = suggestion(key, [name for name in [*known, *keys.UNMAPPED] if not name.endswith("*")])
    return unmapped(key, f"unknown to Axolotl; {near if near.startswith('did') else 'remove it'}")


def _lookup(key: str, table: dict[str, str]) -> str | None:
    """Return the entry of a key or of the glob pattern that it matches, or None."""
    return table.get(key) or next((why for name, why in table.items() if fnmatchcase(key, name)), None)
