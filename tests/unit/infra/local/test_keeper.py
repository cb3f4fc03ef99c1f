"""The keeper tries again after an error, more and more rarely, until the stack is gone."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local import keeper, stack
from nightshift.core.errors import StageError
from nightshift.core.files import write_json


def test_a_service_that_never_starts_is_tried_more_and_more_rarely(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = in_tmp / ".nightshift" / "stack.json"
    write_json(records, {"mlflow": {"pid": 1, "boot_id": "b", "start_ticks": 1, "port": 5000}})
    monkeypatch.delenv("NIGHTSHIFT_HOME", raising=False)
    monkeypatch.setattr(sys, "argv", ["keeper"])
    outcomes = answer()
    monkeypatch.setattr(stack, "restart_lost", lambda: next(outcomes)())
    pauses: list[float] = []
    monkeypatch.setattr(keeper.time, "sleep", lambda seconds: pause(seconds, pauses, records))
    keeper.main()
    assert pauses == [2, 2, 4, 8, 16, 32, 60, 60, 2, 2]
    assert caplog.messages[0] == "the disk has 1 MiB left; next try in 2 s"


def answer() -> Iterator[object]:
    def fail() -> list[str]:
        raise StageError("the disk has 1 MiB left")

    yield from [list, fail, fail, fail, fail, fail, fail, lambda: ["mlflow"]]
    while True:
        yield list


def pause(seconds: float, pauses: list[float], records: Path) -> None:
    pauses.append(seconds)
    if len(pauses) == 10:
        records.unlink()
