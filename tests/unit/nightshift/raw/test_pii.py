"""Personal data is found by format and checksum; text that only looks similar is left unchanged."""

import sys
from pathlib import Path

import pytest

from nightshift.core.errors import ConfigError
from nightshift.raw.pii import find_pii, redact
from nightshift.raw.turns import Call, Conversation, Turn
from tasks.ingest.personal import find_pii_spans, redact_conversation
from tasks.ingest.presidio import load_presidio

TOKEN = "ghp_" + "a1B2" * 9
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk"
PRIVATE = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc=\n-----END RSA PRIVATE KEY-----"

FOUND = {
    "ada.lovelace+x@mail.example.org": "email",
    "jürgen@müller.example": "email",
    "+49 30 1234-5678": "phone",
    "+14155550132": "phone",
    "(030) 1234 5678": "phone",
    "030 1234 5678": "phone",
    "01 23 45 67 89": "phone",
    "415-555-0132": "phone",
    "8.8.8.8": "ip_address",
    "2001:4860:4860::8888": "ip_address",
    "DE89370400440532013000": "iban",
    "GB29 NWBK 6016 1331 9268 19": "iban",
    "NO93 8601 1117 947": "iban",
    "4111 1111 1111 1111": "card",
    "378282246310005": "card",
    "5555-5555-5555-4444": "card",
    "AKIAIOSFODNN7EXAMPLE": "key",
    TOKEN: "key",
    "sk-proj-abcdefghij0123456789": "key",
    JWT: "key",
    PRIVATE: "key",
}


@pytest.mark.parametrize(("value", "kind"), FOUND.items(), ids=range(len(FOUND)))
def test_values_are_found_completely_and_redacted(value: str, kind: str) -> None:
    text = f"It is {value}, you know."
    assert [(f.kind, f.start, f.end) for f in find_pii(text)] == [(kind, 6, 6 + len(value))]
    assert redact(text) == f"It is [{kind.upper()}], you know."


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15 12:30:45",
        "on 01.02.2023 at 10:15",
        "a ratio of 1234567890 to 1",
        "pi is 3.14159265358979",
        "ISBN 978-3-16-148410-0",
        "order 20240115123456",
        "version 1.2.3",
        "10.0.0.1, 127.0.0.1, 192.168.1.1, 203.0.113.7, 300.1.1.1",
        "fe80::1 and ::1 and std::vector and a::b",
        "DE88370400440532013000",
        "4111 1111 1111 1112",
        "@ada and user@localhost",
        "1 000 000 000 people, 2 012 345 678 people",
        "sk-learn, ghost, task-0123",
        "x = +1 - 2",
    ],
)
def test_text_that_only_looks_like_pii_is_unchanged(text: str) -> None:
    assert find_pii(text) == []
    assert redact(text) == text


def test_a_card_number_next_to_other_digits_is_found() -> None:
    assert redact("4111 1111 1111 1111 2031") == "[CARD] 2031"
    assert redact("No 12 4111 1111 1111 1111") == "No 12 [CARD]"


def test_a_key_whose_end_is_missing_is_redacted_to_the_end() -> None:
    assert redact("a -----BEGIN PRIVATE KEY-----\nMIIE") == "a [KEY]"


def test_arguments_and_tools_are_redacted_and_stay_json() -> None:
    calls = (Call("pay", {"to": "DE89370400440532013000", "card": 4111111111111111, "n": 1}),)
    conversation = Conversation(
        [Turn("user", "Pay"), Turn("assistant", "", calls)], [{"doc": "ask ada@example.org"}]
    )
    assert [(span.kind, span.turn, span.field) for span in find_pii_spans(conversation, find_pii)] == [
        ("email", 0, "tools"),
        ("card", 2, "tool_calls"),
        ("iban", 2, "tool_calls"),
    ]
    redacted = redact_conversation(conversation, find_pii)
    assert redacted.turns[1].calls[0].arguments == {"to": "[IBAN]", "card": "[CARD]", "n": 1}
    assert redacted.tools == [{"doc": "ask [EMAIL]"}]
    assert find_pii_spans(redacted, find_pii) == []


def test_presidio_adds_names_to_the_findings_of_the_rules(tmp_path: Path) -> None:
    import spacy

    model = spacy.blank("en")
    patterns = [{"label": "PERSON", "pattern": "Ada"}, {"label": "PERSON", "pattern": "PERSON"}]
    model.add_pipe("entity_ruler").add_patterns(patterns)
    model.to_disk(tmp_path / "model")
    find = load_presidio(str(tmp_path / "model"))
    text = "Ada wrote Ada@example.org"
    assert [(f.kind, f.start, f.end) for f in find(text)] == [("person", 0, 3), ("email", 10, 25)]
    # The model would also match the placeholder as a name.
    assert redact(text, find) == "[PERSON] wrote [EMAIL]"


def test_a_missing_spacy_model_is_an_error_and_not_downloaded() -> None:
    with pytest.raises(ConfigError, match=r"no spaCy model 'xx_none_sm'; run `spacy download"):
        load_presidio("xx_none_sm")


def test_without_presidio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[presidio\]'"):
        load_presidio("en_core_web_sm")
