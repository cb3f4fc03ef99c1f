"""The loss and the adapter's layers, each as one function: as transformers and PEFT, in less memory.

Both stand in the place of a module's `forward`, so hooks of DeepSpeed and FSDP2 on the module still run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn.functional import linear

from tasks.sft.strategy import LOGITS

if TYPE_CHECKING:
    from tasks.sft.float8 import Float8Weight


class SummedLoss(torch.autograd.Function):
    """Sum of the negative log-likelihoods from hidden states and a frozen head, some positions at a time.

    The gradient of the hidden states is made on the way, so the logits of a chunk are the only ones that ever
    exist. The head gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, smoothing: float
    ) -> torch.Tensor:
        """Compute the sum, in nats, shape (1, 1, 1) as one position of logits would have.

        Args:
            ctx: Holds the gradient for `backward`.
            hidden: Shape (n, width), in the type of
            head: shape (n_words, width).
            labels: Shape (n,), none of them ignored.
            smoothing: Probability mass given to all other tokens, 0 to 1.
        """
        words = len(head)
        at_once = max(1, LOGITS[hidden.device.type] // (4 * words))
        total = torch.zeros(1, 1, 1, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), at_once):
            some = slice(start, start + at_once)
            logits = (hidden[some] @ head.t()).float()
            scale = logits.logsumexp(-1, keepdim=True)
            truth = logits.gather(1, labels[some, None])
            total += (scale - (1 - smoothing) * truth).sum()
            if smoothing:
                total -= smoothing * logits.mean(-1).sum()
            if gradient is None:
                continue
            slope = logits.sub_(scale).exp_().sub_(smoothing / words)
            slope.scatter_add_(1, labels[some, None], torch.full_like(truth, smoothing - 1))
            torch.mm(slope.to(hidden.dtype), head, out=gradient[some])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the hidden states, and none for the rest."""
        (gradient,) = ctx.saved_tensors
        return gradient * slope.reshape(()).to(gradient.dtype), None, None, None


class LossHead:
    """In the place of a frozen head's `forward`: logits, or, while it is told labels, their summed loss."""

    def __init__(self, head: torch.nn.Linear) -> None:
        """Take the place of `head.forward`."""
        self.head, self.project = head, head.forward
        self.labels: torch.Tensor | None = None
        self.smoothing = 0.0
        head.forward = self  # type: ignore[assignment]

    @contextmanager
    def told(self, labels: torch.Tensor, smoothing: float) -> Iterator[None]:
        """Return losses instead of logits within the block: shape (1, 1, 1), the sum over the labels.

        Args:
            labels: Of the positions that the head will see, shape (n,).
            smoothing: Probability mass given to all other tokens, 0 to 1.
        """
        self.labels, self.smoothing = labels, smoothing
        try:
            yield
        finally:
            self.labels = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits, or the loss."""
        if self.labels is None:
            return self.project(hidden)
        kind = compute_type(hidden, self.head.weight)
        states = hidden.reshape(-1, hidden.shape[-1]).to(kind)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.head.weight.to(kind)
            loss: torch.Tensor = SummedLoss.apply(states, weight, self.labels, self.smoothing)  # type: ignore[no-untyped-call]
        return loss


class LoraLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' for a frozen W: fewer passes over the result, and x is kept once."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        x: torch.Tensor,
        weight: "torch.Tensor | Float8Weight",
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Compute the layer.

        Args:
            ctx: Holds what `backward` needs.
            x: Shape (..., inputs).
            weight: Shape (outputs, inputs), or that in float8.
            bias: Shape (outputs,), or None.
            a: Shape (rank, inputs).
            b: Shape (outputs, rank).
            scale: Factor of the adapter's share.
        """
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.t()
        out = project(flat, weight, bias)
        out.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, low, a, b)
        # Frozen, and alive as long as its layer.
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B; the frozen weight's is never computed."""
        flat, low, a, b = ctx.saved_tensors
        slope = slope.reshape(-1, slope.shape[-1])
        inner = (slope @ b).mul_(ctx.scale)
        given = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight
            given = slope @ weight if torch.is_tensor(weight) else weight.pull_back(slope)
            given = given.addmm_(inner, a).view(ctx.shape)
        return given, None, None, inner.t() @ flat, (slope.t() @ low).mul_(ctx.scale), None


def project(
    x: torch.Tensor, weight: "torch.Tensor | Float8Weight", bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute x W' + b, shape (n, outputs)."""
    if isinstance(weight, torch.Tensor):
        return linear(x, weight, bias)
    out = weight.project(x)
    return out if bias is None else out.add_(bias)


def fuse_adapter(model: torch.nn.Module) -> None:
    """Let the adapter's plain linear layers compute in one function; others keep PEFT's way."""
    for layer in model.modules():
        if is_plain(layer):
            layer.forward = partial(forward_plain, layer)


def count_lora(model: torch.nn.Module) -> dict[str, int]:
    """Count the adapter's layers by how they compute."""
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    fused = len(list(fused_layers(model)))
    return {"fused": fused, "peft": layers - fused}


def fused_layers(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the adapter's layers that compute in one function."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(vars(module).get("forward"), partial):
            yield module


def is_plain(layer: Any) -> bool:
    """Tell whether a layer of PEFT's is a frozen linear one with a single adapter and nothing else."""
    return (
        type(layer) is Linear
        and type(layer.base_layer) is torch.nn.Linear
        and not any(p.requires_grad for p in layer.base_layer.parameters())
        and len(layer.lora_A) == 1
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(dropout, torch.nn.Identity) for dropout in layer.lora_dropout.values())
    )


def forward_plain(layer: Any, x: torch.Tensor, *more: Any, **rest: Any) -> torch.Tensor:
    """Compute a layer that `is_plain`, as PEFT does."""
    if layer.disable_adapters or layer.merged or more or rest:
        found: torch.Tensor = Linear.forward(layer, x, *more, **rest)
        return found
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    kind = compute_type(x, base.weight)
    bias = None if base.bias is None else base.bias.to(kind)
    weight = getattr(base, "float8", None) or base.weight.to(kind)
    with torch.autocast(x.device.type, enabled=False):
        given = (x.to(kind), weight, bias, a.to(kind), b.to(kind), layer.scaling[name])
        out: torch.Tensor = LoraLinear.apply(*given)  # type: ignore[no-untyped-call]
    return out


def compute_type(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the type in which a linear layer computes: autocast's, or that of its weights."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
