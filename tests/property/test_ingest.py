"""Properties of ingest: no row is lost or duplicated, no text is changed, no redacted value remains."""

import codecs
import io
import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightshift.core.memo import Memo
from nightshift.data.encode import Encoder, load_encoder
from nightshift.raw.arrays import split_rows
from nightshift.raw.checks import CONTROL, compile_special_tokens
from nightshift.raw.checksums import IBAN_LENGTHS, card_length, iban_length, is_luhn
from nightshift.raw.faults import RowError
from nightshift.raw.pii import find_pii, redact
from nightshift.raw.streams import Limits
from tasks.ingest.lengths import measure
from tasks.ingest.rows import Privacy, Rules
from tests.helpers.byte_base import make_byte_base
from tests.helpers.outcomes import convert_shards

LIMITS = Limits(row_bytes=2000, shard_bytes=10**9, ratio=200)
MARKUP = compile_special_tokens([])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": JSON},
    optional={"weight": JSON, "tool_calls": JSON, "function_call": JSON, "name": JSON},
)
ROW = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}),
    st.fixed_dictionaries({"text": JSON, "tools": JSON}),
    st.fixed_dictionaries({"conversations": JSON}),
    st.fixed_dictionaries({"prompt": JSON, "completion": JSON, "system": JSON}),
    st.fixed_dictionaries({"instruction": JSON, "output": JSON, "history": JSON}),
    st.fixed_dictionaries({"question": JSON, "context": JSON, "answers": JSON, "tools": JSON}),
    st.fixed_dictionaries({"prompt": JSON, "chosen": JSON, "rejected": JSON, "label": JSON}),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=2), "weight": JSON, "score": JSON}),
    JSON,
)
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE)
LINE = ROW.map(lambda row: json.dumps(row).encode()) | st.binary(min_size=1, max_size=50).filter(
    # A byte order mark at the start of a file is no part of its rows, and UTF-16 is refused as a whole.
    lambda line: line.strip() and b"\n" not in line and not line.startswith(MARKS)
)


def outcomes(folder: Path, lines: list[bytes], mode: Any = "report") -> list[Any]:
    path = folder / "a" / "000001.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(lines))
    return convert_shards(folder, LIMITS, Rules(MARKUP, Privacy(mode)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(LINE, min_size=1, max_size=8), mode=st.sampled_from(["report", "redact", "drop"]))
def test_every_row_becomes_one_example_or_fault_in_order(
    tmp_path: Path, lines: list[bytes], mode: str
) -> None:
    found = outcomes(tmp_path, lines, mode)
    assert [outcome.origin for outcome in found] == [f"a/000001.jsonl:{i + 1}" for i in range(len(lines))]
    for outcome in found:
        if isinstance(outcome.result, RowError):
            assert outcome.result.remedy
        else:
            assert outcome.result["messages"]
            json.dumps(outcome.result).encode()


CLEAN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text.strip() == text and not CONTROL.search(text) and not MARKUP.search(text)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=CLEAN, escaped=st.booleans())
def test_a_clean_text_is_unchanged_or_counted_as_repaired(
    tmp_path: Path, text: str, *, escaped: bool
) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
    (found,) = outcomes(tmp_path, [json.dumps(row, ensure_ascii=escaped).encode()])
    if isinstance(found.result, RowError):
        assert (found.result.reason, len(json.dumps(row)) > 1000) == ("too_large", True)
    elif not found.repaired:
        assert found.result["messages"][0]["content"] == text


@given(rows=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 1]), size=st.integers(1, 9))
def test_an_array_is_split_into_its_elements(rows: list[Any], indent: int | None, size: int) -> None:
    class Chunks(io.BufferedReader):
        def read(self, wanted: int | None = -1) -> bytes:
            return super().read(size)

    text = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    cut = split_rows(Chunks(io.BytesIO(text)), "array", 10**6)  # type: ignore[arg-type]
    assert [json.loads(element or b"") for element in cut] == rows


@given(st.text("0123456789", min_size=12, max_size=18))
def test_exactly_one_check_digit_is_valid(digits: str) -> None:
    assert sum(is_luhn(digits + last) for last in "0123456789") == 1


def iban(country: str, account: str) -> str:
    """Return an IBAN with its check digits (ISO 13616)."""
    body = (account * 34)[: IBAN_LENGTHS[country] - 4]
    rest = int("".join(str(int(sign, 36)) for sign in f"{body}{country}00")) % 97
    return f"{country}{98 - rest:02d}{body}"


ACCOUNT = st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=30)


@given(country=st.sampled_from(sorted(IBAN_LENGTHS)), account=ACCOUNT, at=st.integers(4, 14))
def test_an_iban_is_found_and_one_with_a_changed_character_is_not(
    country: str, account: str, at: int
) -> None:
    number = iban(country, account)
    assert iban_length(number) == len(number)
    # A letter counts as two digits, so swapping a letter and a digit would shift all other digits.
    first, second = "01" if number[at].isdigit() else "AB"
    other = second if number[at] == first else first
    assert iban_length(number[:at] + other + number[at + 1 :]) == 0


@given(digits=st.text("0123456789", min_size=14, max_size=14))
def test_a_card_number_is_found_in_groups_of_four(digits: str) -> None:
    number = next(f"4{digits}{last}" for last in "0123456789" if is_luhn(f"4{digits}{last}"))
    grouped = " ".join(number[i : i + 4] for i in range(0, 16, 4))
    assert (card_length(number), card_length(grouped)) == (16, 19)


PIECE = st.one_of(
    st.text(max_size=5),
    st.from_regex(r"[a-z.]{1,6}@[a-z]{1,6}\.[a-z]{2,3}", fullmatch=True),
    st.from_regex(r"\+?[0-9 ()./-]{8,20}", fullmatch=True),
    st.from_regex(r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}", fullmatch=True),
    st.from_regex(r"2[0-9a-f]{3}:[0-9a-f:]{2,20}", fullmatch=True),
    st.sampled_from(["4111 1111 1111 1111", "DE89370400440532013000", "AKIAIOSFODNN7EXAMPLE", "@", "-", "0"]),
)


@given(st.lists(PIECE, max_size=8).map("".join))
def test_a_redacted_text_contains_no_personal_data_and_keeps_the_rest(text: str) -> None:
    found = find_pii(text)
    redacted = redact(text)
    assert find_pii(redacted) == []
    assert redact(redacted) == redacted
    assert (redacted == text) == (found == [])
    assert all(a.end <= b.start for a, b in pairwise(found))


CALL = st.fixed_dictionaries({"name": st.text(max_size=5), "arguments": JSON})
CALLING = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.none() | st.text(max_size=5),
        "tool_calls": st.lists(st.builds(lambda call: {"function": call}, CALL), max_size=2),
    }
)
ASKED = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=5)})
ANSWER = st.fixed_dictionaries({"role": st.just("tool"), "content": st.text(max_size=5)})
TALK = st.builds(
    lambda asked, rounds, tools: {"messages": [asked, *chain.from_iterable(rounds)], "tools": tools},
    ASKED,
    st.lists(st.tuples(CALLING) | st.tuples(CALLING, ANSWER, CALLING), min_size=1, max_size=2),
    st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=2), max_size=2),
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(make_byte_base(tmp_path_factory.mktemp("base")))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(TALK, min_size=1, max_size=4))
def test_every_checked_row_is_encoded_or_becomes_a_fault(
    tmp_path: Path, encoder: Encoder, rows: list[Any]
) -> None:
    checked = outcomes(tmp_path, [json.dumps(row).encode() for row in rows])
    with Memo("tokens", {}, tmp_path) as memo:
        measured = list(measure(checked, encoder, memo, 400))
    assert [outcome.origin for outcome, _ in measured] == [outcome.origin for outcome in checked]
    for outcome, tokens in measured:
        assert (tokens == 0) == isinstance(outcome.result, RowError)
        assert tokens <= 400
