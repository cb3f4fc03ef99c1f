"""Kernels in C for training on a CPU in bf16 (kernels.c), compiled once by the machine that trains.

On such a CPU torch's own attention takes a third of a step. Compiling takes half a second, and needs only a C
compiler; the result is kept in the state folder, for this source, compiler and CPU. Results do not depend on
what was computed before, so a resumed run computes the same bits.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nightshift.core.errors import ConfigError
from nightshift.core.files import text_digest
from nightshift.core.hardware import cpu_flags
from nightshift.core.state import state_dir

SOURCE = Path(__file__).with_name("kernels.c")
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Compiled for other CPUs the kernels are correct, but not faster than torch's.
NEEDS = "avx512_bf16"
# The kernels compute vectors of this many values.
MULTIPLE_OF = 16
POINTER, LONG, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
# Function -> number of pointers, sizes and numbers that it takes.
SIGNATURES = {
    "attend": (6, 4, 1),
    "attend_backward": (10, 4, 1),
    "normalize": (4, 2, 1),
    "normalize_backward": (5, 2, 0),
    "swiglu": (3, 1, 0),
    "swiglu_backward": (5, 1, 0),
}


@cache
def load_kernels() -> Any:
    """Load the kernels, and compile them if this machine has not done so yet.

    Processes may do so at once: each writes its own file, and renames it.

    Raises:
        ConfigError: The CPU does not support them, there is no C compiler, or it fails.
    """
    flags = cpu_flags()
    if NEEDS not in flags:
        raise ConfigError(f"this CPU has no {NEEDS}")
    compiler = find_compiler()
    version = run_compiler(compiler, "--version")
    key = text_digest(SOURCE.read_text(encoding="utf-8"), version, *OPTIONS, *sorted(flags))
    file = state_dir() / "kernels" / f"{key[:32]}.so"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            compiled = Path(folder) / file.name
            run_compiler(compiler, *OPTIONS, "-o", str(compiled), str(SOURCE), "-lm")
            compiled.replace(file)
    library = ctypes.CDLL(str(file))
    for name, (pointers, sizes, numbers) in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [POINTER] * pointers + [LONG] * sizes + [FLOAT] * numbers
    return library


def find_compiler() -> str:
    """Return the path of a C compiler: that of the environment variable CC, or the system's.

    Raises:
        ConfigError: There is none.
    """
    names = (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise ConfigError(f"no C compiler ({', '.join(names)}); install gcc or clang")
    return found


def run_compiler(compiler: str, *arguments: str) -> str:
    """Run the compiler, and return its output.

    Raises:
        ConfigError: It failed.
    """
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        first = (done.stderr.strip() or "no message").splitlines()[0]
        raise ConfigError(f"{compiler} failed with code {done.returncode}: {first}")
    return done.stdout


class Attention(torch.autograd.Function):
    """Causal attention within each example of a row, in bf16."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the output, shape (n_tokens, n_heads, width).

        Args:
            ctx: Autograd context for `backward`.
            query: Query states, shape (n_tokens, n_heads, width), contiguous, in bf16. The width is a
                multiple of 16.
            key: Key states, shape (n_tokens, n_kv_heads, width), contiguous, in bf16.
            value: Value states, same shape as `key`.
            ends: Start of each example and end of the row, shape (n_examples + 1,), int32.
            scale: Scale of the scores.
        """
        output = torch.empty_like(query)
        norms = torch.empty(query.shape[1], len(query), dtype=torch.float32)
        tensors = (query, key, value, output, norms, ends)
        call(load_kernels().attend, tensors, *sizes(query, key, ends), scale)
        ctx.save_for_backward(*tensors)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, output, norms, ends = ctx.saved_tensors
        gradients = tuple(map(torch.empty_like, (query, key, value)))
        tensors = (query, key, value, output, norms, grad_output.contiguous(), *gradients, ends)
        call(load_kernels().attend_backward, tensors, *sizes(query, key, ends), ctx.scale)
        return *gradients, None, None


class Norm(torch.autograd.Function):
    """RMSNorm with a frozen weight, in bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Compute the output, shape as x.

        Args:
            ctx: Autograd context for `backward`.
            x: Hidden states, shape (..., width), in bf16; the width is a multiple of 16.
            weight: Frozen weight, shape (width,), in bf16.
            epsilon: Term added to the mean of the squares.
        """
        x = x.contiguous()
        width = x.shape[-1]
        output, factors = torch.empty_like(x), torch.empty(x.numel() // width, dtype=torch.float32)
        call(load_kernels().normalize, (x, weight, output, factors), len(factors), width, epsilon)
        ctx.save_for_backward(x, weight, factors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of x."""
        x, weight, factors = ctx.saved_tensors
        gradient = torch.empty_like(x)
        tensors = (x, weight, factors, grad_output.contiguous(), gradient)
        call(load_kernels().normalize_backward, tensors, len(factors), x.shape[-1])
        return gradient, None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, in bf16."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Compute the output; all have the same shape, in bf16."""
        gate, up = gate.contiguous(), up.contiguous()
        output = torch.empty_like(gate)
        call(load_kernels().swiglu, (gate, up, output), gate.numel())
        ctx.save_for_backward(gate, up)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        gradients = torch.empty_like(gate), torch.empty_like(up)
        tensors = (gate, up, grad_output.contiguous(), *gradients)
        call(load_kernels().swiglu_backward, tensors, gate.numel())
        return gradients


def sizes(query: torch.Tensor, key: torch.Tensor, ends: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the number of examples, heads and key heads, and the width of a head."""
    return len(ends) - 1, query.shape[1], key.shape[1], query.shape[2]


def call(function: Any, tensors: tuple[torch.Tensor, ...], *numbers: float) -> None:
    """Call a kernel with the addresses of tensors, and numbers.

    Raises:
        MemoryError: There is no memory for its workspace.
    """
    if function(*(tensor.data_ptr() for tensor in tensors), *numbers):
        raise MemoryError("no memory for the workspace of a kernel")
