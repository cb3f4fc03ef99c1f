"""Three nights with `sft.start_from: champion`, through DVC, the real launcher and the real registry."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.cli.trace import describe_start
from nightshift.core.files import iterate_rows, read_json, tree_digest, write_json, write_rows
from nightshift.core.paths import (
    CLEAN_TRAIN,
    EFFECTIVE,
    GATE,
    LINEAGE,
    MODEL,
    PACKED,
    SCORES,
    START_MODEL,
    START_RECORD,
    VERSION,
)
from nightshift.data.replay import is_replayed
from nightshift.data.schemas import ALL_SCORES
from nightshift.pipeline.graph import changed_stages
from nightshift.registry.lineage import write_lineage
from tasks import promote, register
from tests.helpers.champion import enter
from tests.helpers.checkouts import Checkout, make_checkout

pytestmark = pytest.mark.timeout(600)
SHARE = 0.25


def chats(first: int, last: int) -> str:
    """Return conversations as lines of JSON, no two alike."""
    words = ("river", "mountain", "harbour", "desert", "orchard", "glacier", "meadow", "canyon")
    rows = []
    for number in range(first, last):
        topic = f"{words[number % 8]} {words[number // 8 % 8]} {number}"
        turns = (("user", f"Where is the {topic}?"), ("assistant", f"Number {number * 37} on map {number}."))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def checkout(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Checkout:
    """Create a checkout whose first file of chats has arrived, and enter it."""
    folder = make_checkout(tmp_path / "checkout", tiny_base)
    (folder / "chats").mkdir()
    (folder / "chats/1.jsonl").write_text(chats(0, 64))
    params: dict[str, Any] = yaml.safe_load((folder / "params.yaml").read_text())
    params["snapshot"] |= {"sources": {"chats": "chats/*.jsonl"}, "benchmarks": {}}
    params["split"] |= {"validation_share": 0.0, "test_share": 0.02}
    params["augment"] |= {"sources": []}
    params["dedupe"] |= {"jaccard_threshold": 0.99}
    params["pack"] |= {"replay_share": SHARE}
    params["sft"] |= {"start_from": "champion", "strategy": "single", "num_processes": 1, "max_steps": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    enter(monkeypatch, folder)
    return Checkout(folder, clean_environment)


def trained() -> list[str]:
    """Return the ids of the packed examples."""
    return sorted(one for row in iterate_rows(PACKED, ["example_ids"]) for one in row["example_ids"])


def promote_candidate() -> None:
    """Register the candidate as after a gate that promotes it, and promote it."""
    write_rows(SCORES, [], ALL_SCORES)
    write_json(GATE, {"verdict": "promote", "reason": "better"})
    register.main()
    promote.move(int(read_json(VERSION)["version"]), "promote", "by hand")


def test_new_examples_are_trained_on_the_champion_and_a_night_without_any_changes_nothing(
    checkout: Checkout,
) -> None:
    snapshot = ("dvc", "repro", "--quiet", "--force", "--single-item", "snapshot")
    checkout.type("dvc", "repro", "--quiet", "sft")
    first, adapter = trained(), tree_digest(MODEL)
    assert 56 <= len(first) <= 64
    assert describe_start(read_json(EFFECTIVE)["start"]) == "the base (there was no champion yet)"
    promote_candidate()

    # The second night has no new data, and a champion.
    checkout.type(*snapshot)
    assert {"pack", "sft"}.isdisjoint(changed_stages())
    assert read_json(START_RECORD)["version"] is None

    Path("chats/2.jsonl").write_text(chats(64, 80))
    checkout.type(*snapshot)
    assert {"ingest", "pack", "sft"} <= changed_stages().keys()
    checkout.type("dvc", "repro", "--quiet", "sft")
    assert tree_digest(START_MODEL) == adapter
    clean = [row["id"] for row in iterate_rows(CLEAN_TRAIN, ["id"])]
    assert set(first) < set(clean)
    new = [one for one in clean if one not in first]
    replayed = [one for one in first if is_replayed(one, SHARE, 0)]
    assert 12 <= len(new) <= 16
    assert 6 <= len(replayed) <= 26
    assert trained() == sorted([*new, *replayed])
    summary = read_json(Path("data/pack/summary.json"))
    assert summary["dropped"] == {"replay": len(first) - len(replayed)}
    assert summary["replayed_by_source"] == {"chats": len(replayed)}
    assert (summary["rows_in"], summary["rows_out"]) == (len(clean), len(new) + len(replayed))
    effective = read_json(EFFECTIVE)
    assert effective["start_from"] == {"requested": "champion", "effective": "champion"}
    assert describe_start(effective["start"]) == "version 1"
    assert tree_digest(MODEL) != adapter

    # Its lineage has what the first version was trained on, too.
    write_json(GATE, {"verdict": "hold", "reason": "not proven"})
    write_lineage(LINEAGE)
    rows = [row["id"] for row in iterate_rows(LINEAGE / "rows.parquet")]
    assert sorted(rows) == sorted([*first, *new])
    assert read_json(LINEAGE / "lineage.json")["start"] == read_json(START_RECORD)

    # DVC has the start, as `nightshift reproduce` needs it.
    before = tree_digest(START_MODEL)
    shutil.rmtree("data/start")
    checkout.type("dvc", "checkout", "--quiet", "data/start")
    assert tree_digest(START_MODEL) == before
