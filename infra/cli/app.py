"""The `nightshift` command: thin wrappers around the stack, the flow and its files."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra.cli import plan as planned
from infra.local import stack
from infra.local.processes import HOST
from infra.local.settings import Stack
from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError, PipelineError, first_line
from nightshift.core.files import read_json
from nightshift.core.paths import GATE, PAGE, VERSION
from nightshift.core.stage import OFFLINE, explain
from nightshift.core.state import state_dir, tools_environment
from nightshift.pipeline.outcome import SKIPPED, promote_command
from nightshift.pipeline.scoreboard import format_rows, scoreboard_file
from nightshift.raw.unused import unused_by_params
from tasks.check import check_overrides

app = typer.Typer(
    help="Retrain a language model every night; ship it only when it is measurably better.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()
VERDICT_CODES = {"promote": 0, "hold": 3, "reject": 4, "error": 5}


def report_errors(verb: Callable[..., None]) -> Callable[..., None]:
    """Report an error that the user can fix, a full disk included, in one line with exit code 2."""

    @wraps(verb)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            verb(*args, **kwargs)
        except (PipelineError, OSError) as err:
            sys.stderr.write(f"error: {explain(err)}\n")
            raise typer.Exit(2) from err
        except Exception as err:
            # MLflow takes seconds to import; an error of its own shows that it was.
            mlflow = sys.modules.get("mlflow.exceptions")
            if not mlflow or not isinstance(err, mlflow.MlflowException):
                raise
            problem = f"registry: {first_line(err)}; check `nightshift status` and MLFLOW_TRACKING_URI"
            sys.stderr.write(f"error: {problem}\n")
            raise typer.Exit(2) from err

    return wrapper


@app.command()
@report_errors
def init(
    more: Annotated[list[str] | None, typer.Argument(help="Further locations.", metavar="[DATA]...")] = None,
    *,
    data: Annotated[
        list[str], typer.Option(help="File, folder, glob, s3:// or hub: location of training data.")
    ],
    model: Annotated[
        str, typer.Option(help="Base model: folder, hub:ID@COMMIT or package:NAME (default: params.yaml's).")
    ] = "",
    benchmark: Annotated[
        list[str] | None, typer.Option(help="Folder with task.yaml and items.jsonl; repeatable.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also change a params.yaml with uncommitted changes.")
    ] = False,
) -> None:
    """Write a params.yaml that fits your data and model; then `nightshift run` trains and judges."""
    from infra.cli import init as initial

    if not force:
        initial.require_committed()
    initial.init(console, [*data, *(more or ())], model or None, benchmark or [])
    console.print("params.yaml was written; `nightshift show --rows 3` shows rows, `nightshift run` trains")


@app.command()
@report_errors
def show(
    stage: Annotated[str, typer.Option(help="Stage whose rows to show.")] = "pack",
    rows: Annotated[int, typer.Option(min=1, help="Number of examples.")] = 3,
) -> None:
    """Show examples as a stage wrote them; for pack, the tokens that are trained are marked."""
    from infra.cli import show as shown

    shown.show(console, stage, rows)


@app.command()
@report_errors
def up() -> None:
    """Start Prefect, MLflow and a worker on this machine, and deploy the flows."""
    stack.up()
    status()


@app.command()
@report_errors
def down() -> None:
    """Stop the services that `up` started; keep databases and checkpoints."""
    stopped = stack.down()
    console.print(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
@report_errors
def status() -> None:
    """Show the services and their errors, what runs, the next nights, the champion, and free disk space."""
    table = Table("service", "pid", "address", "healthy", box=None)
    for row in stack.status():
        table.add_row(*(str(cell) for cell in row))
    console.print(table)
    for service, errors in stack.problems().items():
        log_file = stack.find_log(service)
        console.print(f"{service}: {len(errors)} error(s) in {log_file}, the last: {escape(errors[-1])}")
    for line in describe_nights():
        console.print(escape(line), highlight=False, soft_wrap=True)
    if version := stack.find_waiting():
        console.print(f"version {version} awaits `{promote_command(version)}`")
    for line in unused_by_params():
        console.print(f"not listed in params.yaml, unused: {line}")


def describe_nights() -> Iterator[str]:
    """Describe what runs, the next nights, the champion, disk space and last backup, one line each."""
    from infra.cli import watch
    from infra.local.backup import describe_last

    running = stack.read_stack(state_dir())
    for run in stack.active_runs():
        stages = [
            watch.describe(one) for one in watch.read_stages(running, run["id"], None) if not one.has_ended
        ]
        yield f"runs: {run['name']}: {'; '.join(stages) or run['state_name'].lower()}"
    if following := stack.next_runs():
        yield f"next: {', '.join(following)}"
    if champion := stack.find_champion():
        yield f"champion: {champion}"
    yield f"free disk space: {stack.free_space() / 2**30:.1f} GiB"
    yield f"last backup: {describe_last()}"


@app.command()
@report_errors
def doctor() -> None:
    """Name everything that keeps nights from running, each with its remedy; exit code 1 if any."""
    from infra.cli.doctor import examine

    faults = examine()
    for fault in faults:
        console.print(f"- {escape(fault)}", highlight=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)
    console.print("nothing is wrong")


@app.command()
@report_errors
def backup(
    to: Annotated[str, typer.Option(help="Folder, s3://bucket/folder or gs://bucket/folder.")],
) -> None:
    """Copy the registry with its models, and the branches of the runs; only new files are uploaded."""
    from infra.local import backup as copies

    console.print(f"backup {copies.backup(to)} is in {to}", highlight=False, soft_wrap=True)


@app.command()
@report_errors
def restore(
    source: Annotated[str, typer.Option("--from", help="Where `nightshift backup` put it.")],
) -> None:
    """Restore the newest backup into an empty state folder, such as that of a new clone."""
    from infra.local import backup as copies

    name = copies.restore(source)
    console.print(f"backup {name} is restored; `nightshift up` starts the servers", highlight=False)


@app.command()
@report_errors
def snapshot() -> None:
    """Fetch new data, benchmarks and the champion now; `dvc repro` alone reuses the last snapshot."""
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", "--force", "snapshot"]
    environment = {**os.environ, **tools_environment()}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


@app.command()
@report_errors
def plan() -> None:
    """Show steps, memory and time of a training run before it starts; needs no GPU and no weights."""
    planned.show(console)


@app.command()
@report_errors
def run(
    overrides: str = typer.Option("", help='Parameters as JSON, such as {"sft.num_train_epochs": 2}.'),
) -> None:
    """Retrain once in this folder, or join the active run, and show the scoreboard.

    With overrides, the run has its own clone, as every night has.
    """
    from infra.cli import watch

    values = watch.parse_overrides(overrides)
    check_overrides(values)
    running = stack.up()
    # Overrides need a params.yaml of their own.
    deployment = "finetune/prod" if values else "finetune/here"
    ending = watch.run_deployment(deployment, values, running, console)
    if not ending.startswith(SKIPPED):
        print_scoreboard(running)
    console.print(escape(ending), highlight=False, soft_wrap=True)


@app.command()
@report_errors
def backfill(
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day.")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day.")],
) -> None:
    """Run the nights of past days in order, each with the files that had arrived by then."""
    from infra.cli import backfill as past

    past.backfill(first.date(), last.date(), stack.up(), console)


@app.command()
@report_errors
def gate() -> None:
    """Show the last verdict, check by check; exit codes: 0 promote, 3 hold, 4 reject, 5 error."""
    from infra.cli.trace import checks

    if not GATE.is_file():
        raise ConfigError(f"{GATE}: not found; `nightshift run` or `dvc repro gate` writes it")
    decision = read_json(GATE)
    console.print(checks(decision))
    raise typer.Exit(VERDICT_CODES[decision["verdict"]])


@app.command()
@report_errors
def benchmarks(
    name: Annotated[
        str, typer.Argument(help="Benchmark whose items to list (default: a table of all).")
    ] = "",
    nights: Annotated[int, typer.Option(min=1, help="Number of candidates, the latest.")] = 30,
) -> None:
    """Show how the last candidates answered, and the items that are never right, always right or unstable."""
    from infra.cli import benchmarks as listed

    listed.show(console, name, nights)


@app.command()
@report_errors
def promote(
    version: Annotated[int, typer.Argument(help="Version to make the champion.")],
    reason: Annotated[str, typer.Option(help="Reason, stored in the record.")],
) -> None:
    """Make a version the champion, for example one that awaits manual approval."""
    move_champion(f"--version={version}", f"--reason={reason}")


@app.command()
@report_errors
def adopt(
    model: Annotated[Path, typer.Argument(help="Folder of an adapter, or of full weights.")],
    reason: Annotated[str, typer.Option(help="Reason, stored in lineage and record.")],
) -> None:
    """Make a model that was trained elsewhere, such as the one in production, the champion."""
    command = [sys.executable, "-m", "tasks.register", f"--adopt={model}", f"--reason={reason}"]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)
    move_champion(f"--version={read_json(VERSION)['version']}", f"--reason=adopted: {reason}")


@app.command()
@report_errors
def rollback(
    reason: Annotated[str, typer.Option(help="Reason, stored in the record.")],
    to: Annotated[str, typer.Option(help="`previous`, or a version number.")] = "previous",
) -> None:
    """Restore the previous champion, and suspend automatic promotion."""
    target = () if to == "previous" else (f"--version={to}",)
    move_champion("--rollback", *target, f"--reason={reason}")


@app.command()
@report_errors
def acknowledge(reason: Annotated[str, typer.Option(help="Reason, stored in the record.")]) -> None:
    """Resume automatic promotion after a rollback."""
    move_champion("--acknowledge", f"--reason={reason}")


def move_champion(*arguments: str) -> None:
    """Run the promoter against the local stack's MLflow, or the MLflow that the environment sets."""
    command = [sys.executable, "-m", "tasks.promote", *arguments]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
@report_errors
def history() -> None:
    """List all champion changes and their reasons, after verifying that the record is unaltered."""
    from nightshift.registry.record import HELD, open_record
    from nightshift.registry.versions import find_alias, open_registry

    client, name = open_registry()
    record, challenger = open_record(client, name), find_alias(client, name, "challenger")
    table = Table("when", "what", "champion", "before", "why", "by", box=None)
    for entry in record.entries:
        moved = (str(entry.champion or "none"), str(entry.before or "none"))
        table.add_row(entry.moment, entry.action, *moved, escape(entry.reason), entry.by)
    console.print(table)
    if record.is_held:
        console.print(HELD)
    if challenger:
        console.print(f"version {challenger.version} awaits `{promote_command(int(challenger.version))}`")


@app.command()
@report_errors
def trace(
    version: Annotated[int | None, typer.Argument(help="Version number.")] = None,
    row: Annotated[str, typer.Option(help="Id of an example, or its origin: source/shard:line.")] = "",
) -> None:
    """Show the lineage of a version, or with --row the versions that were trained on a row."""
    from infra.cli import trace as lineage

    hide_downloads()
    if (version is None) == (not row):
        raise ConfigError("nightshift trace: needs either a version or --row; give exactly one")
    if version is None:
        lineage.show_row(console, row)
    else:
        lineage.show(console, version)


@app.command()
@report_errors
def reproduce(version: Annotated[int, typer.Argument(help="Version number.")]) -> None:
    """Rebuild a version from its data, code and parameters in a separate folder, and compare digests."""
    from infra.cli.reproduce import rebuild

    raise typer.Exit(0 if rebuild(console, version) else 1)


@app.command()
@report_errors
def forget(
    rows: Annotated[list[str], typer.Argument(help="Ids of examples, or their origins: source/shard:line.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Erase rows and their near-duplicates from the raw data and everything derived from it."""
    from nightshift.registry.versions import open_registry
    from tasks.forget import erase, find

    hide_downloads()
    client, name = open_registry()
    found = find(rows, client, name)
    for origin in found.origins:
        console.print(escape(origin))
    trained = ", ".join(f"{version} ({count:,})" for version, count in found.versions.items())
    console.print(f"versions of {name} to retrain (examples from these rows): {trained or 'none'}")
    if not yes:
        typer.confirm(
            "This permanently deletes these rows and all outputs, caches and checkpoints. Continue?",
            abort=True,
        )
    erase(found, client, name)
    console.print("deleted; `nightshift run` trains without them")


def hide_downloads() -> None:
    """Hide the progress bar for the few small files that MLflow downloads."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@app.command("import")
@report_errors
def import_config(
    config: Annotated[Path, typer.Argument(help="Config file of Axolotl, LLaMA-Factory or TRL's sft.")],
    *,
    tool: Annotated[
        Literal["axolotl", "llamafactory", "trl"] | None,
        typer.Option("--from", help="Tool of the file (default: recognized by its keys)."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write params.yaml; otherwise only show the result.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write although base, data or objective could not be mapped.")
    ] = False,
) -> None:
    """Convert a config file of another tool to params.yaml."""
    from infra.importers import result, tools

    found, content = tools.convert(config, tool)
    console.print(result.tables(found, content, read_params()))
    if write:
        result.write(found, partial=partial)
        console.print("params.yaml was written; `git diff params.yaml` shows the changes")
        return
    result.require_valid(found.text)
    missing = "" if not found.list_essential() else ", which needs --partial: see above"
    console.print(f"nothing was written; use --write to write params.yaml{missing}")


def print_scoreboard(running: Stack) -> None:
    """Print the outcome of the last run and where to find details."""
    table = Table(title="Nightshift", box=None, show_header=False)
    for label, value in format_rows(read_json(scoreboard_file())):
        table.add_row(label, value)
    table.add_row("report", os.path.relpath(state_dir() / PAGE.name))
    table.add_row("Prefect", running.prefect_ui)
    table.add_row("Prefect's password", f"in {os.path.relpath(running.auth_file)}")
    table.add_row("MLflow", running.mlflow_url)
    console.print(table)


@app.command()
@report_errors
def chat(
    model: Annotated[
        str, typer.Argument(help="Version number, alias, models:/NAME@ALIAS, or exported folder.")
    ] = "champion",
) -> None:
    """Chat with a version of the model; with piped input, each line is a question."""
    os.environ.update(OFFLINE)
    from infra.cli import chat as talk

    hide_downloads()
    talk.chat(model)


@app.command()
@report_errors
def serve(
    model: Annotated[
        str, typer.Argument(help="Version number, alias, models:/NAME@ALIAS, or exported folder.")
    ] = "champion",
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; clients are not authenticated.")] = HOST,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between checks whether the alias moved.")
    ] = 30.0,
) -> None:
    """Serve a version behind an OpenAI-compatible API; when its alias moves, the new version takes over."""
    os.environ.update(OFFLINE)
    from infra.cli.serve import serve as answer_requests

    hide_downloads()
    answer_requests(model, host, port, interval)


@app.command()
@report_errors
def export(
    model: Annotated[str, typer.Argument(help="Version number, alias, or models:/NAME@ALIAS.")] = "champion",
    *,
    to: Annotated[Path, typer.Option(help="Output folder; must not exist yet.")],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Dtype of the weights (default: the base's)."),
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write model.gguf for llama.cpp.")] = False,
) -> None:
    """Export a version as full weights for vLLM, `transformers serve` or llama.cpp."""
    os.environ.update(OFFLINE)
    from infra.cli.export import export as write
    from nightshift.registry.versions import find_model

    record = write(find_model(model), to, dtype, with_gguf=gguf)
    console.print(f"version {record['version']} of {record['model']} is in {to}")
    for what, found in record["differences"].items():
        text = "logits differ by up to {largest:.2g} of their standard deviation (limit: {bound:.2g})"
        console.print(f"{what}: {text.format(**found) if found else 'not checked, see above'}")
