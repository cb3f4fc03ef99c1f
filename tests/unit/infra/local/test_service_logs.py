"""The logs of the services are read, and no error in them is missed."""

from pathlib import Path

import pytest

from infra.local.service_logs import EXPLAINED, unexplained
from tests.helpers.checkouts import ROOT

SCHEDULER = """12:00:00.000 | WARNING | prefect.server - slow
12:00:01.000 | ERROR   | prefect.server.services.scheduler - Unexpected error in: 'Scheduler'
Traceback (most recent call last):
  File "a.py", line 1, in run
    raise ValueError

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement
12:00:02.000 | INFO    | prefect.server - on
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", 0),
        ("12:00:00.000 | INFO    | x - an ERROR in a text\n", 0),
        ("12:00:00.000 | CRITICAL | x - down\n", 1),
        ("2026/11/26 15:21:30 ERROR mlflow.server: no\n", 1),
        ("2026/11/26 15:21:30 INFO:     Started server process [1]\n", 0),
        ("ERROR:    [Errno 98] address already in use\n", 1),
        ("Exception in thread T:\nTraceback (most recent call last):\n  File x\nOSError: no\n", 1),
        ("12:00:00.000 | ERROR   | asyncio - Exception in callback FlowRunCancellingObserver.x\n", 0),
    ],
)
def test_messages_above_warning_are_errors(text: str, found: int, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert len(unexplained(tmp_path / "log")) == found


def test_a_traceback_belongs_to_its_message(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(SCHEDULER)
    first, last = unexplained(tmp_path / "log")[0], unexplained(tmp_path / "log")[-1]
    assert first.startswith("12:00:01.000 | ERROR   | prefect.server.services.scheduler - Unexpected error")
    assert last.endswith("sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement")
    assert len(unexplained(tmp_path / "log")) == 1


def test_a_missing_log_has_no_errors(tmp_path: Path) -> None:
    assert unexplained(tmp_path / "log") == []


def test_all_ignored_errors_are_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert [known for known in EXPLAINED if known not in text] == []
