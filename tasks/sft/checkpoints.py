"""Checkpoints that can be trusted: each is closed by a manifest with digests and takes its name last.

They live in the state folder under a key of code, data, base, parameters and versions. The same key
means the same training, so resuming is exact; any change is another folder, so a stale checkpoint
cannot be picked up.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nightshift.core.errors import StageError
from nightshift.core.files import file_digest, read_json, write_json

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
# Where a checkpoint is written before it counts.
SAVING = ".saving"
log = logging.getLogger(__name__)


def close(written: Path, folder: Path) -> Path:
    """Put a written checkpoint on the disk, digests last, and give it its name: from now on it counts.

    Returns:
        Its place in `folder`.
    """
    files = sorted(p for p in written.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        sync(path)
    write_json(
        written / MANIFEST, {path.relative_to(written).as_posix(): file_digest(path) for path in files}
    )
    target = folder / written.name
    shutil.rmtree(target, ignore_errors=True)
    written.rename(target)
    sync(folder)
    return target


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest checkpoints, and never the best one.

    Args:
        folder: Where they lie.
        keep: Checkpoints to keep.
        best: Step of the best one, or None.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step)[:-keep]:
        if step(checkpoint) != best:
            shutil.rmtree(checkpoint)


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
    """Return the newest checkpoint that verifies and has finite weights, or None; say which ones do not."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        if not is_complete(checkpoint):
            log.warning("%s is incomplete or damaged; trying the one before", checkpoint)
        elif name := find_broken(checkpoint):
            log.warning("%s: %s is not finite; trying the one before", checkpoint, name)
        else:
            return checkpoint
    return None


def find_broken(folder: Path) -> str | None:
    """Return the name of a tensor in a folder's safetensors that is not finite, or None."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                if not is_finite(weights.get_tensor(name)):
                    return str(name)
    return None


def require_finite(folder: Path) -> None:
    """Check the weights in a folder's safetensors, one tensor at a time.

    Raises:
        StageError: One is NaN or infinite.
    """
    if name := find_broken(folder):
        raise StageError(
            f"{folder}: {name} is not finite, so this model must not be used; lower sft.learning_rate, or "
            "take another sft.precision than fp16"
        )


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether all elements are finite; integers and a tensor without elements are."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # NaN wins over every number, and no copy is made.
    lowest, highest = tensor.aminmax()
    return bool(lowest.isfinite() and highest.isfinite())


def step(checkpoint: Path) -> int:
    """Return the optimiser step of a checkpoint.

    Example:
        >>> step(Path("checkpoint-20"))
        20
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))
