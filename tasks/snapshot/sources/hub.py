"""Datasets of the Hugging Face Hub: the Parquet files of one commit. No repository script is run."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from nightshift.core.errors import DataError
from nightshift.hub import explain_hub_errors
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.folders import read_file
from tasks.snapshot.sources.splits import choose_split

HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})(?:/(?P<glob>\S+))?")


def hub_offers(location: str, split: str | None = None) -> Iterator[Offer]:
    """Yield the Parquet files of a dataset, ordered by path.

    Args:
        location: `hub:<owner>/<name>@<commit>`, with an optional `/<glob>` to select files.
        split: Split to read, or None.

    Raises:
        DataError: The Hub is unreachable or rejects the request, no Parquet file matches, or a split has to
            be chosen.
    """
    from huggingface_hub import HfApi

    found = HUB.fullmatch(location)
    if not found:
        raise ValueError(f"{location!r} was not checked by require_location")
    identity, commit = found["id"], found["commit"]
    with explain_hub_errors(f"snapshot.sources: {location}"):
        files = HfApi().list_repo_files(identity, revision=commit, repo_type="dataset")
    for name in choose_split(choose_parquet(files, found["glob"] or "*", location), split, location):
        chunks = download(identity, commit, name, location)
        yield Offer(".parquet", chunks, name, f"hub:{identity}@{commit}/{name}")


def download(identity: str, commit: str, name: str, location: str) -> Iterator[bytes]:
    """Download a file of a dataset and yield its bytes.

    Raises:
        DataError: The Hub is unreachable or rejects the request.
    """
    from huggingface_hub import hf_hub_download

    with explain_hub_errors(f"snapshot.sources: {location}"):
        path = hf_hub_download(identity, name, revision=commit, repo_type="dataset")
    yield from read_file(Path(path))


def choose_parquet(files: list[str], pattern: str, location: str) -> list[str]:
    """Return the Parquet files that match a pattern, sorted.

    Raises:
        DataError: No file matches.

    Example:
        >>> choose_parquet(["README.md", "load.py", "data/train-0.parquet"], "data/train-*", "hub:a/b@c")
        ['data/train-0.parquet']
    """
    chosen = sorted(name for name in files if name.endswith(".parquet") and fnmatchcase(name, pattern))
    if not chosen:
        raise DataError(
            f"snapshot.sources: {location}: no Parquet file matches {pattern}; use a commit of the "
            "dataset's branch refs/convert/parquet"
        )
    return chosen
