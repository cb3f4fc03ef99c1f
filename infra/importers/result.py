"""From findings to params.yaml: contradictions, values, tables, and the checked file."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from infra.importers.findings import Config, Finding, contradiction, unmapped
from nightshift.core.config import PARAMS, config_error
from nightshift.core.errors import ConfigError
from nightshift.core.files import write_text
from nightshift.pipeline.params_yaml import edit
from tasks.check import check

HEADINGS = {
    "mapped": ("Mapped", "params.yaml", "note"),
    "not_needed": ("Not needed", "reason"),
    "unmapped": ("Could not be mapped", "reason and remedy", "holds instead"),
}
# A parameter that a remedy names.
PARAMETER = re.compile(r"\b(?:snapshot|base|split|pack|sft)\.[a-z_]+[a-z]\b")


@dataclass(frozen=True, slots=True)
class Result:
    """Result of an import.

    Attributes:
        tool: Name of the tool.
        found: Findings for all keys.
        text: Text of the new params.yaml.
    """

    tool: str
    found: list[Finding]
    text: str

    def list_essential(self) -> list[str]:
        """Return why another base, other data or another objective would be trained, one line each."""
        return [f"{one.key}: {one.note}" for one in self.found if one.is_essential]


def finish(config: Config, found: Iterable[Finding]) -> list[Finding]:
    """Return all findings, with contradictions and the keys that no rule matched."""
    listed = list(found)
    listed += _clashes(listed)
    return listed + _unmatched(config, listed)


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


def build(tool: str, found: list[Finding], path: Path, params: Path = PARAMS) -> Result:
    """Return the result of the findings for a file.

    Raises:
        ConfigError: The file has contradictions; all are listed.
    """
    if wrong := [f"{one.key}: {one.note}" for one in found if one.kind == "contradiction"]:
        raise config_error(wrong, path)
    return Result(tool, found, edit(params.read_text(encoding="utf-8"), values_of(found)))


def require_valid(text: str) -> None:
    """Validate the complete text of a new params.yaml.

    Raises:
        ConfigError: The parameters are invalid; every problem is listed.
    """
    try:
        check(yaml.safe_load(text))
    except ConfigError as err:
        raise ConfigError(
            f"{err}\nThe resulting params.yaml is invalid; nothing was written. Correct the imported file, "
            "or the other keys of params.yaml, and import again"
        ) from err


def write(result: Result, *, partial: bool = False, params: Path = PARAMS) -> None:
    """Validate and write a new params.yaml.

    Args:
        result: Result of an import.
        partial: Write although base, data or objective are not those of the file.
        params: File to write.

    Raises:
        ConfigError: The parameters are invalid, or not those of the file; nothing is written.
    """
    if not partial and (missing := result.list_essential()):
        listed = "\n  ".join(missing)
        raise ConfigError(
            f"nothing was written: base, data or objective could not be mapped, so another model would be "
            f"trained:\n  {listed}\nCorrect the file, or write the rest with --partial and complete "
            f"{params} by hand"
        )
    require_valid(result.text)
    write_text(params, result.text)


def tables(result: Result, config: Config, present: Mapping[str, Any]) -> Group:
    """Render the findings as tables, one for each kind.

    Args:
        result: Result of an import; defaults that params.yaml already has are not shown.
        config: Imported config, key -> value.
        present: Current parameters, section -> key -> value.
    """
    after = yaml.safe_load(result.text)
    shown: list[Table | Text] = []
    for kind, (title, *columns) in HEADINGS.items():
        table = Table(title=title, title_justify="left", box=None)
        for column in (result.tool, *columns):
            table.add_column(column, overflow="fold")
        for one in (one for one in result.found if one.kind == kind):
            if one.is_default and one.kind == "mapped" and _value(present, one.target) == one.value:
                continue
            table.add_row(*map(Text, _cells(one, config, after)))
        if table.row_count:
            shown += [table, Text()]
    stays = f"sft.num_processes = {_value(after, 'sft.num_processes')} is kept: the launcher sets it"
    return Group(*shown, Text(f"{stays} in {result.tool}"))


def _cells(one: Finding, config: Config, after: Mapping[str, Any]) -> list[str]:
    """Return the cells of a finding."""
    key = f"({one.key})" if one.is_default else _with_value(one.key, config)
    if one.kind == "mapped":
        return [key, f"{one.target} = {show(one.value)}", one.note]
    if one.kind == "unmapped":
        return [key, one.note, holding(one, after)]
    return [key, one.note]


def holding(one: Finding, after: Mapping[str, Any]) -> str:
    """Return the values that hold instead of an unmapped key.

    Args:
        one: Finding.
        after: Resulting parameters, section -> key -> value.

    Example:
        >>> holding(unmapped("lr_groups", "set sft.optim"), {"sft": {"optim": "adamw_torch"}})
        'sft.optim = adamw_torch'
        >>> holding(unmapped("vllm", "remove it"), {})
        'nothing'
    """
    names = dict.fromkeys([*([one.target] if one.target else []), *PARAMETER.findall(one.note)])
    known = [name for name in names if _knows(after, name)]
    return ", ".join(f"{name} = {_short(_value(after, name))}" for name in known) or "nothing"


def _short(value: Any) -> str:
    text = show(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _knows(params: Mapping[str, Any], name: str) -> bool:
    section, _, key = name.partition(".")
    return key in params.get(section, {})


def _value(params: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return params.get(section, {}).get(key)


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
