"""The snapshot chooses where training starts, from a real registry: new data, rollback, forgotten rows."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.errors import ConfigError
from nightshift.core.files import read_json, read_rows, tree_digest, write_json, write_rows
from nightshift.core.paths import (
    CHAMPION,
    GATE,
    PACKED,
    SCORES,
    START,
    START_MODEL,
    START_RECORD,
    START_ROWS,
    VERSION,
)
from nightshift.data.schemas import ALL_SCORES
from nightshift.raw.forgotten import Forgotten, write_forgotten
from nightshift.registry import versions
from tasks import promote, register
from tasks.pack import ROWS
from tasks.snapshot.start import update_start
from tests.helpers.champion import enter
from tests.integration.test_registry import adapter, candidate, make_checkout

RAW, DIGESTS = Path("data/raw"), Path("data/raw/digests.json")
FIRST = {"start_from": "champion", "lora_r": 4, "lora_alpha": 8}


def edit(**changes: Any) -> None:
    """Change the section `sft`."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["base"]["model"] = "tiny"
    params["sft"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(params))


def arrive(number: int) -> None:
    """Add a shard."""
    name = f"facts/{number:06d}.jsonl"
    write_json(DIGESTS, read_json(DIGESTS) | {name: f"{number}" * 64})


def train(seed: int, *examples: str) -> int:
    """Pack examples, register an adapter that was trained on them, and promote it; return its version."""
    row = {"input_ids": [1], "labels": [1], "seq_lengths": [1], "starts": [0]}
    rows = [{**row, "example_ids": [one], "origins": [f"facts/{one}"]} for one in examples]
    write_rows(PACKED, rows, ROWS)
    versions.write_champion(CHAMPION)
    candidate(seed)
    write_rows(SCORES, [], ALL_SCORES)
    write_json(GATE, {"verdict": "promote", "reason": "better"})
    register.main()
    version = int(read_json(VERSION)["version"])
    promote.move(version, "promote", "by hand")
    return version


def snapshot() -> str:
    """Choose the start, and return the digest of data/start."""
    update_start()
    return tree_digest(START)


def start() -> tuple[int | None, str | None]:
    """Return the version and the reason in the record."""
    record = read_json(START_RECORD)
    return record["version"], record["reason"]


def ids(path: Path) -> list[str]:
    """Return the ids of the examples in a file."""
    return [row["id"] for row in read_rows(path)]


def tag(version: int, examples: int) -> None:
    """Tag a version as `nightshift forget` does."""
    client, name = versions.open_registry()
    client.set_model_version_tag(name, str(version), versions.FORGOTTEN, str(examples))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Create a checkout before its first champion."""
    folder = tmp_path_factory.mktemp("start")
    make_checkout(folder, tiny_base)
    return folder


def test_a_start_changes_only_with_new_data(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, checkout)
    edit(**FIRST)
    before = snapshot()
    assert start() == (None, "there was no champion yet")
    assert train(1, "e1:1", "e2:1") == 1

    # Nothing new: the second night has the inputs of the first.
    assert snapshot() == before
    assert not START_MODEL.exists()

    arrive(3)
    assert snapshot() != before
    assert start() == (1, None)
    assert tree_digest(START_MODEL) == tree_digest(adapter(1))
    assert ids(START_ROWS) == ["e1:1", "e2:1"]
    before = snapshot()
    assert train(2, "e3:1") == 2
    # The champion was trained on all shards, so its own start stays that of the night.
    assert snapshot() == before

    arrive(4)
    snapshot()
    assert start() == (2, None)
    # What the first version was trained on is in the weights of the second.
    assert ids(START_ROWS) == ["e1:1", "e2:1", "e3:1"]
    assert tree_digest(START_MODEL) == tree_digest(adapter(2))

    promote.roll_back(None, "answers in rhymes")
    snapshot()
    assert start() == (1, None)
    promote.move(2, "promote", "again")

    # A shard that was rewritten because rows were forgotten is not new; a new one is.
    known = read_json(DIGESTS)
    write_json(
        DIGESTS,
        {name: one for name, one in known.items() if "4" not in name} | {"facts/000003.jsonl": "f" * 64},
    )
    write_forgotten(RAW, Forgotten(shards={"facts/000003.jsonl": ["3" * 64]}))
    assert snapshot() == before
    write_json(DIGESTS, known)

    tag(2, 7)
    snapshot()
    assert start() == (1, None)
    tag(1, 5)
    snapshot()
    assert start() == (None, "5 examples of version 1 were forgotten")
    assert not START_MODEL.exists()
    assert not START_ROWS.exists()


@pytest.mark.usefixtures("checkout")
def test_with_the_base_as_start_the_registry_is_not_asked(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, checkout)
    edit(start_from="base")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    update_start()
    assert start() == (None, None)


def test_a_section_that_does_not_fit_the_champion_stops_the_snapshot(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkout(tmp_path, tiny_base)
    enter(monkeypatch, tmp_path)
    edit(**FIRST)
    update_start()
    train(1, "e1:1")
    arrive(3)
    edit(lora_r=16, lora_alpha=8)
    with pytest.raises(ConfigError, match=r"sft\.lora_r is 16, but version 1, .* has 4; set the same"):
        update_start()
    # It will not be the start on another base.
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["base"]["model"] = "package:another"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    update_start()
    assert start() == (1, None)
