"""Checkpoints that can be trusted: each is closed by a manifest with digests, written last.

They live in the state folder under a key of code, data, base, parameters and versions. The same key
means the same training, so resuming is exact; any change is another folder, so a stale checkpoint
cannot be picked up.
"""

import logging
from pathlib import Path

from tasks.files import file_digest, read_json, write_json

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)


def close(checkpoint: Path) -> None:
    """Write the manifest: from now on the checkpoint counts."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    write_json(
        checkpoint / MANIFEST,
        {path.relative_to(checkpoint).as_posix(): file_digest(path) for path in files},
    )


def is_complete(checkpoint: Path) -> bool:
    """Verify every file of a checkpoint against its manifest."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return False
    digests: dict[str, str] = read_json(manifest)
    return bool(digests) and all(
        (checkpoint / name).is_file() and file_digest(checkpoint / name) == digest
        for name, digest in digests.items()
    )


def find_newest(folder: Path) -> Path | None:
    """Return the newest checkpoint that verifies, or None; say which ones do not."""
    numbered = sorted(folder.glob("checkpoint-*"), key=step, reverse=True)
    for checkpoint in numbered:
        if is_complete(checkpoint):
            return checkpoint
        log.warning("%s is incomplete or damaged; trying the one before", checkpoint)
    return None


def step(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint.

    Example:
        >>> step(Path("checkpoint-20"))
        20
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))
