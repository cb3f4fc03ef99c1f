"""Training through the real launcher: killed at any level, it leaves no process and resumes exactly."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nightshift.core.files import file_digest, read_json, tree_digest
from nightshift.core.hardware import cpu_flags
from tasks.sft import native
from tests.helpers.checkouts import BIN, make_checkout
from tests.helpers.processes import command_line
from tests.helpers.sft import only_run

MODEL = Path("data/sft/model")


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Path:
    """Create a checkout with packed data and without a trained model."""
    folder = make_checkout(tmp_path_factory.mktemp("training") / "checkout", tiny_base)
    subprocess.run([str(BIN / "dvc"), "repro", "pack", "-q"], cwd=folder, env=clean_environment, check=True)
    return folder


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, clean_environment: dict[str, str]) -> str:
    """Return the adapter digest of an uninterrupted training run."""
    train(prepared, clean_environment, "undisturbed")
    return tree_digest(prepared / MODEL)


def environment(base: dict[str, str], state: Path) -> dict[str, str]:
    """Return an environment with its own state, so that training finds no other test's checkpoint."""
    return {**base, "NIGHTSHIFT_HOME": str(state)}


def train(folder: Path, base: dict[str, str], name: str) -> str:
    """Train as a user would and return the output."""
    state = folder.parent / name
    command = [str(BIN / "dvc"), "repro", "--single-item", "--force", "sft"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(base, state),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def training(
    folder: Path, base: dict[str, str], name: str
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Start a training run, wait until it has written a checkpoint, and always clean up.

    One rank is then suspended. The others cannot step without it, so training cannot end undisturbed.

    Yields:
        The `dvc` process and the suspended rank; see `release`.
    """
    process = subprocess.Popen(
        [str(BIN / "dvc"), "repro", "--single-item", "--force", "sft"],
        cwd=folder,
        env=environment(base, folder.parent / name),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    tree = psutil.Process(process.pid)
    try:
        for line in process.stdout:
            if re.search(r"step 3/6", line):
                break
        else:
            pytest.fail("the training ended before step 3")
        held = victim(tree.children(recursive=True), "tasks.sft.worker")
        held.suspend()
        yield process, held
    finally:
        with contextlib.suppress(psutil.Error):
            for member in [*tree.children(recursive=True), tree]:
                with contextlib.suppress(psutil.Error):
                    member.kill()
        process.stdout.close()
        process.wait()


def members(root: int) -> list[psutil.Process]:
    return psutil.Process(root).children(recursive=True)


def victim(processes: list[psutil.Process], word: str) -> psutil.Process:
    """Return the deepest process whose command line contains the word."""
    return next(p for p in reversed(processes) if word in " ".join(command_line(p)))


def release(held: psutil.Process) -> None:
    """Resume a suspended rank once it is gone or has received SIGTERM."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        while held.status() != "zombie":
            status = Path(f"/proc/{held.pid}/status").read_text()
            pending = int(re.findall(r"^ShdPnd:\s*(\w+)", status, re.MULTILINE)[0], 16)
            if pending >> (signal.SIGTERM - 1) & 1:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        held.resume()


def require_gone(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 30
    while alive := [p for p in processes if command_line(p)]:
        assert time.monotonic() < deadline, [" ".join(command_line(p)) for p in alive]
        time.sleep(0.2)


@pytest.mark.parametrize(
    "word",
    [
        pytest.param("tasks.sft.worker", marks=pytest.mark.long),
        "deepspeed.launcher.launch",
    ],
)
def test_kill_9_leaves_no_process_and_no_finished_stage_and_training_resumes_exactly(
    prepared: Path, undisturbed: str, clean_environment: dict[str, str], word: str
) -> None:
    name = f"killed-{word.replace('/', '-')}"
    before = (prepared / "dvc.lock").read_bytes()
    with training(prepared, clean_environment, name) as (process, held):
        processes = members(process.pid)
        assert len(processes) >= 6
        os.kill(victim(processes, word).pid, signal.SIGKILL)
        release(held)
        output = process.stdout.read() if process.stdout else ""
        assert process.wait(timeout=60) != 0, output
        require_gone(processes)
    # If the ranks could still save their step, the message is theirs.
    assert re.search(r"error: sft: (the ranks exited with code|received SIGTERM; saved at step)", output)
    assert (prepared / "dvc.lock").read_bytes() == before
    assert not (prepared / MODEL).exists()
    assert "resuming from checkpoint-" in train(prepared, clean_environment, name)
    assert tree_digest(prepared / MODEL) == undisturbed
    # Step 3 or 4 was trained twice but logged once, in the MLflow run of the first attempt.
    client, run = only_run(f"sqlite:///{prepared.parent / name / 'mlflow.db'}")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_kill_9_of_the_stage_leaves_no_process_and_training_resumes_exactly(
    prepared: Path, undisturbed: str, clean_environment: dict[str, str]
) -> None:
    with training(prepared, clean_environment, "killed-stage") as (process, held):
        processes = members(process.pid)
        stage = next(p for p in processes if command_line(p)[-2:] == ["-m", "tasks.sft"])
        stage.kill()
        release(held)
        require_gone(processes)
    assert "resuming from checkpoint-" in train(prepared, clean_environment, "killed-stage")
    assert tree_digest(prepared / MODEL) == undisturbed


def test_plan_selftest_and_effective_values_are_written(prepared: Path, undisturbed: str) -> None:
    assert undisturbed
    plan = read_json(prepared / "data/sft/plan.json")
    summary = read_json(prepared / "data/sft/summary.json")
    assert plan["steps"] == summary["steps"] == len(plan["learning_rate"]) == 6
    assert summary["tokens"] == sum(plan["tokens"])
    proof = read_json(prepared / "data/sft/selftest.json")
    assert proof["isolation"]["moved"] == 0.0
    assert proof["isolation"]["proven"]
    assert proof["gradients"]["weights_reached"] > 0
    effective = read_json(prepared / "data/sft/effective.json")
    assert effective["strategy"] == {"requested": "zero2", "effective": "zero2"}
    kernel = "avx512_per_example" if native.NEEDS in cpu_flags() else "sdpa_per_example"
    assert effective["attn_implementation"] == {"requested": "auto", "effective": kernel}
    assert file_digest(prepared / MODEL / "adapter_model.safetensors")


def test_metrics_parameters_and_data_are_logged_once_by_one_rank(prepared: Path, undisturbed: str) -> None:
    import yaml

    assert undisturbed
    client, run = only_run(f"sqlite:///{prepared.parent / 'undisturbed' / 'mlflow.db'}")
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run.data.params["sft.lora_r"] == "16"
    (dataset,) = run.inputs.dataset_inputs
    lock = yaml.safe_load((prepared / "dvc.lock").read_text())
    digests = {out["path"]: out["md5"] for out in lock["stages"]["pack"]["outs"]}
    assert dataset.dataset.digest == digests["data/pack/train.parquet"]
