r"""Turn raw shards into checked examples: data/raw -> data/ingest.

Every row becomes an example or stands in quarantine.jsonl with `file:line` and a reason; the two
add up to the rows read. A share of bad rows above `max_quarantined_share` fails the stage.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tasks.config import StageParams, load_params
from tasks.errors import DataError
from tasks.files import jsonl, text_digest, write_rows, write_text
from tasks.schemas import EXAMPLES
from tasks.stage import DATA, run_main, write_summary

SOURCE = DATA / "raw"
TARGET = DATA / "ingest" / "examples.parquet"
QUARANTINE = DATA / "ingest" / "quarantine.jsonl"

ROLES = ("system", "user", "assistant")
# Markup that a chat template writes between turns (<|im_start|>, [INST], <s>). Inside a text it
# would let the text forge a turn.
SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>")
REMEDIES = {
    "not_utf8": "save the file as UTF-8",
    "malformed_json": "one JSON object per line",
    "not_an_object": 'write {"messages": [...]}',
    "no_messages": 'give "messages" as a list of {"role", "content"}',
    "unknown_role": f"use one of {', '.join(ROLES)}",
    "empty_content": "fill the text or remove the turn",
    "special_token": "remove the chat markup from the text",
    "wrong_order": "system first, then user and assistant in turn",
    "no_final_answer": "end with an assistant turn",
}


class IngestParams(StageParams):
    """Limits on bad rows.

    Attributes:
        max_quarantined_share: Share of all rows, 0 to 1, above which the stage fails.
    """

    max_quarantined_share: Annotated[float, Field(ge=0, le=1)]


def main() -> None:
    """Read all shards in order of arrival, write examples and quarantine."""
    params = load_params(IngestParams, "ingest")
    examples, quarantine = ingest(SOURCE)
    write_text(QUARANTINE, jsonl(quarantine))
    require_share(quarantine, len(examples) + len(quarantine), params.max_quarantined_share)
    write_rows(TARGET, examples, EXAMPLES)
    write_summary(
        "ingest",
        rows_in=len(examples) + len(quarantine),
        rows_out=len(examples),
        dropped=Counter(row["reason"] for row in quarantine),
    )


def ingest(raw: Path) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Check every row of every shard.

    Args:
        raw: Folder with `<source>/<arrival>.jsonl`.

    Returns:
        Examples, ordered by arrival and line, and quarantined rows with origin, reason, remedy.
    """
    examples, quarantine = [], []
    for shard in sorted(raw.glob("*/*.jsonl"), key=lambda path: (path.stem, path.parent.name)):
        for number, line in read_lines(shard):
            origin = f"{shard.relative_to(raw).as_posix()}:{number}"
            messages, reason = parse(line)
            if reason:
                quarantine.append({"origin": origin, "reason": reason, "remedy": REMEDIES[reason]})
                continue
            examples.append(
                {
                    "id": text_digest(origin, json.dumps(messages)),
                    "messages": messages,
                    "source": shard.parent.name,
                    "origin": origin,
                    "arrival": int(shard.stem),
                }
            )
    return examples, quarantine


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse(line: bytes) -> tuple[list[dict[str, str]], str | None]:
    r"""Read one line into messages, or name the reason why it cannot be used.

    Example:
        >>> parse(b'{"messages": [{"role": "user", "content": "Hi"}]}')
        ([], 'no_final_answer')
        >>> parse(b'\xff')
        ([], 'not_utf8')
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return [], "not_utf8"
    except (json.JSONDecodeError, RecursionError):
        return [], "malformed_json"
    if not isinstance(row, dict):
        return [], "not_an_object"
    messages = row.get("messages")
    if reason := find_fault(messages):
        return [], reason
    return [{"role": m["role"], "content": m["content"].strip()} for m in messages], None  # type: ignore[union-attr]


def find_fault(messages: object) -> str | None:
    """Name the first fault of a conversation, or None.

    Example:
        >>> find_fault([{"role": "user", "content": "Hi"}, {"role": "robot", "content": "Ho"}])
        'unknown_role'
    """
    if not isinstance(messages, list) or not messages:
        return "no_messages"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "no_messages"
        if message["role"] not in ROLES:
            return "unknown_role"
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return "empty_content"
        if SPECIAL_TOKEN.search(content):
            return "special_token"
    return _find_order_fault([message["role"] for message in messages])


def _find_order_fault(roles: list[str]) -> str | None:
    """Check: an optional system turn, then user and assistant alternating, an answer last."""
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        return "wrong_order"
    return None if turns and turns[-1] == "assistant" else "no_final_answer"


def require_share(quarantine: list[dict[str, str]], total: int, limit: float) -> None:
    """Fail when too many rows are bad, and show the first of them.

    Raises:
        DataError: There is no row at all, or the quarantined share is above `limit`.
    """
    if not total:
        raise DataError(f"{SOURCE}: no rows; run `nightshift snapshot` or check snapshot.sources")
    if len(quarantine) > limit * total:
        first = "\n  ".join(
            f"{SOURCE}/{row['origin']}: {row['reason']}; {row['remedy']}" for row in quarantine[:20]
        )
        raise DataError(
            f"{QUARANTINE}: {len(quarantine)} of {total} rows are bad, more than "
            f"ingest.max_quarantined_share={limit}; mend the rows or raise the limit\n  {first}"
        )


if __name__ == "__main__":
    run_main(main)
