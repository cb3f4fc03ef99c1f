"""Convert rows of common dataset formats to turns; the columns of a row determine its format.

| format | columns |
|---|---|
| messages (OpenAI, Anthropic, Hermes, ...) | `messages`: role, content, tool_calls, tool_call_id; `tools` |
| ShareGPT | `conversations`: from, value; `system`, `tools` |
| Alpaca | `instruction`, `output`; `input`, `system`, `history` |
| prompt-completion (TRL) | `prompt`, `completion`: text or messages; `tools` |
| question and answer | `question`, `answer` and similar names (`nightshift.raw.pairs`); `context` |
| plain text | `text` |

The first format whose columns are present applies, except that a `text` which the options of the source name
in `columns` wins over all others. What a format does not read is counted, unless it changes what the row
means: then the row is refused.
"""

from collections.abc import Callable

from nightshift.raw.columns import TARGETS, ignored_columns, is_given, prepare, refuse_columns
from nightshift.raw.contents import read_content, read_text
from nightshift.raw.faults import RowError
from nightshift.raw.flags import ROW_FLAGS, pop_flag
from nightshift.raw.formats import RawRow
from nightshift.raw.messages import CONTENT_KEYS, read_turns
from nightshift.raw.options import SourceOptions
from nightshift.raw.pairs import has_answer, has_question, read_pair, shown
from nightshift.raw.preferences import CHOSEN, Answer, apply_preference, list_answers
from nightshift.raw.tool_calls import TEXT_CALL, parse_functions, parse_tools
from nightshift.raw.turns import Conversation, Turn

# Columns with a list of messages, in order of precedence. `turns` is often a number, `dialog` often text.
LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "contents", "chat")
SYSTEMS = ("system", "system_prompt", "system_message", "systeminstruction", "system_instruction")
TOOLS: tuple[tuple[str, Callable[[object], list[RawRow]]], ...] = (
    ("tools", parse_tools),
    ("functions", parse_functions),
)
TEXT = "text"
DEFAULTS = SourceOptions()


def convert(row: RawRow, options: SourceOptions = DEFAULTS, answer: Answer = "good") -> Conversation:
    """Convert a row of any known format.

    Args:
        row: Row as its author wrote it.
        options: Options of its source: columns, roles and preference.
        answer: Which answer to read, if the row compares or labels them; a bad one only if `find_answers`
            returns it.

    Raises:
        RowError: No format matches, a part of the row has the wrong type, or a column changes what the
            row means in a way that cannot be trained.

    Example:
        >>> [turn.role for turn in convert({"instruction": "Add", "input": "1, 2", "output": "3"}).turns]
        ['user', 'assistant']
    """
    rest, ignored = prepare(row, options), set[str]()
    if TEXT in options.columns:
        return read_document(rest, row, options)
    refuse_columns(rest)
    if is_compared(rest):
        apply_preference(rest, LISTS, options.preference, answer)
    if pop_flag(rest, "the row", ROW_FLAGS) is False:
        raise RowError("no_supervised_token", "the row has the weight 0")
    turns = read_rest(rest, row, options, ignored)
    tools = [tool for key, parse in TOOLS if is_given(rest.get(key)) for tool in parse(rest.pop(key))]
    turns = with_system(rest, turns)
    if tools and lists_tools_itself(turns):
        tools = []
        ignored.add("tools")
    pop_group(rest, options)
    return Conversation(turns, tools, frozenset(ignored | ignored_columns(rest)))


def find_answers(row: RawRow, options: SourceOptions) -> list[Answer]:
    """Return which answers a row of a source with `preference: compare` gives; none for other sources.

    Raises:
        RowError: A label is a number without a known meaning.
    """
    if options.preference != "compare" or TEXT in options.columns:
        return []
    rest = prepare(row, options)
    return list_answers(rest) if is_compared(rest) else []


def is_compared(rest: RawRow) -> bool:
    """Return whether the columns of a row may compare or rate its answer: it is no plain text."""
    return bool(find_list(rest)) or has_question(rest) or any(key in rest for key in CHOSEN)


def read_document(rest: RawRow, row: RawRow, options: SourceOptions) -> Conversation:
    """Read the text of a row whose source names its column; all other columns are ignored.

    Raises:
        RowError: The row has no such column.

    Example:
        >>> row = {"body": "Once upon a time", "instruction": "Write", "output": "Once"}
        >>> found = convert(row, SourceOptions(columns={"text": "body"}))
        >>> [(turn.role, turn.content) for turn in found.turns], sorted(found.ignored)
        ([('text', 'Once upon a time')], ['instruction', 'output'])
    """
    if TEXT not in rest:
        raise RowError("unknown_format", shown(row))
    turn = Turn("text", read_text(rest.pop(TEXT)))
    pop_group(rest, options)
    return Conversation([turn], [], frozenset(ignored_columns(rest)))


def pop_group(rest: RawRow, options: SourceOptions) -> None:
    """Remove the column by which the split groups the rows: it is read there."""
    if options.group_by:
        rest.pop(options.group_by.split(".")[0].lower(), None)


def read_rest(rest: RawRow, row: RawRow, options: SourceOptions, ignored: set[str]) -> list[Turn]:
    """Read the turns of a row in the first format that fits, and remove its columns from `rest`."""
    if key := find_list(rest):
        return read_turns(rest.pop(key), options.roles, ignored)
    if has_question(rest) and ("text" not in rest or has_answer(rest)):
        return read_pair(rest, options, ignored)
    if ("role" in rest and any(key in rest for key in CONTENT_KEYS)) or ("from" in rest and "value" in rest):
        raise RowError("one_message", shown(row))
    if "text" not in rest:
        raise RowError("unknown_format", shown(row))
    if labels := [key for key in rest if key in TARGETS and is_given(rest[key])]:
        raise RowError("labelled_text", ", ".join(["text", *labels]))
    return [Turn("text", read_text(rest.pop("text")))]


def find_list(rest: RawRow) -> str | None:
    """Return the column with the messages; `messages` and `conversations` never contain anything else."""
    found = [key for key in LISTS if key in rest and (key in LISTS[:2] or is_list(rest[key]))]
    return next((key for key in found if is_given(rest[key])), found[0] if found else None)


def is_list(value: object) -> bool:
    """Return whether a value is a list, or a list of objects as JSON."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def with_system(rest: RawRow, turns: list[Turn]) -> list[Turn]:
    """Prepend the row's separate system prompt to the turns; a system turn among them wins."""
    found = next((key for key in SYSTEMS if is_given(rest.get(key))), None)
    has_own = turns[0].role == "text" or (turns[0].role == "system" and turns[0].content.strip())
    if found is None or has_own:
        return turns
    return [Turn("system", read_content(rest.pop(found)).text), *turns]


def lists_tools_itself(turns: list[Turn]) -> bool:
    """Return whether the system turn already lists the tools, and the calls are text (Hermes)."""
    return (
        turns[0].role == "system"
        and "<tools>" in turns[0].content
        and not any(turn.calls for turn in turns)
        and any(turn.role == "assistant" and TEXT_CALL.search(turn.content) for turn in turns)
    )
