"""Rows that compare or rate answers: DPO, KTO, reward data. A bad answer is never trained as a good one.

A row has a good answer (`chosen`, or one with a good label), a bad one (`rejected`, or one with a bad label),
or both. Each is read as a conversation of its own, in any format; see `apply_preference`.
"""

from typing import Literal

from nightshift.raw.columns import is_given
from nightshift.raw.contents import describe_type
from nightshift.raw.faults import RowError
from nightshift.raw.formats import RawRow
from nightshift.raw.messages import CONTENT_KEYS, ROLE_KEYS, ROLES, is_messages, parse_messages

CHOSEN = ("chosen", "chosen_messages", "chosen_response", "chosen_answer")
REJECTED = ("rejected", "rejected_messages", "rejected_response", "rejected_answer")
# Columns that say whether the answer is a good one: TRL, LLaMA-Factory, OpenMathInstruct, BeaverTails.
LABELS = (
    *("label", "kto_tag", "desirable", "is_chosen", "accepted", "thumbs_up"),
    *("is_correct", "correct", "is_valid", "is_safe", "passed", "resolved"),
)
GOOD = (True, "true", "good", "chosen", "desirable", "1")
BAD = (False, -1, "false", "bad", "rejected", "undesirable", "0", "-1")
# Columns that grade the answer.
RATINGS = (
    "score",
    "scores",
    "rating",
    "ratings",
    "reward",
    "rewards",
    "grade",
    "helpfulness",
    "correctness",
    "quality",
)
NAMES = frozenset((*CHOSEN, *REJECTED, *LABELS, *RATINGS))


Answer = Literal["good", "bad"]


def list_answers(rest: RawRow) -> list[Answer]:
    """Return which answers a row gives, good ones first; none if it neither compares nor labels any.

    Args:
        rest: Columns of the row.

    Raises:
        RowError: A label is a number without a known meaning.

    Example:
        >>> list_answers({"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}), list_answers({"label": False})
        (['good', 'bad'], ['bad'])
    """
    if any(is_given(rest.get(key)) for key in REJECTED):
        return ["good", "bad"]
    labels = _read_labels(rest).values()
    if not labels:
        return []
    return ["good"] if all(labels) else ["bad"]


def apply_preference(
    rest: RawRow,
    lists: tuple[str, ...],
    preference: Literal["refuse", "chosen", "compare"],
    answer: Answer = "good",
) -> None:
    """Put the good or the bad answer where the formats look for it, and remove what compares or rates it.

    Args:
        rest: Columns of the row; changed in place.
        lists: Columns that may contain a list of messages.
        preference: `preference` of the source's options.
        answer: Which answer to read; a bad one must be in `list_answers`.

    Raises:
        RowError: Such rows are to be refused, the answer is not a good one, or it is rated by a number, with
            which nothing can be compared.

    Example:
        >>> row = {"prompt": "Hi", "chosen": "Ho", "rejected": "Hm"}
        >>> apply_preference(row, ("messages",), "chosen")
        >>> row
        {'prompt': 'Hi', 'completion': 'Ho'}
    """
    if rest.keys().isdisjoint(NAMES):
        return
    compared = [key for key in (*CHOSEN, *REJECTED) if is_given(rest.get(key))]
    labels = _read_labels(rest)
    rated = [key for key in RATINGS if _is_rating(rest.get(key))]
    found = [*compared, *labels, *rated]
    if found and preference == "refuse":
        raise RowError("preference", ", ".join(found))
    if rated and preference == "compare" and not (compared or labels):
        raise RowError("rated", ", ".join(rated))
    if answer == "good" and not all(labels.values()):
        raise RowError("rejected_answer", ", ".join(labels))
    if answer == "bad" and any(key in compared for key in REJECTED):
        _forget_answer(rest, lists)
        wanted, other = REJECTED, CHOSEN
    else:
        wanted, other = CHOSEN, REJECTED
    for key in (*labels, *other):
        rest.pop(key, None)
    for key in wanted:
        if key in rest:
            _place(rest, lists, rest.pop(key))


def _forget_answer(rest: RawRow, lists: tuple[str, ...]) -> None:
    """Remove the good answer from a conversation that ends with it, next to which the bad one is given."""
    if any(is_given(rest.get(key)) for key in CHOSEN):
        return
    for key in lists:
        if is_messages(rest.get(key)):
            messages = parse_messages(rest[key])
            last = messages[-1] if messages else {}
            if any(ROLES.get(str(last.get(key)).lower()) == "assistant" for key in ROLE_KEYS):
                rest[key] = messages[:-1]


def _read_labels(rest: RawRow) -> dict[str, bool]:
    """Return the labels that say whether the answer is a good one, by column."""
    labels = {key: _as_label(rest[key]) for key in LABELS if key in rest}
    return {key: good for key, good in labels.items() if good is not None}


def _place(rest: RawRow, lists: tuple[str, ...], chosen: object) -> None:
    """Put a chosen answer, a text, a message, or a whole conversation, into the column of its format."""
    answer = [chosen] if isinstance(chosen, dict) else chosen
    if is_messages(answer):
        answer = parse_messages(answer)
        if any(message.get(key) in ("user", "human") for message in answer for key in ROLE_KEYS):
            for key in (*lists, "prompt"):
                rest.pop(key, None)
            rest["messages"] = answer
            return
    known = next((key for key in lists if is_messages(rest.get(key))), None)
    if known is None:
        rest["completion"] = answer
        return
    ending = answer if isinstance(answer, list) else [{"role": "assistant", CONTENT_KEYS[0]: answer}]
    rest[known] = [*parse_messages(rest[known]), *ending]


def _as_label(value: object) -> bool | None:
    """Return whether a label says good or bad; None for another one, such as a topic.

    Raises:
        RowError: The label is a number without a known meaning.
    """
    word = value.strip().lower() if isinstance(value, str) else value
    if word in GOOD:
        return True
    if word in BAD:
        return False
    if isinstance(word, (int, float)) and describe_type(word) != "NaN":
        raise RowError("unsupported_weight", f"label {word}")
    return None


def _is_rating(value: object) -> bool:
    """Return whether a value is a number, or contains numbers."""
    if isinstance(value, dict):
        return any(map(_is_rating, value.values()))
    if isinstance(value, list):
        return any(map(_is_rating, value))
    if isinstance(value, str):
        return value.strip().replace(".", "", 1).lstrip("-").isdecimal()
    return isinstance(value, (int, float)) and describe_type(value) != "NaN"
