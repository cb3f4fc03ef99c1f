"""Which nights run, by a driven clock: over both changes of the clock, and after a month of outage."""

import itertools
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Completed, Pending
from prefect.testing.utilities import prefect_test_harness

from flows.janitor import STUCK, find_stuck, janitor
from flows.nights import find_newer_night
from infra.cli.backfill import nights
from infra.local import runs
from nightshift.core.errors import ConfigError
from nightshift.pipeline.leases import lease
from nightshift.pipeline.outcome import MISSED
from tests.helpers.checkouts import ROOT

BERLIN = ZoneInfo("Europe/Berlin")
SCHEDULED = ROOT / "prefect.yaml"


@pytest.fixture(scope="module")
def client() -> Iterator[SyncPrefectClient]:
    with prefect_test_harness(), get_client(sync_client=True) as client:
        yield client


class Server:
    """Prefect's API, called as `infra.local` does."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.client._client.request(method, path, json=body)
        return answer.json() if answer.content else None


@flow
def nightly() -> None:
    """Stand in for the retraining."""


@pytest.fixture
def deployment(client: SyncPrefectClient) -> uuid.UUID:
    """Create a deployment with the schedule of prefect.yaml; plan nothing yet."""
    (declared,) = [
        one for one in yaml.safe_load(SCHEDULED.read_text())["deployments"] if one["name"] == "nightly"
    ]
    (schedule,) = declared["schedules"]
    server = Server(client)
    if not server.prefect("POST", "/work_pools/filter", {"work_pools": {"name": {"any_": [runs.POOL]}}}):
        server.prefect("POST", "/work_pools/", {"name": runs.POOL, "type": "process"})
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    return client.create_deployment(
        client.create_flow(nightly),
        f"nightly-{uuid.uuid4()}",
        schedules=[DeploymentScheduleCreate(schedule=cron)],
        work_pool_name=runs.POOL,
    )


def plan(client: SyncPrefectClient, deployment: uuid.UUID, start: datetime, end: datetime) -> list[FlowRun]:
    """Let Prefect plan the nights of a period, as its scheduler does; return them in order."""
    span = {"start_time": start.isoformat(), "end_time": end.isoformat()}
    most = {"min_time": (end - start).total_seconds(), "min_runs": 1, "max_runs": 100}
    Server(client).prefect("POST", f"/deployments/{deployment}/schedule", span | most)
    return planned(client, deployment)


def planned(client: SyncPrefectClient, deployment: uuid.UUID) -> list[FlowRun]:
    body = {"deployments": {"id": {"any_": [str(deployment)]}}, "sort": "EXPECTED_START_TIME_ASC"}
    found = Server(client).prefect("POST", "/flow_runs/filter", body)
    return [FlowRun.model_validate(one) for one in found]


# 30 days around each change of the clock.
@pytest.mark.parametrize(("first", "hours"), [(date(2027, 3, 14), 23), (date(2026, 10, 11), 25)])
def test_every_night_is_planned_once_over_a_change_of_the_clock(first: date, hours: int) -> None:
    found = nights(first, first + timedelta(days=29), SCHEDULED)
    assert [night.astimezone(BERLIN).date() for night in found] == [
        first + timedelta(days=day) for day in range(30)
    ]
    between = Counter(
        (later.timestamp() - night.timestamp()) / 3600 for night, later in itertools.pairwise(found)
    )
    assert sum(between.values()) == 29
    assert between[24] >= 27
    # In spring there is no two o'clock: that night starts an hour early, and the next one as usual.
    assert between.keys() <= {23, 24, 25}
    assert hours in between
    others = [night for night in found if night.astimezone(BERLIN).hour != 2]
    assert [f"{night.astimezone(BERLIN):%Y-%m-%d %H:%M}" for night in others] == (
        ["2027-03-28 01:00"] if hours == 23 else []
    )


@pytest.mark.parametrize("first", [datetime(2027, 3, 1, tzinfo=BERLIN), datetime(2026, 10, 1, tzinfo=BERLIN)])
def test_each_of_sixty_nights_runs_once_or_is_missed_with_a_reason(
    first: datetime, client: SyncPrefectClient, deployment: uuid.UUID
) -> None:
    found = plan(client, deployment, first, first + timedelta(days=60))
    assert len(found) == 60
    starts = [run.expected_start_time for run in found]
    # Nights 10 to 14 and 27 wait for a long training; all others start on time.
    delays = {10: 4, 11: 3, 12: 2, 13: 1, 27: 1}
    ran, missed = [], []
    for number, run in enumerate(found):
        assert starts[number]
        now = starts[number + delays.get(number, 0)] + timedelta(minutes=1)
        reason = find_newer_night(run, now)
        (missed if reason else ran).append(number)
        if reason:
            assert f"the night of {starts[number].astimezone():%Y-%m-%d %H:%M} could not start" in reason
    assert missed == sorted(delays)
    assert len(ran) + len(missed) == 60


def test_after_a_month_of_outage_there_is_one_catch_up_run_and_a_reason_for_every_other_night(
    client: SyncPrefectClient, deployment: uuid.UUID
) -> None:
    now = datetime.now(UTC)
    (last, *_) = plan(client, deployment, now - timedelta(days=31), now - timedelta(days=30))
    client.set_flow_run_state(last.id, Completed(), force=True)
    for _ in range(2):  # `up` twice
        runs.schedule_missed_nights(Server(client), now)  # type: ignore[arg-type]
    found = [run for run in planned(client, deployment) if run.id != last.id]
    states = Counter(run.state_name for run in found)
    assert states == {MISSED: 29, "Scheduled": 1}
    assert found[-1].state_name == "Scheduled"
    reason = "the servers were down; a newer night trains on all that has arrived"
    assert {run.state.message for run in found[:-1] if run.state} == {reason}
    assert find_newer_night(found[-1], now) is None


def test_without_a_night_before_or_without_a_schedule_nothing_is_missed(
    client: SyncPrefectClient, deployment: uuid.UUID
) -> None:
    runs.schedule_missed_nights(Server(client), datetime.now(UTC))  # type: ignore[arg-type]
    assert planned(client, deployment) == []


def test_nights_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(ConfigError, match="give --from before --to"):
        nights(date(2026, 2, 2), date(2026, 2, 1), SCHEDULED)


@flow
def finetune() -> None:
    """Stand in for the retraining, by name."""


def test_the_janitor_ends_a_run_that_never_begins_to_work(
    client: SyncPrefectClient, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, working = (client.create_flow_run(finetune, state=Pending()) for _ in range(2))
    client.create_flow_run(nightly, state=Pending())
    with lease(str(working.id)):
        assert find_stuck(client, datetime.now(UTC)) == []
        late = datetime.now(UTC) + STUCK + timedelta(minutes=1)
        assert [run.id for run in find_stuck(client, late)] == [stuck.id]
        monkeypatch.setattr("flows.janitor.STUCK", -timedelta(minutes=1))
        janitor()
    state = client.read_flow_run(stuck.id).state
    assert state
    assert (state.name, state.message) == ("Crashed", "it did not begin to work within -1 day, 23:59:00")
    assert client.read_flow_run(working.id).state_name == "Pending"
    assert in_tmp.exists()
