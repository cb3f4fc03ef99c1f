"""Columns of a row: renamed as the source's options say, refused if nothing can be learned with them."""

from functools import lru_cache
from typing import Any

from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.options import SourceOptions
from nightshift.raw.pii import redact

# Columns that describe a row without changing what it teaches. They are counted; others also get a warning.
DESCRIPTIONS = """
    id _id idx index uid uuid key row_id qid hash md5 sha256 source sources dataset dataset_name dataset_id
    subset config split origin original_id url link title license author category categories subcategory
    topic topics subject domain task tasks task_name task_type type kind level tag tags keywords lang
    language languages model model_name teacher generator timestamp created created_at updated_at date time
    version schemaversion meta metadata info extra conversation_id conversation_hash conv_id prompt_id
    question_id message_id session_id user_id thread_id turn num_turns n_turns num_tokens n_tokens
    token_count length name text tool_choice parallel_tool_calls __index_level_0__
"""
HARMLESS = frozenset(DESCRIPTIONS.split())
# Reason to refuse a row -> columns that no format reads and that change what the row means.
REASONS = {
    "not_text": """
        image images img image_path image_file image_url image_urls picture pictures photo pixel_values
        audio audios audio_path audio_url video videos video_path video_url
    """,
    "pretokenized": "input_ids token_ids prompt_ids completion_ids",
    "conversation_tree": "parent_id parent_message_id message_tree_id replies",
    "revised": "corrected correction revision revised critique critiques reflection",
}
REFUSED = {column: reason for reason, columns in REASONS.items() for column in columns.split()}
# Columns of a question that cannot be answered without them.
CHOICES = ("choices", "options", "option_a", "opa", "choice_a", "endings", "sol1")
# Columns that make `text` the question of a task instead of a document.
TASKS = """
    label labels label_text text_label class class_label category_label sentiment emotion intent target
    targets answer answers question response responses completion output outputs summary highlights
    translation ner_tags pos_tags
"""
TARGETS = frozenset(TASKS.split())


def is_given(value: object) -> bool:
    """Return whether a column has a value: neither null nor empty."""
    return value is not None and value != "" and value != [] and value != {}


def prepare(row: RawRow, options: SourceOptions) -> RawRow:
    """Return the columns of a row that have a value, under the names that the formats use.

    The names of a format may be written in capitals, as in a spreadsheet: `Question` is `question`.

    Example:
        >>> prepare({"Frage": "Hi", "best": {"text": "Ho"}, "output": None},
        ...     SourceOptions(columns={"instruction": "Frage", "output": "best.text"}))
        {'instruction': 'Hi', 'output': 'Ho'}
    """
    rest = {key: value for key, value in row.items() if value is not None}
    for key in [key for key in rest if key != key.strip().lower()]:
        if (lower := key.strip().lower()) not in rest and key not in options.columns.values():
            rest[lower] = rest.pop(key)
    # All mapped columns leave before the first one arrives: two may swap their names.
    mapped = {key: find_column(row, column) for key, column in options.columns.items()}
    for column in options.columns.values():
        if rest.pop(column, None) is None and "." in column:
            parent, inner = column.split(".", 1)
            rest |= {f"{parent}.{key}": value for key, value in (rest.pop(parent, None) or {}).items()}
            rest.pop(f"{parent}.{inner.split('.')[0]}", None)
    for key, value in mapped.items():
        rest.pop(key, None)
        if value is not None:
            rest[key] = value
    return rest


def find_column(row: RawRow, column: str) -> Any:
    """Return the value of a column, or of a key in it (`answer.text`); None if the row has none.

    Example:
        >>> find_column({"a": {"b": 1}}, "a.b"), find_column({"a.b": 2}, "a.b"), find_column({"a": 3}, "a.b")
        (1, 2, None)
    """
    if column in row:
        return row[column]
    first, _, inner = column.partition(".")
    value = row.get(first)
    return find_column(value, inner) if inner and isinstance(value, dict) else None


def refuse_columns(rest: RawRow) -> None:
    """Refuse a row with a column that no format reads and that changes what the row means.

    Raises:
        RowError: The first such column.
    """
    for key in rest:
        if key in REFUSED and is_given(rest[key]):
            raise RowError(REFUSED[key], f"column {key}")
        if is_media(rest[key]):
            raise RowError("not_text", f"column {column_name(key)}")


def is_media(value: object) -> bool:
    """Return whether a value is an image, audio or video as `datasets` stores it in Parquet and Arrow.

    Example:
        >>> is_media([{"bytes": b"PNG", "path": "1.png"}]), is_media({"text": "PNG"})
        (True, False)
    """
    if isinstance(value, list):
        return bool(value) and is_media(value[0])
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def is_harmless(column: str) -> bool:
    """Return whether an ignored column, or key of a message, only describes the row.

    Example:
        >>> is_harmless("source"), is_harmless("messages.id"), is_harmless("hint")
        (True, True, False)
    """
    return column.removeprefix("messages.") in HARMLESS


def ignored_columns(rest: RawRow) -> set[str]:
    """Return the names of the columns that were not read, without personal data, at most 40 characters."""
    return {column_name(key) for key, value in rest.items() if is_given(value)}


@lru_cache(maxsize=4096)
def column_name(key: str) -> str:
    """Return the name of a column for a report, without personal data, at most 40 characters.

    Example:
        >>> column_name("ada@example.org")
        '[EMAIL]'
    """
    # A key of JSON inside a cell may have half a surrogate pair, which no file can hold.
    return redact(key.encode("utf-8", "replace").decode("utf-8"))[:40]
