"""MLflow's `mlflow-artifacts:` locations without a server.

A server serves the files of such a location; MLflow itself therefore needs the address of one. Stages and
commands also run while the local stack is down, with its database: then the files are read directly.
MLflow loads this module as a plugin (`mlflow.artifact_repository` in pyproject.toml).
"""

from pathlib import PurePosixPath
from urllib.parse import unquote, urlparse

from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.tracking import get_tracking_uri

from nightshift.core.state import ARTIFACTS, state_dir


def open_artifacts(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> ArtifactRepository:
    """Open a location: through the server if MLflow tracks through one, else in the state folder.

    Args:
        artifact_uri: Location, `mlflow-artifacts:/...`.
        tracking_uri: Address or database of MLflow; None for the one that is set.
        registry_uri: Address or database of the registry; None for the tracking URI.

    Raises:
        MlflowException: The location is outside the folder.
    """
    tracking = tracking_uri or get_tracking_uri()
    if urlparse(tracking).scheme in ("http", "https"):
        return MlflowArtifactsRepository(artifact_uri, tracking, registry_uri)
    path = PurePosixPath(unquote(urlparse(artifact_uri).path).lstrip("/"))
    if ".." in path.parts:
        raise MlflowException(f"{artifact_uri}: not a location inside {state_dir() / ARTIFACTS}")
    return LocalArtifactRepository((state_dir() / ARTIFACTS / path).as_uri(), tracking, registry_uri)
