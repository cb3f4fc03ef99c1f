"""A loaded version, or a loaded export."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from nightshift.registry.served_model import PROBES, fastest_device, generate, load
from nightshift.registry.versions import find_model, open_model


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model.

    Attributes:
        name: Name of the registered model; of an export without version, the name of its folder.
        version: Version number; None for an export without one.
        created: Time at which it was registered or exported, seconds since 1970.
        model: Model with or without an adapter.
        tokenizer: Tokenizer with a chat template.
    """

    name: str
    version: int | None
    created: int
    model: Any
    tokenizer: Any

    @property
    def label(self) -> str:
        """Name and version, such as nightshift@3."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


def is_export(address: str) -> bool:
    """Return whether an address is the folder of an exported model."""
    return (Path(address) / "config.json").is_file()


def load_address(address: str) -> Served:
    """Load an export, or the version with an address as for `find_model`.

    Raises:
        GateError: The version does not exist, or its files differ from the registered ones.
    """
    if is_export(address):
        return load_export(Path(address))
    version = find_model(address)
    with open_model(version) as folders:
        return load_version(version, *folders)


def load_version(version: ModelVersion, base: Path, adapter: Path) -> Served:
    """Load a version from the verified folders of its base and its adapter."""
    return prepare(version.name, int(version.version), version.creation_timestamp // 1000, base, adapter)


def load_export(folder: Path) -> Served:
    """Load the folder of an export, or of any model with safetensors."""
    record = folder / "export.json"
    found = json.loads(record.read_text("utf-8")) if record.is_file() else {}
    name = found.get("model", folder.absolute().name)
    created = int((folder / "config.json").stat().st_mtime)
    return prepare(name, found.get("version"), created, folder, folder)


def prepare(name: str, version: int | None, created: int, base: Path, adapter: Path) -> Served:
    """Load a model on the fastest device and let it answer once, so that it fails here if at all."""
    model, tokenizer = load(base, adapter)
    model.to(fastest_device())
    generate(model, tokenizer, [{"role": "user", "content": PROBES[0]}], 1)
    return Served(name, version, created, model, tokenizer)
