"""A pipe gets the lines unchanged; a terminal gets a progress bar with the last step's metrics."""

import io
import sys

import pytest

from tasks.sft.terminal import line_printer

LINES = (
    "12:00:00 __main__ starting with [bold] step 1",
    "12:00:01 tasks.sft.callbacks step 1/4 loss 10.8 lr 1.00e-02 278 tok/s",
    "12:00:01 tasks.sft.callbacks step 1/4 eval_loss 10.9",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stdout: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with line_printer() as show:
        for line in LINES:
            show(line)
    return stdout.getvalue()


def test_a_pipe_gets_every_line_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(io.StringIO(), monkeypatch) == "".join(f"{line}\n" for line in LINES)


def test_a_terminal_gets_a_progress_bar_with_metrics_and_all_other_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = shown(Terminal(), monkeypatch)
    assert "starting with [bold] step 1\n" in output
    assert "25%" in output
    assert "loss 10.8 lr 1.00e-02 278 tok/s" in output
    assert "step 1/4 eval_loss 10.9\n" in output
    assert "tasks.sft.callbacks" not in output
