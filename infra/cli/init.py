"""Write a params.yaml that fits one's own data: sources, row length, split, epochs, learning rate."""

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from nightshift.core.config import PARAMS
from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import iterate_batches, read_json, write_text
from nightshift.core.paths import BASE, DATA, INGESTED
from nightshift.core.stage import RESULT
from nightshift.core.state import tools_environment
from nightshift.data.chat_templates import ALPACA_SEPARATOR
from nightshift.data.encode import load_encoder
from nightshift.data.tokens import encode_known, open_memo
from nightshift.pipeline.ledger import entry
from nightshift.pipeline.params_yaml import edit
from tasks.check import check

# The retention benchmark of a new project: general knowledge that no training data of one's own contains.
RETENTION = {"countries": "package:countryinfo"}
# Row lengths are multiples of this; attention kernels work on such tiles.
MULTIPLE = 64
# Longest row that is proposed. Longer rows take more memory than a first run should.
LONGEST = 4096
# Share of the tokens that may be in examples longer than a row.
LOST_TOKENS = 0.01
# Test examples for a verdict (gate.min_items), with a reserve, because the split is by hash.
TEST_EXAMPLES, VALIDATION_EXAMPLES = 75, 20
# Examples from which one epoch is enough, and epochs below.
MANY_EXAMPLES, EPOCHS = 10_000, 3
# Parameters of a model -> learning rate with LoRA. Smaller models tolerate, and need, higher rates
# (Schulman et al., LoRA Without Regret, 2025).
LEARNING_RATES = ((1e9, 1.0e-3), (4e9, 4.0e-4), (2e10, 2.0e-4), (math.inf, 1.0e-4))
# Optimizer steps of an epoch that a larger batch should leave.
STEPS = 100


@dataclass(frozen=True, slots=True)
class Choice:
    """A proposed value and the reason for it."""

    key: str
    value: Any
    reason: str


def init(console: Console, data: Sequence[str], model: str | None, benchmarks: Sequence[str]) -> None:
    """Write params.yaml for some data, fetch and check the data, and choose what depends on it.

    Args:
        console: Where the choices and what is dropped are printed.
        data: Files, folders or other locations of training data.
        model: Reference of the base model; None keeps that of params.yaml.
        benchmarks: Folders of benchmarks, or other references.

    Raises:
        ConfigError: A value is invalid; params.yaml is unchanged.
        StageError: The data cannot be read; params.yaml is unchanged.
    """
    before = PARAMS.read_text(encoding="utf-8")
    try:
        write_values(first_values(data, model, benchmarks))
        for stage in ("snapshot", "base"):
            run_stage(console, stage)
        choices = []
        if load_encoder(BASE).template is None:
            choices = [Choice("base.chat_template", "alpaca", "the base has none; plain texts need none")]
            sources = name_sources(data, {"input_separator": ALPACA_SEPARATOR})
            write_values({"base.chat_template": "alpaca", "snapshot.sources": sources})
            for stage in ("snapshot", "base"):
                run_stage(console, stage)
        run_stage(console, "ingest")
        choices += choose(token_lengths(), count_parameters(BASE), read_json(BASE / "config.json"))
        write_values({choice.key: choice.value for choice in choices})
    except BaseException:
        write_text(PARAMS, before)
        raise
    console.print(sources_table(entry(DATA, "ingest"), data))
    console.print(choices_table(choices))


def require_committed() -> None:
    """Refuse to change a params.yaml with changes of which git has no copy.

    Raises:
        ConfigError: It has such changes.
    """
    status = subprocess.run(
        ["git", "status", "--porcelain", str(PARAMS)], capture_output=True, text=True, check=False
    )
    if status.stdout.strip():
        raise ConfigError(f"{PARAMS}: has changes that are not committed; commit them, or use --force")


def first_values(data: Sequence[str], model: str | None, benchmarks: Sequence[str]) -> dict[str, Any]:
    """Return the values that need no look at the data."""
    asked = {name_of(location): location for location in benchmarks}
    if len(asked) < len(benchmarks):
        raise ConfigError("--benchmark: two benchmarks have the same name; rename one of the folders")
    values: dict[str, Any] = {
        "snapshot.sources": name_sources(data),
        "snapshot.benchmarks": asked | RETENTION,
        "split.by_phrasing": [],
        "augment.sources": [],
        "evaluate.retrieval": None,
        "gate.floors": {},
        "gate.retention": dict.fromkeys(RETENTION, 0.1),
        "gate.behaviour": [],
    }
    if model:
        values |= {"base.model": model, "base.chat_template": None}
        values |= {"base.special_tokens": {}, "base.added_tokens": []}
    return values


def name_sources(data: Sequence[str], options: Mapping[str, str] | None = None) -> dict[str, dict[str, str]]:
    """Name each location after its file or folder; the newest content of a path is the whole source.

    Args:
        data: Locations.
        options: Options of all sources.

    Example:
        >>> name_sources(["exports/My Chats.jsonl", "old/my_chats.csv"])
        {'my_chats': {'path': 'exports/My Chats.jsonl', 'mode': 'replace'}, \
'my_chats_2': {'path': 'old/my_chats.csv', 'mode': 'replace'}}
    """
    sources: dict[str, dict[str, str]] = {}
    for location in data:
        name = stem = name_of(location)
        number = 1
        while name in sources:
            number += 1
            name = f"{stem}_{number}"
        sources[name] = {"path": location, "mode": "replace", **(options or {})}
    return sources


def name_of(location: str) -> str:
    """Return a name for a location: the last part of its path without suffixes and special characters.

    Example:
        >>> name_of("s3://bucket/2026/chats.jsonl.gz"), name_of("data/faq/"), name_of("*.csv")
        ('chats', 'faq', 'data')
    """
    last = location.rstrip("/").rsplit("/", 1)[-1].split(".", 1)[0]
    return re.sub(r"\W+", "_", last.lower()).strip("_") or "data"


def write_values(values: Mapping[str, Any]) -> None:
    """Set values in params.yaml; comments stay.

    Raises:
        ConfigError: A value is invalid; the file is unchanged.
    """
    text = edit(PARAMS.read_text(encoding="utf-8"), values)
    check(yaml.safe_load(text))
    write_text(PARAMS, text)


def run_stage(console: Console, stage: str) -> None:
    """Run one stage through DVC, whose cache a later run uses; its output is shown only if DVC fails.

    Raises:
        StageError: The stage failed.
    """
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    force = ["--force"] if stage == "snapshot" else []
    with console.status(f"{stage} ..."), TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [*command, *force],
            env={**os.environ, **tools_environment(), RESULT: str(result)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # A crashed program leaves no result.
        error = read_json(result)["error"] if result.is_file() else None
    if done.returncode:
        raise StageError(error or done.stdout)


def token_lengths() -> list[int]:
    """Return the number of tokens of each sequence; their tokens are in the cache that ingest filled."""
    encoder = load_encoder(BASE)
    lengths: list[int] = []
    with open_memo(encoder) as memo:
        for batch in iterate_batches(INGESTED, ["messages", "tools"]):
            rows = [(row["messages"], row["tools"]) for row in batch.to_pylist()]
            encoded = encode_known(rows, encoder, memo)
            lengths += [len(one.input_ids) for ones in encoded if isinstance(ones, list) for one in ones]
    return lengths


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder of safetensors, from the headers of the files."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total


def choose(lengths: Sequence[int], parameters: int, config: Mapping[str, Any]) -> list[Choice]:
    """Choose the values that depend on the data and the model.

    Args:
        lengths: Tokens of each example.
        parameters: Weights of the model.
        config: Its config.json.
    """
    count, total = len(lengths), sum(lengths)
    limit = min(LONGEST, context_of(config))
    max_length = choose_max_length(lengths, limit)
    lost = sum(length for length in lengths if length > max_length)
    longer = sum(length > max_length for length in lengths)
    test = share(count, TEST_EXAMPLES, 0.1, 0.3)
    validation = share(count, VALIDATION_EXAMPLES, 0.05, 0.15)
    epochs = 1 if count >= MANY_EXAMPLES else EPOCHS
    rows = math.ceil(total * (1 - test - validation) / max_length)
    accumulate = max(1, min(16, rows // (2 * STEPS)))
    rate = next(rate for size, rate in LEARNING_RATES if parameters < size)
    reason = f"the longest example has {max(lengths):,} tokens"
    if longer:
        reason += f"; {longer:,} longer ones are dropped, {lost / total:.1%} of the tokens"
    chosen = {
        "pack.max_length": (max_length, reason),
        "split.test_share": (test, f"about {count * test:,.0f} of {count:,} examples judge the model"),
        "split.validation_share": (validation, f"about {count * validation:,.0f} examples"),
        "sft.num_train_epochs": (epochs, f"{count:,} examples, {total:,} tokens"),
        "sft.learning_rate": (rate, f"LoRA on {parameters / 1e6:,.0f} million weights"),
        "sft.gradient_accumulation_steps": (accumulate, f"about {rows:,} packed rows in an epoch"),
    }
    # Above these limits, which params.yaml sets, the stage would fail.
    if lost > 0.02 * total:
        chosen["pack.max_lost_token_share"] = round_up(lost / total * 1.5), "accepts this loss of tokens"
    if longer > 0.5 * count:
        chosen["pack.max_drop_rate"] = round_up(longer / count * 1.5), "accepts this loss of examples"
    return [Choice(key, *value) for key, value in chosen.items()]


def context_of(config: Mapping[str, Any]) -> int:
    """Return the longest sequence of a model, in tokens."""
    text = config.get("text_config", config)
    return int(text.get("max_position_embeddings") or text.get("n_positions") or LONGEST)


def choose_max_length(lengths: Sequence[int], limit: int) -> int:
    """Return the length of a row: a multiple of 64 that leaves 1 % of the tokens in longer examples.

    Example:
        >>> choose_max_length([100] * 99 + [130], 4096), choose_max_length([100] * 99 + [90_000], 4096)
        (192, 4096)
    """
    ordered = sorted(lengths, reverse=True)
    allowed, lost = LOST_TOKENS * sum(ordered), 0
    for length in ordered:
        lost += length
        if lost > allowed:
            return max(MULTIPLE, min(math.ceil(length / MULTIPLE) * MULTIPLE, limit // MULTIPLE * MULTIPLE))
    return limit


def share(count: int, wanted: int, least: float, most: float) -> float:
    """Return a share that gives the wanted number of examples, within limits.

    Example:
        >>> share(10_000, 75, 0.1, 0.3), share(500, 75, 0.1, 0.3), share(60, 75, 0.1, 0.3)
        (0.1, 0.15, 0.3)
    """
    return round_up(min(most, max(least, wanted / count)))


def round_up(value: float) -> float:
    """Round up to two decimals, at most 1.

    Example:
        >>> round_up(0.1501), round_up(0.15), round_up(1.4)
        (0.16, 0.15, 1.0)
    """
    return min(1.0, math.ceil(round(value * 100, 6)) / 100)


def sources_table(summary: Mapping[str, Any], data: Sequence[str]) -> Table:
    """Return a table of the sources: rows read and used, and why rows are dropped."""
    table = Table("source", "examples", "dropped", "columns not used", title="Data", box=None)
    for name in name_sources(data):
        dropped = summary["dropped_by_source"].get(name, {})
        ignored = summary.get("ignored_columns", {}).get(name, {})
        table.add_row(
            name,
            f"{summary['rows_out_by_source'].get(name, 0):,}",
            ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none",
            ", ".join(ignored) or "none",
        )
    return table


def choices_table(choices: Sequence[Choice]) -> Table:
    """Return a table of the chosen values."""
    table = Table("parameter", "value", "because", title="params.yaml", box=None)
    for choice in choices:
        value = choice.value if isinstance(choice.value, str) else f"{choice.value:g}"
        table.add_row(choice.key, value, choice.reason)
    return table
