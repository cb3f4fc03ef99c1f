"""Logged data is on disk first, is sent in order and arrives once, whichever process is killed."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from nightshift.tracking import spool


class Tracker:
    """A fake MLflow that records what is logged; metrics of equal key, step, time and value are one."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, int]] = []
        self.known: set[tuple[str, int, int, float]] = set()
        self.params: dict[str, str] = {}
        self.datasets: list[str] = []
        self.runs: dict[str, str] = {}
        self.ended: list[str] = []
        self.failure: BaseException | None = None
        self.requests = 0

    def answer(self) -> None:
        self.requests += 1
        if self.failure:
            raise self.failure

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self.answer()
        for metric in metrics:
            identity = (metric.key, metric.step, metric.timestamp, metric.value)
            if identity not in self.known:
                self.known.add(identity)
                self.logged.append((metric.key, metric.step))
        self.params |= {param.key: param.value for param in params}

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        self.answer()
        self.datasets += [one.dataset.digest for one in datasets]

    def get_experiment_by_name(self, name: str) -> Any:
        self.answer()
        return SimpleNamespace(experiment_id="1")

    def search_runs(self, experiments: list[str], query: str) -> list[Any]:
        found = [run for key, run in self.runs.items() if f"'{key}'" in query]
        return [SimpleNamespace(info=SimpleNamespace(run_id=run)) for run in found]

    def create_run(self, experiment: str, tags: dict[str, str], **_: Any) -> Any:
        (key,) = tags.values()
        self.runs[key] = f"run-{len(self.runs) + 1}"
        return SimpleNamespace(info=SimpleNamespace(run_id=self.runs[key]))

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self.answer()
        self.ended.append(f"{run_id} {status}")


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Tracker:
    tracker = Tracker()
    monkeypatch.setattr(spool, "connect", lambda _uri: tracker)
    monkeypatch.setattr(spool, "SEND_SECONDS", 0.0)
    monkeypatch.setattr(spool, "RETRY_SECONDS", 0.05)
    return tracker


def log_steps(path: Path, *steps: int) -> None:
    """Log the losses of some steps, as one attempt of a training run does."""
    writer = spool.Spool(path, "")
    for step in steps:
        writer.log("metrics", values={"loss": 1 / step}, step=step)
    writer.close()
    writer.thread.join()


def down() -> MlflowException:
    return MlflowException("API request failed: connection refused")


def losses(*steps: int) -> list[tuple[str, int]]:
    return [("loss", step) for step in steps]


def test_everything_arrives_in_order_and_the_spool_of_an_ended_run_is_removed(
    tmp_path: Path, tracker: Tracker
) -> None:
    path = spool.begin(tmp_path, "key", "abc")
    writer = spool.Spool(path, "")
    writer.log("params", values={"sft.lora_r": "16"})
    writer.log("dataset", name="train", digest="d1", source="data/pack/train.parquet")
    for step in (1, 2, 3):
        writer.log("metrics", values={"loss": 1.0, "grad_norm": 2.0}, step=step)
    writer.close()
    assert tracker.params == {"sft.lora_r": "16"}
    assert tracker.datasets == ["d1"]
    assert sorted(tracker.logged) == [("grad_norm", 1), ("grad_norm", 2), ("grad_norm", 3), *losses(1, 2, 3)]
    assert [step for key, step in tracker.logged if key == "loss"] == [1, 2, 3]
    spool.finish(path)
    spool.replay(tmp_path, "")
    assert not path.exists()
    assert spool.find_run_id(path) == "abc"
    assert tracker.ended == []  # left to the run's owner


def test_logging_does_not_wait_for_a_hung_server(
    tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "log_batch", lambda *_, **__: time.sleep(60))
    monkeypatch.setattr(spool, "FLUSH_SECONDS", 0.2)
    path = spool.begin(tmp_path, "key", "abc")
    writer = spool.Spool(path, "")
    before = time.monotonic()
    for step in range(1, 101):
        writer.log("metrics", values={"loss": 1.0}, step=step)
    assert time.monotonic() - before < 2
    writer.close()
    assert time.monotonic() - before < 4
    assert [entry["step"] for entry in spool.read_spool(path)[1:]] == list(range(1, 101))


def test_an_outage_is_reported_once_and_everything_arrives_afterwards(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = spool.begin(tmp_path, "key", "abc")
    tracker.failure = down()
    writer = spool.Spool(path, "")
    for step in (1, 2, 3):
        writer.log("metrics", values={"loss": 1.0}, step=step)
        time.sleep(0.1)
    assert tracker.requests >= 2
    tracker.failure = None
    writer.log("metrics", values={"loss": 1.0}, step=4)
    time.sleep(0.3)
    writer.close()
    assert tracker.logged == losses(1, 2, 3, 4)
    warning, info = caplog.records
    assert (warning.levelname, info.levelname) == ("WARNING", "INFO")
    assert str(path) in warning.message
    assert "connection refused" in warning.message


def test_a_kill_before_the_position_is_stored_duplicates_nothing(
    tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spool.begin(tmp_path, "key", "abc")
    spool.append(path, {"kind": "metrics", "values": {"loss": 1.0}, "step": 1, "time": 7})
    spool.send(path, tracker)
    spool.append(path, {"kind": "metrics", "values": {"loss": 2.0}, "step": 2, "time": 8})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(spool, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            spool.send(path, tracker)
    before = tracker.requests
    log_steps(path, 2, 3)
    assert tracker.logged == losses(1, 2, 3)
    assert tracker.requests > before


def test_steps_repeated_after_a_resume_are_logged_once(tmp_path: Path, tracker: Tracker) -> None:
    path = spool.begin(tmp_path, "key", None)
    log_steps(path, 1, 2, 3)
    assert spool.begin(tmp_path, "key", None, before=path) == path
    log_steps(path, 2, 3, 4)
    assert tracker.logged == losses(1, 2, 3, 4)
    assert list(tracker.runs.values()) == ["run-1"]


@pytest.mark.parametrize("kept", [10, 60])
def test_a_partial_line_is_repaired(tmp_path: Path, tracker: Tracker, kept: int) -> None:
    path = spool.begin(tmp_path, "key", "abc")
    log_steps(path, 1)
    whole = path.read_bytes()
    torn = json.dumps({"kind": "metrics", "step": 2, "time": 5, "values": {"loss": 0.5}})[:kept]
    path.write_bytes(whole + torn.encode())
    assert [entry.get("step") for entry in spool.read_spool(path)] == [None, 1]
    spool.send(path, tracker)
    assert tracker.logged == losses(1)
    log_steps(path, 2, 3)
    assert tracker.logged == losses(1, 2, 3)
    assert [entry["step"] for entry in spool.read_spool(path)[1:]] == [1, 2, 3]


def test_a_run_that_could_not_be_created_is_created_once_by_the_replay(
    tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.failure = down()
    path = spool.begin(tmp_path, "key", None)
    log_steps(path, 1, 2)
    assert spool.find_run_id(path) is None
    spool.finish(path)
    spool.replay(tmp_path, "")
    assert path.exists()
    tracker.failure = None
    spool.position_file(path).unlink(missing_ok=True)  # as after a kill just after creation
    tracker.runs[path.stem] = "run-of-the-first-attempt"
    spool.replay(tmp_path, "")
    assert spool.find_run_id(path) == "run-of-the-first-attempt"
    assert tracker.logged == losses(1, 2)
    assert tracker.ended == ["run-of-the-first-attempt FINISHED"]
    assert not path.exists()


def test_a_training_resumed_in_another_run_has_complete_curves(tmp_path: Path, tracker: Tracker) -> None:
    first = spool.begin(tmp_path, "key", None)
    log_steps(first, 1, 2)
    second = spool.begin(tmp_path, "key", "night-2", before=first)
    assert second.name == "key-night-2.jsonl"
    tracker.logged.clear()
    tracker.known.clear()
    log_steps(second, 2, 3)
    assert tracker.logged == losses(1, 2, 3)
    spool.replay(tmp_path, "")
    assert tracker.logged == losses(1, 2, 3)
    assert tracker.ended == ["run-1 FAILED"]
    assert not first.exists()


def test_rejected_entries_are_skipped_and_an_unknown_run_does_not_block_others(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    path = spool.begin(tmp_path, "a", "deleted")
    spool.append(path, {"kind": "metrics", "values": {"loss": 1.0}, "step": 1, "time": 7})
    tracker.failure = MlflowException("run is deleted", INVALID_PARAMETER_VALUE)
    spool.replay(tmp_path, "")
    assert "rejected" in caplog.text
    assert "run is deleted" in caplog.text
    requests = tracker.requests
    spool.replay(tmp_path, "")
    assert tracker.requests == requests

    spool.append(path, {"kind": "metrics", "values": {"loss": 1.0}, "step": 2, "time": 8})
    other = spool.begin(tmp_path, "b", "elsewhere")
    spool.append(other, {"kind": "metrics", "values": {"loss": 1.0}, "step": 3, "time": 9})
    tracker.failure = MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)
    spool.replay(tmp_path, "")
    assert tracker.requests == requests + 2
    tracker.failure = down()
    spool.replay(tmp_path, "")
    assert tracker.requests == requests + 3
    tracker.failure = None
    spool.replay(tmp_path, "")
    assert tracker.logged == losses(2, 3)


def test_a_full_disk_does_not_stop_the_training(
    tmp_path: Path, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    path = spool.begin(tmp_path, "key", "abc")
    writer = spool.Spool(path, "")
    path.rename(tmp_path / "elsewhere")
    writer.log("metrics", values={"loss": 1.0}, step=1)
    writer.log("metrics", values={"loss": 1.0}, step=2)
    writer.close()
    assert [record.message for record in caplog.records if "cannot write" in record.message] == [
        f"tracking: cannot write: [Errno 2] No such file or directory: '{path}'; "
        "free disk space, or values are missing in MLflow"
    ]
