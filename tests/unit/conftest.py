"""A model that answers each conversation in another way."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def lively(tiny_base: Path) -> tuple[Any, Any]:
    """The small random model, whose layers say so little that it repeats the last token, made louder."""
    from nightshift.registry.served_model import load

    model, tokenizer = load(tiny_base, tiny_base, "float32")
    for parameter in model.model.layers.parameters():
        parameter.data *= 10
    return model, tokenizer
