"""Measure tokens per second and model FLOPs utilization (MFU) on one NVIDIA GPU: `make bench-gpu`.

A Llama with 8 billion random weights, LoRA of rank 16 on all linear layers, rows of 4096 tokens. The
model is created once, on the device, in this process. Every rung of the ladder changes an earlier rung,
which shows the gain of each part. A rung that does not fit or run is recorded with its error. Results
are written after each rung, so a time limit loses nothing. `--rehearse` uses a two-layer model on any
machine.
"""

import argparse
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from peft.tuners.lora import LoraLayer
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import RESULTS, Record, record, require_bounds, write_records
from benchmarks.stages import ROOT
from nightshift.core.errors import StageError
from nightshift.core.stage import run_main
from nightshift.data.encode import IGNORED
from tasks.sft import SftParams
from tasks.sft.attention import boundaries
from tasks.sft.float8 import quantize_base
from tasks.sft.fused import LossHead, fuse_adapter
from tasks.sft.loss import summed_loss
from tasks.sft.model import adapt

PACKAGES = ("accelerate", "peft", "torch", "transformers", "trl")
# One H100, LoRA on Llama-3-8B, rows of 4096 tokens, micro-batch 2 (NeMo Automodel,
# docs/performance-summary): 12,473 tokens/s, 40.6 % MFU by its own count.
ANCHOR, ANCHOR_UTILISATION = 12_473.0, 0.406
# Peak FLOP/s in dense bf16, by device name (NVIDIA's data sheets).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# Remaining time below which a rung is not started, in seconds. Compilation takes minutes.
RUNG_SECONDS, COMPILE_SECONDS = 12, 70
# Kernels in a profile, and the characters of their names: templates have long ones.
TOP_KERNELS, NAME_WIDTH = 16, 120
# Llama-3-8B, and a small model for testing the benchmark itself.
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
}
REHEARSAL = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rung:
    """Training configuration.

    Attributes:
        attention: Attention kernel, or `fastest` for the fastest kernel measured so far on such rows.
        rows: Rows per forward pass.
        loss: chunked or logits.
        lora: fused or peft.
        use_liger_kernel: Whether to use Liger's RMSNorm, rotary embedding and SwiGLU.
        activation_checkpointing: Activation checkpointing, as in params.yaml.
        torch_compile: Whether to compile the model layer by layer.
        fp8_base: Whether the frozen weights are in float8.
        packed: Whether a row has several examples of unequal length instead of one.
    """

    attention: str
    rows: int = 2
    loss: Literal["chunked", "logits"] = "chunked"
    lora: Literal["fused", "peft"] = "fused"
    use_liger_kernel: bool = False
    activation_checkpointing: bool = False
    torch_compile: bool = False
    fp8_base: bool = False
    packed: bool = False


FASTEST = Rung("fastest")
QUICK = ("flash_attention_4", "flash_attention_3", "torch_varlen", "flash_attention_2", "sdpa_per_example")
LADDER = (
    # Plain transformers and PEFT first, then each of our parts.
    Rung("sdpa", rows=1, loss="logits", lora="peft"),
    Rung("torch_varlen", rows=1, loss="logits", lora="peft"),
    Rung("torch_varlen", loss="logits", lora="peft"),
    Rung("torch_varlen", lora="peft"),
    *(Rung(kernel, packed=packed) for packed in (False, True) for kernel in QUICK),
    replace(FASTEST, rows=4, activation_checkpointing=True),
    Rung("sdpa"),
    Rung("xformers"),
    Rung("flex_attention"),
    replace(FASTEST, loss="logits", lora="peft", torch_compile=True),
    # Liger and float8 replace parts of the model permanently, so their rungs come last.
    replace(FASTEST, use_liger_kernel=True),
    replace(FASTEST, use_liger_kernel=True, packed=True),
    replace(FASTEST, use_liger_kernel=True, fp8_base=True),
    replace(FASTEST, use_liger_kernel=True, fp8_base=True, packed=True),
)


@dataclass(frozen=True, slots=True)
class Size:
    """Model shape, row length in tokens, and number of timed steps after two warmup steps."""

    shape: dict[str, Any]
    length: int
    steps: int


def main(*, rehearse: bool, seconds: float, out: Path) -> None:
    """Run all rungs, write their results, and report claims that do not hold."""
    begin = time.monotonic()
    if not rehearse and not torch.cuda.is_available():
        raise StageError("no NVIDIA GPU; use --rehearse to try the benchmark with a small model")
    size = Size(REHEARSAL, 256, 2) if rehearse else Size(LLAMA_8B, 4096, 5)
    climber = Climber(size, "cuda" if torch.cuda.is_available() else "cpu")
    records: list[Record] = []
    for number, rung in enumerate(LADDER):
        left = seconds - (time.monotonic() - begin)
        is_slow = rung.torch_compile or rung.attention == "flex_attention"
        # The last rungs are the fastest configurations, so time is reserved for them.
        reserved = RUNG_SECONDS * sum(later.use_liger_kernel for later in LADDER[number + 1 :])
        needs = reserved + (COMPILE_SECONDS if is_slow else RUNG_SECONDS)
        result = climber.climb(rung) if left > needs else {"error": f"not started: only {left:.0f} s left"}
        records.append(describe(climber, rung, result))
        log.info("%s: %s", records[-1]["claim"], result)
        write_records("gpu", records, PACKAGES, out)
    if "H100" in records[0]["device"]:
        best = max(one["utilisation_as_anchor"] for one in records)
        records.append(record("MFU, as the anchor counts it", best, "share", at_least=0.45))
        write_records("gpu", records, PACKAGES, out)
    require_bounds(records)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--rehearse", action="store_true", help="use a small model, on any machine")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no rung that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of gpu.json (benchmarks/results)")


class Climber:
    """Model on the device, reconfigured for each rung."""

    def __init__(self, size: Size, device: str) -> None:
        """Create the model with a trainable adapter."""
        self.size, self.device = size, device
        # Attention kernel and whether rows are packed -> tokens/s.
        self.speeds: dict[tuple[str, bool], float] = {}
        self.has_liger = self.has_float8 = False
        section = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
        params = SftParams(**section | {"strategy": "single", "num_processes": 1, "precision": "bf16"})
        torch.manual_seed(0)
        with torch.device(device):
            base = LlamaForCausalLM._from_config(LlamaConfig(**size.shape), dtype=torch.bfloat16)
        base.config.use_cache = False
        self.model: Any = adapt(base, params, "single", "bf16")
        self.base: Any = self.model.get_base_model()
        self.base.enable_input_require_grads()
        self.model.train()
        self.head = LossHead(self.base.get_output_embeddings())
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.trained = sum(weight.numel() for weight in weights)
        self.optimizer = AdamW(weights, lr=1e-4)

    def climb(self, rung: Rung) -> dict[str, Any]:
        """Train some steps and restore the model; an error is returned as a result."""
        if rung.attention == "fastest":
            known = {
                kernel: speed for (kernel, packed), speed in self.speeds.items() if packed is rung.packed
            }
            rung = replace(rung, attention=max(known, key=known.__getitem__, default="sdpa"))
        begin = time.monotonic()
        try:
            self.change(rung)
            found = self.measure(rung)
        except Exception as err:  # noqa: BLE001 - kernels raise various exceptions
            found = {"error": f"{type(err).__name__}: {str(err)[:300]}"}
        finally:
            self.restore()
        if rung == Rung(rung.attention, packed=rung.packed) and "tokens_per_second" in found:
            self.speeds[rung.attention, rung.packed] = found["tokens_per_second"]
        return {"attention": rung.attention, **found, "seconds": round(time.monotonic() - begin, 1)}

    def change(self, rung: Rung) -> None:
        """Apply the configuration of a rung to the model."""
        self.base.set_attn_implementation(rung.attention)
        if rung.lora == "fused":
            fuse_adapter(self.model)
        if rung.use_liger_kernel and not self.has_liger:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
            apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, model=self.base, **off)
            self.has_liger = True
        if rung.fp8_base and not self.has_float8:
            quantize_base(self.model)
            self.has_float8 = True
        if rung.activation_checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": False})
        if rung.torch_compile:
            for layer in self.base.model.layers:
                layer.compile(dynamic=False)

    def restore(self) -> None:
        """Undo all changes except Liger and float8, and free the memory."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                vars(module).pop("forward", None)
        for layer in self.base.model.layers:
            layer._compiled_call_impl = None
        self.base.activation_checkpointing_disable()
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def measure(self, rung: Rung) -> dict[str, Any]:
        """Measure throughput, time of the first step, and on a GPU peak memory."""
        batch, head = self.make_batch(rung), self.head if rung.loss == "chunked" else None
        first = self.timed(lambda: self.step(batch, head))
        self.step(batch, head)
        seconds = self.timed(lambda: self.step(batch, head), self.size.steps)
        tokens = batch["input_ids"].numel()
        found = {
            "tokens_per_second": tokens * self.size.steps / seconds,
            "first_step_seconds": round(first, 1),
        }
        if self.device == "cuda":
            found["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            found["kernel_milliseconds"] = profile_kernels(lambda: self.step(batch, head))
        return found

    def step(self, batch: dict[str, Any], head: LossHead | None) -> None:
        """Train one step, as the stage sft does."""
        with torch.autocast(self.device, torch.bfloat16):
            loss, _ = summed_loss(self.model, batch, head=head)
        (loss / batch["input_ids"].numel()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def timed(self, work: Callable[[], None], times: int = 1) -> float:
        """Return the seconds that repeated calls take, including the device's pending work."""
        wait = torch.cuda.synchronize if self.device == "cuda" else nullcontext
        wait()
        begin = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return time.perf_counter() - begin

    def make_batch(self, rung: Rung) -> dict[str, Any]:
        """Return one flattened row of random tokens, all labelled but the first of each example."""
        lengths = [length for _ in range(rung.rows) for length in self.lengths(rung)]
        ids = torch.randint(self.size.shape["vocab_size"], (1, sum(lengths)), device=self.device)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])[None]
        labels = ids.clone()
        labels[positions == 0] = IGNORED
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            **boundaries(lengths, self.device),
        }

    def lengths(self, rung: Rung) -> Iterator[int]:
        """Yield the example lengths of one row; the longest of several takes half of the row."""
        if not rung.packed:
            yield self.size.length
            return
        rest = self.size.length
        while rest > 32:
            yield (taken := rest // 2)
            rest -= taken
        yield rest


def profile_kernels(work: Callable[[], None]) -> dict[str, float]:
    """Return the milliseconds of the kernels that take most of a call's time on the GPU, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key[:NAME_WIDTH]
        spent[name] = spent.get(name, 0.0) + event.self_device_time_total / 1000
    longest = sorted(spent, key=spent.__getitem__, reverse=True)[:TOP_KERNELS]
    return {"total": round(sum(spent.values()), 1), **{name: round(spent[name], 1) for name in longest}}


def describe(climber: Climber, rung: Rung, result: dict[str, Any]) -> Record:
    """Return the record of a rung: throughput, and MFU by two counts."""
    name = torch.cuda.get_device_name(0) if climber.device == "cuda" else "cpu"
    speed = float(result.get("tokens_per_second", 0.0))
    more: dict[str, Any] = {"rung": asdict(rung), "device": name, **result}
    if peak := next((value for known, value in PEAKS.items() if known in name), None):
        lengths = list(climber.lengths(rung))
        # A token attends to half of its own example, so a long example weighs by its square.
        length = sum(n * n for n in lengths) / sum(lengths)
        flops = operations(climber.size.shape, length, climber.trained)
        more["utilisation"] = round(speed * flops / peak, 4)
        # The anchor counts two thirds of the FLOPs of full fine-tuning.
        more["utilisation_as_anchor"] = round(speed / ANCHOR * ANCHOR_UTILISATION, 4)
        more["of_anchor"] = round(speed / ANCHOR, 3)
    words = ", ".join(f"{key} {value}" for key, value in asdict(rung).items())
    return record(f"tokens/s: {words}", speed, "tokens/s", **more)


def operations(shape: dict[str, Any], length: float, trained: int) -> float:
    """Count the FLOPs per token of a LoRA step, without recomputation.

    Frozen weights are multiplied in the forward and the backward pass (2 and 2 FLOPs), adapter weights
    once more for their own gradient; attention is causal, so half of its square matrix counts.

    Example:
        >>> round(operations(LLAMA_8B, 4096, 41_943_040) / 1e9, 1)
        33.5
    """
    hidden, kv = shape["hidden_size"], shape["num_key_value_heads"] / shape["num_attention_heads"]
    layer = hidden * hidden * (2 + 2 * kv) + 3 * hidden * shape["intermediate_size"]
    weights = shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"]
    # Scores and weighted sum, once forward and twice backward: 3 x 2 x 2 x length / 2 per hidden unit.
    attention = shape["num_hidden_layers"] * 6 * length * hidden
    return float(4 * weights + 6 * trained + attention)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        run_main(main, declare)
