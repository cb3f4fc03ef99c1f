"""Show the lineage of a version, and the versions that were trained on a row."""

from collections.abc import Sequence
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nightshift.core.files import read_json
from nightshift.pipeline.graph import stage_order
from nightshift.registry.lineage import find_rows, open_lineage, row_counts
from nightshift.registry.record import Entry, open_record
from nightshift.registry.versions import DIGEST, FORGOTTEN, find_version, open_registry, registered


def show(console: Console, version: int) -> None:
    """Print code, data, parameters, base, environment, training, verdict and promotions of a version.

    Raises:
        GateError: The version does not exist, or it has no lineage.
    """
    client, name = open_registry()
    found = find_version(client, name, version)
    with open_lineage(name, version) as folder:
        lineage = read_json(folder / "lineage.json")
        params = (folder / "params.yaml").read_text(encoding="utf-8")
    moves = [entry for entry in open_record(client, name).entries if entry.champion == version]
    verdict = checks(lineage["gate"])
    tables = (about(found, lineage), shards(lineage), stages(lineage), verdict, promotions(moves))
    for table in tables:
        console.print(table)
    console.print(Panel(Text(params), title="params.yaml"))


def show_row(console: Console, row: str) -> None:
    """Print the versions that were trained on a row, given by its id or origin (`source/shard:line`)."""
    client, name = open_registry()
    table = Table("version", "aliases", "as", "from", title=f"Trained on {row}", box=None)
    for version in registered(client, name):
        aliases = client.get_model_version(name, version.version).aliases
        with open_lineage(name, int(version.version)) as folder:
            for found in find_rows(folder, row):
                table.add_row(str(version.version), ", ".join(aliases), found["id"], found["origin"])
    console.print(table if table.rows else f"no version of {name} was trained on {row}")


def about(version: ModelVersion, lineage: dict[str, Any]) -> Table:
    """Return a table of the version's adapter, code, base and environment."""
    base = lineage["base"]
    environment = ", ".join(f"{name} {number}" for name, number in lineage["environment"].items())
    table = Table(title=f"Version {version.version} of {version.name}", box=None, show_header=False)
    table.add_row("adapter", version.tags[DIGEST])
    table.add_row("aliases", ", ".join(version.aliases) or "none")
    if FORGOTTEN in version.tags:
        table.add_row("forgotten since", f"{version.tags[FORGOTTEN]} of its examples; retrain it")
    if "adopted" in lineage:
        table.add_row("adopted from", lineage["adopted"]["from"])
    table.add_row("code", lineage["code"])
    if lineage["changed"]:
        table.add_row("uncommitted changes", ", ".join(lineage["changed"]))
    table.add_row("base", f"{base['model']}, {len(base['files'])} files")
    # Lineages of earlier releases do not say it.
    if start := lineage.get("effective", {}).get("start"):
        table.add_row("started from", describe_start(start))
    table.add_row("trained by", f"run {lineage['training']['run_id']}")
    table.add_row("environment", environment)
    return table


def describe_start(start: dict[str, Any]) -> str:
    """Describe where a training started, as in effective.json.

    Example:
        >>> describe_start({"version": 3, "reason": None}), describe_start({"version": None, "reason": "why"})
        ('version 3', 'the base (why)')
    """
    if start["version"] is not None:
        return f"version {start['version']}"
    return f"the base ({start['reason']})" if start["reason"] else "the base"


def shards(lineage: dict[str, Any]) -> Table:
    """Return a table of the raw shards and the number of trained examples of each."""
    table = Table("shard", "SHA-256", "examples trained", title="Data", box=None)
    for shard in lineage["shards"]:
        table.add_row(shard["shard"], shard["sha256"][:16], f"{shard['examples']:,}")
    return table


def stages(lineage: dict[str, Any]) -> Table:
    """Return a table of the rows in and out of each stage, and why rows were dropped."""
    table = Table("stage", "in", "added", "out", "dropped", title="Rows", box=None)
    summaries = lineage["summaries"]
    # Stages that are no longer in the pipeline come last.
    for stage in dict.fromkeys((*stage_order(), *summaries)):
        if "rows_in" in summaries.get(stage, {}):
            table.add_row(stage, *row_counts(summaries[stage]))
    return table


def checks(gate: dict[str, Any]) -> Table:
    """Return a table of the gate's checks."""
    table = Table("check", "verdict", "why", title=f"Gate: {gate['verdict']}", box=None)
    for check in gate.get("checks", ()):
        # Lineages of earlier releases use the key `said`.
        message = check["message"] if "message" in check else check["said"]
        table.add_row(check["name"], check["verdict"], escape(message))
    return table


def promotions(entries: Sequence[Entry]) -> Table:
    """Return a table of when and why the version became champion."""
    table = Table("when", "what", "why", "by", title="Champion", box=None)
    for entry in entries:
        table.add_row(entry.moment, entry.action, escape(entry.reason), entry.by)
    if not entries:
        table.add_row("never", "", "", "")
    return table
