"""A row is forgotten in a real checkout: gone from every DVC file, and not ingested again."""

import html
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient

from nightshift.core.files import read_rows
from nightshift.pipeline.leases import lease
from tests.helpers.checkouts import Checkout, make_checkout

pytestmark = pytest.mark.timeout(300)
SECRET = "Zephyrine Quillfeather"


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a conversation of two turns."""
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS = [
    chat("Which animal barks at night?", "The dog next door, and a fox now and then."),
    chat("Who lives in the old mill by the river?", f"{SECRET} lives in the old mill by the river bend."),
    chat("How do I get to the mill?", "Follow the river to the bend."),
    chat("Who lives in the old mill by the river?", f"{SECRET} lives in the old mill by the river bend!"),
]


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Checkout:
    """Create a checkout with examples and their duplicates, also pushed to a remote.

    A second source repeats a row of the first. It was used once, then removed, and is configured again.
    """
    folder = make_checkout(tmp_path_factory.mktemp("forget") / "checkout", tiny_base)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "other.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    made = Checkout(folder, clean_environment | {"COLUMNS": "160"})
    mine, both = {"mine": "mine.jsonl"}, {"mine": "mine.jsonl", "other": "other.jsonl"}
    for sources in (both, mine):
        params["snapshot"]["sources"] = sources
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        made.type("dvc", "repro", "--quiet", "dedupe")
        made.type("dvc", "push", "--quiet")
    params["snapshot"]["sources"] = both
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return made


def places(folder: Path, text: str) -> Iterator[str]:
    """Yield the files of a checkout that contain a text, in any format, except the user's own files."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in ("mine.jsonl", "other.jsonl") or ".git" in path.parts:
            continue
        content = path.read_bytes()
        if content[:4] == b"PAR1":
            content = json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False, default=str).encode()
        if text.encode() in content:
            yield path.relative_to(folder).as_posix()


def log_page(folder: Path, client: MlflowClient, row: dict[str, Any]) -> str:
    """Log a report that shows a row, as an earlier night would have."""
    page = folder / "report.html"
    page.write_text("<p>" + "</p><p>".join(html.escape(turn["content"]) for turn in row["messages"]))
    found = client.get_experiment_by_name("nightshift")
    experiment = (
        found.experiment_id if found else client.create_experiment("nightshift", "mlflow-artifacts:/")
    )
    run_id: str = client.create_run(experiment).info.run_id
    client.log_artifact(run_id, str(page))
    page.unlink()
    return run_id


def test_a_forgotten_row_is_erased_everywhere_and_does_not_return(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(checkout.folder / ".nightshift"))
    client = MlflowClient(f"sqlite:///{checkout.folder / '.nightshift' / 'mlflow.db'}")
    pages = [log_page(checkout.folder, client, ROWS[number]) for number in (0, 1)]
    # What a failed night left, and the newest report.
    for name in ("workspaces/2026-01-31-00000001/data", "damaged"):
        shutil.copytree(checkout.folder / "data/raw", checkout.folder / ".nightshift" / name)
    (checkout.folder / ".nightshift/report.html").write_text(SECRET)
    found = list(places(checkout.folder, SECRET))
    assert "data/raw/mine/000001.jsonl" in found
    assert "data/ingest/examples.parquet" in found
    assert any(name.startswith(".dvc/cache") for name in found)
    assert any(name.startswith(".dvc/remote") for name in found)
    before = {row["origin"]: row["id"] for row in read_rows(checkout.folder / "data/ingest/examples.parquet")}
    # The row is given by its id. Its near-duplicate would replace it and is removed too.
    output = checkout.type("nightshift", "forget", before["mine/000001.jsonl:2"], "--yes")
    origins = ["mine/000001.jsonl:2", "mine/000001.jsonl:4", "other/000002.jsonl:1"]
    assert output.splitlines()[:3] == origins
    assert list(places(checkout.folder, SECRET)) == []
    # DVC has recorded the erased shards; snapshot has not yet run with the current parameters.
    status = checkout.type("dvc", "status", "snapshot")
    assert "modified:           snapshot" in status
    assert "data/raw" not in status
    assert [len(client.list_artifacts(run_id)) for run_id in pages] == [1, 0]

    # The source offers the same file again, then a file with one more line.
    checkout.type("nightshift", "snapshot")
    assert [path.name for path in (checkout.folder / "data/raw/mine").iterdir()] == ["000001.jsonl"]
    assert [path.name for path in (checkout.folder / "data/raw/other").iterdir()] == ["000002.jsonl"]
    with (checkout.folder / "mine.jsonl").open("a") as file:
        file.write(json.dumps(chat("And who keeps the bees?", "The sisters at the end of the lane.")) + "\n")
    output = checkout.type("nightshift", "snapshot")
    assert "data/raw/mine/000003.jsonl: 2 previously forgotten rows arrived again" in output
    shards = sorted(path.name for path in (checkout.folder / "data/raw/mine").iterdir())
    assert shards == ["000001.jsonl", "000003.jsonl"]
    checkout.type("dvc", "repro", "--quiet", "ingest")
    after = {row["origin"]: row["id"] for row in read_rows(checkout.folder / "data/ingest/examples.parquet")}
    assert {origin: after.get(origin) for origin in before} == {
        "mine/000001.jsonl:1": before["mine/000001.jsonl:1"],
        "mine/000001.jsonl:2": None,
        "mine/000001.jsonl:3": before["mine/000001.jsonl:3"],
        "mine/000001.jsonl:4": None,
    }
    assert after["mine/000003.jsonl:5"]
    assert "other/000002.jsonl:1" not in after
    assert list(places(checkout.folder, SECRET)) == []


def test_an_unknown_row_is_an_error_and_answering_no_changes_nothing(checkout: Checkout) -> None:
    wrong = checkout.type("nightshift", "forget", "mine/000009.jsonl:1", "--yes", code=2)
    assert "mine/000009.jsonl:1: no example with this id and no row at this origin" in wrong
    before = (checkout.folder / "dvc.lock").read_bytes()
    checkout.type("nightshift", "forget", "mine/000001.jsonl:1", code=1)
    assert (checkout.folder / "dvc.lock").read_bytes() == before


def test_nothing_is_forgotten_while_a_run_is_active(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(checkout.folder / ".nightshift"))
    with lease("00000001-x"):
        output = checkout.type("nightshift", "forget", "mine/000001.jsonl:1", "--yes", code=2)
    assert "run 00000001-x is active; wait for it" in output
