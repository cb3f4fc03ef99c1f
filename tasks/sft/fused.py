"""Fused loss and adapter layers: computed as in transformers and PEFT, in less memory.

Both replace a module's `forward`, so the hooks of DeepSpeed and FSDP2 on the module still run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn.functional import linear

from nightshift.data.encode import IGNORED
from tasks.sft.strategy import LOGITS

if TYPE_CHECKING:
    from tasks.sft.float8 import Float8Weight


class SummedLoss(torch.autograd.Function):
    """Sum of negative log-likelihoods from hidden states and a frozen head, computed in chunks.

    The gradient of the hidden states is computed in the forward pass, so only the logits of one chunk
    exist at a time. The head gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, smoothing: float
    ) -> torch.Tensor:
        """Compute the sum, in nats, shape (1, 1, 1), like the logits of a single position.

        Args:
            ctx: Autograd context with the gradient for `backward`.
            hidden: Hidden states, shape (n, width), in the dtype of `head`.
            head: Head weights, shape (vocab_size, width).
            labels: Token ids, shape (n,), none of them ignored.
            smoothing: Probability mass spread over the vocabulary, 0 to 1.
        """
        vocab_size = len(head)
        chunk_size = max(1, LOGITS[hidden.device.type] // (4 * vocab_size))
        total = torch.zeros(1, 1, 1, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(labels), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = (hidden[chunk] @ head.t()).float()
            log_norm = logits.logsumexp(-1, keepdim=True)
            target_logits = logits.gather(1, labels[chunk, None])
            total += (log_norm - (1 - smoothing) * target_logits).sum()
            if smoothing:
                total -= smoothing * logits.mean(-1).sum()
            if gradient is None:
                continue
            logits_gradient = logits.sub_(log_norm).exp_().sub_(smoothing / vocab_size)
            logits_gradient.scatter_add_(
                1, labels[chunk, None], torch.full_like(target_logits, smoothing - 1)
            )
            torch.mm(logits_gradient.to(hidden.dtype), head, out=gradient[chunk])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the hidden states, and None for the rest."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.reshape(()).to(gradient.dtype), None, None, None


class LossHead:
    """Replacement for a frozen head's `forward`: logits, or the summed loss if labels are set."""

    def __init__(self, head: torch.nn.Linear) -> None:
        """Replace `head.forward`."""
        self.head, self.project = head, head.forward
        self.labels: torch.Tensor | None = None
        self.smoothing = 0.0
        head.forward = self  # type: ignore[assignment]

    @contextmanager
    def with_labels(self, labels: torch.Tensor, smoothing: float) -> Iterator[None]:
        """Return the summed loss over the labels instead of logits within the block, shape (1, 1, 1).

        Args:
            labels: Labels of the positions passed to the head, shape (n_rows, n).
            smoothing: Probability mass spread over the vocabulary, 0 to 1.
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
        states, labels = hidden.reshape(-1, hidden.shape[-1]).to(kind), self.labels.flatten()
        if len(self.labels) > 1:
            # In a flattened row each of these positions has a label, in padded rows any of them has.
            is_labelled = labels != IGNORED
            states, labels = states[is_labelled], labels[is_labelled]
        with torch.autocast(hidden.device.type, enabled=False):
            weight = self.head.weight.to(kind)
            loss: torch.Tensor = SummedLoss.apply(states, weight, labels, self.smoothing)  # type: ignore[no-untyped-call]
        return loss


class LoraLinear(torch.autograd.Function):
    """x W' + b + s (x A') B' for a frozen W: fewer passes over the result, and x is saved once."""

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
            ctx: Autograd context for `backward`.
            x: Input, shape (n, inputs). The caller reshapes: a model may change the result in place, which
                torch forbids for a view made here.
            weight: Frozen weight, shape (outputs, inputs), or its float8 version.
            bias: Bias, shape (outputs,), or None.
            a: LoRA A, shape (rank, inputs).
            b: LoRA B, shape (outputs, rank).
            scale: Scale of the adapter output.
        """
        low = x @ a.t()
        out = project(x, weight, bias)
        out.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(x, low, a, b)
        # Frozen, and kept alive by its layer.
        ctx.weight, ctx.scale = weight, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, A and B; that of the frozen weight is never computed."""
        x, low, a, b = ctx.saved_tensors
        inner = (grad_output @ b).mul_(ctx.scale)
        grad_input = None
        if ctx.needs_input_grad[0]:
            weight = ctx.weight
            grad_input = grad_output @ weight if torch.is_tensor(weight) else weight.pull_back(grad_output)
            grad_input = grad_input.addmm_(inner, a)
        return grad_input, None, None, inner.t() @ x, (grad_output.t() @ low).mul_(ctx.scale), None


def project(
    x: torch.Tensor, weight: "torch.Tensor | Float8Weight", bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute x W' + b, shape (n, outputs)."""
    if isinstance(weight, torch.Tensor):
        return linear(x, weight, bias)
    out = weight.project(x)
    return out if bias is None else out.add_(bias)


def fuse_adapter(model: torch.nn.Module) -> None:
    """Fuse the adapter's plain linear layers; other layers keep PEFT's forward."""
    for layer in model.modules():
        if is_plain(layer):
            layer.forward = partial(forward_plain, layer)


def count_lora(model: torch.nn.Module) -> dict[str, int]:
    """Count the fused adapter layers and those computed by PEFT."""
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    fused = len(list(fused_layers(model)))
    return {"fused": fused, "peft": layers - fused}


def fused_layers(model: torch.nn.Module) -> Iterator[Any]:
    """Yield the fused adapter layers."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and isinstance(vars(module).get("forward"), partial):
            yield module


def is_plain(layer: Any) -> bool:
    """Return whether a PEFT layer is a frozen linear layer with a single adapter and nothing else."""
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
    """Compute a layer that `is_plain` in one function, equivalent to PEFT's forward."""
    if layer.disable_adapters or layer.merged or more or rest:
        found: torch.Tensor = Linear.forward(layer, x, *more, **rest)
        return found
    (name,) = layer.active_adapters
    base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    kind = compute_type(x, base.weight)
    bias = None if base.bias is None else base.bias.to(kind)
    weight = getattr(base, "float8", None) or base.weight.to(kind)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(kind).reshape(-1, x.shape[-1])
        given = (flat, weight, bias, a.to(kind), b.to(kind), layer.scaling[name])
        out: torch.Tensor = LoraLinear.apply(*given)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def compute_type(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the compute dtype of a linear layer: autocast's, or that of its weights."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
