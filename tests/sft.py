"""The section sft in tests: a short training without anything that is off by default."""

from typing import Any

import yaml

from tasks.sft import SftParams
from tests.checkouts import ROOT

SHORT = {
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "precision": "fp32",
    "attn_implementation": "sdpa",
    "save_steps": 1,
}


def sft_params(**changes: Any) -> SftParams:
    """The shipped parameters, made short, with changes."""
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["sft"]
    return SftParams(**{**shipped, **SHORT, **changes})
