"""Verified checkpoints: a manifest with digests completes each one, and its final name comes last.

They are stored in the state folder under a key of code, data, base, parameters and versions. The same
key means the same training run, so resuming is exact; any change uses another folder, so a stale
checkpoint cannot be picked up.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nightshift.core.errors import StageError
from nightshift.core.files import file_digest, read_state, write_json

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
# Folder of a checkpoint that is not yet complete.
SAVING = ".saving"
log = logging.getLogger(__name__)


def finalize(written: Path, folder: Path) -> Path:
    """Flush a written checkpoint to disk, write its manifest, and rename it: from then on it is valid.

    Returns:
        Final path in `folder`.
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
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest checkpoints, and never the best one.

    Args:
        folder: Folder of the checkpoints.
        keep: Number of checkpoints to keep.
        best: Step of the best checkpoint, or None.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step)[:-keep]:
        if step(checkpoint) != best:
            shutil.rmtree(checkpoint)


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file of a checkpoint matches its manifest."""
    digests = read_state(checkpoint / MANIFEST) or {}
    return bool(digests) and all(
        (checkpoint / name).is_file() and file_digest(checkpoint / name) == digest
        for name, digest in digests.items()
    )


def find_newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint with finite weights, or None; log the rejected ones."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        if not is_complete(checkpoint):
            log.warning("%s is incomplete or damaged; trying the previous one", checkpoint)
        elif name := find_non_finite(checkpoint):
            log.warning("%s: %s is not finite; trying the previous one", checkpoint, name)
        else:
            return checkpoint
    return None


def find_non_finite(folder: Path) -> str | None:
    """Return the name of a non-finite tensor in a folder's safetensors, or None."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if not is_finite(weights.get_tensor(name)):
                    return str(name)
    return None


def require_finite(folder: Path) -> None:
    """Check that the weights in a folder's safetensors are finite, one tensor at a time.

    Raises:
        StageError: A weight is NaN or infinite.
    """
    if name := find_non_finite(folder):
        raise StageError(
            f"{folder}: {name} is not finite, so this model must not be used; lower sft.learning_rate, or "
            "set sft.precision to another value than fp16"
        )


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return whether all elements are finite; True for integers and empty tensors."""
    if not (tensor.is_floating_point() and tensor.numel()):
        return True
    # aminmax propagates NaN, and makes no copy.
    lowest, highest = tensor.aminmax()
    return bool(lowest.isfinite() and highest.isfinite())


def step(checkpoint: Path) -> int:
    """Return the optimizer step of a checkpoint.

    Example:
        >>> step(Path("checkpoint-20"))
        20
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))
