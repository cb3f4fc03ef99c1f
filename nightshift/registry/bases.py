"""Base models of registered versions, kept in the state folder.

A version needs the exact base that it was trained on, for scoring, inference, promotion and rollback,
whatever data/base contains by now. Registration keeps its base; promotion removes all but those of the
versions with an alias. Files are hard links where possible, which take no extra space until
data/base/model becomes another base.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nightshift.core.files import file_digest, text_digest


def base_digest(files: Mapping[str, str]) -> str:
    """Return the digest of a base from the SHA-256 of its files, whatever its reference."""
    return text_digest(json.dumps(files, sort_keys=True), size=16)


def kept_place(model_name: str, files: Mapping[str, str]) -> str:
    """Return where the base of a registered model's version is kept, relative to the state folder."""
    return f"bases/{text_digest(model_name)}/{base_digest(files)}"


def is_base(folder: Path, files: Mapping[str, str]) -> bool:
    """Return whether a folder contains a base: every file with its SHA-256."""
    return all(
        (folder / name).is_file() and file_digest(folder / name) == digest for name, digest in files.items()
    )


def keep(base: Path, files: Mapping[str, str], target: Path) -> None:
    """Keep the files of a base in a folder, which appears only when complete."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in files:
        link_or_copy(base / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system forbids links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
