"""Rows with a question and its answer in columns: Alpaca, prompt and completion, Dolly, SQuAD, xLAM, ..."""

from collections.abc import Mapping, Sequence
from typing import Any

from nightshift.raw.columns import CHOICES, column_name, is_given
from nightshift.raw.contents import REASONING, read_text
from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.messages import is_messages, read_turns
from nightshift.raw.options import SourceOptions
from nightshift.raw.tool_calls import from_json, parse_calls
from nightshift.raw.turns import Turn

INSTRUCTION = "instruction"
QUESTIONS = ("prompt", "question", "query", "problem", "inputs")
ANSWERS = ("output", "response", "completion", "answer", "solution", "target", "targets")
# Texts that belong to the question. `input` is the question itself if there is no other.
CONTEXTS = ("input", "context", "passage", "article", "document", "contexts", "passages", "documents")
INPUT = "input"


def has_question(rest: RawRow) -> bool:
    """Return whether a column contains a question."""
    return any(key in rest for key in (INSTRUCTION, *QUESTIONS, INPUT))


def has_answer(rest: RawRow) -> bool:
    """Return whether a column contains an answer."""
    return any(key in rest for key in (*ANSWERS, "answers"))


def read_pair(rest: RawRow, options: SourceOptions, ignored: set[str]) -> list[Turn]:
    r"""Read the question with its context, earlier turns (`history`), and the answer.

    Args:
        rest: Columns of the row; those that are read are removed.
        options: Options of its source: roles, and the text between the question and its contexts.
        ignored: Receives the keys of messages that are not read.

    Raises:
        RowError: Question or answer is missing or ambiguous, or is not text.

    Example:
        >>> row = {"question": "Who?", "context": "Ada wrote it.", "answer": "Ada"}
        >>> turns = read_pair(row, SourceOptions(), set())
        >>> [turn.content for turn in turns]
        ['Who?\n\nAda wrote it.', 'Ada']
    """
    for key in CHOICES:
        if is_given(rest.get(key)):
            raise RowError("choices", f"column {key}")
    question, answer = _find_question(rest), _answer(rest, options.roles, ignored)
    asked = rest.pop(question)
    if is_messages(asked):
        return [*read_turns(asked, options.roles, ignored), *answer]
    parts = [read_text(asked), *(_context(rest.pop(key)) for key in CONTEXTS if key in rest)]
    text = options.input_separator.join(part for part in parts if part.strip())
    return [*_history(rest.pop("history", None)), Turn("user", text), *answer]


def _find_question(rest: RawRow) -> str:
    """Return the column with the question; `prompt` may be the rendered text of an instruction."""
    if INSTRUCTION not in rest:
        return find_one(rest, QUESTIONS) or INPUT
    others = [key for key in QUESTIONS if is_given(rest.get(key))]
    if any(str(rest[INSTRUCTION]).strip() not in str(rest[key]) for key in others):
        raise RowError("ambiguous_columns", ", ".join([INSTRUCTION, *others]))
    return INSTRUCTION


def find_one(rest: RawRow, names: Sequence[str]) -> str | None:
    """Return the column of these that has a value; None if the row has none of them.

    Raises:
        RowError: Several of them have a value.

    Example:
        >>> find_one({"answer": "4", "id": 1}, ANSWERS)
        'answer'
    """
    found = [key for key in names if key in rest]
    given = [key for key in found if is_given(rest[key])] or found[:1]
    if len(given) > 1:
        raise RowError("ambiguous_columns", ", ".join(given))
    return given[0] if given else None


def shown(row: Mapping[str, Any]) -> str:
    """Return the names of the columns for an error, without personal data.

    Example:
        >>> shown({"frage": "Hi", "ada@example.org": 1})
        '[EMAIL], frage'
    """
    return ", ".join(sorted(map(column_name, row))[:12]) or "none"


def _answer(rest: RawRow, roles: Mapping[str, str], ignored: set[str]) -> list[Turn]:
    """Read the answer: text, messages, the calls of xLAM or the answers of SQuAD."""
    key = find_one(rest, ANSWERS)
    if key is None and "answers" in rest:
        return [_answers(rest.pop("answers"), has_tools="tools" in rest)]
    if key is None:
        raise RowError("no_answer", shown(rest))
    value = rest.pop(key)
    if is_messages(value):
        return read_turns(value, roles, ignored)
    thought = find_one(rest, REASONING)
    reasoning = read_text(rest.pop(thought)) if thought else ""
    return [Turn("assistant", read_text(value), reasoning=reasoning)]


def _answers(value: object, *, has_tools: bool) -> Turn:
    """Read calls (xLAM), or the first of the texts that annotators gave (SQuAD)."""
    if has_tools:
        return Turn("assistant", "", parse_calls(from_json(value)))
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError("not_text", "answers")
    if isinstance(value, list) and len(texts) > 1:
        raise RowError("ambiguous_columns", f"{len(texts)} answers")
    return Turn("assistant", texts[0] if texts else "")


def _context(value: object) -> str:
    """Read a text, or a list of passages."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n\n".join(value)
    return read_text(value)


def _history(value: object) -> list[Turn]:
    """Read the earlier rounds of LLaMA-Factory: a list of [question, answer]."""
    rounds = from_json(value) if isinstance(value, str) and value.startswith("[") else value or []
    if not isinstance(rounds, list) or not all(isinstance(r, list) and len(r) == 2 for r in rounds):
        raise RowError("no_messages", "history is not a list of [question, answer]")
    return [
        Turn(role, read_text(text))
        for round_ in rounds
        for role, text in zip(("user", "assistant"), round_, strict=True)
    ]
