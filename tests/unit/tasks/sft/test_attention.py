"""Per-example attention equals attention with one mask over the whole row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from nightshift.core.errors import ConfigError
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
        # The longest example exceeds the sliding window, so the mask is needed.
        lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**SHAPE, head_dim=8, num_local_experts=2, attention_chunk_size=4)
        ),
    ],
    ids=["causal", "sliding window", "chunks"],
)
def test_logits_and_gradients_equal_those_with_a_mask(
    make: Callable[[], PreTrainedModel],
) -> None:
    torch.manual_seed(0)
    model = make()
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

    model.set_attn_implementation("sdpa_per_example")
    logits, gradient = run()
    model.set_attn_implementation("sdpa")
    masked_logits, masked_gradient = run()
    assert torch.allclose(logits, masked_logits, atol=1e-6)
    assert torch.allclose(gradient, masked_gradient, atol=1e-6)


def test_only_token_pairs_within_an_example_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def count(_: Any, query: Any, *__: Any, attention_mask: Any, **___: Any) -> tuple[Any, None]:
        assert attention_mask is None
        seen.append(query.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setattr(attention, "sdpa_attention_forward", count)
    states = torch.randn(1, 4, sum(LENGTHS), 8)
    output, _ = attention.attend_per_example(
        torch.nn.Module(), states, states, states, None, cu_seq_lens_q=torch.tensor([0, 5, 6, 19, 27])
    )
    assert seen == [5, 1, 13, 8]
    assert torch.equal(output, states.transpose(1, 2))


@pytest.mark.parametrize("source", ["boundaries", "positions"])
def test_xformers_receives_the_example_lengths(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # xFormers has no CPU kernel, so torch computes attention with the mask of xFormers.
    def reference(query: Any, key: Any, value: Any, attn_bias: Any, p: float, scale: float) -> torch.Tensor:
        assert p == 0.0
        mask = attn_bias.materialize((sum(LENGTHS), sum(LENGTHS)))
        states = (state.transpose(1, 2) for state in (query, key, value))
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
    expected, _ = attention.attend_per_example(layer, query, key, value, None, cu_seq_lens_q=boundaries)
    output, _ = attention.attend_with_xformers(layer, query, key, value, None, **given[source])
    assert torch.allclose(output, expected, atol=1e-6)


def test_xformers_rejects_a_sliding_window() -> None:
    states = torch.randn(1, 4, 8, 8)
    with pytest.raises(ConfigError, match="the model's window is 4 tokens; set sdpa"):
        attention.attend_with_xformers(torch.nn.Module(), states, states, states, None, sliding_window=4)


def varlen_2_13(query: Any, key: Any, value: Any, *rest: Any, enable_gqa: bool = False, **more: Any) -> Any:
    """Compute torch's varlen attention with a mask, since the kernel runs on a GPU only."""
    cu_q, cu_k, *longest = rest
    assert torch.equal(cu_q, cu_k)
    assert (cu_q.dtype, longest) == (torch.int32, [13, 13])
    left, right = more["window_size"]
    at, owner = torch.arange(len(query)), torch.repeat_interleave(torch.arange(len(cu_q) - 1), cu_q.diff())
    behind = at[:, None] - at
    mask = (owner[:, None] == owner) & (behind >= -right) & ((left < 0) | (behind <= left))
    states = [state.transpose(0, 1)[None] for state in (query, key, value)]
    output = scaled_dot_product_attention(*states, attn_mask=mask, scale=more["scale"], enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


def varlen_2_11(*states_and_lengths: Any, **more: Any) -> Any:
    """Emulate torch 2.11, which does not support grouped-query attention."""
    return varlen_2_13(*states_and_lengths, **more)


@pytest.mark.parametrize("source", ["boundaries", "positions"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kernel", [varlen_2_13, varlen_2_11])
def test_torch_varlen_receives_the_example_boundaries(
    source: str, window: int | None, kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2))
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    given: dict[str, Any] = {
        "boundaries": {"cu_seq_lens_q": ends, "max_length_q": max(LENGTHS)},
        "positions": {"position_ids": positions},
    }
    output, _ = attention.attend_varlen(
        torch.nn.Module(), query, key, value, None, sliding_window=window, **given[source]
    )
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    behind = torch.arange(len(owner))[:, None] - torch.arange(len(owner))
    mask = (owner[:, None] == owner) & (behind >= 0) & (behind < (window or 100))
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert torch.allclose(output, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("kernel", [attention.attend_varlen, attention.attend_with_xformers])
def test_kernels_receive_states_of_one_dtype(
    kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast over full-precision weights yields queries and keys in full precision, values in half."""
    dtypes = set()

    def note(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        dtypes.update(state.dtype for state in (query, key, value))
        return torch.as_tensor(query)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", note)
    monkeypatch.setattr("xformers.ops.memory_efficient_attention", note)
    full, half = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    kernel(torch.nn.Module(), full, full, half, None)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("has", [{"dropout": 0.1}, {"softcap": 30.0}])
def test_torch_varlen_rejects_dropout_and_softcap(has: dict[str, float]) -> None:
    states = torch.randn(1, 4, 8, 8)
    with pytest.raises(ConfigError, match=r"torch_varlen supports neither dropout \(.*\) nor softcap \("):
        attention.attend_varlen(torch.nn.Module(), states, states, states, None, **has)  # type: ignore[arg-type]
