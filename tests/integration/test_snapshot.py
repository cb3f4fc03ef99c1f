"""The snapshot stage in real use: a team that shares git and a remote, sources that come and go.

The tests share two checkouts and run in file order.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nightshift.core.files import read_json, read_rows, tree_digest, write_json
from nightshift.pipeline.dvc_cache import md5
from nightshift.pipeline.graph import read_stages
from tests.helpers.checkouts import Checkout, make_checkout
from tests.helpers.report import write_version

pytestmark = pytest.mark.timeout(900)
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


def promote_adapter(folder: Path) -> None:
    """Make an untrained adapter the champion in the registry of a checkout."""
    base = folder / "data/base/model"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    artifacts = folder / "versions/1/artifacts"
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(artifacts / "model")
    reference = {**read_json(folder / "data/base/base.json"), "path": str(base)}
    write_json(artifacts / "base_reference.json", reference)
    write_json(artifacts / "lineage" / "lineage.json", {"shards": []})
    client = MlflowClient(f"sqlite:///{folder / '.nightshift/mlflow.db'}")
    client.create_registered_model("nightshift")
    write_version(client, "nightshift", folder, tree_digest(artifacts / "model"))


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Checkout:
    """Create a clone with a champion, in which only `dvc repro` was run; its remote is next to it."""
    team = tmp_path_factory.mktemp("team")
    folder = make_checkout(team / "first", shutil.copytree(tiny_base, team / "base"))
    made = Checkout(folder, clean_environment)
    made.type("dvc", "remote", "modify", "storage", "url", str(team / "remote"))
    made.type(*GIT, "commit", "-qam", "one remote for all")
    output = made.type("dvc", "repro", "base")
    promote_adapter(folder)
    output += made.type("dvc", "repro")
    for stage in read_stages(folder / "dvc.yaml"):
        assert f"Running stage '{stage}'" in output
    return made


@pytest.fixture(scope="module")
def second(first: Checkout) -> Checkout:
    """Clone what the first clone committed and pushed, for a user who has nothing else of it."""
    first.type("dvc", "push")
    first.type(*GIT, "add", "dvc.lock")
    first.type(*GIT, "commit", "-qm", "a night")
    team = first.folder.parent
    own = {"HOME": str(team / "home"), "NIGHTSHIFT_HOME": str(team / "state")}
    (team / "home").mkdir()
    first.type("git", "clone", "-q", str(first.folder), str(team / "second"))
    return Checkout(team / "second", first.environment | own)


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
    assert (first.folder / "data/champion/model/adapter_config.json").is_file()
    # Forced, as every night, but without new data: no other stage has to run.
    before = digests(first.folder)
    assert "Running stage 'snapshot'" in first.type("nightshift", "snapshot")
    assert digests(first.folder) == before
    assert UP_TO_DATE in first.type("dvc", "status")


def test_a_second_clone_pulls_everything_and_has_nothing_to_compute(
    first: Checkout, second: Checkout
) -> None:
    # The base and the registry are only on the machine of the first clone.
    shutil.rmtree(first.folder.with_name("base"))
    second.type("dvc", "pull")
    output = second.type("dvc", "repro")
    for stage in read_stages(second.folder / "dvc.yaml"):
        assert f"Stage '{stage}' didn't change, skipping" in output
    assert UP_TO_DATE in second.type("dvc", "status")
    assert tree_digest(second.folder / "data") == tree_digest(first.folder / "data")
    assert (second.folder / "data/champion/model/adapter_config.json").is_file()
    assert not (second.folder / ".nightshift").exists()
    assert not (second.folder / ".dvc/remote").exists()


def test_the_first_clone_pulls_what_the_second_computed(first: Checkout, second: Checkout) -> None:
    set_params(second.folder, "gate", n_resamples=9999)
    output = second.type("dvc", "repro")
    assert "Running stage 'gate'" in output
    assert "Running stage 'evaluate'" not in output
    second.type("dvc", "push")
    second.type(*GIT, "commit", "-qam", "another gate")
    first.type("git", "pull", "-q", str(second.folder))
    first.type("dvc", "pull")
    assert "Stage 'gate' didn't change, skipping" in first.type("dvc", "repro")
    assert tree_digest(first.folder / "data") == tree_digest(second.folder / "data")


def test_a_snapshot_with_another_registry_warns_that_the_champion_is_gone(second: Checkout) -> None:
    output = second.type("nightshift", "snapshot")
    assert "data/champion/champion.json: version 1 was the champion, but this registry has none" in output
    second.type("git", "checkout", "dvc.lock")
    second.type("dvc", "checkout", "--force", "data/champion")
    assert UP_TO_DATE in second.type("dvc", "status")


def test_a_damaged_file_in_the_remote_is_neither_pulled_nor_restored(
    first: Checkout, second: Checkout
) -> None:
    digest = md5(first.folder / "data/raw/elements/000001.jsonl")
    name = f"files/md5/{digest[:2]}/{digest[2:]}"
    stored = first.folder.parent / "remote" / name
    stored.chmod(0o600)
    stored.write_bytes(stored.read_bytes().replace(b"Gold", b"Lead"))
    third = Checkout(first.folder.with_name("third"), second.environment)
    first.type("git", "clone", "-q", str(first.folder), str(third.folder))
    third.type("dvc", "pull", code=1)
    assert not (third.folder / "data/raw").exists()
    shutil.rmtree(third.folder / ".dvc/cache")
    output = third.type("dvc", "repro", "snapshot", code=255)
    assert "a file there is damaged; replace it with the file of the same name" in output
    # As the message says. `dvc push` does not look again at what it once pushed.
    assert name in third.type("dvc", "pull", "-v", "data/raw", code=1)
    shutil.copy(first.folder / ".dvc/cache" / name, stored)
    third.type("dvc", "pull")
    assert UP_TO_DATE in third.type("dvc", "status")


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
