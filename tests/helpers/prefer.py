"""Helpers for tests of the prefer stage: comparisons beside the rows of `tests.helpers.sft`."""

from pathlib import Path
from typing import Any

import yaml

from nightshift.core.files import write_rows
from nightshift.data.schemas import PLACED_PREFERENCES
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import WHOLE_SET, make_folder, shipped_params

# Two steps of four pairs.
SHORT = {
    "method": "dpo",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "save_steps": 1,
}


def prefer_section(**changes: Any) -> dict[str, Any]:
    """Return the shipped section, shortened, with changes."""
    section: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["prefer"]
    return {**section, **SHORT, **changes}


def comparison(number: int, side: str = "train", **more: Any) -> dict[str, Any]:
    """Return a pair of a good and a bad answer."""
    prompt = [{"role": "user", "content": f"What is {number}?"}]
    chosen = [{"role": "assistant", "content": f"It is the number {number}."}]
    rejected = [{"role": "assistant", "content": f"No idea, ask somebody else about {number}!"}]
    names = {"id": f"p{number}", "example_id": f"e{number}", "source": "made", "side": side}
    origin = f"made/000001.jsonl:{number + 1}"
    answers = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {**names, **answers, "origin": origin, "arrival": 1, **more}


def make_preferences(folder: Path, base: Path) -> Path:
    """Fill a folder with all inputs of `python -m tasks.sft` and, after it, `python -m tasks.prefer`."""
    make_folder(folder, base, ((0, 1), (2, 3)))
    rows = [*(comparison(i) for i in range(8)), *(comparison(i, "validation") for i in range(20, 25))]
    write_rows(folder / "data" / "decontaminate" / "preferences.parquet", rows, PLACED_PREFERENCES)
    return folder


def make_start(folder: Path, **changes: Any) -> Path:
    """Write a model as `sft` leaves it: an adapter with an effect, or whole weights, with random changes.

    Args:
        folder: Folder with the data.
        changes: Changes to the sft section.

    Returns:
        Folder of the model.
    """
    import torch

    from tasks.sft import SftParams
    from tasks.sft.model import load_model

    params = SftParams(**{**shipped_params(), **WHOLE_SET, "activation_checkpointing": False, **changes})
    torch.manual_seed(0)
    model = load_model(str(folder / "data" / "base" / "model"), params, "single", "fp32", "eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" not in name:
                weight.add_(0.02 * torch.randn_like(weight))
    target = folder / "data" / "sft" / "model"
    model.save_pretrained(target)
    return target


def write_params(folder: Path, sft: dict[str, Any] | None = None, **changes: Any) -> None:
    """Write params.yaml with both sections, shortened, with changes to either."""
    sections = {"sft": {**shipped_params(), **WHOLE_SET, **(sft or {})}, "prefer": prefer_section(**changes)}
    text = yaml.safe_dump({**sections, "registry": {"experiment": "nightshift"}})
    (folder / "params.yaml").write_text(text, encoding="utf-8")
