"""Convert a raw row to an example or a fault."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nightshift.core.files import text_digest
from nightshift.raw.checks import check, repair
from nightshift.raw.convert import convert
from nightshift.raw.faults import RowError
from nightshift.raw.forgotten import read_forgotten
from nightshift.raw.pii import Find, find_pii
from nightshift.raw.selection import Selection
from nightshift.raw.shards import read_digests, require_digest, used_shards
from nightshift.raw.streams import Limits
from nightshift.raw.strict_json import dumps
from nightshift.raw.turns import Conversation, Turn
from tasks.ingest.personal import PiiSpan, calls_json, find_pii_spans, redact_conversation

Example = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Privacy:
    """Handling of personal data, and the function that finds it."""

    mode: Literal["report", "redact", "drop"]
    find: Find = find_pii


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one row.

    Attributes:
        origin: Origin of the row, `source/arrival.suffix:number`.
        source: Name of the source.
        result: Example (see `nightshift.data.schemas.EXAMPLES`), or fault.
        repaired: Repairs made to the row.
        pii_spans: Positions of personal data.
    """

    origin: str
    source: str
    result: Example | RowError
    repaired: frozenset[str] = frozenset()
    pii_spans: tuple[PiiSpan, ...] = ()


def read_outcomes(
    raw: Path,
    limits: Limits,
    special: re.Pattern[str],
    privacy: Privacy,
    selection: Selection | None = None,
) -> Iterator[Outcome]:
    """Read, convert and check every row of every shard in use, ordered by arrival and row number.

    Args:
        raw: Folder with `<source>/<arrival>.<suffix>`.
        limits: Size limits of shards and rows.
        special: Markup that no text may contain.
        privacy: Handling of personal data.
        selection: Counts the rows that are left out; by default nobody asks for the counts.

    Raises:
        DataError: A shard cannot be read completely.
    """
    selection = selection or Selection(raw)
    digests, forgotten = read_digests(raw), read_forgotten(raw)
    for arrival, path in used_shards(raw):
        name = path.relative_to(raw).as_posix()
        require_digest(path, digests.get(name))
        for number, row in selection.rows(path, limits):
            if (origin := f"{name}:{number}") not in forgotten.rows:
                outcome = convert_row(row, origin, arrival, special, privacy)
                if isinstance(outcome.result, dict) and isinstance(row, dict):
                    selection.complete(outcome.result, row)
                yield outcome


def convert_row(
    row: dict[str, Any] | RowError, origin: str, arrival: int, special: re.Pattern[str], privacy: Privacy
) -> Outcome:
    """Convert, repair and check one row; find its personal data before building the example."""
    source = origin.split("/", 1)[0]
    try:
        if isinstance(row, RowError):
            raise row
        conversation, repaired = repair(convert(row))
        conversation = check(conversation, special)
        spans = tuple(find_pii_spans(conversation, privacy.find))
        if spans and privacy.mode == "redact":
            conversation = redact_conversation(conversation, privacy.find)
        example = build_example(conversation, origin, source, arrival)
    except RowError as fault:
        return Outcome(origin, source, fault)
    except RecursionError:
        return Outcome(origin, source, RowError("too_deep"))
    if spans and privacy.mode == "drop":
        counts = sorted(Counter(span.kind for span in spans).items())
        detail = ", ".join(f"{count} {kind}" for kind, count in counts)
        return Outcome(origin, source, RowError("pii", detail), pii_spans=spans)
    return Outcome(origin, source, example, frozenset(repaired), spans)


def build_example(conversation: Conversation, origin: str, source: str, arrival: int) -> Example:
    """Build the row of `nightshift.data.schemas.EXAMPLES`."""
    messages = [_message(turn) for turn in conversation.turns]
    tools = dumps(conversation.tools) if conversation.tools else None
    parts = [json.dumps(messages), *([tools] if tools else [])]
    return {
        "id": text_digest(origin, *parts),
        "messages": messages,
        "tools": tools,
        "source": source,
        "origin": origin,
        "arrival": arrival,
        "group": None,
    }


def _message(turn: Turn) -> dict[str, str]:
    """Return a turn as a message without empty fields."""
    message = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["tool_calls"] = calls_json(turn)
    if turn.name:
        message["name"] = turn.name
    return message
