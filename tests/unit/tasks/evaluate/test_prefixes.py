"""Whatever texts start with the same tokens, each has the score that it has alone."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.evaluate.asker import Answer
from tasks.evaluate.prefixes import Text, batch_questions, group_by_prompt, score_requests, score_texts

VOCABULARY = 5
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6)


@cache
def model() -> LlamaForCausalLM:
    """Return a small model whose likelihoods depend on all tokens before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    made = LlamaForCausalLM(config).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.6)
    return made


def score_alone(text: Sequence[int], scored: Sequence[int]) -> Answer:
    """Score tokens of a text, without a cache or other texts."""
    with torch.inference_mode():
        nats = model()(torch.tensor([text])).logits[0].log_softmax(-1)
    found = [(nats[i - 1, text[i]], nats[i - 1].argmax() == text[i]) for i in scored]
    return float(sum(one for one, _ in found)), all(bool(one) for _, one in found)


def require_equal(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Compare likelihoods within rounding."""
    assert [one for _, one in found] == [one for _, one in expected]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
    st.lists(st.tuples(tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_continuations_have_the_score_that_they_have_alone(
    start: list[int], questions: list[tuple[list[int], list[list[int]]]], batch_size: int
) -> None:
    requests = [
        (("", ""), [*start, 0, *prompt], rest)
        for prompt, continuations in questions
        for rest in continuations
    ]
    done: list[int] = []
    found = score_requests(model(), requests, batch_size, done.append)
    expected = [
        score_alone([*prompt, *rest], range(len(prompt), len(prompt) + len(rest)))
        for _, prompt, rest in requests
    ]
    require_equal(found, expected)
    assert sum(done) == len(requests)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
    st.lists(
        st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=2), min_size=1, max_size=6
    ),
    st.integers(1, 5),
)
def test_texts_have_the_score_that_they_have_alone(
    start: list[int], rests: list[list[tuple[int, bool]]], batch_size: int
) -> None:
    texts = []
    for rest in rests:
        marked = [*((token, False) for token in start), *rest]
        scored = [i for i, (_, is_scored) in enumerate(marked) if is_scored and i]
        texts.append(Text([token for token, _ in marked], scored))
    done: list[int] = []
    found = score_texts(model(), texts, batch_size, done.append)
    require_equal(found, [score_alone(text.tokens, text.scored) for text in texts])
    assert sum(done) == len(texts)


def test_layers_on_several_devices_and_models_that_compute_all_logits_give_the_same_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [Text([1, 2, 3, 4, 0, 2], [4, 5]), Text([1, 2, 0, 4], [2]), Text([3, 3])]
    expected = [score_alone(text.tokens, text.scored) for text in texts]
    monkeypatch.setattr(model(), "hf_device_map", {"": 0}, raising=False)
    require_equal(score_texts(model(), texts, 3, lambda _: None), expected)
    forward = model().forward

    def compute_all(ids: torch.Tensor, **options: object) -> object:
        return forward(ids, **{**options, "logits_to_keep": 0})

    monkeypatch.setattr(model(), "forward", compute_all)
    require_equal(score_texts(model(), texts, 3, lambda _: None), expected)


def test_what_several_texts_start_with_is_processed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    processed = []
    forward = model().forward

    def count(ids: torch.Tensor, **options: object) -> object:
        processed.append(tuple(ids.shape))
        return forward(ids, **options)

    monkeypatch.setattr(model(), "forward", count)
    prompts = [[1, 2, 3, 4, 0], [1, 2, 3, 4, 3, 2], [1, 2, 3, 4, 4]]
    requests = [(("", ""), prompt, [2, 2, choice]) for prompt in prompts for choice in range(3)]
    score_requests(model(), requests, 6, lambda _: None)
    # Three tokens of all prompts, the shortest of which keeps one. Then of two prompts the rest and what
    # their choices start with, but the last token, then with that the choices.
    assert processed == [(1, 3), (2, 4), (6, 1), (1, 3), (3, 1)]


def test_the_most_expensive_questions_are_batched_first() -> None:
    requests = [(("", ""), [7] * length, [8] * rest) for length, rest in ((2, 1), (9, 1), (3, 1))]
    requests += [(("", ""), [6] * 4, [8, number] * 3) for number in range(4)]
    batches = list(batch_questions(group_by_prompt(requests), 4))
    assert [[(len(one.prompt), list(one.numbers)) for one in batch] for batch in batches] == [
        [(4, [3, 4, 5, 6])],
        [(9, [1]), (3, [2]), (2, [0])],
    ]
