"""The automation that wakes the janitor, evaluated by Prefect's own code."""

from typing import Any

import pytest
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource

from infra.local.runs import create_automation

JANITOR = {"id": "a-deployment"}


class Server:
    """The automations part of Prefect's API."""

    def __init__(self) -> None:
        self.automations: list[dict[str, Any]] = []
        self.created = 0

    def prefect(self, method: str, path: str, body: Any = None) -> Any:
        match method, path:
            case "POST", "/deployments/filter":
                return [JANITOR]
            case "POST", "/automations/filter":
                return list(self.automations)
            case "POST", "/automations/":
                self.created += 1
                self.automations.append({**body, "id": str(self.created)})
            case "DELETE", _:
                self.automations = [one for one in self.automations if one["id"] != path.split("/")[-1]]
        return None


def watches(trigger: dict[str, Any], flow: str) -> bool:
    """Return whether a trigger matches the events of a flow's runs."""
    run = Resource({"prefect.resource.id": "prefect.flow-run.1"})
    related = [
        {
            "prefect.resource.id": "prefect.flow.1",
            "prefect.resource.role": "flow",
            "prefect.resource.name": flow,
        },
        {"prefect.resource.id": "prefect.deployment.1", "prefect.resource.role": "deployment"},
    ]
    return EventTrigger(**trigger).covers_resources(run, [RelatedResource(one) for one in related])


def test_the_automation_ignores_janitor_runs() -> None:
    """The janitor's last heartbeat arrives after its end, so it would wake itself forever."""
    server = Server()
    create_automation(server)  # type: ignore[arg-type]
    (automation,) = server.automations
    assert [watches(automation["trigger"], flow) for flow in ("finetune", "another", "janitor")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize("edited", [{"actions": []}, {"trigger": {"type": "compound", "triggers": []}}])
def test_an_automation_that_the_user_edited_is_replaced(edited: dict[str, Any]) -> None:
    server = Server()
    create_automation(server)  # type: ignore[arg-type]
    server.automations[0] |= edited
    create_automation(server)  # type: ignore[arg-type]
    (automation,) = server.automations
    assert automation["actions"][0]["deployment_id"] == JANITOR["id"]
    assert watches(automation["trigger"], "finetune")


def test_the_automation_is_created_once_and_replaced_if_it_triggers_itself() -> None:
    server = Server()
    for _ in range(2):
        create_automation(server)  # type: ignore[arg-type]
    assert server.created == 1
    server.automations[0] |= {"enabled": False}
    server.automations[0]["trigger"] |= {"match_related": {}}
    create_automation(server)  # type: ignore[arg-type]
    (automation,) = server.automations
    assert (server.created, automation["enabled"]) == (2, False)
    assert not watches(automation["trigger"], "janitor")
