"""The automations that tell how nights end, evaluated by Prefect's own code."""

from typing import Any

import pytest
from prefect.server.events.actions import SendNotification
from prefect.server.events.schemas.automations import Automation, EventTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource

from infra.local.notify import create_notifications
from nightshift.core.errors import StageError
from nightshift.pipeline.outcome import OUTCOMES

BLOCK = "00000000-0000-0000-0000-000000000001"


class Server:
    """The blocks and automations of Prefect's API."""

    prefect_ui = "http://127.0.0.1:4200"

    def __init__(self) -> None:
        self.automations: list[dict[str, Any]] = [{"id": "own", "name": "the user's own"}]
        self.changes = 0

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        match method, path:
            case "POST", "/automations/filter":
                return list(self.automations)
            case "POST", "/automations/":
                # As Prefect reads and returns it.
                made = Automation.model_validate(body).model_dump(mode="json")
                self.automations.append({**made, "id": str(self.changes)})
                self.changes += 1
            case "DELETE", _:
                self.automations = [one for one in self.automations if one["id"] != path.split("/")[-1]]
                self.changes += 1
            case "GET", "/block_types/slug/slack-webhook/block_documents/name/team":
                return {"id": BLOCK}
            case "GET", _:
                raise StageError("HTTP Error 404")
        return None


@pytest.fixture
def server() -> Server:
    made = Server()
    create_notifications(made, ["slack-webhook/team"])  # type: ignore[arg-type]
    return made


def triggers(server: Server) -> list[EventTrigger]:
    return [EventTrigger.model_validate(one["trigger"]) for one in server.automations[1:]]


def sends(server: Server, state: str, deployment: str = "nightly", flow: str = "finetune") -> int:
    """Return how many automations send a message when a run enters a state."""
    run = Resource({"prefect.resource.id": "prefect.flow-run.1"})
    related = [
        RelatedResource(
            {
                "prefect.resource.id": f"prefect.{role}.1",
                "prefect.resource.role": role,
                "prefect.resource.name": name,
            }
        )
        for role, name in {"flow": flow, "deployment": deployment}.items()
    ]
    event = f"prefect.flow-run.{state}"
    return sum(one.expects(event) and one.covers_resources(run, related) for one in triggers(server))


@pytest.mark.parametrize("state", [*OUTCOMES, "Completed", "Failed", "Crashed", "Cancelled", "TimedOut"])
def test_every_end_of_a_night_is_told_once(state: str, server: Server) -> None:
    assert sends(server, state) == sends(server, state, "prod") == 1


def test_nothing_else_is_told(server: Server) -> None:
    assert sends(server, "Running") == sends(server, "heartbeat") == 0
    assert sends(server, "Failed", "here") == sends(server, "Failed", "local", "janitor") == 0


def test_many_missed_nights_are_one_message(server: Server) -> None:
    (missed,) = [one for one in triggers(server) if one.expects("prefect.flow-run.Missed")]
    assert missed.for_each == set()
    assert missed.within.total_seconds() == 600


def test_the_message_has_state_reason_and_link(server: Server) -> None:
    action = SendNotification.model_validate(server.automations[1]["actions"][0])
    assert "flow_run.state.name" in action.subject
    assert "flow_run.state.message" in action.body
    assert "ui_url" in action.body


def test_a_second_up_changes_nothing_and_a_removed_block_ends(server: Server) -> None:
    before = server.changes
    server.automations[1]["enabled"] = False
    create_notifications(server, ["slack-webhook/team"])  # type: ignore[arg-type]
    assert server.changes == before
    assert server.automations[1]["enabled"] is False
    create_notifications(server, [])  # type: ignore[arg-type]
    assert [one["name"] for one in server.automations] == ["the user's own"]


def test_a_missing_block_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    create_notifications(server, ["custom-webhook/none"])  # type: ignore[arg-type]
    assert len(server.automations) == 1
    assert "nightly.notify: custom-webhook/none: there is no such block; create it at http" in caplog.text
