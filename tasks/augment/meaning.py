"""Compare meanings with a sentence embedder from a folder or an installed package."""

import importlib.resources
from pathlib import Path

from nightshift.core.errors import ConfigError
from nightshift.core.state import user_path
from tasks.augment.quality import CompareMeaning


def load_embedder(location: str) -> CompareMeaning:
    """Load a sentence-transformers model and return a function for the cosine similarity of two texts.

    Args:
        location: Folder, or `package:<name>` for a package with the folder `model`.

    Raises:
        ConfigError: sentence-transformers, or the package of the model, is not installed, or the model is
            not a folder.
    """
    try:
        from sentence_transformers import SentenceTransformer

        folder = _find_folder(location)
    except ImportError as err:
        raise ConfigError(
            f"params.yaml: augment.embedder={location}: {err.name} is not installed; "
            "run `pip install -e '.[meaning]'`, or set it to null"
        ) from err
    if not folder.is_dir():
        raise ConfigError(
            f"params.yaml: augment.embedder={location}: {folder} is not a folder; correct the path, or set "
            "it to null"
        )
    model = SentenceTransformer(str(folder), trust_remote_code=False, local_files_only=True)

    def compare(before: str, after: str) -> float:
        first, second = model.encode([before, after], normalize_embeddings=True, show_progress_bar=False)
        return float(first @ second)

    return compare


def _find_folder(location: str) -> Path:
    """Return the folder of the model."""
    if not location.startswith("package:"):
        return user_path(location)
    module = location.removeprefix("package:").replace("-", "_")
    return Path(str(importlib.resources.files(module) / "model"))
