"""Say plainly what the Hugging Face Hub does not give: the Hub, the network or its cache.

The stages `base` and `snapshot` may ask it, nothing else may (`nightshift.core.stage.run_main`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from nightshift.core.errors import DataError
from nightshift.core.stage import NO_ROOM


@contextmanager
def asking_hub(what: str) -> Iterator[None]:
    """Turn what the block cannot get from the Hub into an error that names the remedy.

    Args:
        what: Key and value in params.yaml, such as `base.model: hub:owner/name@<commit>`.

    Raises:
        DataError: The Hub cannot be reached or refuses, or may not be asked.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        yield
    except hub_errors() as err:
        if getattr(err, "errno", None) in NO_ROOM:
            raise
        # "Not in the cache" is what follows from the reason why the Hub gave nothing.
        cause = (isinstance(err, LocalEntryNotFoundError) and err.__cause__) or err
        said = str(cause).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"{what}: {type(cause).__name__}: {said}; {find_remedy(cause)}") from err


def hub_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors of the client, of the library by which this version of it asks, and others."""
    from huggingface_hub import errors

    return errors.HTTPError, errors.XetDownloadError, OSError, *others  # type: ignore[attr-defined]


def find_remedy(err: BaseException) -> str:
    """Say what to do about an error of the client."""
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if is_offline_mode():
        return (
            f"it is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE=1 keeps the Hub out; "
            "unset it and run again"
        )
    if isinstance(err, GatedRepoError):
        return "its owner asks for consent: accept its terms on the Hub, and set HF_TOKEN"
    # 401: the Hub does not tell strangers whether a repository is there.
    status = getattr(getattr(err, "response", None), "status_code", None)
    if isinstance(err, RepositoryNotFoundError) or status == 401:
        return "there is no such repository, or it is private; correct the name, or set HF_TOKEN"
    if isinstance(err, RevisionNotFoundError):
        return "correct the commit"
    return f"{constants.ENDPOINT} does not answer as it should; check network, HF_ENDPOINT and HF_TOKEN"
