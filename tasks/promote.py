"""Change the champion: after the gate, manually, or by rollback. No other code changes it.

`python -m tasks.promote` applies the gate's verdict and `registry.approval`, and writes
`data/promote/outcome.json`. `--version 7 --reason TEXT` promotes a version, `--rollback` restores the
previous champion (or `--version`), `--acknowledge` allows automatic promotion again after a rollback.

A promotion that waits for approval is only the alias `challenger`, not a process: it blocks nothing and
survives any restart.
"""

import argparse
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlflow.entities.model_registry import ModelVersion

from nightshift.core.config import load_params
from nightshift.core.errors import ConfigError, GateError
from nightshift.core.files import read_json, text_digest, write_json
from nightshift.core.paths import CHAMPION_RECORD, GATE, OUTCOME, VERSION
from nightshift.core.stage import run_main
from nightshift.core.state import state_dir
from nightshift.pipeline.outcome import promote_command
from nightshift.registry.record import HELD, Action, Record, open_record
from nightshift.registry.versions import (
    ANSWERS,
    DIGEST,
    RegistryParams,
    drop_bases,
    find_alias,
    find_version,
    keep_base,
    open_model,
    open_registry,
    read_reference,
    start_probes,
)
from nightshift.tracking.runs import flow_run

# Expected champion of a manual move.
ANY_CHAMPION = -1
log = logging.getLogger(__name__)


def main(version: int | None, reason: str, *, rollback: bool, acknowledge: bool) -> None:
    """Run the requested change; without arguments, apply the gate's verdict.

    Raises:
        ConfigError: A manual move has no reason.
    """
    is_manual = acknowledge or rollback or version is not None
    if is_manual and not reason.strip():
        raise ConfigError("--reason is required; it is stored in the promotion record")
    if acknowledge:
        release_hold(reason)
    elif rollback:
        roll_back(version, reason)
    elif version is not None:
        move(version, "promote", reason)
    else:
        apply_verdict()


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("--version", type=int, help="version to promote or restore")
    parser.add_argument("--rollback", action="store_true", help="restore the previous champion")
    parser.add_argument(
        "--acknowledge", action="store_true", help="allow automatic promotion again after a rollback"
    )
    parser.add_argument("--reason", default="", help="reason, stored in the promotion record")


def apply_verdict() -> None:
    """Promote the latest registered version, or mark it as waiting for approval.

    Raises:
        GateError: The champion has changed since the gate's comparison.
    """
    decision, registered = read_json(GATE), read_json(VERSION)
    version = int(registered["version"])
    client, name = open_registry()
    approval = load_params(RegistryParams, "registry").approval
    waits = find_wait_reason(decision["verdict"], version, approval, open_record(client, name))
    promoted = decision["verdict"] == "promote" and waits is None
    if waits:
        client.set_registered_model_alias(name, "challenger", str(version))
        log.info("version %d awaits `%s`: %s", version, promote_command(version), waits)
    elif promoted:
        expected = read_json(CHAMPION_RECORD)["version"]
        # Registration loaded it from the registry a moment ago.
        is_proven = registered["proven_in"] is not None and registered["proven_in"] == flow_run()
        move(version, "promote", f"gate: {decision['reason']}", expected, is_proven=is_proven)
    write_json(OUTCOME, {"promoted": promoted, "waits": waits})


def find_wait_reason(verdict: str, version: int, approval: str, record: Record) -> str | None:
    """Return why a version must wait for manual approval, or None.

    Args:
        verdict: Verdict of the gate.
        version: Version of the candidate.
        approval: Value of `registry.approval`.
        record: Record of promotions.
    """
    if version == record.champion:
        return None
    if {"manual": "promote", "manual_if_hold": "hold"}.get(approval) == verdict:
        return f"registry.approval is {approval}"
    if verdict == "promote" and record.is_held:
        return HELD
    if verdict == "promote" and version in record.withdrawn:
        return f"version {version} was rolled back before"
    return None


def roll_back(version: int | None, reason: str) -> None:
    """Restore an earlier champion and hold automatic promotion.

    Args:
        version: Version to restore; None for the previous champion.
        reason: Reason for the record.

    Raises:
        GateError: There is no previous champion.
    """
    if version is None:
        client, name = open_registry()
        previous = find_alias(client, name, "previous-champion")
        if previous is None:
            raise GateError(f"registry: {name} has no previous champion; pass a version with --version N")
        version = int(previous.version)
    move(version, "rollback", reason)


def release_hold(reason: str) -> None:
    """Allow automatic promotion again after a rollback."""
    client, name = open_registry()
    with promotion_lock(name):
        current = find_alias(client, name, "champion")
        open_record(client, name).append("acknowledge", current, current, reason)


def move(
    version: int,
    action: Action,
    reason: str,
    expected: int | None = ANY_CHAMPION,
    *,
    is_proven: bool = False,
) -> None:
    """Make a version the champion and its predecessor `previous-champion`.

    Args:
        version: Version of the new champion.
        action: `promote` or `rollback`.
        reason: Reason for the record.
        expected: Champion that the gate compared with, or None; a manual move accepts any.
        is_proven: Whether a fresh process loaded the version in this flow run, and compared its answers. Its
            bytes are verified nevertheless.

    Raises:
        GateError: The champion is not the expected one, another process is moving it, the version does
            not load or does not match its registration, or the registry did not set the alias.
    """
    client, name = open_registry()
    with promotion_lock(name):
        current = find_alias(client, name, "champion")
        now = int(current.version) if current else None
        record = record_outside_move(open_record(client, name), current)
        if now == version:
            log.info("version %d is already the champion", version)
            return
        if expected not in (ANY_CHAMPION, now):
            raise GateError(
                f"registry: the champion of {name} is version {now}, but the gate compared with {expected}; "
                "the alias was moved meanwhile; rerun the flow"
            )
        following = find_version(client, name, version)
        verify_version(following, is_proven=is_proven)
        keep_base(name, read_reference(following))
        if current:
            # A champion that was set outside Nightshift may not record its base.
            with suppress(GateError):
                keep_base(name, read_reference(current))
        # Before the alias moves: an entry without its move is later detected as an outside move.
        record.append(action, following, current, reason)
        if current:
            client.set_registered_model_alias(name, "previous-champion", current.version)
        client.set_registered_model_alias(name, "champion", str(version))
        moved = find_alias(client, name, "champion")
        if moved is None or int(moved.version) != version:
            raise GateError(f"registry: the champion of {name} is {moved} instead of {version}; check MLflow")
        # A promotion ends the wait of an earlier candidate, which was compared with another champion.
        if action == "promote" and find_alias(client, name, "challenger"):
            client.delete_registered_model_alias(name, "challenger")
        drop_bases(client, name)
    log.info("%s: version %d (%s) is the champion of %s", action, version, following.tags[DIGEST][:12], name)


@contextmanager
def promotion_lock(name: str) -> Iterator[None]:
    """Lock out other promotions on this machine; deployments run one at a time across machines.

    Raises:
        GateError: Another promotion is running.
    """
    file = state_dir() / f"promote-{text_digest(name)}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise GateError(
                f"registry: the champion of {name} is being moved by another process; retry later"
            ) from err
        yield


def record_outside_move(record: Record, current: ModelVersion | None) -> Record:
    """Record an outside move if the alias does not match the record."""
    now, known = int(current.version) if current else None, record.champion
    if now != known:
        log.warning(
            "the champion of %s is version %s, not %s: it was moved outside Nightshift",
            record.name,
            now,
            known,
        )
        record.append("outside", current, None, f"found at version {now}, expected {known}")
    return record


def verify_version(version: ModelVersion, *, is_proven: bool) -> None:
    """Verify a version against its registration: the bytes of adapter and base, and three answers.

    Args:
        version: Version.
        is_proven: Whether the answers were compared in this flow run.

    Raises:
        GateError: The version does not match its registration.
    """
    uri = f"models:/{version.name}/{version.version}"
    with open_model(version) as (base, _):
        if is_proven:
            return
        with start_probes(base) as ask:
            answers = text_digest(*ask(uri))
    if answers != version.tags.get(ANSWERS):
        raise GateError(
            f"registry: {uri} loads, but its answers (digest {answers}) differ from those at registration "
            f"({version.tags.get(ANSWERS)}); the base or the libraries changed, so evaluate it again"
        )


if __name__ == "__main__":
    run_main(main, declare)
