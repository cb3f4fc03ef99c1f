"""A terminal conversation with a small random model."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from infra.cli import chat
from nightshift.registry.served_model import generate

Talk = Callable[[str], str]


@pytest.fixture
def talk(
    lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Talk:
    """Return a function that sends text to stdin and returns stdout."""
    monkeypatch.setattr(chat, "MAX_NEW_TOKENS", 8)

    def converse(text: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        chat.converse(*lively)
        return capsys.readouterr().out

    return converse


def answer(lively: tuple[Any, Any], *texts: str) -> str:
    """Return the answer to a conversation that begins and ends with a user turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    model, tokenizer = lively
    return str(tokenizer.decode(generate(model, tokenizer, turns, 8)[1], skip_special_tokens=True))


def test_previous_turns_are_the_context_of_a_question(talk: Talk, lively: tuple[Any, Any]) -> None:
    first = answer(lively, "One?")
    second = answer(lively, "One?", first.strip(), "Two?")
    assert talk("One?\n\n  Two? \n/exit\nThree?\n") == f"{first}\n{second}\n"
    assert second != answer(lively, "Two?")


def test_an_interrupted_answer_stays_in_the_context(
    talk: Talk, lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = chat.stream

    def interrupted(model: Any, tokenizer: Any, turns: list[dict[str, str]], limit: int) -> Iterator[str]:
        if len(turns) > 1:
            yield from stream(model, tokenizer, turns, limit)
        else:
            yield "It is "
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    assert talk("One?\nTwo?\n") == f"It is \n{answer(lively, 'One?', 'It is', 'Two?')}\n"


def test_a_conversation_that_is_too_long_is_restarted(talk: Talk, lively: tuple[Any, Any]) -> None:
    assert talk(f"{'word ' * 2100}\nTwo?\n") == f"\n{answer(lively, 'Two?')}\n"


def test_control_characters_are_removed() -> None:
    assert chat.printable("\x1b]0;title\x07a\u009bb\r\n\tc\N{ZERO WIDTH JOINER}") == (
        "]0;titleab\n\tc\N{ZERO WIDTH JOINER}"
    )
