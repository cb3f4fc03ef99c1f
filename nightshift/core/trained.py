"""The model that training results in: that of `prefer`, or that of `sft` if preference tuning is off."""

from pathlib import Path
from typing import Any

from nightshift.core.files import read_json
from nightshift.core.paths import MODEL, TUNED, TUNING_RECORD

# In `TUNED` without preference tuning, as DVC needs a file in each output.
OFF = "off.json"


def trained_model(checkout: Path = Path()) -> Path:
    """Return the folder of the model that is evaluated and registered; an older checkout has no `prefer`.

    Args:
        checkout: Folder of the data.
    """
    has_weights = any((checkout / TUNED).glob("*.safetensors"))
    return checkout / (TUNED if has_weights else MODEL)


def describe_tuning() -> str | None:
    """Return one sentence on preference tuning, or None without it.

    The accuracy is the share of held-out pairs whose chosen answer gained more on the model of `sft` than the
    rejected one.
    """
    found = read_tuning()
    if found is None:
        return None
    what = "pairs of answers" if found["method"] == "dpo" else "answers"
    text = f"Tuned by {found['method'].upper()} (beta {found['beta']}) on {found['rows']:,} {what}"
    if held := found["held_out"]:
        shown = {"accuracy": "accuracies", "margin": "margins"}
        figures = {name: held.get(f"eval_rewards/{key}") for name, key in shown.items()}
        listed = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)
        text += f"; on {held['rows']:,} held-out ones: {listed}" if listed else ""
    return f"{text}."


def read_tuning() -> dict[str, Any] | None:
    """Return what preference tuning did (see `tasks.prefer.__main__.record`), or None without it."""
    found: dict[str, Any] = read_json(TUNING_RECORD) if TUNING_RECORD.is_file() else {"method": None}
    return found if found["method"] else None
