"""Let Prefect tell people how nights end, through its notification blocks.

The server sends the messages, by automations: a night neither waits for them nor fails with them, and a night
whose process was killed is told about as well.
"""

import logging
from typing import TYPE_CHECKING, Any

from nightshift.core.errors import StageError
from nightshift.pipeline.outcome import MISSED, OUTCOMES

if TYPE_CHECKING:
    from infra.local.settings import Stack

PREFIX = "tell-how-nights-end"
FLOW, DEPLOYMENTS = "finetune", ["nightly", "prod"]
# The event of a state has the state's name.
ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut", *OUTCOMES)
# A month of missed nights is one message, not 29.
MISSED_SECONDS = 600
SUBJECT = "Nightshift: {{ flow_run.name }}: {{ flow_run.state.name }}"
BODY = "{{ flow_run.state.message }}\n{{ flow_run | ui_url }}"
log = logging.getLogger(__name__)


def create_notifications(stack: "Stack", blocks: list[str]) -> None:
    """Replace the automations that send messages by those for the given blocks; problems are only warnings.

    Args:
        stack: Local stack.
        blocks: Prefect blocks, `type/name`, such as `slack-webhook/team`.
    """
    ids = {block: find_block(stack, block) for block in blocks}
    for block in (block for block, found in ids.items() if found is None):
        where = f"{stack.prefect_ui}/blocks/catalog"
        log.warning("nightly.notify: %s: there is no such block; create it at %s", block, where)
    found = stack.prefect("POST", "/automations/filter", {})
    known = {one["name"]: one for one in found if one["name"].startswith(PREFIX)}
    wanted = {one["name"]: one for block, known in ids.items() for one in automations(block, known)}
    for name, automation in known.items():
        if not (name in wanted and is_same(automation, wanted[name])):
            stack.prefect("DELETE", f"/automations/{automation['id']}")
    for name, automation in wanted.items():
        if not (name in known and is_same(known[name], automation)):
            stack.prefect("POST", "/automations/", automation)


def find_block(stack: "Stack", block: str) -> str | None:
    """Return the id of a block; None if Prefect does not have it."""
    kind, _, name = block.partition("/")
    try:
        return str(stack.prefect("GET", f"/block_types/slug/{kind}/block_documents/name/{name}")["id"])
    except StageError:
        return None


def automations(block: str, block_id: str | None) -> list[dict[str, Any]]:
    """Return the automations of a block: for nights that ran, and for missed ones."""
    if block_id is None:
        return []
    return [
        automation(f"{PREFIX}: {block}", block_id, [one for one in ENDED if one != MISSED], 0),
        automation(f"{PREFIX}: {block}: {MISSED.lower()}", block_id, [MISSED], MISSED_SECONDS),
    ]


def automation(name: str, block_id: str, states: list[str], seconds: int) -> dict[str, Any]:
    """Return an automation that sends a message when a night enters one of the states.

    Args:
        name: Name of the automation.
        block_id: Id of the notification block.
        states: Names of the states.
        seconds: For how long a message stands for all such nights.
    """
    return {
        "name": name,
        "description": "Set by nightly.notify in params.yaml.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "match_related": [
                {"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
                {"prefect.resource.role": "deployment", "prefect.resource.name": DEPLOYMENTS},
            ],
            "for_each": [] if seconds else ["prefect.resource.id"],
            "expect": [f"prefect.flow-run.{state}" for state in states],
            "threshold": 1,
            "within": seconds,
        },
        "actions": [
            {"type": "send-notification", "block_document_id": block_id, "subject": SUBJECT, "body": BODY}
        ],
    }


def is_same(automation: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Return whether an automation sends what it should; whether it is enabled is up to the user."""
    is_expecting = set(automation["trigger"].get("expect", ())) == set(wanted["trigger"]["expect"])
    return is_expecting and any(wanted["actions"][0].items() <= one.items() for one in automation["actions"])
