"""A champion is always evaluated on the base it was trained on, even after `base.model` changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nightshift.core.errors import DataError, GateError
from nightshift.core.files import file_digest, read_json, read_rows, tree_digest, write_json, write_rows
from nightshift.data.clusters import CLUSTERS_SCHEMA
from nightshift.data.schemas import ALL_SCORES, AUGMENTED, GROUPED
from nightshift.registry import bases, versions
from nightshift.registry.served_model import find_base
from tasks import promote, register
from tasks.base import save
from tasks.evaluate import __main__ as evaluate
from tasks.gate import __main__ as gate
from tasks.report.__main__ import read_scores
from tasks.report.compare import compare, find_moves, pair
from tests.helpers.checkouts import ROOT
from tests.helpers.gate import PARAMS
from tests.helpers.sft import conversation
from tests.integration.test_evaluate import put_benchmarks
from tests.integration.test_registry import alias, candidate, make_checkout

KEPT = Path(".nightshift/bases")
Row = dict[str, Any]


def make_base(folder: Path, tokenizer: Path, seed: int) -> Path:
    """Create a model of the size of `tiny_base` with other random weights, so that adapters fit both."""
    config = LlamaConfig.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def put_base(base: Path, name: str) -> dict[str, str]:
    """Write a base to data/base as the stage does after base.model changes; return its file digests."""
    shutil.rmtree(evaluate.BASE, ignore_errors=True)
    shutil.copytree(base, evaluate.BASE)
    files = {path.name: file_digest(path) for path in sorted(evaluate.BASE.iterdir())}
    write_json(evaluate.BASE_RECORD, {"model": name, "dtype": "float32", "files": files})
    return files


def night(seed: int) -> str:
    """Run snapshot, candidate, evaluation and gate; return the candidate's digest."""
    versions.write_champion(evaluate.CHAMPION)
    digest = candidate(seed)
    evaluate.main()
    gate.main()
    return digest


def promoted(seed: int) -> int:
    """Register a candidate and make it champion; return its version."""
    versions.write_champion(evaluate.CHAMPION)
    candidate(seed)
    write_rows(evaluate.SCORES, [], ALL_SCORES)
    write_json(register.GATE, {"verdict": "promote", "reason": "better"})
    register.main()
    version = int(read_json(register.VERSION)["version"])
    promote.move(version, "promote", "by hand")
    return version


def champion_scores() -> list[tuple[str, str, float | None, str | None]]:
    """Return benchmark, item, score and answer of each champion row."""
    rows = [row for row in read_rows(evaluate.SCORES) if row["model"] == "champion"]
    return [(row["benchmark"], row["item"], row["score"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def other_bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Create two other bases."""
    root = tmp_path_factory.mktemp("bases")
    return [make_base(root / str(seed), tiny_base, seed) for seed in (7, 8)]


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Create a checkout whose champion, version 1, was trained and scored on data/base."""
    folder = tmp_path_factory.mktemp("champion")
    make_checkout(folder, tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        params = yaml.safe_load(Path("params.yaml").read_text())
        params["evaluate"] |= {"limit": None, "batch_size": 8, "retrieval": None}
        params["gate"] |= {"min_items": 2, "n_resamples": 1000, "retention": {}, "behaviour": []}
        Path("params.yaml").write_text(yaml.safe_dump(params))
        write_rows(evaluate.TEST, [conversation(i) for i in range(3)], GROUPED)
        more = {"parent_id": None, "style": None, "ordinal": None}
        write_rows(evaluate.CLEAN_TRAIN, [{**conversation(i), **more} for i in range(3, 9)], AUGMENTED)
        write_rows(evaluate.CLUSTERS, [], CLUSTERS_SCHEMA)
        put_benchmarks(evaluate.BENCHMARKS)
        put_base(tiny_base, "package:first")
        promoted(1)
        night(2)
        # Versions record this path, and no copy of the checkout may find its base here.
        shutil.rmtree(evaluate.BASE)
    return folder


@pytest.fixture
def checkout(in_tmp: Path, first_night: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the checkout with its state; MLflow's artifacts stay where they are."""
    enter(monkeypatch, in_tmp)
    shutil.copytree(first_night, in_tmp, dirs_exist_ok=True)
    put_base(tiny_base, "package:first")
    return in_tmp


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Enter a checkout with its own state."""
    patch.chdir(folder)
    patch.setenv("PYTHONPATH", str(ROOT))
    for name in ("NIGHTSHIFT_HOME", "NIGHTSHIFT_BASE", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        patch.delenv(name, raising=False)


@pytest.mark.usefixtures("checkout")
def test_a_champion_is_scored_on_its_own_base_after_base_model_changes(other_bases: list[Path]) -> None:
    before = champion_scores()
    assert len(before) == 15
    known = read_json(evaluate.CHAMPION / "champion.json")["base"]
    assert (known["model"], known["dtype"]) == ("package:first", "float32")
    assert sorted(path.name for path in (Path(".nightshift") / known["kept"]).iterdir()) == sorted(
        known["files"]
    )

    put_base(other_bases[0], "package:second")
    models = evaluate.find_models(evaluate.load_params(evaluate.EvaluateParams, "evaluate"))
    assert models["champion"].base == Path(".nightshift").absolute() / known["kept"]
    assert models["champion"].base_digest == bases.base_digest(known["files"])
    assert models["candidate"].base == models["base"].base == evaluate.BASE
    assert models["candidate"].base_digest != models["champion"].base_digest
    shutil.rmtree(".nightshift/memo")
    night(2)
    assert champion_scores() == before
    scored = {row["model"] for row in read_rows(evaluate.SCORES)}
    assert scored == {"base", "candidate", "champion"}
    assert read_json(gate.GATE)["reference"] == "champion"
    assert read_json(gate.GATE)["verdict"] != "error"


@pytest.mark.usefixtures("checkout")
def test_cached_scores_of_a_champion_are_keyed_by_its_own_base(other_bases: list[Path]) -> None:
    params = evaluate.load_params(evaluate.EvaluateParams, "evaluate")

    def keys() -> dict[str, Any]:
        return {name: evaluate.memo_files(one, params) for name, one in evaluate.find_models(params).items()}

    before = keys()
    put_base(other_bases[0], "package:second")
    after = keys()
    assert after["champion"] == before["champion"]
    assert after["candidate"] != before["candidate"]
    assert after["base"] != before["base"]


@pytest.mark.usefixtures("checkout")
def test_the_champions_adapter_on_another_base_is_a_different_model(other_bases: list[Path]) -> None:
    candidate(1)
    models = evaluate.digest_models(
        evaluate.find_models(evaluate.load_params(evaluate.EvaluateParams, "evaluate"))
    )
    assert models["candidate"] == models["champion"]
    put_base(other_bases[0], "package:second")
    models = evaluate.digest_models(
        evaluate.find_models(evaluate.load_params(evaluate.EvaluateParams, "evaluate"))
    )
    assert models["candidate"] != models["champion"]
    register.main()
    assert read_json(register.VERSION)["version"] == 2


@pytest.mark.usefixtures("checkout")
def test_a_missing_base_is_an_error_with_a_remedy_until_it_is_found(
    other_bases: list[Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(KEPT)
    put_base(other_bases[0], "package:second")
    night(2)
    decision = read_json(gate.GATE)
    assert decision["verdict"] == "error"
    assert (
        "champion: version 1 has no scores, because its base package:first (float32, digest"
        in decision["reason"]
    )
    assert "NIGHTSHIFT_BASE=FOLDER nightshift snapshot" in decision["reason"]
    assert {row["model"] for row in read_rows(evaluate.SCORES)} == {"base", "candidate"}
    gone = read_json(evaluate.CHAMPION / "champion.json")
    assert gone["base"]["kept"] is None

    with pytest.raises(GateError, match="nothing is registered"):
        register.main()
    rows = read_scores(evaluate.SCORES)
    assert [one.name for one in compare(rows, "champion", PARAMS)][-1] == "test"
    assert find_moves(pair(rows, "champion")).gains == []

    monkeypatch.setenv("NIGHTSHIFT_BASE", str(tiny_base))
    versions.write_champion(evaluate.CHAMPION)
    monkeypatch.delenv("NIGHTSHIFT_BASE")
    found = read_json(evaluate.CHAMPION / "champion.json")
    assert found != gone
    assert tree_files(Path(".nightshift") / found["base"]["kept"]) == tree_files(tiny_base)
    night(2)
    assert read_json(gate.GATE)["verdict"] != "error"


def tree_files(folder: Path) -> dict[str, str]:
    """Return file name -> digest for a folder."""
    return {path.name: file_digest(path) for path in folder.iterdir()}


@pytest.mark.usefixtures("checkout")
def test_a_damaged_kept_base_is_not_scored_and_is_restored(
    other_bases: list[Path],
) -> None:
    versions.write_champion(evaluate.CHAMPION)
    kept = Path(".nightshift") / read_json(evaluate.CHAMPION / "champion.json")["base"]["kept"]
    whole = tree_files(kept)
    (kept / "model.safetensors").unlink()
    (kept / "model.safetensors").write_bytes(b"x")
    # data/base still holds the old base.
    versions.write_champion(evaluate.CHAMPION)
    assert tree_files(kept) == whole
    put_base(other_bases[0], "package:second")
    (kept / "config.json").unlink()
    with pytest.raises(DataError, match="does not contain the base package:first of the champion, version 1"):
        evaluate.main()


@pytest.mark.usefixtures("checkout")
def test_a_rollback_restores_the_older_base_and_only_needed_bases_are_kept(
    other_bases: list[Path], tiny_base: Path
) -> None:
    first = tree_files(tiny_base)
    second = put_base(other_bases[0], "package:second")
    assert promoted(2) == 2
    assert kept_bases() == {bases.base_digest(first), bases.base_digest(second)}
    promote.roll_back(None, "answers in rhymes")
    assert alias("champion") == 1
    with versions.open_model(versions.find_model("champion")) as (base, _):
        assert tree_files(base) == first
    third = put_base(other_bases[1], "package:third")
    assert promoted(3) == 3
    assert kept_bases() == {bases.base_digest(first), bases.base_digest(third)}
    with pytest.raises(
        GateError, match=r"version 2 of nightshift: .*NIGHTSHIFT_BASE .* the base package:second"
    ):
        promote.move(2, "rollback", "its base is missing")
    assert alias("champion") == 3


def kept_bases() -> set[str]:
    """Return the digests of the bases in the state folder."""
    return {path.name for path in KEPT.glob("*/*")}


@pytest.mark.usefixtures("checkout")
def test_a_served_version_finds_its_kept_base(other_bases: list[Path], tmp_path: Path) -> None:
    put_base(other_bases[0], "package:second")
    promoted(2)
    put_base(other_bases[1], "package:third")
    reference = versions.read_reference(versions.find_model("champion"))
    write_json(tmp_path / "reference.json", reference)
    found = find_base(tmp_path / "reference.json")
    assert found == Path(reference["kept"])
    assert tree_files(found) == reference["files"]


def test_a_kept_base_is_hard_linked_and_survives_a_rerun_of_the_stage(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kept = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "state/kept"
    files = tree_files(base)
    bases.keep(base, files, kept)
    assert (base / "model.safetensors").samefile(kept / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(base)
    save(model, AutoTokenizer.from_pretrained(base), "bfloat16", base)
    assert tree_files(base) != files
    assert bases.is_base(kept, files)

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    bases.keep(kept, files, tmp_path / "copy")
    assert bases.is_base(tmp_path / "copy", files)
    assert tree_digest(tmp_path / "copy") != ""
