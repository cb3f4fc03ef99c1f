"""Explain errors of the Hugging Face Hub: the Hub itself, the network or the local cache.

Only the stages `base` and `snapshot` may access it (`nightshift.core.stage.run_main`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nightshift.core.errors import DataError
from nightshift.core.stage import DISK_ERRORS


@contextmanager
def explain_hub_errors(what: str) -> Iterator[None]:
    """Turn a Hub error in the block into an error with a fix.

    Args:
        what: Key and value in params.yaml, such as `base.model: hub:owner/name@<commit>`.

    Raises:
        DataError: The Hub cannot be reached, refuses access, or may not be used.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except hub_errors() as err:
        if getattr(err, "errno", None) in DISK_ERRORS:
            raise
        # "Not in the cache" is only a consequence; report why the Hub returned nothing.
        cause = (isinstance(err, LocalEntryNotFoundError) and err.__cause__) or err
        message = str(cause).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"{what}: {type(cause).__name__}: {message}; {find_remedy(cause)}") from err


def hub_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the exceptions of huggingface_hub, of the HTTP library of its version, and `others`."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.XetDownloadError, OSError, *others  # type: ignore[attr-defined]


def find_remedy(err: BaseException) -> str:
    """Return how to fix an error of the Hub client."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if is_offline_mode():
        return (
            f"it is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 blocks the Hub; "
            "unset it and run again"
        )
    if isinstance(err, GatedRepoError):
        return "gated repository: accept its terms on the Hub, and set HF_TOKEN"
    # 401: the Hub hides from unauthenticated users whether a repository exists.
    status = getattr(getattr(err, "response", None), "status_code", None)
    if isinstance(err, RepositoryNotFoundError) or status == 401:
        return "the repository does not exist or is private; correct the name, or set HF_TOKEN"
    if isinstance(err, RevisionNotFoundError):
        return "correct the commit"
    return f"the request to {constants.ENDPOINT} failed; check the network, HF_ENDPOINT and HF_TOKEN"
