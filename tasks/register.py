"""Register the candidate in MLflow: data/sft and data/gate -> a model version.

Runs after the graph, never inside it. The version is a pyfunc model from code that contains the
adapter, a reference to its base with digests, its lineage and its model card. Writes
`data/register/version.json`, with the flow run in which a fresh process loaded the version. `--adopt FOLDER
--reason TEXT` registers a model that was trained elsewhere.
"""

import argparse
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from nightshift.core.config import load_params
from nightshift.core.errors import ConfigError, DataError, GateError
from nightshift.core.files import file_digest, read_json, text_digest, tree_digest, write_json, write_text
from nightshift.core.paths import (
    BASE,
    BASE_RECORD,
    BASE_REFERENCE,
    BENCHMARKS,
    CARD,
    GATE,
    LINEAGE,
    RAW,
    TRAINING_RUN,
    VERSION,
)
from nightshift.core.stage import run_main, skip_bitsandbytes
from nightshift.core.state import state_dir
from nightshift.core.trained import trained_model
from nightshift.data.used import USED
from nightshift.pipeline.graph import locked_outputs
from nightshift.pipeline.workspaces import checkout
from nightshift.raw.options import OPTIONS
from nightshift.raw.shards import DIGESTS
from nightshift.raw.versions import VERSIONS
from nightshift.registry import served_model
from nightshift.registry.adoption import copy_model, require_fit, write_adopted_lineage
from nightshift.registry.card import write_card
from nightshift.registry.lineage import write_lineage
from nightshift.registry.versions import (
    ANSWERS,
    DIGEST,
    Ask,
    answer_from_files,
    keep_base,
    logged_model,
    open_registry,
    registered,
    start_probes,
)
from nightshift.tracking.runs import dataset_input, experiment_id, flow_run, git_commit
from nightshift.tracking.spool import training_run
from tasks.gate import GateParams

BASE_DIGEST = "nightshift.base_digest"
# Folder written by snapshot -> its context in MLflow.
DATASET_CONTEXTS = {RAW: "training", BENCHMARKS: "evaluation"}
# The served model always decodes greedily, so there are no sampling parameters.
EXAMPLE = {
    "messages": [{"role": "user", "content": "What is the chemical symbol of Gold?"}],
    "max_tokens": 16,
}
log = logging.getLogger(__name__)


def main(adopt_from: Path | None = None, reason: str = "") -> None:
    """Register the candidate, unless the gate's verdict is error; or a model that was trained elsewhere.

    Raises:
        ConfigError: An adoption has no reason.
        GateError: The verdict is error.
    """
    if adopt_from:
        if not reason.strip():
            raise ConfigError("--reason is required; it is stored in the lineage and the promotion record")
        write_json(VERSION, {"version": adopt(adopt_from, reason), "proven_in": None})
        return
    decision = read_json(GATE)
    if decision["verdict"] == "error":
        raise GateError(f"{GATE}: {decision['reason']}; nothing is registered")
    version, is_new = register(decision["verdict"])
    write_json(VERSION, {"version": version, "proven_in": flow_run() if is_new else None})


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("--adopt", type=Path, dest="adopt_from", help="folder of a model trained elsewhere")
    parser.add_argument("--reason", default="", help="reason of an adoption, stored in its lineage")


def register(verdict: str) -> tuple[int, bool]:
    """Register the candidate once; the same adapter on the same base keeps its version.

    Before the alias `candidate` moves, a fresh process loads the version and must return the same
    answers as the files it was built from.

    Args:
        verdict: Verdict of the gate, stored as a tag.

    Returns:
        Version number of the candidate, and whether it is new.

    Raises:
        GateError: The reloaded model answers differently.
    """
    client, name = open_registry()
    digest, base = tree_digest(trained_model()), file_digest(BASE_RECORD)
    for version in registered(client, name):
        if (version.tags[DIGEST], version.tags.get(BASE_DIGEST)) == (digest, base):
            log.info("the candidate is already registered as version %s", version.version)
            return int(version.version), False
    with start_probes(BASE) as ask:
        write_lineage(LINEAGE)
        write_card(CARD, name, load_params(GateParams, "gate"))
        run = training_run(client, TRAINING_RUN)
        log_data(client, run)
        tags = {
            "nightshift.verdict": verdict,
            "nightshift.dvc_lock_digest": file_digest(Path("dvc.lock")),
            "nightshift.params_digest": file_digest(Path("params.yaml")),
            "nightshift.git_commit": git_commit(),
            "nightshift.data_digest": data_digest(),
            "nightshift.flow_run": flow_run() or "none",
        }
        number = log_verified(client, name, run, trained_model(), tags, ask)
    client.set_registered_model_alias(name, "candidate", str(number))
    return number, True


def adopt(source: Path, reason: str) -> int:
    """Register a model that was trained elsewhere on `base.model`, such as the one in production.

    Args:
        source: Folder of an adapter, or of full weights, in Hugging Face format.
        reason: Reason, stored in the lineage.

    Returns:
        Version number of the model.

    Raises:
        DataError: The folder contains no model that fits the base, or the base is not there yet.
        GateError: The model is registered already, or the reloaded model answers differently.
    """
    if not BASE_RECORD.is_file():
        raise DataError(f"{BASE_RECORD}: not found; `dvc repro base` fetches the base that the model needs")
    client, name = open_registry()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        copy_model(source, model)
        require_fit(model, BASE)
        digest = tree_digest(model)
        for version in registered(client, name):
            if version.tags[DIGEST] == digest:
                raise GateError(f"registry: {source} is already version {version.version} of {name}")
        run = client.create_run(experiment_id(client), run_name=f"adopted {source.name}").info.run_id
        write_adopted_lineage(LINEAGE, model, source, reason, run)
        write_text(
            CARD,
            f"# {name}\n\nTrained elsewhere on `{read_json(BASE_RECORD)['model']}`, and adopted: {reason}\n",
        )
        status = "FAILED"
        try:
            with start_probes(BASE) as ask:
                number = log_verified(client, name, run, model, {"nightshift.verdict": "adopted"}, ask)
            status = "FINISHED"
        finally:
            client.set_terminated(run, status)
    return number


def log_verified(
    client: MlflowClient, name: str, run: str, model: Path, tags: Mapping[str, str], ask: Ask
) -> int:
    """Log and register a model; set its tags once a fresh process has loaded it and answers like the files.

    Args:
        client: MLflow client.
        name: Name of the registered model.
        run: MLflow run.
        model: Folder of the adapter, or of full weights.
        tags: Further tags of the version.
        ask: Function from `start_probes`.

    Returns:
        Version number.

    Raises:
        GateError: The reloaded model answers differently, or does not load.
    """
    identity = {DIGEST: tree_digest(model), BASE_DIGEST: file_digest(BASE_RECORD)}
    number = log_model(client, name, run, model)
    uri = f"models:/{name}/{number}"
    try:
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(ask, uri)
            trained = answer_from_files(BASE, model)
            answers = require_same_answers(uri, found.result(), trained)
    except BaseException:
        # A version that is not proven must not be used.
        client.delete_model_version(name, str(number))
        raise
    for key, value in (identity | {ANSWERS: text_digest(*answers)} | dict(tags)).items():
        client.set_model_version_tag(name, str(number), key, value)
    describe_version(client, name, number)
    return number


def describe_version(client: MlflowClient, name: str, number: int) -> None:
    """Show the model card on MLflow's pages of the version and its logged model."""
    # As in nightshift/registry/card.py.
    from huggingface_hub import ModelCard

    card = ModelCard.load(CARD).text.strip()
    client.update_model_version(name, str(number), description=card)
    if logged := logged_model(client.get_model_version(name, str(number))):
        client.set_logged_model_tags(logged, {MLFLOW_RUN_NOTE: card})
    if not client.get_registered_model(name).description:
        client.update_registered_model(
            name,
            "Retrained by Nightshift. The alias `champion` is the version in use, `candidate` the latest.",
        )


def data_digest() -> str:
    """Return the digest of the shards, and of which of them are used and how."""
    records = (RAW / name for name in (DIGESTS, USED, VERSIONS, OPTIONS))
    return tree_digest(*(path for path in records if path.is_file()))


def require_same_answers(model_uri: str, registered: list[str], trained: list[str]) -> list[str]:
    """Return the answers of a registered model.

    Args:
        model_uri: URI of the model.
        registered: Its answers in a fresh process.
        trained: Answers of the files that were registered.

    Raises:
        GateError: They differ.
    """
    if registered != trained:
        raise GateError(
            f"registry: {model_uri} returns {registered}, but the trained files return {trained}; "
            "the registered model is broken, so no alias was moved"
        )
    log.info("reloaded in a fresh process: the three answers are identical: %s", registered)
    return registered


def log_model(client: MlflowClient, name: str, run: str, model: Path) -> int:
    """Log a model with its base reference, lineage and card to a run, and register them.

    Args:
        client: MLflow client.
        name: Name of the registered model.
        run: MLflow run.
        model: Folder of the adapter, or of full weights.

    Returns:
        Version number.
    """
    base = read_json(BASE_RECORD)
    # A workspace is removed with its base. Its checkout may have another base by then, or none.
    place = str(checkout() / BASE)
    kept = str(state_dir() / str(keep_base(name, base | {"path": place})))
    write_json(BASE_REFERENCE, base | {"path": place, "kept": kept})
    state = client.get_run(run).info.status
    with mlflow.start_run(run_id=run), being_logged():
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=served_model.__file__,
            artifacts={
                "model": str(model),
                "base_reference": str(BASE_REFERENCE),
                "lineage": str(LINEAGE),
                "card": str(CARD),
            },
            input_example=EXAMPLE,
            pip_requirements=["torch", "transformers", "peft", "mlflow"],
            registered_model_name=name,
        )
    # Leaving the block ends the run, but only its owner may end it: restore the status.
    client.update_run(run, status=state)
    return int(info.registered_model_version)


@contextmanager
def being_logged() -> Iterator[None]:
    """Let a model that is loaded in the block have no weights."""
    os.environ[served_model.LOGGED] = "1"
    try:
        yield
    finally:
        del os.environ[served_model.LOGGED]


def log_data(client: MlflowClient, run: str) -> None:
    """Log raw data and benchmarks as inputs of the run, in addition to its packed rows."""
    outputs = locked_outputs()["snapshot"]
    datasets = [
        dataset_input(folder.name, outputs[folder.as_posix()], folder.as_posix(), context)
        for folder, context in DATASET_CONTEXTS.items()
    ]
    client.log_inputs(run, datasets=datasets)


if __name__ == "__main__":
    skip_bitsandbytes()
    run_main(main, declare)
