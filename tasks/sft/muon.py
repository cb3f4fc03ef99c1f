"""Muon for matrices, AdamW for the rest, as one optimizer.

torch's Muon takes matrices only, and was made for those inside the blocks: embeddings, head, norms and biases
are AdamW's. Its updates are scaled to the size of AdamW's, so one learning rate fits both.

Source: Jordan et al., kellerjordan.github.io/posts/muon; scale: Liu et al., arXiv 2502.16982.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Embedding


class Muon(torch.optim.Optimizer):
    """Muon and AdamW on parameter groups of their own, with one state."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adamw: Any) -> None:
        """Build both optimizers, or the one that has weights.

        Args:
            matrices: Parameter groups of two-dimensional weights, with lr and weight_decay.
            others: Parameter groups of all other weights, with lr and weight_decay.
            adamw: betas and eps of AdamW.
        """
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, **adamw))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()

    def share(self) -> None:
        """Let both optimizers work on the groups and the state of this one."""
        start = 0
        for part in self.parts:
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            start += len(part.param_groups)
            part.state = self.state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, which replaces groups and state by new objects."""
        super().load_state_dict(dict(state_dict))
        self.share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights."""
        assert closure is None
        for part in self.parts:
            part.step()


def build_muon(
    model: Any, decayed: set[str], learning_rate: float, weight_decay: float, **adamw: Any
) -> Muon:
    """Build the optimizer of a model.

    Args:
        model: Model with the adapter, not wrapped.
        decayed: Names of the weights with weight decay.
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        adamw: betas and eps of AdamW.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tables = {module.weight for module in model.modules() if isinstance(module, Embedding)}
    tables.add(model.get_output_embeddings().weight)
    is_matrix = {name: weight.ndim == 2 and weight not in tables for name, weight in trained.items()}

    def group(weights: list[Any], decay: float) -> list[dict[str, Any]]:
        return [{"params": weights, "lr": learning_rate, "weight_decay": decay}] if weights else []

    matrices = [weight for name, weight in trained.items() if is_matrix[name]]
    others = [(name in decayed, weight) for name, weight in trained.items() if not is_matrix[name]]
    return Muon(
        group(matrices, weight_decay),
        [
            *group([weight for is_decayed, weight in others if is_decayed], weight_decay),
            *group([weight for is_decayed, weight in others if not is_decayed], 0.0),
        ],
        **adamw,
    )
