"""The snapshot stage in real use: clones that share a remote, sources that come and go.

The tests share two checkouts and run in file order.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightshift.core.files import read_json, read_rows, tree_digest
from nightshift.pipeline.graph import read_stages
from tests.helpers.checkouts import Checkout, make_checkout

pytestmark = pytest.mark.timeout(600)
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@example.invalid")
UP_TO_DATE = "Data and pipelines are up to date."
BROUGHT_IN = ("data/raw", "data/benchmarks", "data/champion")


def chats(folder: Path, name: str, *questions: str) -> None:
    """Write a file of conversations that a source offers."""
    (folder / name).parent.mkdir(exist_ok=True)
    turns = [[("user", one), ("assistant", f"The answer to {one}")] for one in questions]
    rows = [{"messages": [{"role": role, "content": text} for role, text in both]} for both in turns]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def set_params(folder: Path, section: str, **changes: Any) -> None:
    """Change a section of params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def digests(folder: Path) -> list[str]:
    """Return the digests of the snapshot's outputs."""
    return [tree_digest(folder / path) for path in BROUGHT_IN]


def shards(checkout: Checkout) -> list[str]:
    """Return the shards on disk."""
    raw = checkout.folder / "data/raw"
    return sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*"))


def trained_sources(checkout: Checkout) -> set[str]:
    """Return the sources of the examples that ingest wrote."""
    return {row["source"] for row in read_rows(checkout.folder / "data/ingest/examples.parquet")}


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Checkout:
    """Create a clone in which only `dvc repro` was run; its remote is a folder next to it."""
    folder = make_checkout(tmp_path_factory.mktemp("snapshot") / "first", tiny_base)
    made = Checkout(folder, clean_environment)
    made.type("dvc", "remote", "modify", "local", "url", str(folder.parent / "remote"))
    made.type(*GIT, "commit", "-qam", "one remote for all")
    output = made.type("dvc", "repro")
    for stage in read_stages(folder / "dvc.yaml"):
        assert f"Running stage '{stage}'" in output
    return made


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Checkout:
    """Create a checkout with two small sources and one benchmark, in which nothing has run."""
    folder = make_checkout(tmp_path_factory.mktemp("sources") / "checkout", tiny_base)
    chats(folder, "mine/a.jsonl", "Which animal barks at night?", "Who lives in the old mill?")
    chats(folder, "yours/b.jsonl", "Where does the river end?", "How deep is the lake?")
    set_params(
        folder,
        "snapshot",
        sources={"mine": "mine/*.jsonl", "yours": "yours/*.jsonl"},
        benchmarks={"countries": "package:countryinfo"},
    )
    return Checkout(folder, clean_environment)


def test_dvc_repro_runs_from_a_clean_checkout_to_the_verdict(first: Checkout) -> None:
    assert read_json(first.folder / "data/gate/gate.json")["verdict"] in ("promote", "hold", "reject")
    assert "Running stage" not in first.type("dvc", "repro")
    # Forced, as every night, but without new data: no other stage has to run.
    before = digests(first.folder)
    assert "Running stage 'snapshot'" in first.type("nightshift", "snapshot")
    assert digests(first.folder) == before
    assert UP_TO_DATE in first.type("dvc", "status")


def test_a_second_clone_pulls_the_snapshot_of_the_first(first: Checkout) -> None:
    first.type("dvc", "push")
    first.type(*GIT, "add", "-A")
    first.type(*GIT, "commit", "-qm", "a night")
    second = Checkout(first.folder.with_name("second"), first.environment)
    subprocess.run(["git", "clone", "-q", str(first.folder), str(second.folder)], check=True)
    second.type("dvc", "pull")
    assert digests(second.folder) == digests(first.folder)
    assert (second.folder / "data/raw/elements/000001.jsonl").is_file()
    assert UP_TO_DATE in second.type("dvc", "status")
    assert "Running stage" not in second.type("dvc", "repro")


def test_an_unlisted_benchmark_is_neither_scored_nor_used_by_the_gate(first: Checkout) -> None:
    params = yaml.safe_load((first.folder / "params.yaml").read_text())
    named, retention = params["snapshot"]["benchmarks"], params["gate"]["retention"]
    scores = first.folder / "data/evaluate/scores.parquet"
    assert "countries" in {row["benchmark"] for row in read_rows(scores)}
    before = tree_digest(first.folder / "data/benchmarks/countries")
    rest = {name: location for name, location in named.items() if name != "countries"}
    set_params(first.folder, "snapshot", benchmarks=rest)
    set_params(first.folder, "gate", retention={})
    first.type("dvc", "repro")
    assert {row["benchmark"] for row in read_rows(scores)} == {"elements", "elements_written", "test"}
    assert "countries" not in (first.folder / "data/gate/gate.json").read_text()
    assert tree_digest(first.folder / "data/benchmarks/countries") == before
    set_params(first.folder, "snapshot", benchmarks=named)
    set_params(first.folder, "gate", retention=retention)
    output = first.type("dvc", "repro")
    assert "Stage 'evaluate' is cached - skipping run" in output
    assert tree_digest(first.folder / "data/benchmarks/countries") == before


def test_an_unlisted_source_is_not_trained_on_and_returns_unchanged(checkout: Checkout) -> None:
    checkout.type("dvc", "repro", "ingest")
    assert trained_sources(checkout) == {"mine", "yours"}
    before = tree_digest(checkout.folder / "data/raw"), tree_digest(checkout.folder / "data/ingest")
    set_params(checkout.folder, "snapshot", sources={"mine": "mine/*.jsonl"})
    # Meanwhile the source's file is replaced by another one.
    chats(checkout.folder, "yours/c.jsonl", "Is the lake salty?")
    (checkout.folder / "yours/b.jsonl").unlink()
    checkout.type("dvc", "repro", "ingest")
    assert trained_sources(checkout) == {"mine"}
    assert shards(checkout) == ["mine/000001.jsonl", "yours/000002.jsonl"]
    status = checkout.type("nightshift", "status")
    assert "not listed in params.yaml, unused: source yours: 1 shard, 0.3 kB" in status
    assert "source mine" not in status

    (checkout.folder / "yours/c.jsonl").unlink()
    chats(checkout.folder, "yours/b.jsonl", "Where does the river end?", "How deep is the lake?")
    set_params(checkout.folder, "snapshot", sources={"mine": "mine/*.jsonl", "yours": "yours/*.jsonl"})
    output = checkout.type("dvc", "repro", "ingest")
    assert "Stage 'ingest' is cached - skipping run" in output
    after = tree_digest(checkout.folder / "data/raw"), tree_digest(checkout.folder / "data/ingest")
    assert after == before
    assert "not used" not in checkout.type("nightshift", "status")


def test_reverting_parameters_does_not_restore_earlier_data(checkout: Checkout) -> None:
    set_params(checkout.folder, "snapshot", sources={"mine": "mine/*.jsonl"})
    checkout.type("dvc", "repro", "snapshot")
    # The next day, one file has replaced another.
    (checkout.folder / "mine/a.jsonl").unlink()
    chats(checkout.folder, "mine/d.jsonl", "Who keeps the bees?")
    checkout.type("nightshift", "snapshot")
    everything = ["mine/000001.jsonl", "mine/000003.jsonl", "yours/000002.jsonl"]
    assert shards(checkout) == everything
    for sources in ({"mine": "mine/*.jsonl", "yours": "yours/*.jsonl"}, {"mine": "mine/*.jsonl"}):
        set_params(checkout.folder, "snapshot", sources=sources)
        assert "Running stage 'snapshot'" in checkout.type("dvc", "repro", "snapshot")
        assert shards(checkout) == everything
    assert UP_TO_DATE in checkout.type("dvc", "status", "snapshot")


def test_a_clone_without_data_restores_it_or_refuses(checkout: Checkout) -> None:
    raw, benchmarks = (checkout.folder / path for path in ("data/raw", "data/benchmarks"))
    (benchmarks / "countries").rename(benchmarks / "lands")
    checkout.type("nightshift", "snapshot")
    before = tree_digest(raw), tree_digest(benchmarks)
    checkout.type("rm", "-r", "data")
    # Only DVC's cache has the first shards and the benchmark that params.yaml does not name.
    checkout.type("dvc", "repro", "snapshot")
    assert (tree_digest(raw), tree_digest(benchmarks)) == before
    assert shards(checkout) == ["mine/000001.jsonl", "mine/000003.jsonl", "yours/000002.jsonl"]

    lock = (checkout.folder / "dvc.lock").read_bytes()
    checkout.type("rm", "-r", "data", ".dvc/cache")
    refused = checkout.type("dvc", "repro", "snapshot", code=255)
    assert "data/raw: dvc.lock lists it, but neither DVC's cache nor its remote contains all of it" in refused
    assert not raw.exists()
    assert (checkout.folder / "dvc.lock").read_bytes() == lock
    (checkout.folder / "dvc.lock").unlink()
    checkout.type("dvc", "repro", "snapshot")
    assert shards(checkout) == ["mine/000001.jsonl"]
