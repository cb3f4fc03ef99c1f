"""Register the candidate in MLflow: data/sft and data/gate -> a model version.

Runs after the graph, never inside it. The version is a pyfunc model from code that contains the
adapter, a reference to its base with digests, its lineage and its model card. Writes
`data/register/version.json`.
"""

import logging
import os
from pathlib import Path

import mlflow
from mlflow import MlflowClient

from nightshift.core.config import load_params
from nightshift.core.errors import GateError
from nightshift.core.files import file_digest, read_json, text_digest, tree_digest, write_json
from nightshift.core.paths import (
    BASE,
    BASE_RECORD,
    BASE_REFERENCE,
    BENCHMARKS,
    CARD,
    GATE,
    LINEAGE,
    MODEL,
    RAW,
    TRAINING_RUN,
    VERSION,
)
from nightshift.core.stage import run_main
from nightshift.core.state import state_dir
from nightshift.data.used import USED
from nightshift.pipeline.graph import locked_outputs
from nightshift.raw.shards import DIGESTS
from nightshift.registry import served_model
from nightshift.registry.bases import kept_place
from nightshift.registry.card import write_card
from nightshift.registry.lineage import write_lineage
from nightshift.registry.versions import ANSWERS, DIGEST, answer_probes, open_registry, registered
from nightshift.tracking.runs import dataset_input, git_commit
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


def main() -> None:
    """Register the candidate, unless the gate's verdict is error.

    Raises:
        GateError: The verdict is error.
    """
    decision = read_json(GATE)
    if decision["verdict"] == "error":
        raise GateError(f"{GATE}: {decision['reason']}; nothing is registered")
    write_json(VERSION, {"version": register(decision["verdict"])})


def register(verdict: str) -> int:
    """Register the candidate once; the same adapter on the same base keeps its version.

    Before the alias `candidate` moves, a fresh process loads the version and must return the same
    answers as the files it was built from.

    Args:
        verdict: Verdict of the gate, stored as a tag.

    Returns:
        Version number of the candidate.

    Raises:
        GateError: The reloaded model answers differently.
    """
    client, name = open_registry()
    digest, base = tree_digest(MODEL), file_digest(BASE_RECORD)
    for version in registered(client, name):
        if (version.tags[DIGEST], version.tags.get(BASE_DIGEST)) == (digest, base):
            log.info("the candidate is already registered as version %s", version.version)
            return int(version.version)
    number = log_model(client, name)
    tags = {
        DIGEST: digest,
        "nightshift.verdict": verdict,
        BASE_DIGEST: base,
        "nightshift.dvc_lock_digest": file_digest(Path("dvc.lock")),
        "nightshift.params_digest": file_digest(Path("params.yaml")),
        "nightshift.git_commit": git_commit(),
        "nightshift.data_digest": data_digest(),
        "nightshift.flow_run": os.environ.get("PREFECT__FLOW_RUN_ID", "none"),
    }
    tags[ANSWERS] = require_same_answers(f"models:/{name}/{number}")
    for key, value in tags.items():
        client.set_model_version_tag(name, str(number), key, value)
    client.set_registered_model_alias(name, "candidate", str(number))
    return number


def data_digest() -> str:
    """Return the digest of the shards and of the sources in use."""
    return tree_digest(RAW / DIGESTS, RAW / USED)


def require_same_answers(model_uri: str) -> str:
    """Load the registered model in a fresh process and compare its answers with the trained files'.

    Returns:
        Digest of the answers.

    Raises:
        GateError: The answers differ, or the model does not load.
    """
    registered, trained = answer_probes(BASE, model_uri, str(BASE), str(MODEL))
    if registered != trained:
        raise GateError(
            f"registry: {model_uri} returns {registered}, but the trained files return {trained}; "
            "the registered model is broken, so no alias was moved"
        )
    log.info("reloaded in a fresh process: the three answers are identical: %s", registered)
    return text_digest(*registered)


def log_model(client: MlflowClient, name: str) -> int:
    """Log adapter, base reference, lineage and card to the training run, and register them."""
    base = read_json(BASE_RECORD)
    # Current path of the base, and its kept copy while this version or its successor is the champion.
    kept = state_dir() / kept_place(name, base["files"])
    write_json(BASE_REFERENCE, base | {"path": str(BASE.absolute()), "kept": str(kept)})
    write_lineage(LINEAGE)
    write_card(CARD, name, load_params(GateParams, "gate"))
    run = training_run(client, TRAINING_RUN)
    log_data(client, run)
    state = client.get_run(run).info.status
    with mlflow.start_run(run_id=run):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=served_model.__file__,
            artifacts={
                "model": str(MODEL),
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


def log_data(client: MlflowClient, run: str) -> None:
    """Log raw data and benchmarks as inputs of the run, in addition to its packed rows."""
    outputs = locked_outputs()["snapshot"]
    datasets = [
        dataset_input(folder.name, outputs[folder.as_posix()], folder.as_posix(), context)
        for folder, context in DATASET_CONTEXTS.items()
    ]
    client.log_inputs(run, datasets=datasets)


if __name__ == "__main__":
    run_main(main)
