"""Generation, complete and streamed, with a small random model."""

import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from nightshift.registry.served_model import TooLongError, generate, has_stopped, stream
from tests.helpers.checkouts import ROOT

LIMIT = 24


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["Who are you?", "Grüße, 世界! 🙂", "a\nb"])
def test_the_pieces_are_the_answer(lively: tuple[Any, Any], text: str) -> None:
    model, tokenizer = lively
    asked, new = generate(model, tokenizer, ask(text), LIMIT)
    assert 0 < len(new) <= LIMIT < asked
    assert "".join(stream(model, tokenizer, ask(text), LIMIT)) == tokenizer.decode(
        new, skip_special_tokens=True
    )


def test_closing_the_pieces_ends_the_generation(
    lively: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = lively
    steps: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    with closing(stream(model, tokenizer, ask("Count."), 1500)) as pieces:
        next(pieces)
    assert 0 < len(steps) < 1000


def test_an_error_of_the_generation_ends_the_pieces_with_it(lively: tuple[Any, Any]) -> None:
    model, tokenizer = lively
    with pytest.raises(TooLongError, match=r"has \d{4} tokens, the model takes 2048; start a new one"):
        list(stream(model, tokenizer, ask("word " * 2100), LIMIT))


def test_forced_tokens_are_generated_whatever_the_model_wants(lively: tuple[Any, Any]) -> None:
    model, tokenizer = lively
    _, new = generate(model, tokenizer, ask("Who?"), LIMIT, forced=True)
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


def test_the_project_can_import_it_without_setting_a_model_of_mlflow() -> None:
    code = "import nightshift.registry.served_model, mlflow.models.model as m; print(m.__mlflow_model__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
