"""The one place where the champion changes. Runs after the gate said promote."""

import logging

from tasks.errors import GateError
from tasks.files import read_json
from tasks.registry import DIGEST, find_alias, open_registry
from tasks.stage import DATA, run_main

GATE = DATA / "gate" / "gate.json"
CHAMPION = DATA / "champion" / "champion.json"
VERSION = DATA / "register" / "version.json"

log = logging.getLogger(__name__)


def main() -> None:
    """Promote the version that was registered last.

    Raises:
        GateError: The gate does not say promote.
    """
    decision = read_json(GATE)
    if decision["verdict"] != "promote":
        raise GateError(f"{GATE}: the verdict is {decision['verdict']}: {decision['reason']}")
    promote(read_json(VERSION)["version"], read_json(CHAMPION)["version"])


def promote(version: int, expected_champion: int | None) -> None:
    """Make a version the champion, and its predecessor `previous-champion`.

    Args:
        version: The version to promote.
        expected_champion: The champion that the gate compared with, or None.

    Raises:
        GateError: Another champion stands there by now, or the registry did not take the alias.
    """
    client, name = open_registry()
    current = find_alias(client, name, "champion")
    now = int(current.version) if current else None
    if now == version:
        log.info("version %d is the champion already", version)
        return
    if now != expected_champion:
        raise GateError(
            f"registry: the champion of {name} is version {now}, but the gate compared with "
            f"{expected_champion}; somebody moved the alias: run the flow again"
        )
    if current:
        client.set_registered_model_alias(name, "previous-champion", current.version)
    client.set_registered_model_alias(name, "champion", str(version))
    moved = find_alias(client, name, "champion")
    if moved is None or int(moved.version) != version:
        raise GateError(f"registry: champion of {name} should be {version}, is {moved}; see MLflow")
    log.info("version %d (%s) is the champion of %s", version, moved.tags[DIGEST][:12], name)


if __name__ == "__main__":
    run_main(main)
