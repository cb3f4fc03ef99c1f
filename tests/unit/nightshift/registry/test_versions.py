"""Files of a version that are fetched from the registry."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.entities.model_registry import ModelVersion
from mlflow.entities.model_registry.model_version_tag import ModelVersionTag
from mlflow.exceptions import MlflowException

from nightshift.registry import versions


def test_a_failed_download_leaves_the_earlier_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise MlflowException("the server does not respond")

    monkeypatch.setattr(versions, "download_artifacts", fail)
    target = tmp_path / "champion" / "model"
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_text("{}")
    version = ModelVersion("support", "2", 0, tags=[ModelVersionTag(versions.DIGEST, "d")])
    with pytest.raises(MlflowException):
        versions.fetch_adapter(version, target)
    assert (target / "adapter_config.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
