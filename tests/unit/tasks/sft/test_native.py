"""The kernels in C are at least as accurate as torch's in bf16, and are refused where they do not fit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nightshift.core.errors import ConfigError
from tasks.sft import attention, native
from tasks.sft.machine import choose_attention
from tasks.sft.probe import Probe
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import sft_params

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 100,
}
LLAMA = {"model_type": "llama", **SHAPE}
MISTRAL = {"model_type": "mistral", **SHAPE, "sliding_window": 50}
GEMMA2 = {"model_type": "gemma2", **SHAPE, "attn_logit_softcapping": 50.0}
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let any CPU compile the kernels; without AVX-512 BF16 they compute the same, slowly."""
    monkeypatch.setattr(native, "cpu_flags", lambda: {native.NEEDS})
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path_factory.getbasetemp() / "state"))
    native.load_kernels.cache_clear()
    yield
    native.load_kernels.cache_clear()


def make_states(lengths: tuple[int, ...], heads: int, kv_heads: int, width: int) -> States:
    torch.manual_seed(0)
    shapes = [(1, n, sum(lengths), width) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    return query, key, value


def by_torch(states: States, lengths: tuple[int, ...]) -> torch.Tensor:
    examples = zip(*(state.split(lengths, 2) for state in states), strict=True)
    outputs = [scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True) for one in examples]
    return torch.cat(outputs, 2).transpose(1, 2)


def by_kernel(states: States, lengths: tuple[int, ...]) -> torch.Tensor:
    ends = attention.boundaries(lengths, "cpu")["cu_seq_lens_q"]
    assert isinstance(ends, torch.Tensor)
    return attention.attend_with_avx512(torch.nn.Module(), *states, None, cu_seq_lens_q=ends)[0]


def errors(output: torch.Tensor, states: States, exact: list[torch.Tensor]) -> list[float]:
    """Return the relative errors of the output, and of the gradients of the states."""
    torch.manual_seed(1)
    found = [output, *torch.autograd.grad(output, states, torch.randn(output.shape).to(output.dtype))]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width"),
    [
        ((5, 1, 100, 47), 4, 2, 64),
        ((383,), 9, 3, 64),
        ((48, 49, 16, 97), 4, 4, 128),
        ((2, 31), 4, 1, 80),
        ((700,), 2, 2, 16),
    ],
)
def test_output_and_gradients_are_as_accurate_as_those_of_torch(
    lengths: tuple[int, ...], heads: int, kv_heads: int, width: int
) -> None:
    states = make_states(lengths, heads, kv_heads, width)
    double: Any = tuple(state.detach().double().requires_grad_() for state in states)
    output = by_torch(double, lengths)
    torch.manual_seed(1)
    pulled = torch.randn(output.shape).bfloat16().double()
    exact = [output.detach(), *torch.autograd.grad(output, double, pulled)]
    ours = errors(by_kernel(states, lengths), states, exact)
    torchs = errors(by_torch(states, lengths), states, exact)
    assert sum(ours) < sum(torchs)
    assert all(0 < mine < 1.1 * theirs for mine, theirs in zip(ours, torchs, strict=True))
    assert max(ours) < 4e-3


def test_an_example_of_one_token_returns_its_value() -> None:
    query, key, value = make_states((1, 1), 2, 2, 16)
    output = by_kernel((query, key, value), (1, 1))
    gradients = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert torch.equal(output, value.transpose(1, 2))
    assert [gradient.abs().sum().item() for gradient in gradients] == [0.0, 0.0, 64.0]


def test_large_scores_do_not_overflow_and_nan_is_passed_on() -> None:
    query, key, value = make_states((40,), 2, 2, 16)
    large = (query * 1000, key * 1000, value)
    assert by_kernel(large, (40,)).isfinite().all()
    with torch.no_grad():
        query[0, 0, 3] = float("nan")
    output = by_kernel((query, key, value), (40,))
    assert output[0, 3, 0].isnan().all()
    assert output[0, 4:].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "mistral with short examples"])
def test_the_probe_accepts_the_kernel(name: str) -> None:
    config, longest = (LLAMA, 100) if name == "llama" else (MISTRAL, 30)
    probe = Probe(sft_params(), "cpu", "bf16", config, longest)
    assert probe.try_kernel("avx512_per_example") is None
    assert probe.find_leak("avx512_per_example") is None
    assert choose_attention("auto", "cpu", probe) == ("avx512_per_example", None)


@pytest.mark.parametrize(
    ("config", "precision", "fault"),
    [
        (LLAMA, "fp32", "torch.float32 states"),
        (MISTRAL, "bf16", "windows"),
        (GEMMA2, "bf16", "softcap"),
        ({**LLAMA, "head_dim": 24}, "bf16", "heads of width 24"),
    ],
)
def test_a_model_that_needs_more_gets_the_next_kernel(
    config: dict[str, Any], precision: str, fault: str
) -> None:
    probe = Probe(sft_params(), "cpu", precision, config, 100)
    found = f"{probe.try_kernel('avx512_per_example')} {probe.find_leak('avx512_per_example')}"
    assert f"avx512_per_example does not support {fault}; set auto" in found
    assert choose_attention("auto", "cpu", probe)[0] in ("sdpa_per_example", "eager")


@pytest.mark.parametrize(
    ("compiler", "fault"),
    [
        ("no-such-compiler", r"no C compiler \(no-such-compiler\); install gcc or clang"),
        ("false", "false failed with code 1: no message"),
    ],
)
def test_without_a_compiler_another_kernel_is_chosen(
    compiler: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(ConfigError, match=fault):
        native.load_kernels()
    probe = Probe(sft_params(), "cpu", "bf16", LLAMA, 100)
    assert choose_attention("auto", "cpu", probe) == ("sdpa_per_example", None)


def test_another_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: {"avx2"})
    monkeypatch.setattr(native, "run_compiler", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match="this CPU has no avx512_bf16"):
        native.load_kernels()


def test_processes_that_start_together_compile_without_harm(tmp_path: Path) -> None:
    code = (
        "from tasks.sft import native; native.cpu_flags = lambda: {native.NEEDS}; "
        "print(native.load_kernels().attend)"
    )
    environment = {**os.environ, "NIGHTSHIFT_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert all("_FuncPtr" in output for output in outputs)
    (compiled,) = (tmp_path / "kernels").iterdir()
    assert compiled.suffix == ".so"
