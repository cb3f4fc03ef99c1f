"""Example by example, attention is what one mask over the whole row makes it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.errors import ConfigError
from tasks.sft import attention

LENGTHS = (5, 1, 13, 8)
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        # The longest example does not fit into the window, so that the mask is needed.
        lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    ],
    ids=["causal", "sliding window"],
)
def test_logits_and_gradients_equal_those_under_a_mask(
    make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make()
    assert model.config._attn_implementation == "sdpa"
    ids = torch.randint(64, (1, sum(LENGTHS)))
    row = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0),
    }

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        out = model(**row, labels=ids, use_cache=False)
        out.loss.backward()
        return out.logits.detach(), model.model.embed_tokens.weight.grad.clone()

    logits, gradient = run()
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    under_mask, its_gradient = run()
    assert torch.allclose(logits, under_mask, atol=1e-6)
    assert torch.allclose(gradient, its_gradient, atol=1e-6)


def test_only_pairs_within_an_example_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def count(_: Any, query: Any, *__: Any, attention_mask: Any, **___: Any) -> tuple[Any, None]:
        assert attention_mask is None
        seen.append(query.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", count)
    states = torch.randn(1, 4, sum(LENGTHS), 8)
    output, _ = attention.attend_by_example(
        torch.nn.Module(), states, states, states, None, cu_seq_lens_q=torch.tensor([0, 5, 6, 19, 27])
    )
    assert seen == [5, 1, 13, 8]
    assert torch.equal(output, states.transpose(1, 2))


@pytest.mark.parametrize("told", ["boundaries", "positions"])
def test_xformers_gets_the_examples_of_a_row(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # xFormers has no kernel for a processor: torch computes what the mask of xFormers says.
    def reference(query: Any, key: Any, value: Any, attn_bias: Any, p: float, scale: float) -> torch.Tensor:
        assert p == 0.0
        mask = attn_bias.materialize((sum(LENGTHS), sum(LENGTHS)))
        states = (one.transpose(1, 2) for one in (query, key, value))
        return scaled_dot_product_attention(*states, attn_mask=mask, scale=scale).transpose(1, 2)

    monkeypatch.setattr("xformers.ops.memory_efficient_attention", reference)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0)
    given = {
        "boundaries": {"cu_seq_lens_q": boundaries},
        "positions": {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]},
    }
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    expected, _ = attention.attend_by_example(layer, query, key, value, None, cu_seq_lens_q=boundaries)
    output, _ = attention.attend_with_xformers(layer, query, key, value, None, **given[told])
    assert torch.allclose(output, expected, atol=1e-6)


def test_xformers_refuses_a_window_that_it_does_not_know() -> None:
    states = torch.randn(1, 4, 8, 8)
    with pytest.raises(ConfigError, match="the model has one of 4 tokens; set sdpa"):
        attention.attend_with_xformers(torch.nn.Module(), states, states, states, None, sliding_window=4)
