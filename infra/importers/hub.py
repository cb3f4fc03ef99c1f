"""Look up the commits of models and datasets on the Hugging Face Hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, Protocol

from nightshift.core.errors import DataError
from nightshift.hub import explain_hub_errors

Kind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Branch on which the Hub keeps a dataset as Parquet files: <config>/<split>/0000.parquet.
PARQUET = "refs/convert/parquet"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit.

    Attributes:
        identity: Owner and name.
        commit: 40 hex digits.
        files: Paths of its files; empty if unknown.
    """

    identity: str
    commit: str
    files: tuple[str, ...] = ()

    def list_configs(self) -> list[str]:
        """Return the configs of a dataset on its Parquet branch: the folders with a folder per split."""
        parts = [PurePosixPath(name).parts for name in self.files if name.endswith(".parquet")]
        return sorted({names[0] for names in parts if len(names) == 3})


class Lookup(Protocol):
    """What the importers ask of the Hub."""

    def find(self, kind: Kind, identity: str, revision: str) -> Repository:
        """Return a repository; raise DataError with the remedy if it cannot be found."""
        ...


@dataclass
class Hub:
    """The Hub that HF_ENDPOINT names. If it is unreachable, it is asked once.

    Attributes:
        fault: Why it is unreachable.
    """

    fault: str = ""
    known: dict[tuple[str, str, str], Repository] = field(default_factory=dict)

    def find(self, kind: Kind, identity: str, revision: str) -> Repository:
        """Return a repository at a commit; of a dataset, preferably its Parquet files.

        Args:
            kind: model or dataset.
            identity: Owner and name; some models have no owner.
            revision: Commit, branch or tag; empty for the newest commit.

        Raises:
            DataError: The Hub is unreachable, or has no such repository or revision.
        """
        key = (kind, identity, revision)
        if key not in self.known:
            if self.fault:
                raise DataError(self.fault)
            self.known[key] = self._ask(kind, identity, revision)
        return self.known[key]

    def _ask(self, kind: Kind, identity: str, revision: str) -> Repository:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

        branches = [revision or "main"]
        if kind == "dataset" and not revision:
            branches = [PARQUET, "main"]
        for branch in branches:
            try:
                with explain_hub_errors(f"{kind} {identity}"):
                    info = HfApi().repo_info(identity, revision=branch, repo_type=kind, timeout=20)
            except DataError as err:
                if isinstance(err.__cause__, RevisionNotFoundError) and branch != branches[-1]:
                    continue
                if not isinstance(err.__cause__, HfHubHTTPError):
                    self.fault = str(err)
                raise
            files = tuple(one.rfilename for one in getattr(info, "siblings", None) or ())
            return Repository(info.id or identity, str(info.sha), files)
        raise AssertionError("the last branch returns or raises")


@dataclass(frozen=True, slots=True)
class Offline:
    """Knows no repository: for files whose commits are given."""

    def find(self, kind: Kind, identity: str, revision: str) -> Repository:  # noqa: ARG002 - as in Lookup
        """Raise: nothing is known.

        Raises:
            DataError: Always.
        """
        raise DataError(f"{kind} {identity}: the Hub was not asked")


def resolve(hub: Lookup, kind: Kind, identity: str, revision: str) -> tuple[Repository, str]:
    """Return a repository, and a note if it could not be looked up.

    Raises:
        DataError: No commit is given, and it cannot be looked up.
    """
    try:
        found = hub.find(kind, identity, revision)
    except DataError as err:
        if not COMMIT.fullmatch(revision):
            raise
        return Repository(identity, revision), f"not verified: {err}"
    return found, "" if revision == found.commit else f"the commit of today: {found.commit[:12]}"


def has_parquet(files: Iterable[str]) -> bool:
    """Return whether a repository has Parquet files, or its files are unknown."""
    names = list(files)
    return not names or any(name.endswith(".parquet") for name in names)
