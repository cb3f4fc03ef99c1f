"""Training against a real MLflow server that is down, hangs, dies and comes back."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from mlflow import MlflowClient

from nightshift.core.files import read_json
from nightshift.core.ports import free_port
from nightshift.tracking import spool
from tests.helpers.sft import make_folder, only_run, run_sft, start_sft

PACKED = ((0, 1), (2, 3), (4, 5), (6, 7))
METRICS = {
    "loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "supervised_tokens_per_second",
    "supervised_tokens",
    "peak_memory_gib",
}


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return make_folder(tmp_path, tiny_base, PACKED)


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[psutil.Process]:
    """Start an MLflow server on loopback and always stop it with its child processes."""
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
    ]
    with (folder / "server.log").open("a") as log:
        started = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    process = psutil.Process(started.pid)
    try:
        deadline = time.monotonic() + 90
        while not is_healthy(port):
            assert time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.3)
        yield process
    finally:
        for one in family(process):
            with contextlib.suppress(psutil.Error):
                one.kill()
        started.wait()


def is_healthy(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200
    return False


def family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def test_a_server_that_starts_later_gets_everything_once(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    port = free_port()
    environment = {**clean_environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    done = run_sft(folder, environment, "state", eval_steps=1)
    assert done.returncode == 0, done.stdout
    # One each from the start of the stage, the rank and the end of the stage.
    assert done.stdout.count("tracking: MLflow did not receive") == 3
    (path,) = (folder / "state" / "tracking").glob("*.jsonl")
    kinds = [entry["kind"] for entry in spool.read_spool(path)[1:]]
    assert kinds == ["params", "dataset", *["metrics"] * 7, "end"]
    record = read_json(folder / "data/sft/mlflow_run.json")
    assert (record["run_id"], record["tracking_key"]) == (None, path.stem)

    with server(folder, port):
        again = run_sft(folder, environment, "state", eval_steps=1)
        assert again.returncode == 0, again.stdout
        assert "step 1/3" not in again.stdout
        client, run = only_run(f"http://127.0.0.1:{port}")
        assert run.info.status == "FINISHED"
        assert set(run.data.metrics) == METRICS | {"cpu_share/0"}
        for key in METRICS:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, key)]
            assert steps == [1, 2, 3], key
        assert run.data.params["sft.lora_r"] == "16"
        (dataset,) = run.inputs.dataset_inputs
        assert dataset.dataset.name == "train"
    record = read_json(folder / "data/sft/mlflow_run.json")
    assert record["run_id"] == run.info.run_id
    assert record["cpu_shares"] == [run.data.metrics["cpu_share/0"]]
    assert 0 < record["cpu_shares"][0] < 2
    assert not path.exists()


@pytest.mark.long
def test_a_hung_and_killed_server_delays_no_step_and_misses_none(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    port = free_port()
    environment = {**clean_environment, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    changes = {"num_train_epochs": 40}
    arrived: dict[int, float] = {}
    with server(folder, port) as process, start_sft(folder, environment, "state", **changes) as training:
        assert training.stdout
        output = []
        for line in training.stdout:
            output.append(line)
            if not (found := re.search(r"step (\d+)/40", line)):
                continue
            arrived[int(found[1])] = time.monotonic()
            if found[1] in ("5", "30"):
                signum = signal.SIGSTOP if found[1] == "5" else signal.SIGKILL
                for one in family(process):
                    os.kill(one.pid, signum)
        assert training.wait() == 0, "".join(output)
    gaps = [arrived[step] - arrived[step - 1] for step in range(2, 41)]
    # A step that waited for MLflow would have taken 5 s.
    assert max(gaps) < 4, gaps
    assert read_json(folder / "data/sft/mlflow_run.json")["run_id"]
    assert len(list((folder / "state" / "tracking").glob("*.jsonl"))) == 1

    with server(folder, port):
        done = run_sft(folder, environment, "state", **changes)
        assert done.returncode == 0, done.stdout
        client, run = only_run(f"http://127.0.0.1:{port}")
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert steps == list(range(1, 41))


def test_metrics_sent_twice_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    path = spool.begin(tmp_path / "tracking", "key", None)
    writer = spool.Spool(path, uri)
    writer.log("params", values={"sft.lora_r": "16"})
    writer.log("dataset", name="train", digest="d1", source="data/pack/train.parquet")
    for step, loss in ((1, 2.5), (2, float("nan")), (3, 0.1)):
        writer.log("metrics", values={"loss": loss}, step=step)
    writer.close()
    writer.thread.join()
    run_id = spool.find_run_id(path)
    spool.position_file(path).unlink()
    spool.replay(path.parent, uri)
    assert spool.find_run_id(path) == run_id
    client = MlflowClient(uri)
    assert [metric.step for metric in client.get_metric_history(str(run_id), "loss")] == [1, 2, 3]
    assert len(client.get_run(str(run_id)).inputs.dataset_inputs) == 1
