"""Which GPUs score which model. Needs no torch."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from nightshift.core.errors import StageError

GIB = 2**30
VISIBLE = "CUDA_VISIBLE_DEVICES"
# Memory per byte of weights: caches, activations and logits take the rest.
ROOM = 1.2
# Prints the free bytes of each GPU; asking takes half a gibibyte on each until the process ends.
FREE = "import torch; print(*(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"


def find_places(weights: Iterable[set[Path]]) -> list[dict[str, str]]:
    """Return the environment of each process that may score at the same time as the others.

    Args:
        weights: Folders with the weights of each model.

    Raises:
        StageError: All GPUs together do not hold the largest model.
    """
    needed = largest(weights)
    free = read_free()
    if (total := sum(free.values())) < needed:
        raise StageError(
            f"evaluate: a model has {needed / GIB:.1f} GiB of weights, and the GPUs {', '.join(free)} have "
            f"{total / GIB:.1f} GiB free; end what else runs on them, or use evaluate.engine: endpoint with "
            "a larger machine"
        )
    return [{VISIBLE: ",".join(group)} for group in split_gpus(free, int(needed * ROOM))]


def largest(weights: Iterable[set[Path]]) -> int:
    """Return the bytes of the weights of the largest model, each a set of folders; 0 without models."""
    return max((sum(map(size_of, folders)) for folders in weights), default=0)


def size_of(folder: Path) -> int:
    """Return the size of the safetensors in a folder, bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_free() -> dict[str, int]:
    """Return the free bytes of each visible GPU, by its name in CUDA_VISIBLE_DEVICES."""
    done = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True)
    free = [int(one) for one in done.stdout.split()]
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    names = named or [str(number) for number in range(len(free))]
    return dict(zip(names, free, strict=False))


def split_gpus(free: Mapping[str, int], needed: int) -> list[list[str]]:
    """Divide GPUs into groups that hold a model each, as small as possible; all in one if none does.

    Args:
        free: Free bytes of each GPU, by name.
        needed: Bytes that the largest model needs.

    Example:
        >>> split_gpus({"0": 80, "1": 80, "2": 20, "3": 80}, 60)
        [['0'], ['1'], ['3']]
        >>> split_gpus({"0": 80, "1": 80, "2": 80, "3": 80}, 140)
        [['0', '1'], ['2', '3']]
        >>> split_gpus({"0": 80, "1": 80, "2": 80}, 160), split_gpus({"0": 80, "1": 80}, 999)
        ([['0', '1']], [['0', '1']])
    """
    # Those with the most free memory first, so that as few as possible share a model.
    names = sorted(free, key=lambda name: -free[name])
    for size in range(1, len(names) + 1):
        groups = [names[i : i + size] for i in range(0, len(names) - size + 1, size)]
        if fitting := [group for group in groups if sum(free[name] for name in group) >= needed]:
            return sorted(sorted(group) for group in fitting)
    return [sorted(names)]
