"""Record of promotions, stored in the registry: which version was champion when, and why.

An entry is a tag of the registered model, `nightshift.promotion.<number>`: a JSON line that contains the
digest of the line before. `nightshift.promotions` contains the last digest. Edited, removed or inserted
lines are detected, and every machine that sees the registry sees the record.
"""

import getpass
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from nightshift.core.errors import GateError
from nightshift.registry.versions import DIGEST
from nightshift.tracking.runs import flow_run

Action = Literal["promote", "rollback", "acknowledge", "outside"]
PREFIX, HEAD = "nightshift.promotion.", "nightshift.promotions"
FIRST = "0" * 64
HELD = "automatic promotion is on hold since a rollback; run `nightshift acknowledge` to resume"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the record.

    Attributes:
        moment: UTC time, ISO 8601.
        action: promote and rollback move the champion; acknowledge ends the hold after a rollback;
            outside: a move of the champion outside Nightshift was detected.
        champion: Version that is the champion after the entry, or None.
        before: Version that was the champion before the entry, or None.
        adapter: Digest of the champion's adapter, or None.
        reason: Reason as free text.
        by: Flow run or user that requested the action.
        last: Digest of the previous entry.
    """

    moment: str
    action: Action
    champion: int | None
    before: int | None
    adapter: str | None
    reason: str
    by: str
    last: str


@dataclass(slots=True)
class Record:
    """The record of one registered model.

    Attributes:
        client: MLflow client.
        name: Name of the registered model.
        entries: Entries, oldest first.
    """

    client: MlflowClient
    name: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def champion(self) -> int | None:
        """Champion according to the last entry, or None."""
        return self.entries[-1].champion if self.entries else None

    @property
    def is_held(self) -> bool:
        """Whether automatic promotion is on hold: after a rollback, until it is acknowledged."""
        acts = [entry.action for entry in self.entries if entry.action in ("rollback", "acknowledge")]
        return bool(acts) and acts[-1] == "rollback"

    @property
    def withdrawn(self) -> set[int | None]:
        """Versions that were rolled back."""
        return {entry.before for entry in self.entries if entry.action == "rollback"}

    def append(
        self, action: Action, champion: ModelVersion | None, before: ModelVersion | None, reason: str
    ) -> None:
        """Write the next entry.

        Args:
            action: Action to record.
            champion: New champion, or None.
            before: Previous champion, or None.
            reason: Reason as free text.
        """
        entry = Entry(
            moment=datetime.now(UTC).isoformat(timespec="seconds"),
            action=action,
            champion=int(champion.version) if champion else None,
            before=int(before.version) if before else None,
            adapter=champion.tags.get(DIGEST) if champion else None,
            reason=reason,
            by=flow_run() or getpass.getuser(),
            last=digest(line(self.entries[-1])) if self.entries else FIRST,
        )
        self.client.set_registered_model_tag(self.name, tag(len(self.entries) + 1), line(entry))
        self.client.set_registered_model_tag(self.name, HEAD, digest(line(entry)))
        self.entries.append(entry)


def open_record(client: MlflowClient, name: str) -> Record:
    """Read the record of a registered model.

    Raises:
        GateError: No version is registered yet, or an entry was changed, removed or inserted.
    """
    try:
        tags = dict(client.get_registered_model(name).tags)
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise GateError(f"registry: {name} has no version yet; `nightshift run` registers the first") from err
    return Record(client, name, verified(tags, name))


def verified(tags: Mapping[str, str], name: str) -> list[Entry]:
    """Return the verified entries from the tags of a model; see `open_record`."""
    keys = sorted(key for key in tags if key.startswith(PREFIX))
    entries, last = [], FIRST
    for number, key in enumerate(keys, 1):
        entry = Entry(**json.loads(tags[key]))
        if key != tag(number) or entry.last != last:
            raise GateError(
                f"registry: the record of {name} is broken before {key}: an entry was changed, removed or "
                "inserted; compare `nightshift history` with a backup of MLflow's database"
            )
        entries.append(entry)
        last = digest(tags[key])
    if tags.get(HEAD, FIRST) != last:
        raise GateError(
            f"registry: the record of {name} is broken at its end: the last of {len(keys)} entries was "
            "changed, or one was removed; compare `nightshift history` with a backup of MLflow's database"
        )
    return entries


def tag(number: int) -> str:
    """Return the tag name of an entry.

    Example:
        >>> tag(7)
        'nightshift.promotion.00007'
    """
    return f"{PREFIX}{number:05}"


def digest(text: str) -> str:
    """Return the SHA-256 of an entry's line, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def line(entry: Entry) -> str:
    """Format an entry as it is stored in its tag."""
    return json.dumps(asdict(entry), sort_keys=True, ensure_ascii=False)
