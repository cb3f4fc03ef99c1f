"""Read the MLflow Model Registry: aliases, champion files and base, candidates since its promotion."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import GateError
from nightshift.core.files import read_json, tree_digest, write_json, write_rows
from nightshift.core.paths import BASE, BEST
from nightshift.core.stage import OFFLINE
from nightshift.core.state import state_dir
from nightshift.data.schemas import SCORES
from nightshift.registry.bases import is_base, keep, kept_place
from nightshift.registry.best import fetch_best
from nightshift.registry.served_model import answer_probes, find_base, load
from nightshift.tracking.runs import tracking_uri

DIGEST = "nightshift.adapter_digest"
# Digest of the version's answers at registration.
ANSWERS = "nightshift.answers_digest"
# Number of the version's training examples that were forgotten since.
FORGOTTEN = "nightshift.forgotten"
# Error codes of MLflow's registry for what does not exist, unlike those of a registry that does not answer.
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
# From `start_probes`: URI of a registered model -> its answers.
Ask = Callable[[str], list[str]]
ADDRESS = re.compile(r"(?:models:/(?P<name>[^/@]+)[/@])?(?P<which>[^/@]+)")


class RegistryParams(StageParams):
    """Registration and promotion of versions.

    Attributes:
        experiment: Name of the MLflow experiment.
        model_name: Name of the registered model.
        approval: Promotion policy: auto, the gate promotes; manual, a person promotes what passed the
            gate; manual_if_hold, the gate promotes, and a person promotes what the gate holds.
    """

    experiment: str
    model_name: str
    approval: Literal["auto", "manual", "manual_if_hold"]


def write_champion(folder: Path) -> None:
    """Write `champion.json`, the champion's adapter, and the best scores so far, if there is a champion.

    champion.json has version, digest, base, arrival and best. `base` is the champion's base: reference,
    precision, digests of its files, and where in the state folder it is kept, or null if it cannot be found.
    See `nightshift.registry.best` for the others. The files change only when the registry does, so an
    unchanged night recomputes nothing.

    Raises:
        GateError: The adapter in the registry is not the promoted one, or its lineage is missing.
    """
    client, name = open_registry()
    champion = find_alias(client, name, "champion")
    if champion is None:
        record: dict[str, Any] = {"version": None, "digest": None, "base": None, "arrival": None, "best": {}}
        shutil.rmtree(folder / "model", ignore_errors=True)
        write_rows(folder / BEST.name, [], SCORES)
    else:
        reference = read_reference(champion)
        base = {key: reference[key] for key in ("model", "dtype", "files")}
        record = {
            "version": int(champion.version),
            "digest": champion.tags[DIGEST],
            # The base of the last run still exists: this runs before the stage base.
            "base": {**base, "kept": keep_base(name, reference)},
            **fetch_best(champion, folder / BEST.name),
        }
        fetch_adapter(champion, folder / "model")
    write_json(folder / "champion.json", record)


def open_registry() -> tuple[MlflowClient, str]:
    """Return the client and the registered model name; set the tracking URI for other MLflow calls."""
    name = load_params(RegistryParams, "registry").model_name
    mlflow.set_tracking_uri(tracking_uri())
    return MlflowClient(), name


def logged_model(version: ModelVersion) -> str | None:
    """Return the id of MLflow's logged model that a version was registered from, or None.

    A database server leaves `model_id` empty, but not the source, `models:/<id>`.

    Example:
        >>> logged_model(ModelVersion("a", "1", 0, source="models:/m-12"))
        'm-12'
    """
    if version.model_id:
        return str(version.model_id)
    kind, _, found = str(version.source).partition("models:/")
    return found if not kind and found.startswith("m-") else None


def find_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """Return the version with an alias, or None."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as err:
        if err.error_code in MISSING:
            return None
        raise


def find_version(client: MlflowClient, name: str, version: int) -> ModelVersion:
    """Return a version of the model.

    Raises:
        GateError: The version does not exist, or Nightshift did not register it.
    """
    try:
        found = client.get_model_version(name, str(version))
    except MlflowException as err:
        if err.error_code not in MISSING:
            raise
        raise GateError(f"registry: {name} has no version {version}; see `nightshift history`") from err
    if DIGEST not in found.tags:
        raise GateError(
            f"registry: version {version} of {name} has no {DIGEST}; Nightshift did not register it"
        )
    return found


def find_model(address: str) -> ModelVersion:
    """Return the version for `7`, `champion`, `models:/NAME/7` or `models:/NAME@champion`.

    Raises:
        GateError: The version does not exist, or Nightshift did not register it.
    """
    client, name = open_registry()
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise GateError(f"{address}: not a version number, an alias or models:/NAME@ALIAS; correct it")
    name, which = found["name"] or name, found["which"]
    if which.isdigit():
        return find_version(client, name, int(which))
    version = find_alias(client, name, which)
    if version is None:
        raise GateError(f"registry: no version of {name} has the alias {which}; see `nightshift history`")
    return find_version(client, name, int(version.version))


@contextmanager
def open_model(version: ModelVersion) -> Iterator[tuple[Path, Path]]:
    """Download a version temporarily: yield the folders of its base and its adapter, both verified.

    `base_reference.json`, which identifies the base, is next to the adapter.

    Raises:
        GateError: One of the two differs from what was registered, or the base is not on this machine.
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
    """Read the base_reference.json of a version, which identifies its base.

    Raises:
        GateError: The version has none.
    """
    uri = f"models:/{version.name}/{version.version}/artifacts/base_reference.json"
    try:
        with tempfile.TemporaryDirectory() as folder:
            reference: dict[str, Any] = read_json(Path(download_artifacts(uri, dst_path=folder)))
    except (MlflowException, OSError) as err:
        raise GateError(
            f"registry: version {version.version} of {version.name} has no base_reference.json ({err}); "
            "promote another version"
        ) from err
    return reference


def keep_base(name: str, reference: dict[str, Any]) -> str | None:
    """Keep the base of a version, so that it outlives a change of `base.model`.

    Args:
        name: Name of the registered model.
        reference: Reference from `read_reference`.

    Returns:
        Its folder, relative to the state folder; None if the base is in no known folder.
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


def drop_bases(client: MlflowClient, name: str) -> None:
    """Remove the kept bases of a registered model, except those of the versions that have an alias."""
    folders = list((state_dir() / kept_place(name, {})).parent.glob("*"))
    if len(folders) < 2:
        return
    needed = set()
    for alias in ("champion", "previous-champion", "candidate", "challenger"):
        # A version that was registered outside Nightshift may not record its base.
        with suppress(GateError):
            if version := find_alias(client, name, alias):
                needed.add(state_dir() / kept_place(name, read_reference(version)["files"]))
    for folder in folders:
        if folder not in needed:
            shutil.rmtree(folder)


def fetch_adapter(version: ModelVersion, target: Path) -> None:
    """Download a version's adapter to `target`, unless it is already there.

    Raises:
        GateError: Its digest differs from the registered one.
    """
    expected = version.tags[DIGEST]
    if target.is_dir() and tree_digest(target) == expected:
        return
    uri = f"models:/{version.name}/{version.version}/artifacts/model"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fetched = Path(download_artifacts(uri, dst_path=folder))
        shutil.rmtree(target, ignore_errors=True)
        fetched.replace(target)
    if (found := tree_digest(target)) != expected:
        raise GateError(
            f"registry: version {version.version} of {version.name} contains an adapter with digest "
            f"{found}, but {expected} was registered; it was changed: promote another version"
        )


@contextmanager
def start_probes(base: Path) -> Iterator[Ask]:
    """Start a process that answers the probes, in which nothing of this process is loaded.

    It imports its libraries while this process works on.

    Args:
        base: Folder of the base of the registered model.

    Yields:
        A function that gets the URI of a registered model, and returns its answers, with special tokens.
        Decoding is greedy, so they never vary. It raises GateError if the model does not load.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "nightshift.registry.served_model"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # CPU: another GPU kernel could give another answer than at registration. One thread: sums,
        # and so tokens, do not depend on the number of cores, and busy cores cause no delay.
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **OFFLINE,
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "NIGHTSHIFT_BASE": str(base.absolute()),
        },
    )

    def ask(model_uri: str) -> list[str]:
        output, errors = process.communicate(model_uri)
        if process.returncode:
            raise GateError(f"registry: {model_uri} does not load: {errors.strip()[-2000:]}")
        answers: list[str] = json.loads(output.strip().splitlines()[-1])
        return answers

    with process:
        try:
            yield ask
        finally:
            process.kill()


def answer_from_files(base: Path, model: Path) -> list[str]:
    """Return the answers of a base with an adapter, or of full weights, to compare with `start_probes`.

    As there, one thread of a CPU computes them.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return answer_probes(*load(base, model))
    finally:
        torch.set_num_threads(threads)


def registered(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return the versions that Nightshift registered, oldest first, without their aliases."""
    found = client.search_model_versions(f"name = '{name}'")
    return sorted((v for v in found if DIGEST in v.tags), key=lambda version: int(version.version))
