"""Past nights run one after the other, in date order."""

import io
from datetime import date
from typing import Any

import pytest
from rich.console import Console

from infra.cli import backfill, watch
from nightshift.core.errors import ConfigError, StageError
from tests.helpers.checkouts import ROOT

FIRST, LAST = date(2026, 10, 24), date(2026, 10, 26)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return the overrides of the runs that are started; the one of October 26 fails."""
    monkeypatch.chdir(ROOT)
    started: list[dict[str, Any]] = []

    def run(_deployment: str, overrides: dict[str, Any], *_: Any) -> str:
        started.append(overrides)
        if overrides["snapshot.until"].startswith("2026-10-26"):
            raise StageError("finetune/prod: run Failed")
        return "Held: no gain"

    monkeypatch.setattr(watch, "run_deployment", run)
    return started


def test_nights_run_in_order_each_with_what_had_arrived(ran: list[dict[str, Any]]) -> None:
    out = io.StringIO()
    backfill.backfill(FIRST, date(2026, 10, 25), None, Console(file=out))  # type: ignore[arg-type]
    # The second night is that of the end of summer time.
    assert ran == [
        {"snapshot.until": "2026-10-24T02:00:00+02:00"},
        {"snapshot.until": "2026-10-25T02:00:00+02:00"},
    ]
    assert out.getvalue().splitlines() == ["2026-10-24: Held: no gain", "2026-10-25: Held: no gain"]


@pytest.mark.usefixtures("ran")
def test_a_failed_night_ends_the_backfill_and_says_how_to_continue() -> None:
    message = (
        "the night of 2026-10-26: .*run Failed; .*`nightshift backfill --from 2026-10-26 --to 2026-10-26`"
    )
    with pytest.raises(StageError, match=message):
        backfill.backfill(FIRST, LAST, None, Console(file=io.StringIO()))  # type: ignore[arg-type]


@pytest.mark.usefixtures("ran")
def test_future_nights_cannot_be_backfilled() -> None:
    with pytest.raises(ConfigError, match=r"--to 2126-01-02: the night of .* has not come yet"):
        backfill.backfill(date(2126, 1, 1), date(2126, 1, 2), None, Console())  # type: ignore[arg-type]
