"""Read the MLflow registry: aliases, the champion as files, its base, the candidates since its promotion."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import GateError
from nightshift.core.files import read_json, tree_digest, write_json
from nightshift.core.paths import BASE
from nightshift.core.stage import OFFLINE
from nightshift.core.state import state_dir
from nightshift.registry.bases import is_base, keep, kept_place
from nightshift.registry.served_model import find_base
from nightshift.tracking.runs import tracking_uri

DIGEST = "nightshift.adapter_digest"
# Digest of the answers that the version gave when it was registered.
ANSWERS = "nightshift.answers_digest"
# How many of the examples that the version was trained on were forgotten since.
FORGOTTEN = "nightshift.forgotten"
ADDRESS = re.compile(r"(?:models:/(?P<name>[^/@]+)[/@])?(?P<which>[^/@]+)")


class RegistryParams(StageParams):
    """Where versions go.

    Attributes:
        model_name: Name of the registered model.
        approval: Who promotes: auto, the gate; manual, a person what the gate would promote; manual_if_hold,
            the gate, and a person what it holds.
    """

    model_name: str
    approval: Literal["auto", "manual", "manual_if_hold"]


def write_champion(folder: Path) -> None:
    """Write `champion.json` (version, digest, base, looks) and the champion's adapter, if there is one.

    `base` is what the champion stands on: reference, precision, digests of its files, and where in the state
    folder it is kept, or null if it is nowhere to be found. `looks` lists the digests of the candidates that
    the gate judged since the last promotion. The files stay untouched while the registry does, so that an
    unchanged night recomputes nothing.

    Raises:
        GateError: The adapter in the registry is not the one that was promoted.
    """
    client, name = open_registry()
    champion = find_alias(client, name, "champion")
    if champion is None:
        record: dict[str, Any] = {"version": None, "digest": None, "base": None}
        shutil.rmtree(folder / "model", ignore_errors=True)
    else:
        reference = read_reference(champion)
        base = {key: reference[key] for key in ("model", "dtype", "files")}
        record = {
            "version": int(champion.version),
            "digest": champion.tags[DIGEST],
            # Last night's base is still there: this runs before the stage base.
            "base": {**base, "kept": keep_base(name, reference)},
        }
        fetch_adapter(champion, folder / "model")
    write_json(folder / "champion.json", {**record, "looks": find_looks(client, name, champion)})


def open_registry() -> tuple[MlflowClient, str]:
    """Return the client and the name of the registered model; what else asks MLflow asks the same one."""
    mlflow.set_tracking_uri(tracking_uri())
    return MlflowClient(), load_params(RegistryParams, "registry").model_name


def find_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version that an alias names, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as err:
        if err.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_version(client: MlflowClient, name: str, version: int) -> ModelVersion:
    """Return a version of the model.

    Raises:
        GateError: There is none, or Nightshift did not register it.
    """
    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as err:
        raise GateError(f"registry: {name} has no version {version}; see `nightshift history`") from err
    if DIGEST not in found.tags:
        raise GateError(
            f"registry: version {version} of {name} has no {DIGEST}; Nightshift did not register it"
        )
    return found


def find_model(address: str) -> ModelVersion:
    """Return the version that `7`, `champion`, `models:/NAME/7` or `models:/NAME@champion` names.

    Raises:
        GateError: There is none, or Nightshift did not register it.
    """
    client, name = open_registry()
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise GateError(f"{address}: no version's number, alias, or models:/NAME@ALIAS; correct it")
    name, which = found["name"] or name, found["which"]
    if which.isdigit():
        return find_version(client, name, int(which))
    version = find_alias(client, name, which)
    if version is None:
        raise GateError(f"registry: no version of {name} is its {which}; see `nightshift history`")
    return find_version(client, name, int(version.version))


@contextmanager
def open_model(version: ModelVersion) -> Iterator[tuple[Path, Path]]:
    """Fetch a version for a while: the folders of its base and its adapter, both verified.

    Beside the adapter lies `base_reference.json`, which names the base.

    Raises:
        GateError: One of the two is not what was registered, or the base is not on this machine.
    """
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "model"
        fetch_adapter(version, adapter)
        reference = adapter.with_name("base_reference.json")
        named = read_reference(version)
        write_json(reference, named)
        try:
            base = find_base(reference, state_dir() / kept_place(version.name, named["files"]))
        except FileNotFoundError as err:
            raise GateError(f"registry: version {version.version} of {version.name}: {err}") from err
        yield base, adapter


def read_reference(version: ModelVersion) -> dict[str, Any]:
    """Read which base a version stands on: its base_reference.json.

    Raises:
        GateError: The version has none.
    """
    uri = f"models:/{version.name}/{version.version}/artifacts/base_reference.json"
    try:
        reference: dict[str, Any] = read_json(Path(download_artifacts(uri)))
    except (MlflowException, OSError) as err:
        raise GateError(
            f"registry: version {version.version} of {version.name} does not name its base ({err}); promote "
            "another version"
        ) from err
    return reference


def keep_base(name: str, reference: dict[str, Any]) -> str | None:
    """Keep the base of a version, so that it outlives a change of `base.model`.

    Args:
        name: Of the registered model.
        reference: Of `read_reference`.

    Returns:
        Its place, relative to the state folder; None if the base is at no place that is known.
    """
    files, kept = reference["files"], kept_place(name, reference["files"])
    if is_base(state_dir() / kept, files):
        return kept
    places = (BASE, reference["path"], os.environ.get("NIGHTSHIFT_BASE"))
    found = next((Path(place) for place in places if place and is_base(Path(place), files)), None)
    if found is None:
        return None
    keep(found, files, state_dir() / kept)
    return kept


def drop_bases(name: str, needed: Collection[str | None]) -> None:
    """Remove the kept bases of a registered model but those at the places that `keep_base` gave."""
    for folder in (state_dir() / kept_place(name, {})).parent.glob("*"):
        if folder.relative_to(state_dir()).as_posix() not in needed:
            shutil.rmtree(folder)


def fetch_adapter(version: ModelVersion, target: Path) -> None:
    """Bring a version's adapter to `target`, unless it is there already.

    Raises:
        GateError: Its digest is not the registered one.
    """
    expected = version.tags[DIGEST]
    if target.is_dir() and tree_digest(target) == expected:
        return
    where = download_artifacts(f"models:/{version.name}/{version.version}/artifacts/model")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(where, target)
    if (found := tree_digest(target)) != expected:
        raise GateError(
            f"registry: version {version.version} of {version.name} holds an adapter with digest "
            f"{found}, registered was {expected}; it was changed: promote another version"
        )


def ask(base: Path, model_uri: str, *folders: str) -> list[list[str]]:
    """Ask models the probe's questions in a process of its own; greedy, so the answers are always the same.

    Args:
        base: Folder of the base on which the model stands.
        model_uri: Of a registered model.
        folders: Of a base and an adapter that are asked too.

    Returns:
        The answers, special tokens and all, of each model.

    Raises:
        GateError: A model does not load.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "nightshift.registry.served_model",
            model_uri,
            *(["--folders", *folders] if folders else []),
        ],
        capture_output=True,
        text=True,
        check=False,
        # Without a GPU: another kernel could give another answer than at registration. On one thread: sums,
        # and so the tokens, do not depend on the number of cores, and busy cores do not delay them.
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **OFFLINE,
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "NIGHTSHIFT_BASE": str(base.absolute()),
        },
    )
    if done.returncode:
        raise GateError(f"registry: {model_uri} does not load: {done.stderr.strip()[-2000:]}")
    answers: list[list[str]] = json.loads(done.stdout.strip().splitlines()[-1])
    return answers


def registered(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return the versions that Nightshift registered, oldest first; their aliases are not in it."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted((v for v in found if DIGEST in v.tags), key=lambda version: int(version.version))


def find_looks(client: MlflowClient, name: str, champion: ModelVersion | None) -> list[str]:
    """List the distinct candidates, oldest first, that were registered after the champion."""
    after = int(champion.version) if champion else 0
    return [v.tags[DIGEST] for v in registered(client, name) if int(v.version) > after]
