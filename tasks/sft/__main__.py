"""Run the stage: compile the plan, launch the ranks, verify the success marker."""

import logging
import os
from collections.abc import Iterator

from nightshift.core.code_digest import MODEL_ENGINES, code_digest
from nightshift.core.config import config_error, load_params
from nightshift.core.errors import DataError, StageError
from nightshift.core.files import file_digest, iterate_rows, read_json, text_digest
from nightshift.core.paths import BASE, BASE_RECORD, MODEL, PACKED, START_MODEL, VALIDATION
from nightshift.core.stage import run_main, write_summary
from nightshift.core.state import state_dir
from nightshift.data.encode import load_encoder
from nightshift.data.tokens import encode_stream, open_memo
from nightshift.registry.start import Start, find_misfits, read_start
from nightshift.tracking import spool
from nightshift.tracking.runs import tracking_uri
from tasks.sft import SftParams
from tasks.sft.backend import Backend, choose_backend, with_processes
from tasks.sft.failures import clear_failure, micro_batch_size, plan_next_attempt, read_attempt
from tasks.sft.inputs import require_rows_fit
from tasks.sft.job import Job
from tasks.sft.launch import launch, node_rank
from tasks.sft.machine import VISIBLE, probe_in_subprocess
from tasks.sft.memory import largest_batch
from tasks.sft.plan import compile_plan, without_steps
from tasks.sft.result import dvc_digest, is_finished, open_spool, publish, resolve_auto, resolve_intervals
from tasks.sft.rows import SCHEMA, Sizes, as_batches, iterate_row_groups, read_sizes, write_mapped

ENGINES = (*MODEL_ENGINES, "deepspeed", "schedulefree", "trl")
# Code that only displays, tracks or estimates. It does not affect the result, so an unfinished training
# run keeps its checkpoints when this code changes.
NO_EFFECT_ON_RESULT = (
    # Progress line and metrics of a step.
    "tasks/sft/callbacks.py",
    # Memory estimates. They choose the strategy if it is auto, and the key contains the chosen strategy.
    "tasks/sft/memory.py",
    "tasks/sft/shape.py",
    # Delivery to MLflow.
    "nightshift/tracking/spool.py",
    "nightshift/tracking/runs.py",
    # Progress bar in a terminal.
    "tasks/sft/terminal.py",
)
log = logging.getLogger(__name__)


def main() -> None:
    """Train, or resume the training run with the same key, and publish the result."""
    params = load_params(SftParams, "sft")
    sizes = read_sizes(PACKED)
    job = build_job(params, sizes)
    folder = job.folder
    if node := node_rank(params):
        # Multi-node run without ssh: this node only trains; the first one tracks, saves and publishes.
        if code := launch(job, folder / f"job-{node}.json"):
            raise StageError(f"sft: node {node}: the ranks exited with code {code}; see the output above")
        return
    is_trained = is_finished(folder)
    spool_file = open_spool(folder, is_trained)
    job = job.model_copy(update={"spool": spool_file})
    # Create the MLflow run of this training, and send what earlier ones could not.
    spool.limit_requests()
    spool.replay(state_dir() / "tracking", job.tracking_uri)
    if not is_trained:
        prepare_rows(job, sizes)
        clear_failure(folder)
        code = launch(job, folder / "job.json")
        if not is_finished(folder):
            raise plan_next_attempt(folder, params.per_device_train_batch_size, code)
    publish(job, spool_file, MODEL, MODEL.parent)
    plan = job.plan
    write_summary(
        "sft",
        rows_in=len(sizes.lengths),
        rows_out=len(sizes.lengths),
        steps=plan.steps,
        tokens=sum(plan.tokens),
        tokens_supervised=sum(plan.supervised_tokens),
    )


def build_job(params: SftParams, sizes: Sizes) -> Job:
    """Build the job of the ranks, with the changes from earlier attempts."""
    config, start = read_json(BASE / "config.json"), find_start(params)
    machine = probe_in_subprocess(params, config, max(map(max, sizes.lengths)), start.version)
    require_rows_fit(sizes, config, params, machine)
    requested, params = params, with_processes(params, len(machine.devices))
    plan = compile_plan(params, sizes.lengths, sizes.labelled)
    size, is_padded = params.per_device_train_batch_size, machine.leak is not None
    batch = largest_batch(plan.order, sizes.tokens, sizes.labelled, size, is_padded=is_padded)
    backend = choose_backend(params, machine, config, batch)
    folder = state_dir() / "checkpoints" / training_key(params, backend, start)
    attempt = read_attempt(folder)
    micro = micro_batch_size(params.per_device_train_batch_size, attempt.halvings)
    return Job(
        requested=requested,
        params=resolve_intervals(resolve_auto(params, backend), plan.steps),
        backend=backend,
        plan=without_steps(plan, attempt.skipped),
        visible=os.environ.get(VISIBLE, "all"),
        micro_batch_size=micro,
        accumulation_steps=params.gradient_accumulation_steps * (params.per_device_train_batch_size // micro),
        folder=folder,
        base=BASE,
        start=start,
        rows=folder / "rows.arrow",
        eval_rows=folder / "eval.arrow" if params.eval_steps else None,
        data_digest=dvc_digest(PACKED),
        tracking_uri=tracking_uri(),
    )


def find_start(params: SftParams) -> Start:
    """Return where training starts, and log it.

    Raises:
        ConfigError: The parameters do not fit the version from which training starts.
    """
    start = read_start() if params.start_from == "champion" else Start()
    if start.version is None:
        log.info("training starts from the base%s", f": {start.reason}" if start.reason else "")
    else:
        log.info("training starts from version %d, whose weights are trained further", start.version)
        if found := list(find_misfits(START_MODEL, start.version, params.model_dump())):
            raise config_error(found)
    return start


def training_key(params: SftParams, backend: Backend, start: Start) -> str:
    """Digest everything that decides the result: code, engines, data, base, start, parameters, backend."""
    code = code_digest("sft", ENGINES, NO_EFFECT_ON_RESULT)
    base = file_digest(BASE_RECORD)
    heldout = file_digest(VALIDATION) if params.eval_steps else ""
    rows = file_digest(PACKED)
    return text_digest(code, rows, heldout, base, start.digest or "", params.model_dump_json(), backend.key())


def prepare_rows(job: Job, sizes: Sizes) -> None:
    """Write what the ranks map into memory: the packed rows, and the validation set.

    Raises:
        DataError: There is no validation example, or one cannot be encoded.
    """
    write_mapped(job.rows, iterate_row_groups(PACKED))
    if job.eval_rows:
        max_length = max(sizes.tokens) if job.params.eval_packing else 0
        write_mapped(job.eval_rows, as_batches(eval_rows(max_length)))


def eval_rows(max_length: int) -> Iterator[dict[str, list[int]]]:
    """Encode the validation set: one example per row, or packed rows of up to `max_length` tokens.

    Raises:
        DataError: There is no example, or an example cannot be encoded.
    """
    encoder = load_encoder(BASE)
    examples = iterate_rows(VALIDATION, ["messages", "tools", "origin"])
    items = ((row["origin"], (row["messages"], row["tools"])) for row in examples)
    row: dict[str, list[int]] = {name: [] for name in SCHEMA.names}
    with open_memo(encoder) as memo:
        for origin, encoded in encode_stream(items, encoder, memo):
            if not isinstance(encoded, list):
                raise DataError(f"{VALIDATION}: {origin}: {encoded}")
            for one in encoded:
                if row["seq_lengths"] and len(row["input_ids"]) + len(one.input_ids) > max_length:
                    yield row
                    row = {name: [] for name in SCHEMA.names}
                row["input_ids"] += one.input_ids.tolist()
                row["labels"] += one.labels.tolist()
                row["seq_lengths"].append(len(one.input_ids))
    if not row["seq_lengths"]:
        raise DataError(f"{VALIDATION}: no examples to evaluate on; raise split.validation_share")
    yield row


if __name__ == "__main__":
    run_main(main)
