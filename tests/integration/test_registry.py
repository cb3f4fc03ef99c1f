"""Register, promote and roll back against a real MLflow: reload, expected champion, record, drill."""

import io
import os
import re
import shlex
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from infra.cli import benchmarks
from infra.cli.reproduce import rebuild
from nightshift.core.errors import ConfigError, GateError
from nightshift.core.files import file_digest, read_json, read_rows, tree_digest, write_json, write_rows
from nightshift.data.schemas import ALL_SCORES
from nightshift.raw.options import SourceOptions, write_options
from nightshift.raw.versions import Versions, write_versions
from nightshift.registry import lineage, versions
from nightshift.registry.bases import is_base, kept_place
from nightshift.registry.lineage import write_lineage
from nightshift.registry.record import PREFIX, Record, open_record, tag
from nightshift.tracking.runs import experiment_id, tracking_uri
from tasks import forget, promote, register
from tasks.evaluate.__main__ import best_scores
from tasks.pack import ROWS
from tests.helpers.checkouts import BIN, ROOT

DATABASE = Path(".nightshift/mlflow.db")
# Right answers of ten of each candidate.
RIGHT = {1: 6, 2: 4, 3: 8}


def adapter(seed: int) -> Path:
    """Return the path of an adapter that can become the candidate."""
    return Path("adapters") / str(seed) / "model"


def make_checkout(folder: Path, base: Path) -> None:
    """Create a folder as it is after the gate, with three candidate adapters."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    digests = {"data/benchmarks": f"{'c' * 32}.dir", "data/raw": f"{'a' * 32}.dir"}
    outs = [{"path": path, "md5": digest} for path, digest in digests.items()]
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"snapshot": {"outs": outs}}}))
    write_json(
        folder / "data/raw/digests.json", {"facts/000001.jsonl": "a" * 64, "facts/000002.jsonl": "b" * 64}
    )
    write_json(folder / "data/raw/used.json", ["facts"])
    (folder / "data/benchmarks/facts").mkdir(parents=True)
    (folder / "data/benchmarks/facts/task.yaml").write_text("kind: generation\n")
    write_summaries(folder / "data")
    shutil.copytree(base, folder / "data/base/model")
    files = {p.name: file_digest(p) for p in (folder / "data/base/model").iterdir()}
    write_json(folder / "data/base/base.json", {"model": "tiny", "dtype": "float32", "files": files})
    write_json(folder / "data/start/start.json", {})
    for seed in (1, 2, 3):
        # Weights that change the answer, as training would.
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / adapter(seed))


def write_summaries(data: Path) -> None:
    """Write the outputs that lineage reads: two packed rows of three examples, one a paraphrase."""
    empty: dict[str, Any] = {"input_ids": [1], "labels": [1], "seq_lengths": [1]}
    rows = [
        {
            "example_ids": ["e1", "e2"],
            "origins": ["facts/000001.jsonl:7", "facts/000002.jsonl:1"],
            "starts": [0, 0],
        },
        {"example_ids": ["p1"], "origins": ["facts/000001.jsonl:7"], "starts": [0]},
    ]
    write_rows(data / "pack" / "train.parquet", [{**empty, **row} for row in rows], ROWS)
    summary = {"rows_in": 4, "added": 0, "rows_out": 3, "dropped": {"duplicate": 1}}
    write_json(data / "dedupe" / "summary.json", summary)


def candidate(seed: int) -> str:
    """Put an adapter where training would write it and return its digest."""
    target = Path("data/sft/model")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter(seed), target)
    client = MlflowClient(tracking_uri())
    run = client.create_run(experiment_id(client))
    write_json(Path("data/sft/mlflow_run.json"), {"run_id": run.info.run_id})
    write_json(Path("data/sft/effective.json"), {"num_processes": {"requested": "auto", "effective": 2}})
    return tree_digest(target)


def evaluated(seed: int) -> None:
    """Write the scores of a candidate, and of the best champion so far."""
    same = {"model": "candidate", "benchmark": "facts", "status": "ok", "question": "?", "expected": "!"}
    right = RIGHT[seed]
    rows: list[Any] = [{**same, "item": str(i), "score": float(i < right), "answer": "x"} for i in range(10)]
    rows += [{"model": "best", **row} for row in best_scores(rows)]
    write_rows(lineage.SCORES, rows, ALL_SCORES)


def night(seed: int, verdict: str = "promote") -> dict[str, Any]:
    """Train a candidate, evaluate and register it, and apply the gate's verdict."""
    candidate(seed)
    champion()
    evaluated(seed)
    write_json(register.GATE, {"verdict": verdict, "reason": "better"})
    register.main()
    promote.apply_verdict()
    outcome: dict[str, Any] = read_json(promote.OUTCOME)
    return outcome


def champion() -> dict[str, object]:
    """Return the champion as the next night sees it."""
    versions.write_champion(Path("data/champion"))
    found: dict[str, object] = read_json(Path("data/champion/champion.json"))
    return found


def alias(name: str) -> int | None:
    """Return the version that an alias points to, or None."""
    found = versions.find_alias(*versions.open_registry(), name)
    return int(found.version) if found else None


def record() -> Record:
    """Return the verified record of promotions."""
    return open_record(*versions.open_registry())


@pytest.fixture(scope="module")
def two_nights(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Create a checkout in which version 1, then 2, became champion and version 3 is registered."""
    folder = tmp_path_factory.mktemp("registry")
    make_checkout(folder, tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("NIGHTSHIFT_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        assert champion() == {"version": None, "digest": None, "base": None, "arrival": None, "best": {}}
        first = candidate(1)
        assert night(1) == {"promoted": True, "waits": None}
        base = read_json(Path("data/base/base.json"))
        base["kept"] = kept_place("nightshift", base["files"])
        task = file_digest(Path("data/benchmarks/facts/task.yaml"))
        known = {"base": base, "arrival": 2, "best": {"facts": {"version": 1, "task": task}}}
        assert champion() == {"version": 1, "digest": first, **known}
        assert is_base(Path(".nightshift") / base["kept"], base["files"])
        assert tree_digest(Path("data/champion/model")) == first
        # A held candidate is registered and changes nothing for the next night.
        assert night(2, "hold") == {"promoted": False, "waits": None}
        second = candidate(2)
        assert champion() == {"version": 1, "digest": first, **known}
        promote.move(2, "promote", "by hand")
        # Version 1 had more right answers than version 2, and stays what the next candidate is compared with.
        assert champion() == {"version": 2, "digest": second, **known}
        assert sum(row["score"] for row in read_rows(Path("data/champion/best.parquet"))) == RIGHT[1]
        assert night(3, "hold") == {"promoted": False, "waits": None}
        # The same adapter is registered once and keeps its version.
        register.main()
        assert read_json(register.VERSION)["version"] == 3
    return folder


@pytest.fixture
def checkout(in_tmp: Path, two_nights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the checkout with its own registry."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("data", "adapters", ".nightshift/mlflow-artifacts"):
        shutil.copytree(two_nights / name, in_tmp / name)
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        shutil.copy(two_nights / name, in_tmp)
    shutil.copy(two_nights / DATABASE, DATABASE)
    return in_tmp


@pytest.mark.usefixtures("checkout")
def test_each_promotion_is_recorded_and_keeps_the_previous_champion() -> None:
    assert (alias("champion"), alias("previous-champion"), alias("candidate")) == (2, 1, 3)
    assert [(entry.action, entry.before, entry.champion, entry.reason) for entry in record().entries] == [
        ("promote", None, 1, "gate: better"),
        ("promote", 1, 2, "by hand"),
    ]


@pytest.mark.usefixtures("checkout")
def test_a_rollback_restores_the_same_adapter_and_holds_automatic_promotion() -> None:
    done = subprocess.run(
        [str(BIN / "nightshift"), "rollback", "--reason", "answers in rhymes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    restored = champion()["digest"]
    assert restored == tree_digest(Path("data/champion/model")) == tree_digest(adapter(1))
    assert (alias("champion"), alias("previous-champion")) == (1, 2)
    outcome = night(3)
    assert (outcome["promoted"], outcome["waits"][:30]) == (False, "automatic promotion is on hold")
    assert (alias("champion"), alias("challenger")) == (1, 3)
    promote.release_hold("the cause is found")
    assert night(2) == {"promoted": False, "waits": "version 2 was rolled back before"}
    assert night(3) == {"promoted": True, "waits": None}
    assert (alias("champion"), alias("previous-champion"), alias("challenger")) == (3, 1, None)
    actions = [entry.action for entry in record().entries]
    assert actions == ["promote", "promote", "rollback", "acknowledge", "promote"]


@pytest.mark.usefixtures("checkout")
def test_edited_missing_and_added_record_entries_are_detected() -> None:
    client, name = versions.open_registry()
    promote.release_hold("a third entry")
    tags = dict(client.get_registered_model(name).tags)
    lines = {key: text for key, text in tags.items() if key.startswith(PREFIX)}
    assert len(lines) == 3
    for key, text in lines.items():
        client.set_registered_model_tag(name, key, text.replace('"reason": "', '"reason": "not '))
        with pytest.raises(GateError, match="the record of nightshift is broken"):
            promote.move(1, "promote", "over a broken record")
        client.delete_registered_model_tag(name, key)
        with pytest.raises(GateError, match="the record of nightshift is broken"):
            record()
        client.set_registered_model_tag(name, key, text)
    client.set_registered_model_tag(name, tag(4), text)
    with pytest.raises(GateError, match=r"broken before nightshift\.promotion\.00004"):
        record()
    assert alias("champion") == 2


def test_a_version_of_a_workspace_needs_no_base_in_its_checkout(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first runs of a new checkout may be those of deployments, which leave no base in it."""
    monkeypatch.setattr(register, "checkout", lambda: tmp_path_factory.mktemp("new"))
    shutil.rmtree(".nightshift/bases", ignore_errors=True)
    base = read_json(Path("data/base/base.json"))
    write_json(Path("data/base/model/generation_config.json"), {"do_sample": False})
    base["files"]["generation_config.json"] = file_digest(Path("data/base/model/generation_config.json"))
    write_json(Path("data/base/base.json"), base)
    assert night(2, "hold") == {"promoted": False, "waits": None}
    # The workspace is removed.
    shutil.rmtree("data/base/model")
    waiting = alias("candidate")
    assert waiting == 4
    promote.move(1, "rollback", "while a candidate on another base waits")
    with versions.open_model(versions.find_version(*versions.open_registry(), waiting)) as (folder, _):
        assert is_base(folder, base["files"])
    promote.move(waiting, "promote", "by hand")
    assert alias("champion") == waiting


@pytest.mark.usefixtures("checkout")
def test_an_alias_moved_outside_nightshift_is_recorded() -> None:
    client, name = versions.open_registry()
    client.set_registered_model_alias(name, "champion", "1")
    promote.move(2, "promote", "back to the right one")
    found = record().entries[-2:]
    assert [(entry.action, entry.champion) for entry in found] == [("outside", 1), ("promote", 2)]
    assert found[0].reason == "found at version 1, expected 2"


@pytest.mark.usefixtures("checkout")
def test_of_two_concurrent_promotions_one_fails() -> None:
    _, name = versions.open_registry()
    with promote.promotion_lock(name), pytest.raises(GateError, match="is being moved by another process"):
        promote.move(1, "rollback", "too late")
    assert alias("champion") == 2


def test_a_version_that_needs_approval_gets_the_alias_challenger(checkout: Path) -> None:
    params = checkout / "params.yaml"
    shipped = params.read_text()
    params.write_text(shipped.replace("approval: auto", "approval: manual"))
    assert night(3, "hold") == {"promoted": False, "waits": None}
    assert night(3) == {"promoted": False, "waits": "registry.approval is manual"}
    assert (alias("champion"), alias("challenger")) == (2, 3)
    params.write_text(shipped.replace("approval: auto", "approval: manual_if_hold"))
    assert night(1, "hold") == {"promoted": False, "waits": "registry.approval is manual_if_hold"}
    assert (alias("champion"), alias("challenger")) == (2, 1)
    assert night(2, "hold") == {"promoted": False, "waits": None}
    assert len(record().entries) == 2


@pytest.mark.usefixtures("checkout")
def test_a_version_that_changed_since_registration_is_not_promoted() -> None:
    client, name = versions.open_registry()
    client.set_model_version_tag(name, "1", versions.ANSWERS, "0" * 16)
    with pytest.raises(GateError, match="differ from those at registration"):
        promote.move(1, "rollback", "a version that changed")
    client.set_model_version_tag(name, "1", versions.DIGEST, "0" * 16)
    with pytest.raises(GateError, match="version 1 of nightshift contains an adapter with digest"):
        promote.move(1, "rollback", "an adapter that changed")
    with pytest.raises(GateError, match="nightshift has no version 9"):
        promote.move(9, "promote", "a number mistyped")
    assert (alias("champion"), len(record().entries)) == (2, 2)


@pytest.mark.usefixtures("checkout")
def test_a_champion_that_changed_since_the_gate_stops_the_promotion() -> None:
    with pytest.raises(GateError, match="champion of nightshift is version 2, but the gate compared with 1"):
        promote.move(3, "promote", "gate", expected=1)
    assert (alias("champion"), len(record().entries)) == (2, 2)


def test_the_scores_in_a_lineage_have_no_text_of_a_test_example(checkout: Path) -> None:
    same = {"model": "candidate", "item": "a1", "status": "ok", "score": 2.5, "tokens": 4}
    texts = {"question": "Who is Ann?", "expected": "Ann is 40.", "answer": "Ann is 41."}
    rows = [{**same, **texts, "benchmark": name} for name in ("facts", "test", "test_answers")]
    write_rows(lineage.SCORES, rows, ALL_SCORES)
    write_lineage(checkout / "new")
    kept, *found = read_rows(checkout / "new" / "scores.parquet")
    assert {key: kept[key] for key in texts} == texts
    assert [(row["benchmark"], row["item"], row["score"]) for row in found] == [
        ("test", "a1", 2.5),
        ("test_answers", "a1", 2.5),
    ]
    assert [{row[key] for key in texts} for row in found] == [{None}, {None}]


def test_the_answers_of_the_last_candidates_are_shown_by_item(checkout: Path) -> None:
    assert checkout.is_dir()
    console = Console(width=160, record=True, file=io.StringIO())
    benchmarks.show(console, "", 30)
    # Versions 1 to 3 have 6, 4 and 8 right answers of ten, the same items first.
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["facts", "10", "60.0%", "80.0%", "2", "4", "2"] in lines
    assert lines[-1][:2] == ["3", "candidate(s);"]
    benchmarks.show(console, "facts", 30)
    text = console.export_text()
    assert "never right (too hard, or its reference answer is wrong):" in text
    assert "always right (tells no candidate from another): 4 items" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["8", "?", "!", "0", "0", "0"] in lines
    assert ["4", "?", "!", "1", "0", "1"] in lines
    with pytest.raises(ConfigError, match="gone: the last version has no scores on it; benchmarks: facts"):
        benchmarks.show(console, "gone", 30)


def test_a_version_that_was_just_loaded_in_this_flow_run_is_not_loaded_again(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout.is_dir()
    config = checkout / adapter(3) / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "night-7")
    candidate(3)
    evaluated(3)
    write_json(register.GATE, {"verdict": "promote", "reason": "better"})
    champion()
    register.main()
    version = read_json(register.VERSION)["version"]
    loaded: list[str] = []

    def load(uri: str) -> list[str]:
        loaded.append(uri)
        raise GateError("not again")

    monkeypatch.setattr(promote, "start_probes", lambda _: nullcontext(load))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "night-8")
    with pytest.raises(GateError, match="not again"):
        promote.apply_verdict()
    assert (alias("champion"), len(loaded)) == (2, 1)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "night-7")
    promote.apply_verdict()
    assert (alias("champion"), len(loaded)) == (version, 1)
    # A version of an earlier night is loaded again, even in this one.
    register.main()
    assert read_json(register.VERSION) == {"version": version, "proven_in": None}


def test_a_model_that_cannot_be_reloaded_moves_no_alias(checkout: Path) -> None:
    base = checkout / "data/base/base.json"
    base_record = read_json(base)
    base_record["files"]["config.json"] = "0" * 64
    write_json(base, base_record)
    config = checkout / adapter(1) / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    candidate(1)
    client, name = versions.open_registry()
    before = [version.version for version in client.search_model_versions(f"name = '{name}'")]
    with pytest.raises(GateError, match="not the base that this adapter was trained on"):
        register.main()
    assert alias("candidate") == 3
    after = [version.version for version in client.search_model_versions(f"name = '{name}'")]
    assert after == before


def test_registration_loads_the_model_once_here_and_once_in_a_fresh_process(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def count(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments)
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", count)
    config = checkout / adapter(1) / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    candidate(1)
    register.main()
    assert len(loaded) == 1
    assert alias("candidate") == read_json(register.VERSION)["version"]


def test_a_model_from_elsewhere_is_adopted_and_the_next_night_is_judged_against_it(checkout: Path) -> None:
    shutil.copytree(adapter(3), checkout / "production")
    config = checkout / "production" / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    (checkout / "production" / "optimizer.pt").write_text("not taken")
    with pytest.raises(ConfigError, match="--reason is required"):
        register.main(checkout / "production", " ")
    register.main(checkout / "production", "in use since May")
    promote.move(read_json(register.VERSION)["version"], "promote", "adopted: in use since May")
    # How good it is elsewhere, and what it was trained on, is not known.
    found = champion()
    assert (found["version"], found["arrival"], found["best"]) == (4, None, {})
    assert read_rows(Path("data/champion/best.parquet")) == []
    assert {path.name for path in Path("data/champion/model").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert record().entries[-1].reason == "adopted: in use since May"
    with pytest.raises(GateError, match="production is already version 4 of nightshift"):
        register.main(checkout / "production", "again")
    shown = subprocess.run(
        [str(BIN / "nightshift"), "trace", "4"],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"adopted from +\S*/production", shown)
    with pytest.raises(GateError, match="version 4 was adopted from"):
        rebuild(Console(quiet=True), 4)


@pytest.mark.usefixtures("checkout")
def test_the_documented_commands_of_the_registry_work_as_printed() -> None:
    """The commands in the tables of docs/operations.md, in order; 7 means any version."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    tables = re.search(r"^## Promotion and rollback\n.*?^## Forgetting", text, re.MULTILINE | re.DOTALL)
    assert tables
    commands = re.findall(r"^\|.*`(nightshift [^`]+)` ?(?:\(|,|\|)", tables[0], re.MULTILINE)
    assert [command.split()[1] for command in commands] == [
        *("history", "rollback", "acknowledge", "promote", "trace", "trace", "reproduce"),
    ]
    # `reproduce` needs a commit of this project; it has tests of its own.
    for command in commands[:-1]:
        words = ["3" if word == "7" else word for word in shlex.split(command)]
        done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
    assert alias("champion") == 3
    assert [entry.action for entry in record().entries[-3:]] == ["rollback", "acknowledge", "promote"]


@pytest.mark.usefixtures("checkout")
def test_trace_shows_the_data_of_a_version_and_the_versions_of_a_row() -> None:
    def trace(*arguments: str, code: int = 0) -> str:
        command = [str(BIN / "nightshift"), "trace", *arguments]
        wide = {**os.environ, "COLUMNS": "160"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=wide)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    version = trace("2")
    assert tree_digest(adapter(2)) in version
    assert re.search(r"facts/000001.jsonl +a{16} +2\b", version)
    assert re.search(r"facts/000002.jsonl +b{16} +1\b", version)
    assert re.search(r"dedupe +4 +0 +3 +duplicate 1\b", version)
    assert "by hand" in version
    assert "approval: auto" in version
    by_line = trace("--row", "facts/000001.jsonl:7")
    assert [line.split() for line in by_line.splitlines()[2:]] == [
        ["1", "previous-champion", "e1", "facts/000001.jsonl:7"],
        ["1", "previous-champion", "p1", "facts/000001.jsonl:7"],
        ["2", "champion", "e1", "facts/000001.jsonl:7"],
        ["2", "champion", "p1", "facts/000001.jsonl:7"],
        ["3", "candidate", "e1", "facts/000001.jsonl:7"],
        ["3", "candidate", "p1", "facts/000001.jsonl:7"],
    ]
    assert len(trace("--row", "e2").splitlines()) == 5
    assert "no version of nightshift was trained on e9" in trace("--row", "e9")
    assert "nightshift has no version 9" in trace("9", code=2)
    assert "needs either a version or --row" in trace(code=2)


@pytest.mark.usefixtures("checkout")
def test_forgetting_a_row_lists_the_versions_trained_on_it() -> None:
    client, name = versions.open_registry()
    assert forget.find(["e2"], client, name) == forget.Affected(["facts/000002.jsonl:1"], {1: 1, 2: 1, 3: 1})
    # A paraphrase belongs to the row of its parent.
    assert forget.find(["p1"], client, name) == forget.Affected(["facts/000001.jsonl:7"], {1: 2, 2: 2, 3: 2})
    client.set_model_version_tag(name, "1", versions.FORGOTTEN, "2")
    with pytest.raises(GateError, match="2 examples of version 1 were forgotten, so its training data"):
        rebuild(Console(), 1)


@pytest.mark.usefixtures("checkout")
def test_reproducing_a_version_older_than_the_snapshot_stage_reports_the_commit() -> None:
    client, name = versions.open_registry()
    lineage = Path("older/artifacts/lineage")
    write_json(lineage / "lineage.json", {"code": "c0ffee"})
    (lineage / "dvc.lock").write_text("stages: {ingest: {outs: []}}")
    client.create_model_version(name, str(Path("older").absolute()), tags={versions.DIGEST: "d"})
    with pytest.raises(GateError, match="run `git checkout c0ffee`, then `nightshift reproduce 4`"):
        rebuild(Console(), 4)


@pytest.mark.usefixtures("checkout")
def test_the_lineage_lists_the_used_shards_and_the_data_digest_depends_on_them() -> None:
    digest = register.data_digest()
    write_json(Path("data/raw/used.json"), ["facts", "more"])
    assert register.data_digest() != digest
    digest = register.data_digest()
    write_versions(Path("data/raw"), {"facts": Versions({}, export=["facts/000002.jsonl"])})
    assert register.data_digest() != digest
    write_lineage(Path("written"))
    assert [one["shard"] for one in read_json(Path("written/lineage.json"))["shards"]] == [
        "facts/000002.jsonl"
    ]
    Path("data/raw/versions.json").unlink()
    digest = register.data_digest()
    write_options(Path("data/raw"), {"facts": SourceOptions(weight=2)})
    assert register.data_digest() != digest
    write_lineage(Path("written"))
    assert len(read_json(Path("written/lineage.json"))["shards"]) == 2
    write_json(Path("data/raw/used.json"), ["more"])
    write_lineage(Path("written"))
    assert read_json(Path("written/lineage.json"))["shards"] == []


def test_a_registry_without_versions_is_an_error(in_tmp: Path) -> None:
    shutil.copy(ROOT / "params.yaml", in_tmp)
    with pytest.raises(
        GateError, match="nightshift has no version yet; `nightshift run` registers the first"
    ):
        record()


@pytest.mark.usefixtures("checkout")
def test_the_verdict_error_registers_nothing() -> None:
    write_json(register.GATE, {"verdict": "error", "reason": "3 scores are not numbers"})
    with pytest.raises(GateError, match="3 scores are not numbers; nothing is registered"):
        register.main()
