"""Show rows as a stage wrote them: conversations, or the tokens that the model is trained on."""

import json
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from nightshift.core.errors import ConfigError
from nightshift.core.files import iterate_rows
from nightshift.core.paths import BASE, INGESTED, PACKED, RAW
from nightshift.data.encode import IGNORED, load_encoder
from nightshift.pipeline.graph import outputs, read_stages
from nightshift.pipeline.ledger import DATA_STAGES
from nightshift.raw.erase import NO_LIMITS
from nightshift.raw.faults import RowError
from nightshift.raw.readers import read_shard

# Trained tokens are green and, where there are no colours, in these brackets.
OPENING, CLOSING = "⟦", "⟧"
# Characters of a raw row that are shown.
RAW_CHARACTERS = 2_000


def show(console: Console, stage: str, count: int) -> None:
    """Print the first rows of a stage.

    Args:
        console: Where to print.
        stage: Stage that wrote them.
        count: Number of examples.

    Raises:
        ConfigError: The stage has not run, or writes no rows.
    """
    file = examples_file(stage)
    if not file.is_file():
        raise ConfigError(f"{file}: not found; run `dvc repro {stage}` or `nightshift run`")
    panels = packed_examples(console) if file == PACKED else conversations(file)
    for panel in islice(panels, count):
        console.print(panel)


def examples_file(stage: str) -> Path:
    """Return the first table that a stage writes; split writes the training set first.

    Raises:
        ConfigError: The stage writes no examples.
    """
    if stage not in DATA_STAGES:
        raise ConfigError(f"--stage {stage}: writes no examples; use one of {', '.join(DATA_STAGES)}")
    return next(Path(out) for out in outputs(read_stages()[stage]) if out.endswith(".parquet"))


def packed_examples(console: Console) -> Iterator[Panel]:
    """Yield the examples of the packed rows, with the tokens that are trained marked."""
    tokenizer = load_encoder(BASE).tokenizer
    for number, row in enumerate(iterate_rows(PACKED), start=1):
        edges = accumulate(row["seq_lengths"], initial=0)
        for place, (start, stop) in enumerate(pairwise(edges), start=1):
            ids, labels = row["input_ids"][start:stop], row["labels"][start:stop]
            trained = sum(label != IGNORED for label in labels)
            title = f"{row['origins'][place - 1]}, row {number}, example {place} of {len(row['origins'])}"
            yield Panel(
                mark(tokenizer, ids, labels, in_colour=console.is_terminal),
                title=title,
                subtitle=f"{len(ids):,} tokens, {trained:,} trained",
            )


def mark(tokenizer: Any, ids: list[int], labels: list[int], *, in_colour: bool) -> Text:
    """Decode tokens and mark the trained ones, in green or in brackets."""
    text, start = Text(), 0
    for stop in range(1, len(ids) + 1):
        if stop < len(ids) and (labels[stop] == IGNORED) == (labels[start] == IGNORED):
            continue
        part = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        if labels[start] == IGNORED:
            text.append(part, style="dim" if in_colour else "")
        else:
            text.append(part if in_colour else f"{OPENING}{part}{CLOSING}", style="green")
        start = stop
    return text


def conversations(file: Path) -> Iterator[Panel]:
    """Yield the conversations of a stage; those of ingest with the row that they were made of."""
    for row in iterate_rows(file):
        parts: list[Text] = []
        if file == INGESTED:
            parts += [Text(raw_row(row["origin"])[:RAW_CHARACTERS], style="dim"), Text()]
        if row.get("tools"):
            parts.append(Text(f"tools: {row['tools']}", style="cyan"))
        parts += [turn(message) for message in row["messages"]]
        style = f", {row['style']} of {row['parent_id']}" if row.get("parent_id") else ""
        yield Panel(Group(*parts), title=f"{row['origin']}{style}")


def turn(message: Mapping[str, Any]) -> Text:
    """Format one turn."""
    name = f" ({message['name']})" if message.get("name") else ""
    text = Text(f"{message['role']}{name}: ", style="bold")
    if message.get("reasoning"):
        text.append(f"{message['reasoning']}\n", style="italic")
    text.append(message["content"], style="")
    if message.get("tool_calls"):
        text.append(f" {message['tool_calls']}", style="cyan")
    return text


def raw_row(origin: str) -> str:
    """Return a row as its author wrote it, as JSON."""
    name, _, line = origin.rpartition(":")
    for number, row in read_shard(RAW / name, NO_LIMITS):
        if number == int(line):
            return (
                row.reason if isinstance(row, RowError) else json.dumps(row, ensure_ascii=False, default=str)
            )
    raise ConfigError(f"{RAW / name}: has no row {line}; run `nightshift snapshot`")
