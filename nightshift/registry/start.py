"""Where a training starts: from the base, or from a version whose weights are trained further.

The snapshot writes `data/start`: `start.json` and, if a version is the start, its `model`, and `rows.parquet`
with the examples that it was trained on, also through the version that it started from itself. A version fits
only the base that it was trained on, which is known once the stage `base` has run; on another one, training
starts from the base.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightshift.core.files import read_json
from nightshift.core.paths import BASE_RECORD, START_RECORD
from nightshift.registry.bases import base_digest

ADAPTER_CONFIG = "adapter_config.json"
# Parameter of the section `sft` -> entry of PEFT's adapter_config.json, which decide what the weights of an
# adapter mean. The modules are compared when the model is built.
SHARED = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
# Entries of adapters that were trained elsewhere, which no parameter sets.
FOREIGN = ("alpha_pattern", "rank_pattern", "layer_replication", "fan_in_fan_out")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a training starts.

    Attributes:
        version: Version whose weights are trained further; None for the base.
        digest: Digest of its model.
        base: Digest of its base, from `nightshift.registry.bases.base_digest`.
        base_model: Reference of its base, as in `base.model`.
        reason: Why the start is the base; None for a version.
    """

    version: int | None = None
    digest: str | None = None
    base: str | None = None
    base_model: str | None = None
    reason: str | None = None


def read_record() -> Start:
    """Read what the snapshot chose, whatever the base."""
    return Start(**read_json(START_RECORD))


def read_start() -> Start:
    """Return where training starts on the base in data/base: from what the snapshot chose, if it fits."""
    start = read_record()
    if start.version is None or start.base == base_digest(read_json(BASE_RECORD)["files"]):
        return start
    return Start(
        reason=f"version {start.version} was trained on another base: {start.base_model}, digest {start.base}"
    )


def find_misfits(model: Path, version: int, params: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the weights of a version cannot be trained further with the parameters of the section `sft`.

    Args:
        model: Folder of the version's model.
        version: Its number.
        params: `sft` section of params.yaml.
    """
    file = model / ADAPTER_CONFIG
    where = f"version {version}, from which training starts (sft.start_from: champion)"
    remedy = "or set sft.start_from to base, which trains a new model"
    if file.is_file() != bool(params["adapter"]):
        kind = params["adapter"] or "null"
        has, fits = ("an adapter", "lora or qlora") if file.is_file() else ("full weights", "null")
        yield f"sft.adapter is {kind}, but {where}, has {has}; set it to {fits}, {remedy}"
    elif file.is_file():
        config = read_json(file)
        for name, entry in SHARED.items():
            own, its = params[name], config.get(entry, False)
            if own != its:
                yield f"sft.{name} is {own}, but {where}, has {its}; set the same, {remedy}"
        for entry in FOREIGN:
            if config.get(entry):
                yield f"{where}, has an adapter with {entry} {config[entry]}; set sft.start_from to base"
