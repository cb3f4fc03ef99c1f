"""Generation, complete and streamed, with a small random model."""

import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from nightshift.registry.served_model import TooLongError, generate, has_stopped, stream
from tests.helpers.checkouts import ROOT

LIMIT = 24


def user_turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["Who are you?", "Grüße, 世界! 🙂", "a\nb"])
def test_the_streamed_pieces_equal_the_answer(lively: tuple[Any, Any], text: str) -> None:
    model, tokenizer = lively
    n_prompt, new = generate(model, tokenizer, user_turn(text), LIMIT)
    assert 0 < len(new) <= LIMIT < n_prompt
    assert "".join(stream(model, tokenizer, user_turn(text), LIMIT)) == tokenizer.decode(
        new, skip_special_tokens=True
    )


def test_closing_the_stream_stops_the_generation(
    lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lively
    steps: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    with closing(stream(model, tokenizer, user_turn("Count."), 1500)) as pieces:
        next(pieces)
    assert 0 < len(steps) < 1000


def test_an_error_during_generation_is_raised_by_the_stream(lively: tuple[Any, Any]) -> None:
    model, tokenizer = lively
    with pytest.raises(
        TooLongError, match=r"has \d{4} tokens, the model's context is 2048 tokens; start a new one"
    ):
        list(stream(model, tokenizer, user_turn("word " * 2100), LIMIT))


def test_forced_generation_ignores_stop_tokens(lively: tuple[Any, Any]) -> None:
    model, tokenizer = lively
    _, new = generate(model, tokenizer, user_turn("Who?"), LIMIT, forced=True)
    assert len(new) == LIMIT


def test_only_a_stop_token_at_the_end_is_a_stop(lively: tuple[Any, Any]) -> None:
    model, _ = lively
    stop = model.generation_config.eos_token_id
    assert [has_stopped(model, new) for new in ([], [stop], [stop, 7], [7, stop])] == [
        False,
        True,
        False,
        True,
    ]


def test_importing_the_module_sets_no_mlflow_model() -> None:
    code = "import nightshift.registry.served_model, mlflow.models.model as m; print(m.__mlflow_model__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
