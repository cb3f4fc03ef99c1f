"""The fused loss and adapter match the loss on all logits and PEFT's adapter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tasks.sft import fused
from tasks.sft.fused import LoraLinear, LossHead, SummedLoss, count_lora, fuse_adapter
from tasks.sft.loss import summed_loss

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Seven positions per chunk, so that there is more than one chunk.
    monkeypatch.setitem(fused.LOGITS, "cpu", 7 * 4 * 300)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def qwen() -> Qwen2ForCausalLM:
    """Return a model with biases on queries, keys and values."""
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE))


def adapted(model: Any, **changes: Any) -> Any:
    """Return the model with an adapter that changes its output."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def row(length: int = 40, labelled: int = 25) -> dict[str, torch.Tensor]:
    """Return one example whose last tokens have labels."""
    ids = torch.randint(SHAPE["vocab_size"], (1, length))
    labels = ids.clone()
    labels[0, : length - labelled] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length)[None]}


def loss_and_gradients(
    model: Any, smoothing: float = 0.0, head: LossHead | None = None, **inputs: Any
) -> list[torch.Tensor]:
    loss, _ = summed_loss(model, inputs or row(), smoothing, head)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [loss, *torch.autograd.grad(loss, weights)]


def largest_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest error relative to each tensor's norm."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


def gradient_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the error of all gradients behind the loss, relative to their norm."""
    joined = [torch.cat([one.flatten() for one in many[1:]]) for many in (found, expected)]
    return largest_error([joined[0]], [joined[1]])


def convert_to_half(model: Any) -> None:
    """Convert the base to bf16 and the adapter to full precision, as in training on one GPU."""
    model.get_base_model().to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "lora" in name:
            weight.data = weight.data.float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 7, 8, 50])
def test_the_chunked_loss_equals_the_loss_on_all_logits(count: int, smoothing: float) -> None:
    hidden = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    head, labels = torch.randn(300, 16, dtype=torch.float64), torch.randint(300, (count,))
    expected = cross_entropy(hidden @ head.t(), labels, reduction="sum", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(expected * 0.3, hidden)
    single = hidden.detach().float().requires_grad_()
    loss = SummedLoss.apply(single, head.float(), labels, smoothing)
    (found,) = torch.autograd.grad(loss * 0.3, single)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert largest_error([found.double()], [gradient]) < 1e-6


def test_without_labels_the_loss_is_zero() -> None:
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = SummedLoss.apply(hidden, torch.randn(300, 16), torch.zeros(0, dtype=torch.long), 0.0)
    loss.backward()
    assert (loss.item(), hidden.grad.shape) == (0.0, (0, 16))


def test_only_the_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = torch.Tensor.logsumexp

    def note(self: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        sizes.append(self.shape[0])
        return real(self, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "logsumexp", note)
    hidden = torch.randn(16, 16, requires_grad=True)
    SummedLoss.apply(hidden, torch.randn(300, 16), torch.randint(300, (16,)), 0.0).backward()
    assert sizes == [7, 7, 2]


@pytest.mark.parametrize("make", [llama, qwen])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_head_computes_the_loss_while_labels_are_set(make: Callable[[], Any], smoothing: float) -> None:
    model, inputs = adapted(make()), row()
    expected = loss_and_gradients(model, smoothing, **inputs)
    logits = model(inputs["input_ids"]).logits
    head = LossHead(model.get_output_embeddings())
    assert largest_error(loss_and_gradients(model, smoothing, head, **inputs), expected) < 1e-5
    assert torch.equal(model(inputs["input_ids"]).logits, logits)


def test_an_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(llama()), row()
    head = LossHead(model.get_output_embeddings())
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        found, _ = summed_loss(model, inputs, head=head)
        expected, _ = summed_loss(model, inputs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fused_adapter_has_correct_gradients(has_bias: bool) -> None:  # noqa: FBT001
    double = {"dtype": torch.float64}
    x, weight = torch.randn(5, 6, requires_grad=True, **double), torch.randn(8, 6, **double)
    bias = torch.randn(8, **double) if has_bias else None
    a, b = torch.randn(3, 6, requires_grad=True, **double), torch.randn(8, 3, requires_grad=True, **double)
    assert torch.autograd.gradcheck(lambda x, a, b: LoraLinear.apply(x, weight, bias, a, b, 2.0), (x, a, b))
    expected = torch.nn.functional.linear(x, weight, bias) + 2.0 * (x @ a.t()) @ b.t()
    assert torch.allclose(LoraLinear.apply(x, weight, bias, a, b, 2.0), expected)
    assert torch.autograd.gradcheck(
        lambda a, b: LoraLinear.apply(x.detach(), weight, bias, a, b, 2.0), (a, b)
    )


@pytest.mark.parametrize("make", [llama, qwen])
def test_a_model_with_fused_adapters_matches_peft(make: Callable[[], Any]) -> None:
    model, inputs = adapted(make()), row()
    expected = loss_and_gradients(model, **inputs)
    assert count_lora(model) == {"fused": 0, "peft": 14}
    fuse_adapter(model)
    assert count_lora(model) == {"fused": 14, "peft": 0}
    assert largest_error(loss_and_gradients(model, **inputs), expected) < 1e-5


def test_in_half_precision_it_is_as_accurate_as_peft() -> None:
    model, inputs = adapted(llama()), row()
    exact = loss_and_gradients(model, **inputs)
    convert_to_half(model)

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return gradient_error(loss_and_gradients(model, **inputs), exact)

    by_peft = error()
    fuse_adapter(model)
    assert 0 < error() < 1.2 * by_peft


def test_with_the_adapter_disabled_the_model_is_the_base() -> None:
    base = llama()
    inputs = row()["input_ids"]
    expected = base(inputs).logits
    model = adapted(base)
    fuse_adapter(model)
    assert not torch.allclose(model(inputs).logits, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(inputs).logits, expected)
    merged = model(inputs).logits
    model.merge_adapter()
    assert torch.allclose(model(inputs).logits, merged, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}]
)
def test_layers_beyond_plain_lora_are_left_to_peft(changes: dict[str, Any]) -> None:
    model = adapted(qwen(), **changes)
    fuse_adapter(model)
    assert count_lora(model)["fused"] == 0


def test_a_layer_of_another_type_is_left_to_peft() -> None:
    model = adapted(
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300)), target_modules=["c_attn"]
    )
    fuse_adapter(model)
    assert count_lora(model) == {"fused": 0, "peft": 1}


@pytest.fixture(params=[llama, qwen])
def twins(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return two models with equal weights."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(adapted(request.param()))
    return made[0], made[1]


def test_fifty_steps_match_the_losses_of_peft_with_all_logits(twins: tuple[Any, Any]) -> None:
    rows = [row(40, n) for n in torch.randint(1, 40, (50,)).tolist()]
    plain, fast = twins
    fuse_adapter(fast)
    head = LossHead(fast.get_output_embeddings())
    losses: list[list[float]] = []
    for model, loss_head in ((plain, None), (fast, head)):
        optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
        losses.append([])
        for inputs in rows:
            loss, _ = summed_loss(model, inputs, head=loss_head)
            mean = loss / (inputs["labels"] != -100).sum()
            mean.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(mean.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] != losses[0][0]
