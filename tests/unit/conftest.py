"""A model that answers each conversation differently."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def lively(tiny_base: Path) -> tuple[Any, Any]:
    """Return the small random model with scaled-up layers; unscaled, it only repeats the last token."""
    from nightshift.registry.served_model import load

    model, tokenizer = load(tiny_base, tiny_base, "float32")
    for parameter in model.model.layers.parameters():
        parameter.data *= 10
    return model, tokenizer
