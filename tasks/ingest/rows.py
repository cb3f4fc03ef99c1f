"""Convert a raw row to an example or a fault."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import tee
from pathlib import Path
from typing import Any, Literal

from nightshift.core.errors import DataError
from nightshift.core.files import text_digest
from nightshift.core.workers import Work
from nightshift.raw.checks import check
from nightshift.raw.columns import find_column
from nightshift.raw.convert import convert, find_answers
from nightshift.raw.faults import RowError
from nightshift.raw.forgotten import read_forgotten
from nightshift.raw.formats import RawRow
from nightshift.raw.options import SourceOptions
from nightshift.raw.pairs import shown
from nightshift.raw.pii import Find, find_pii
from nightshift.raw.preferences import Answer
from nightshift.raw.repairs import arrange, repair
from nightshift.raw.selection import Selection
from nightshift.raw.shards import read_digests, require_digest, used_shards
from nightshift.raw.streams import Limits
from nightshift.raw.strict_json import dumps
from nightshift.raw.turns import Change, Conversation, Turn, train_last
from tasks.ingest.personal import PiiSpan, calls_json, find_pii_spans, redact_conversation

Example = dict[str, Any]
# Row or fault, its origin, its arrival, and the options of its source.
Task = tuple[RawRow | RowError, str, int, SourceOptions]


@dataclass(frozen=True, slots=True)
class Privacy:
    """Handling of personal data, and the function that finds it."""

    mode: Literal["report", "redact", "drop"]
    find: Find = find_pii


@dataclass(frozen=True, slots=True)
class Rules:
    """How all rows are checked and repaired.

    Attributes:
        special: Markup that no text may contain.
        privacy: Handling of personal data.
        fix_encoding: Whether wrongly decoded text is repaired.
        has_reasoning: Whether the base's chat template renders reasoning; otherwise it is not read.
    """

    special: re.Pattern[str]
    privacy: Privacy
    fix_encoding: bool = False
    has_reasoning: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one row.

    Attributes:
        origin: Origin of the row, `source/arrival.suffix:number`.
        source: Name of the source.
        result: Example (see `nightshift.data.schemas.EXAMPLES`), or fault.
        repaired: Repair made to the row -> the first place that it changed.
        ignored: Columns and keys of messages that were not read.
        pii_spans: Positions of personal data.
        compared: What preference tuning learns from the row (see `nightshift.data.schemas.PREFERENCES`), or
            None. A row with a bad answer only is a fault as an example.
    """

    origin: str
    source: str
    result: Example | RowError
    repaired: Mapping[str, Change] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    pii_spans: tuple[PiiSpan, ...] = ()
    compared: dict[str, Any] | None = None


# Outcome of a row, and its token count.
Measured = tuple[Outcome, int]


def read_outcomes(
    raw: Path, limits: Limits, convert_all: Work[Task, Measured], selection: Selection
) -> Iterator[Measured]:
    """Read, convert and check every row of every shard in use, ordered by arrival and row number.

    Args:
        raw: Folder with `<source>/<arrival>.<suffix>` and the options of the sources.
        limits: Size limits of shards and rows.
        convert_all: Converts the rows and counts their tokens.
        selection: Completes the examples, and counts the rows that are left out.

    Yields:
        Outcome and token count of each row.

    Raises:
        DataError: A shard cannot be read completely, or no row of a source has a column that its options
            name.
    """
    tasks, originals = tee(rows_in_use(raw, limits, selection))
    for (row, *_), (outcome, tokens) in zip(originals, convert_all(tasks), strict=True):
        if isinstance(outcome.result, dict) and isinstance(row, dict):
            selection.complete(outcome.result, row)
        if outcome.compared and isinstance(row, dict):
            example = outcome.result if isinstance(outcome.result, dict) else None
            group = example["group"] if example else selection.group(row, outcome.source)
            outcome.compared.update(example_id=example and example["id"], group=group)
        yield outcome, tokens


def rows_in_use(raw: Path, limits: Limits, selection: Selection) -> Iterator[Task]:
    """Yield every row in use that is not forgotten, with what its conversion needs.

    Raises:
        DataError: See `read_outcomes`.
    """
    digests, forgotten, mapped = read_digests(raw), read_forgotten(raw), dict[str, Mapped]()
    for arrival, path in used_shards(raw):
        name, source = path.relative_to(raw).as_posix(), path.parent.name
        require_digest(path, digests.get(name))
        columns = mapped.setdefault(source, Mapped(selection.options(source)))
        for number, row in selection.rows(path, limits):
            columns.note(row)
            if (origin := f"{name}:{number}") not in forgotten.rows:
                yield row, origin, arrival, columns.options
    for source, columns in mapped.items():
        columns.require(raw / source)


class Mapped:
    """The columns that a source's options name, and whether a row has them."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self._missing = dict(options.columns)
        self._seen: dict[str, None] = {}

    def note(self, row: RawRow | RowError) -> None:
        """Look for the columns that no row had so far."""
        if not self._missing or isinstance(row, RowError):
            return
        self._seen |= dict.fromkeys(row)
        self._missing = {key: one for key, one in self._missing.items() if find_column(row, one) is None}

    def require(self, where: Path) -> None:
        """Check that some row of the source has each column.

        Raises:
            DataError: No row has one of them.
        """
        if self._missing and self._seen:
            raise DataError(
                f"{where}: no row has the columns {', '.join(self._missing.values())}; correct "
                f"`columns` of the source in snapshot.sources; columns seen: {shown(self._seen)}"
            )


def convert_row(
    row: RawRow | RowError, origin: str, arrival: int, options: SourceOptions, rules: Rules
) -> Outcome:
    """Convert, repair and check one row; find its personal data before building the example."""
    source, privacy = origin.split("/", 1)[0], rules.privacy
    try:
        if isinstance(row, RowError):
            raise row
        answers = find_answers(row, options)
        good, bad = (
            read_conversation(row, options, rules, answer) if answer in (answers or ["good"]) else None
            for answer in ("good", "bad")
        )
        spans = tuple(find_all_pii(good, bad, privacy.find))
        if spans and privacy.mode == "redact":
            good, bad = (one and redact_conversation(one, privacy.find) for one in (good, bad))
        example = build_example(good, origin, source, arrival) if good else RowError("rejected_answer")
        compared = build_preference(good, bad, origin, source, arrival) if answers else None
    except RowError as fault:
        return Outcome(origin, source, fault)
    except RecursionError:
        return Outcome(origin, source, RowError("too_deep"))
    if spans and privacy.mode == "drop":
        counts = sorted(Counter(span.kind for span in spans).items())
        detail = ", ".join(f"{count} {kind}" for kind, count in counts)
        return Outcome(origin, source, RowError("pii", detail), pii_spans=spans)
    read = good or bad
    assert read
    return Outcome(origin, source, example, read.changes, read.ignored, spans, compared)


def find_all_pii(good: Conversation | None, bad: Conversation | None, find: Find) -> Iterator[PiiSpan]:
    """Yield the positions of personal data; a bad answer next to a good one has fields `rejected.<field>`."""
    yield from find_pii_spans(read, find) if (read := good or bad) else ()
    if good and bad:
        for span in find_pii_spans(replace(bad, turns=bad.turns[-1:], tools=[]), find):
            yield replace(span, turn=len(bad.turns), field=f"rejected.{span.field}")


def read_conversation(row: RawRow, options: SourceOptions, rules: Rules, answer: Answer) -> Conversation:
    """Convert, repair and check a row with one of its answers.

    Raises:
        RowError: The row, or the answer, cannot be used.
    """
    conversation = convert(row, options, answer)
    if not rules.has_reasoning:
        conversation = without_reasoning(conversation)
    conversation = arrange(repair(conversation, fix_encoding=rules.fix_encoding))
    if options.train_on == "last":
        conversation = train_last(conversation)
    return check(conversation, rules.special)


def without_reasoning(conversation: Conversation) -> Conversation:
    """Return a conversation without the reasoning of its answers, which then counts as not read."""
    if not any(turn.reasoning for turn in conversation.turns):
        return conversation
    turns = [replace(turn, reasoning="") for turn in conversation.turns]
    return replace(conversation, turns=turns, ignored=conversation.ignored | {"messages.reasoning"})


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


def build_preference(
    good: Conversation | None, bad: Conversation | None, origin: str, source: str, arrival: int
) -> dict[str, Any]:
    """Build the row of `nightshift.data.schemas.PREFERENCES`; equal contents have equal ids.

    Args:
        good: Conversation with the good answer, or None.
        bad: Conversation with the bad answer, or None; not both are None.
        origin: Origin of the row.
        source: Its source.
        arrival: Number of its shard.

    Raises:
        RowError: The conversations differ before their last turns, or do not differ at all.
    """
    prompts, answers = [], []
    for conversation in (good, bad):
        # Which turns are trained is up to the stage that reads them.
        turns = [_message(replace(turn, train=True)) for turn in conversation.turns] if conversation else []
        prompts.append(turns[:-1])
        answers.append(turns[-1:] or None)
    if good and bad:
        if prompts[0] != prompts[1] or good.tools != bad.tools:
            raise RowError("other_prompt")
        if answers[0] == answers[1]:
            raise RowError("same_answer")
    prompt = prompts[0] or prompts[1]
    used = good or bad
    tools = dumps(used.tools) if used and used.tools else None
    return {
        "id": text_digest(json.dumps([prompt, *answers]), tools or ""),
        "example_id": None,
        "prompt": prompt,
        "chosen": answers[0],
        "rejected": answers[1],
        "tools": tools,
        "source": source,
        "origin": origin,
        "arrival": arrival,
        "group": None,
    }


def _message(turn: Turn) -> dict[str, Any]:
    """Return a turn as a message without empty fields."""
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = calls_json(turn)
    if turn.name:
        message["name"] = turn.name
    if turn.role == "assistant" and not turn.train:
        message["train"] = False
    return message
