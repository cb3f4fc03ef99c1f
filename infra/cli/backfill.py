"""Run past nights in date order, each with the data that its sources had by then."""

import asyncio
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

import yaml
from rich.console import Console
from rich.markup import escape

from infra.cli import watch
from nightshift.core.errors import ConfigError, StageError

if TYPE_CHECKING:
    from infra.local.settings import Stack

DEPLOYMENT = "finetune/prod"
NIGHTLY = "nightly"
UNTIL = "snapshot.until"


def nights(first: date, last: date, path: Path = Path("prefect.yaml")) -> list[datetime]:
    """Return the nights of the schedule `nightly` from one day to another, as Prefect plans them.

    Raises:
        ConfigError: The days are in the wrong order, or no active schedule has a night then.
    """
    from prefect.server.schemas.schedules import CronSchedule

    declared = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
    found = [one for one in declared if one["name"] == NIGHTLY for one in one.get("schedules", ())]
    if not found or "cron" not in found[0]:
        raise ConfigError(f"{path}: the deployment {NIGHTLY} has no cron schedule; add one")
    schedule = CronSchedule(cron=found[0]["cron"], timezone=found[0].get("timezone"))
    zone = ZoneInfo(schedule.timezone or "UTC")
    start, end = (datetime.combine(day, time(), zone) for day in (first, last + timedelta(days=1)))
    days = asyncio.run(schedule.get_dates(1000, start, end))
    if not (planned := [datetime.fromtimestamp(day.timestamp(), zone) for day in days if start <= day < end]):
        raise ConfigError(f"no night of {path} is between {first} and {last}; give --from before --to")
    return planned


def backfill(first: date, last: date, stack: "Stack", console: Console) -> None:
    """Run the nights from one day to another, one after the other, and print how each ended.

    Raises:
        ConfigError: There are none, or the last one is in the future.
        StageError: A night failed; the later ones did not run.
    """
    planned = nights(first, last)
    if planned[-1] > datetime.now(planned[-1].tzinfo):
        raise ConfigError(f"--to {last}: the night of {planned[-1]:%Y-%m-%d %H:%M} has not come yet")
    for night in planned:
        try:
            ending = watch.run_deployment(DEPLOYMENT, {UNTIL: night.isoformat()}, stack, console)
        except StageError as err:
            raise StageError(
                f"the night of {night:%Y-%m-%d}: {err}; to continue, run "
                f"`nightshift backfill --from {night:%Y-%m-%d} --to {last}`"
            ) from err
        console.print(f"{night:%Y-%m-%d}: {escape(ending)}", highlight=False, soft_wrap=True)
