"""What dedupe reads of each row, in one process or in several."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.files import read_rows, tree_digest, write_rows
from nightshift.core.paths import DEDUPED, INGESTED
from nightshift.data.prompts import list_prompts
from nightshift.data.schemas import EXAMPLES
from tasks.dedupe import __main__ as stage

PARAMS = {
    "num_perm": 128,
    "bands": 16,
    "rows_per_band": 8,
    "shingle_size": 3,
    "jaccard_threshold": 0.8,
    "seed": 1,
    "max_drop_rate": 1.0,
}


def chat(number: int, *turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "id": f"id-{number}",
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)],
        "tools": None,
        "source": "chats",
        "origin": f"chats/000001.jsonl:{number}",
        "arrival": 1,
        "group": None,
    }


def test_several_processes_write_the_same_bytes_as_one(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({"dedupe": PARAMS}))
    asked = ("Who?", "WHO", "When was that?")
    rows = [chat(i, asked[i % 3], f"Answer {i % 5} — é", "And then?", "Nothing.") for i in range(20)]
    write_rows(INGESTED, rows, EXAMPLES)
    stage.main()
    alone = tree_digest(DEDUPED.parent)
    monkeypatch.setattr(stage, "MANY_BYTES", 0)
    monkeypatch.setattr(stage, "ROWS_PER_WORK", 3)
    stage.main()
    assert tree_digest(DEDUPED.parent) == alone
    kept = read_rows(DEDUPED)
    assert len(kept) == 10
    assert all(len(row["prompts"]) == 1 for row in kept)


def test_the_last_prompt_and_long_earlier_ones_are_listed() -> None:
    roles = ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role} for role in roles]
    long = "user " + " ".join(["word"] * 8)
    texts = [
        "system " + "word " * 20,
        "user hello",
        "assistant hi",
        long,
        "assistant a",
        "user b",
        "assistant c",
        "user d",
    ]
    prompts = list_prompts(messages, texts)
    assert len(prompts) == 2
    # What follows the last answer is no part of a prompt.
    assert prompts == list_prompts(messages[:7], texts[:7])
    assert list_prompts(messages[:5], texts[:5]) == prompts[:1]
    assert list_prompts(messages[:2], texts[:2]) == []
