"""The tools whose config files can be imported, and how a file is recognised."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.importers import axolotl, llamafactory, trl
from infra.importers.findings import Config, Finding
from infra.importers.hub import Hub, Lookup
from infra.importers.result import Result, build
from nightshift.core.config import PARAMS, read_params
from nightshift.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool.

    Attributes:
        title: Its name.
        names: Its keys.
        translate: Function from a config, its folder and the Hub to the findings.
    """

    title: str
    names: frozenset[str]
    translate: Callable[[Config, Path, Lookup], list[Finding]]


TOOLS = {
    "axolotl": Tool("Axolotl", frozenset(axolotl.NAMED), axolotl.translate),
    "llamafactory": Tool("LLaMA-Factory", llamafactory.NAMED, llamafactory.translate),
    "trl": Tool("TRL", trl.NAMED, trl.translate),
}


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file.

    Raises:
        ConfigError: The file is missing, is not YAML, has a key twice, or is not a mapping.
    """
    return {str(key): value for key, value in read_params(path).items()}


def recognise(config: Config, path: Path) -> str:
    """Return the tool of a config, by its keys.

    Raises:
        ConfigError: The keys fit no tool, or several.

    Example:
        >>> recognise({"base_model": "x", "micro_batch_size": 1}, Path("a.yml"))
        'axolotl'
        >>> recognise({"model_name_or_path": "x", "stage": "sft", "seed": 1}, Path("a.yml"))
        'llamafactory'
    """
    counts = {name: sum(key in tool.names for key in config) for name, tool in TOOLS.items()}
    best = max(counts.values())
    found = [name for name, count in counts.items() if count == best]
    if not best or len(found) > 1:
        raise ConfigError(
            f"{path}: its keys do not show of which tool it is; add --from {' or --from '.join(TOOLS)}"
        )
    return found[0]


def convert(
    path: Path, tool: str | None = None, hub: Lookup | None = None, params: Path = PARAMS
) -> tuple[Result, dict[str, Any]]:
    """Translate a file; return the result and the file's content.

    Args:
        path: Config file.
        tool: Name of its tool; None recognises it by its keys.
        hub: Where commits are looked up; None for the Hub.
        params: Current parameters.

    Raises:
        ConfigError: A file cannot be read, its tool is unknown, or it has contradictions; all are listed.
    """
    config = read_config(path)
    chosen = TOOLS[tool or recognise(config, path)]
    read_params(params)
    found = chosen.translate(config, path.parent, hub or Hub())
    return build(chosen.title, found, path, params), config
