"""Muon for matrices and AdamW for the rest: each as alone, and resumed exactly."""

from copy import deepcopy
from typing import Any

import torch

from tasks.sft.muon import Muon, build_muon

ADAMW: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-6}


class Small(torch.nn.Module):
    """Embeddings, a matrix with a bias, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 4)
        self.inner = torch.nn.Linear(4, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 7, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        """Return the head."""
        return self.head

    def learn(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        """Take some steps on one batch."""
        ids = torch.tensor([1, 2, 3])
        for _ in range(steps):
            optimizer.zero_grad()
            logits = self.head(self.norm(self.inner(self.table(ids))))
            torch.nn.functional.cross_entropy(logits, ids + 1).backward()
            optimizer.step()


def build(model: Small) -> Muon:
    """Build the optimizer, with weight decay on matrices and tables."""
    decayed = {"table.weight", "inner.weight", "head.weight"}
    return build_muon(model, decayed, learning_rate=0.05, weight_decay=0.1, **ADAMW)


def test_matrices_get_muon_and_the_rest_adamw() -> None:
    model, same = Small(), Small()
    model.learn(build(model), 3)
    both = [
        torch.optim.Muon([same.inner.weight], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([same.table.weight, same.head.weight], lr=0.05, weight_decay=0.1, **ADAMW),
        torch.optim.AdamW([same.inner.bias, *same.norm.parameters()], lr=0.05, weight_decay=0.0, **ADAMW),
    ]

    class Apart(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for one in both:
                one.step()

    same.learn(Apart(same.parameters(), lr=0.0), 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name]), name


def test_a_loaded_state_continues_exactly() -> None:
    model = Small()
    optimizer = build(model)
    model.learn(optimizer, 2)
    again = Small()
    again.load_state_dict(model.state_dict())
    resumed = build(again)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for one in (model, optimizer), (again, resumed):
        one[1].param_groups[0]["lr"] = 0.01  # as a schedule does
        one[0].learn(one[1], 2)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert {float(state["step"]) for state in resumed.state.values() if "step" in state} == {4.0}
