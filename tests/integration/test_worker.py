"""What a rank does before and after the training steps."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from tasks.sft.worker import finish


def adapter_b(trainer: Any) -> torch.Tensor:
    """Return the adapter's B matrices, initially zero, flattened into one tensor."""
    parameters = trainer.model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in sorted(parameters) if "lora_B" in name])


def test_a_schedule_free_optimizer_saves_inference_weights_not_training_weights(
    build: Callable[..., Any],
) -> None:
    trainer = build(optim="schedule_free_adamw")
    trainer.train()
    trained = adapter_b(trainer)
    folder = Path(trainer.args.output_dir)
    job = SimpleNamespace(plan=SimpleNamespace(steps=3), folder=folder)
    progress = SimpleNamespace(speed=1.0, cpu_share=lambda: 1.0, log_cpu_shares=lambda *_: None)
    finish(trainer, job, progress, None)  # type: ignore[arg-type]
    weights = load_file(folder / "output" / "model" / "adapter_model.safetensors")
    saved = torch.cat([weights[name].flatten() for name in sorted(weights) if "lora_B" in name])
    assert not torch.allclose(saved, trained)
    trainer.optimizer.eval()
    assert torch.equal(saved, adapter_b(trainer))
