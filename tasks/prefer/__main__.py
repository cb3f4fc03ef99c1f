"""Run the stage: nothing if it is off; otherwise compile the plan, launch the ranks, verify the result."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nightshift.core.code_digest import code_digest
from nightshift.core.config import load_params
from nightshift.core.errors import ConfigError, DataError
from nightshift.core.files import file_digest, read_json, text_digest, tree_digest, write_json
from nightshift.core.paths import BASE, BASE_RECORD, MODEL, PREFERENCES, TUNED, TUNING, TUNING_RECORD
from nightshift.core.stage import run_main, write_summary
from nightshift.core.state import state_dir
from nightshift.core.trained import OFF
from nightshift.data.drops import require_drop_rate
from nightshift.data.encode import load_encoder
from nightshift.tracking import spool
from nightshift.tracking.runs import tracking_uri
from tasks.prefer import PreferParams
from tasks.prefer.job import REFERENCE, RESULT, STRATEGIES, PreferJob, training_params
from tasks.prefer.rows import ANSWERS, Rows, read_comparisons, write_comparisons
from tasks.sft import SftParams
from tasks.sft.__main__ import ENGINES, NO_EFFECT_ON_RESULT
from tasks.sft.backend import Backend, choose_backend, with_processes
from tasks.sft.failures import clear_failure, micro_batch_size, plan_next_attempt, read_attempt
from tasks.sft.inputs import find_unknown_tokens
from tasks.sft.launch import launch
from tasks.sft.machine import VISIBLE, Machine, probe_in_subprocess
from tasks.sft.memory import largest_batch
from tasks.sft.plan import FILLER, Plan, compile_plan, without_steps
from tasks.sft.result import dvc_digest, is_finished, open_spool, publish, resolve_auto, resolve_intervals
from tasks.sft.rows import Sizes
from tasks.sft.strategy import is_target


def main() -> None:
    """Tune, or resume the run with the same key, and publish the result; or record that tuning is off."""
    params = load_params(PreferParams, "prefer")
    for folder in (TUNED, TUNING):
        shutil.rmtree(folder, ignore_errors=True)
    if params.method is None:
        write_json(TUNED / OFF, {"method": None})
        write_json(TUNING_RECORD, {"method": None})
        write_summary("prefer", rows_in=0, rows_out=0)
        return
    sides = read_sides(params)
    job = tune(build_job(params, load_params(SftParams, "sft"), sides), sides)
    record(job, sides)


def tune(job: PreferJob, sides: Mapping[str, Rows]) -> PreferJob:
    """Run the ranks of a job unless it has finished, and return it with its spool.

    Raises:
        StageError: The ranks did not finish.
    """
    is_trained = is_finished(job.folder)
    job = job.model_copy(update={"spool": open_spool(job.folder, is_trained)})
    spool.limit_requests()
    spool.replay(state_dir() / "tracking", job.tracking_uri)
    if not is_trained:
        write_comparisons(job.rows, sides["train"])
        if job.eval_rows:
            write_comparisons(job.eval_rows, sides["validation"])
        clear_failure(job.folder)
        code = launch(job, job.folder / "job.json")
        if not is_finished(job.folder):
            raise plan_next_attempt(job.folder, job.prefer.per_device_train_batch_size, code, job.stage)
    return job


def record(job: PreferJob, sides: Mapping[str, Rows]) -> None:
    """Publish the result of a job, with what it changed on the held-out pairs."""
    assert job.spool
    TUNING.mkdir(parents=True)
    held_out = read_json(job.folder / "output" / RESULT)
    publish(job, job.spool, TUNED, TUNING)
    (job.folder / REFERENCE).unlink(missing_ok=True)
    own = job.prefer.model_dump(include={"method", "beta", "loss_type"})
    rows = {"rows": len(sides["train"].rows), "held_out": held_out}
    write_json(TUNING_RECORD, {**own, "steps": job.plan.steps, **rows})
    drops = sides["train"].drops
    kept = drops.read.total() - drops.by_reason().total()
    write_summary(
        "prefer",
        rows_in=drops.read.total(),
        rows_out=kept,
        dropped=drops.by_reason(),
        dropped_by_source=drops.by_source(),
        trained_rows=len(sides["train"].rows),
        held_out_rows=len(sides["validation"].rows),
        steps=job.plan.steps,
        tokens=sum(job.plan.tokens),
        tokens_supervised=sum(job.plan.supervised_tokens),
    )


def read_sides(params: PreferParams) -> dict[str, Rows]:
    """Encode the pairs of the training and of the validation split.

    Raises:
        DataError: There is no pair to train on, or too many are left out.
    """
    encoder = load_encoder(BASE)
    method, longest = str(params.method), params.max_length
    sides = {
        name: read_comparisons(PREFERENCES, encoder, name, method, longest)
        for name in ("train", "validation")
    }
    drops = sides["train"].drops
    require_drop_rate(
        drops,
        params.max_drop_rate,
        (PREFERENCES, "prefer.max_drop_rate"),
        "raise prefer.max_length, or fix the rows",
        harmless=("unpaired",),
    )
    if not sides["train"].rows:
        what = "pair of a chosen and a rejected answer" if params.method == "dpo" else "answer"
        raise DataError(
            f"{PREFERENCES}: no {what} to train on ({drops.read.total()} "
            f"comparisons, left out: {dict(drops.by_reason())}); set `preference: compare` of a source in "
            "snapshot.sources, or prefer.method to null"
        )
    return sides


def build_job(prefer: PreferParams, sft: SftParams, sides: Mapping[str, Rows]) -> PreferJob:
    """Build the job of the ranks, with the changes from earlier attempts."""
    requested = training_params(sft, prefer)
    config = read_json(BASE / "config.json")
    lengths, labelled = sides["train"].lengths, sides["train"].labelled
    longest = max(max(both) for side in sides.values() for both in side.lengths)
    sizes = Sizes(lengths, labelled, max(token for side in sides.values() for token in largest_tokens(side)))
    machine = probe(requested, config, longest)
    require_supported(requested, machine, list(find_unknown_tokens(sizes, config)))
    params = with_processes(requested, len(machine.devices))
    plan = complete(compile_plan(params, lengths, labelled), sizes.tokens, labelled)
    # Both answers of a pair are in a batch, padded to the longest; KTO has the KL term's beside each answer.
    doubled = [2 * max(both) for both in lengths]
    size = params.per_device_train_batch_size
    batch = largest_batch(plan.order, doubled, labelled, size, is_padded=True)
    backend = replace(
        choose_backend(params, machine, config, batch),
        batches="padded",
        loss="logits",
        # TRL copies an adapter, which our fused function does not have.
        lora="peft" if params.adapter else None,
    )
    if backend.strategy not in STRATEGIES:
        raise ConfigError(
            f"params.yaml: prefer.method={prefer.method}: the model fits only with sft.strategy="
            f"{backend.strategy}, which is not supported; lower prefer.per_device_train_batch_size or "
            "prefer.max_length"
        )
    folder = state_dir() / "checkpoints" / tuning_key(prefer, params, backend)
    attempt = read_attempt(folder)
    micro = micro_batch_size(size, attempt.halvings)
    if prefer.method == "kto" and micro < 2:
        # KTO compares the answers of a forward pass.
        micro = next(n for n in range(2, size + 1) if size % n == 0)
    has_eval = bool(sides["validation"].rows)
    return PreferJob(
        requested=requested,
        params=resolve_intervals(resolve_auto(params, backend), plan.steps),
        prefer=prefer,
        backend=backend,
        plan=without_steps(plan, attempt.skipped),
        visible=os.environ.get(VISIBLE, "all"),
        micro_batch_size=micro,
        accumulation_steps=params.gradient_accumulation_steps * (size // micro),
        folder=folder,
        base=BASE,
        model=MODEL,
        rows=folder / "rows.arrow",
        eval_rows=folder / "eval.arrow" if has_eval else None,
        data_digest=dvc_digest(PREFERENCES),
        tracking_uri=tracking_uri(),
    )


def probe(params: SftParams, config: dict[str, Any], longest: int) -> Machine:
    """Probe this machine for a kernel that reads padded rows: the requested one, else sdpa, else eager."""
    if params.attn_implementation != "auto":
        return probe_in_subprocess(params, config, longest)
    try:
        return probe_in_subprocess(params.model_copy(update={"attn_implementation": "sdpa"}), config, longest)
    except ConfigError:
        return probe_in_subprocess(
            params.model_copy(update={"attn_implementation": "eager"}), config, longest
        )


def require_supported(params: SftParams, machine: Machine, faults: Sequence[str]) -> None:
    """Check what only the model says; report all problems at once.

    Raises:
        ConfigError: A token has no embedding, or the head gets an adapter, which TRL's loss would not train.
    """
    found = list(faults)
    if params.adapter and is_target(params, machine.head):
        found.append(f"sft.lora_target_modules: an adapter on {machine.head} would not train; leave it out")
    if found:
        raise ConfigError("\n  ".join(["params.yaml: preference tuning does not fit the base:", *found]))


def largest_tokens(side: Rows) -> list[int]:
    """Return the highest token of each row."""
    names = ("prompt_ids", *ANSWERS[side.method])
    return [max(max(row[name], default=0) for name in names) for row in side.rows]


def complete(plan: Plan, tokens: Sequence[int], supervised: Sequence[int]) -> Plan:
    """Return the plan with the first rows again instead of fillers in the last step.

    The loss is a mean over rows, in which a filler would count.

    Example:
        >>> plan = Plan(2, 2, 1, [4, 7, 1, -1], tokens=[9, 3], supervised_tokens=[3, 1], learning_rate=[1, 1])
        >>> full = complete(plan, [0, 3, 0, 0, 5, 0, 0, 4], [0, 1, 0, 0, 2, 0, 0, 1])
        >>> full.order, full.tokens, full.supervised_tokens, full.fillers
        ([4, 7, 1, 4], [9, 8], [3, 3], 0)
    """
    real = [row for row in plan.order if row != FILLER]
    missing = iter(real[i % len(real)] for i in range(plan.fillers))
    order = [next(missing) if row == FILLER else row for row in plan.order]
    size = plan.rows_per_step
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    return replace(
        plan,
        order=order,
        fillers=0,
        tokens=[sum(tokens[row] for row in rows) for rows in steps],
        supervised_tokens=[sum(supervised[row] for row in rows) for rows in steps],
    )


def tuning_key(prefer: PreferParams, params: SftParams, backend: Backend) -> str:
    """Digest everything that decides the result; see `tasks.sft.__main__.training_key`."""
    code = code_digest("prefer", ENGINES, NO_EFFECT_ON_RESULT)
    inputs = (file_digest(PREFERENCES), file_digest(BASE_RECORD), tree_digest(MODEL))
    return text_digest(code, *inputs, prefer.model_dump_json(), params.model_dump_json(), backend.key())


if __name__ == "__main__":
    run_main(main)
