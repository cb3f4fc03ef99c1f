"""Random valid combinations of the section sft, trained for three steps each by the real stage.

`python -m tests.helpers.fuzz` reads {"base": folder, "folder": folder, "cases": [changes, ...]} from stdin,
and writes what each case did to outcomes.json in the folder. Every case is a fork of one process that has
loaded torch and the rest, and so are its ranks; otherwise the stage runs as it is.
"""

import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from nightshift.core.config import problems
from nightshift.core.errors import ConfigError
from nightshift.core.files import finite, read_json, tree_digest
from tasks.sft import SftParams
from tasks.sft.schedule import learning_rates
from tests.helpers.sft import make_folder, shipped_params

Changes = dict[str, Any]
# The first row has room for two validation examples.
ROWS = ((0, 1, 2, 3), (4, 5), (6, 7), (0, 2))
SECONDS = 150
# Three steps, whatever the batch size.
START: Changes = {
    "strategy": "single",
    "num_processes": "auto",
    "num_train_epochs": 9,
    "max_steps": 3,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "precision": "fp32",
    "attn_implementation": "sdpa_per_example",
    "save_steps": 3,
    "lora_r": 8,
}
ZERO3 = {"strategy": "zero3", "num_processes": 1}
STEP = {"lr_scheduler_type": "step", "lr_scheduler_kwargs": {"step_size": 1}}
STABLE = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}}
RESTARTS = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 1}}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1}
FREE = {"optim": "schedule_free_adamw"}
BEST = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1}
# Choices that change what is trained, observed or kept.
EFFECTIVE: dict[str, list[Changes]] = {
    "batch": [{"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 3}],
    "accumulation": [{"gradient_accumulation_steps": 2}],
    "max_steps": [{"max_steps": 2}],
    "learning_rate": [{"learning_rate": 0.002}],
    "schedule": [
        *({"lr_scheduler_type": name} for name in ("linear", "cosine", "one_cycle", "inverse_sqrt")),
        {"lr_scheduler_type": "exponential", "lr_scheduler_kwargs": {"gamma": 0.5}},
        *(STEP, STABLE, RESTARTS),
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_rate": 0.3}},
        {**PLATEAU, "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.9}},
    ],
    "warmup": [{"warmup_steps": 1}, {"warmup_steps": 2}, {"warmup_ratio": 0.3}],
    "optim": [{"optim": "adafactor"}, FREE, {"optim": "muon"}],
    "adam_beta1": [{"adam_beta1": 0.5}],
    "adam_beta2": [{"adam_beta2": 0.5}],
    "adam_epsilon": [{"adam_epsilon": 0.1}],
    "weight_decay": [{"weight_decay": 0.5}],
    "max_grad_norm": [{"max_grad_norm": 0.001}],
    "label_smoothing_factor": [{"label_smoothing_factor": 0.2}],
    "neftune_noise_alpha": [{"neftune_noise_alpha": 5.0}],
    "precision": [{"precision": "bf16"}],
    "adapter": [{"adapter": None}, {"adapter": "qlora"}],
    "unfrozen_parameters": [{"adapter": None, "unfrozen_parameters": [r"model\.layers\.1\."]}],
    "fp8_base": [{"precision": "bf16", "fp8_base": True}],
    "lora_r": [{"lora_r": 1}, {"lora_r": 16}],
    "lora_alpha": [{"lora_alpha": 8}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "lora_target_modules": [
        {"lora_target_modules": ["q_proj", "down_proj"]},
        {"lora_target_modules": r".*\.(k|v)_proj"},
    ],
    "lora_layers_to_transform": [{"lora_layers_to_transform": [1]}],
    "lora_target_parameters": [
        # No other choice has the module, whose adapter PEFT would refuse to wrap again.
        {"lora_target_parameters": ["gate_proj.weight"], "lora_target_modules": ["q_proj"]}
    ],
    "lora_modules_to_save": [
        {"lora_modules_to_save": ["norm"]},
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    "use_dora": [{"use_dora": True}],
    "use_rslora": [{"use_rslora": True}],
    "loraplus_lr_ratio": [{"loraplus_lr_ratio": 16}],
    "eval_steps": [{"eval_steps": 1}, {"eval_steps": 0.5}],
    "per_device_eval_batch_size": [{"eval_steps": 1, "per_device_eval_batch_size": 1}],
    "eval_packing": [{"eval_steps": 1, "eval_packing": True}],
    "save_steps": [{"save_steps": 1}, {"save_steps": 0.34}],
    "save_total_limit": [{"save_steps": 1, "save_total_limit": 1}],
    "logging_steps": [{"logging_steps": 2}],
    "seed": [{"seed": 1}],
}
# Choices that change how it runs, or that only wait for something to go wrong.
OTHER: dict[str, list[Changes]] = {
    "strategy": [
        *(
            {"strategy": name, "num_processes": 2}
            for name in ("ddp", "zero0", "zero1", "zero2", "fsdp2", "auto")
        ),
        *({"strategy": name, "num_processes": 1} for name in ("zero2", "auto", "fsdp2")),
        ZERO3,
        {"strategy": "zero3", "num_processes": 2},
    ],
    "offload": [
        {"strategy": "zero2", "num_processes": 2, "offload_optimizer": "cpu"},
        {**ZERO3, "offload_param": "cpu"},
    ],
    "attn_implementation": [{"attn_implementation": name} for name in ("auto", "sdpa", "eager")],
    "activation_checkpointing": [
        {"activation_checkpointing": True},
        {"activation_checkpointing": False},
        {"activation_checkpointing": True, "use_reentrant": True, "adapter": None},
    ],
    "use_liger_kernel": [{"use_liger_kernel": False}],
    "plateau": [PLATEAU],
    "best": [BEST, {**BEST, "early_stopping_patience": 1, "early_stopping_min_delta": 0.5}],
    "guards": [{"max_loss_ratio": 50.0}, {"loss_watchdog_threshold": 500.0}, {"step_timeout_seconds": 600}],
}
CHOICES = EFFECTIVE | OTHER


def make_pairs(count: int, seed: int) -> Iterator[tuple[str, Changes, Changes]]:
    """Yield the name of a choice, and two valid combinations that differ in it: without and with it."""
    chance = random.Random(seed)
    made = 0
    while made < count:
        names = chance.sample(sorted(CHOICES), chance.randint(2, 8))
        # Every choice is the difference of a pair in turn.
        name = sorted(EFFECTIVE)[made % len(EFFECTIVE)]
        picked = {one: chance.choice(CHOICES[one]) for one in names if one != name}
        changes = combine(picked)
        other = combine({**picked, name: chance.choice(CHOICES[name])})
        if changes != other and is_valid(changes) and is_valid(other):
            made += 1
            yield name, changes, other


def combine(picked: dict[str, Changes]) -> Changes:
    """Return the changes of all choices; a later one wins."""
    changes: Changes = dict(START)
    for one in picked.values():
        changes |= one
    return changes


def is_valid(changes: Changes) -> bool:
    """Return whether the section is valid with some changes, and its schedule fits into the steps."""
    values = shipped_params() | changes
    if problems(SftParams, "sft", values):
        return False
    try:
        learning_rates(changes["max_steps"], SftParams(**values))
    except ConfigError:
        return False
    return True


def main() -> None:
    """Run all cases of the request."""
    import deepspeed  # noqa: F401 - loaded once, before all forks
    import peft  # noqa: F401
    import torch

    import tasks.sft.probe
    import tasks.sft.worker  # noqa: F401

    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    # transformers loads weights in threads, in which torch's pool of threads does not survive a fork.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    # DeepSpeed compiles its operators once for all cases.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(request["folder"]) / "extensions")
    outcomes = []
    for number, changes in enumerate(request["cases"]):
        folder = Path(request["folder"]) / f"{number:03}"
        began = time.monotonic()
        code = fork(lambda folder=folder, changes=changes: run_case(Path(request["base"]), folder, changes))
        outcomes.append({**observe(folder, code), "seconds": round(time.monotonic() - began, 1)})
        (Path(request["folder"]) / "outcomes.json").write_text(json.dumps(outcomes))


def fork(run: Callable[[], None], seconds: int = SECONDS) -> int:
    """Run a function in a child process in a session of its own, and return its exit code."""
    return wait(start(run), time.monotonic() + seconds)


def start(run: Callable[[], None]) -> int:
    """Start a function in a child process, and return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        logging.exception("a case failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, deadline: float) -> int:
    """Wait for a child process; at the deadline, end it."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.02)


def run_case(base: Path, folder: Path, changes: Changes) -> None:
    """Run the stage in a new folder."""
    from nightshift.core.stage import run_main
    from tasks.sft import __main__ as stage

    make_folder(folder, base, ROWS)
    section = shipped_params() | changes
    (folder / "params.yaml").write_text(yaml.safe_dump({"sft": section, "registry": {"experiment": "fuzz"}}))
    with (folder / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    # Nothing listens there: the spool keeps what would be logged.
    os.environ |= {"NIGHTSHIFT_HOME": str(folder / "state"), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    sys.argv = ["tasks.sft"]
    stage.launch = launch  # type: ignore[assignment]
    stage.probe_in_subprocess = probe  # type: ignore[assignment]
    run_main(stage.main)


def probe(params: SftParams, config: Any, longest: int, start: int | None) -> Any:
    """Probe the machine in a fork; the kernels that it tries leave traces in torch."""
    import pickle

    from tasks.sft.machine import probe_machine

    def run() -> None:
        try:
            found: Any = probe_machine(params, config, longest, start)
        except ConfigError as err:
            found = err
        Path("machine").write_bytes(pickle.dumps(found))

    if code := fork(run):
        raise RuntimeError(f"the probe ended with code {code}")
    found = pickle.loads(Path("machine").read_bytes())
    if isinstance(found, ConfigError):
        raise found
    return found


def launch(job: Any, file: Path) -> int:
    """Fork the ranks of a job, as DeepSpeed's launcher starts them; a rank that fails ends all."""
    from nightshift.core.ports import free_port
    from tasks.sft.launch import rank_environment

    (file.parent / "output").mkdir(parents=True, exist_ok=True)
    job.write(file)
    os.environ |= rank_environment(job.backend.device, job.backend.devices)
    ranks = job.backend.num_processes
    world = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }

    def run(rank: int) -> None:
        from nightshift.core.stage import run_main
        from tasks.sft import worker

        if job.backend.strategy != "single":
            numbers = {**world, "RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {key: str(value) for key, value in numbers.items()}
        if rank == 0:
            watch(Path("events.txt").absolute())
        sys.argv = ["tasks.sft.worker", str(file)]
        run_main(worker.main, worker.declare)

    pids = [start(lambda rank=rank: run(rank)) for rank in range(ranks)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
        failed = next((code for code in codes.values() if code), 0)
        if failed or time.monotonic() > deadline:
            for one in set(pids) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, signal.SIGKILL)
                    os.waitpid(one, 0)
            return failed or 124
        time.sleep(0.02)
    return 0


def watch(events: Path) -> None:
    """Record the saves, the checkpoints that are kept and the batches of evaluations."""
    from tasks.sft import checkpoints
    from tasks.sft.trainer import Trainer

    rotate, batches = checkpoints.rotate, Trainer.eval_batches

    def note(text: str) -> None:
        with events.open("a") as file:
            file.write(f"{text}\n")

    def rotated(folder: Path, keep: int, best: int | None) -> None:
        rotate(folder, keep, best)
        note(f"checkpoints {sorted(path.name for path in folder.glob('checkpoint-*'))}")

    def noted(self: Any) -> Iterator[Any]:
        for batch in batches(self):
            note(f"evaluated {[len(row['input_ids']) for row in batch]}")
            yield batch

    checkpoints.rotate = rotated
    Trainer.eval_batches = noted  # type: ignore[method-assign]


def observe(folder: Path, code: int) -> dict[str, Any]:
    """Return what a case did: exit code, output, effective values, and what a choice may change."""
    sft, output = folder / "data" / "sft", folder / "output.txt"
    text = output.read_text(errors="replace") if output.is_file() else "no output"
    found: dict[str, Any] = {"code": code, "output": text[-4000:], "traceback": "Traceback" in text}
    if code == 0:
        events = folder / "events.txt"
        config = sft / "model" / "adapter_config.json"
        found |= {
            "effective": read_json(sft / "effective.json"),
            "seen": {
                "model": tree_digest(sft / "model"),
                "plan": read_json(sft / "plan.json"),
                "config": read_json(config) if config.is_file() else None,
                "metrics": read_metrics(folder),
                "events": events.read_text() if events.is_file() else "",
            },
        }
    return found


def read_metrics(folder: Path) -> list[Any]:
    """Return the logged metrics that do not measure time or memory, by step."""
    (spool,) = (folder / "state" / "tracking").glob("*.jsonl")
    entries = [json.loads(line) for line in spool.read_text().splitlines()[1:]]
    names = ("loss", "eval_loss", "learning_rate", "grad_norm")
    return [
        (entry["step"], {key: finite(entry["values"][key]) for key in names if key in entry["values"]})
        for entry in entries
        if entry["kind"] == "metrics"
    ]


if __name__ == "__main__":
    main()
