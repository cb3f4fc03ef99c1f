"""Datasets become sources, and commits are looked up on the Hub, which a server on loopback plays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.importers.hub import Hub, Offline, Repository
from infra.importers.sources import Dataset, find_sources, map_base, parse_split
from nightshift.core.errors import DataError
from tests.helpers.hub import COMMIT, serve_hub
from tests.helpers.hub import Hub as Server

GIVEN = "f" * 40
FILES: dict[str, dict[str, bytes]] = {
    "models/owner/base": {"config.json": b"{}"},
    "datasets/owner/one": {"default/train/0000.parquet": b"", "default/test/0000.parquet": b""},
    "datasets/owner/many": {
        "en/train/0000.parquet": b"",
        "en.noclean/train/0000.parquet": b"",
        "de/train/0000.parquet": b"",
    },
    "datasets/owner/usual": {"default/train/0.parquet": b"", "other/train/0.parquet": b""},
    "datasets/owner/large": {"default/partial-train/0000.parquet": b""},
    "datasets/owner/text": {"chats.jsonl": b""},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    refusals = {"datasets/owner/gated": (403, "GatedRepo")}
    with serve_hub(FILES, refusals) as hub:
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def paths(dataset: Dataset, hub: Any) -> list[str]:
    return [source["path"] for source in find_sources(dataset, hub)[0]]


def test_the_newest_commits_are_looked_up(server: Server) -> None:
    found = map_base("base_model", "owner/base", "", Hub())
    assert (found.kind, found.value) == ("mapped", f"hub:owner/base@{COMMIT}")
    assert "the commit of today" in found.note
    sources, note = find_sources(Dataset("owner/one"), Hub())
    assert sources == [{"path": f"hub:owner/one@{COMMIT}", "mode": "replace", "split": "train"}]
    assert "the commit of today" in note
    # The branch with Parquet files is asked first.
    assert "/api/datasets/owner/one/revision/refs%2Fconvert%2Fparquet" in server.requests


def test_a_name_selects_exactly_one_config(server: Server) -> None:
    assert paths(Dataset("owner/many", name="en"), Hub()) == [f"hub:owner/many@{COMMIT}/en/*"]
    with pytest.raises(ValueError, match=r"no config 'fr'; choose one of de, en, en.noclean"):
        paths(Dataset("owner/many", name="fr"), Hub())
    with pytest.raises(ValueError, match=r"has the configs de, en, en.noclean; choose one as `name`"):
        paths(Dataset("owner/many"), Hub())
    assert paths(Dataset("owner/usual"), Hub()) == [f"hub:owner/usual@{COMMIT}/default/*"]


def test_a_dataset_without_all_its_parquet_files_is_refused(server: Server) -> None:
    with pytest.raises(ValueError, match="too large for the branch refs/convert/parquet"):
        paths(Dataset("owner/large"), Hub())
    with pytest.raises(ValueError, match="has no Parquet files; remove the revision"):
        paths(Dataset("owner/text", revision="main"), Hub())
    expected = f"https://huggingface.co/datasets/owner/text/resolve/{COMMIT}/chats.jsonl"
    assert paths(Dataset("owner/text", files=("chats.jsonl",)), Hub()) == [expected]


def test_a_dataset_without_the_branch_is_read_on_main(server: Server) -> None:
    server.branches = (COMMIT, "main")
    assert paths(Dataset("owner/one"), Hub()) == [f"hub:owner/one@{COMMIT}"]


def test_an_unknown_or_gated_repository_is_reported_with_the_remedy(server: Server) -> None:
    hub = Hub()
    found = map_base("base_model", "owner/none", "", hub)
    assert found.is_essential
    assert "the repository does not exist or is private; correct the name, or set HF_TOKEN" in found.note
    assert "git ls-remote https://huggingface.co/owner/none HEAD" in found.note
    with pytest.raises(DataError, match="accept its terms on the Hub"):
        paths(Dataset("owner/gated"), hub)
    # The Hub answered, so others are still asked.
    assert map_base("base_model", "owner/base", "", hub).kind == "mapped"


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(*_: Any, **__: Any) -> None:
        asked.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = Hub()
    for _ in range(3):
        found = map_base("base_model", "owner/base", "", hub)
        assert "no route" in found.note
        assert "check the network, HF_ENDPOINT and HF_TOKEN" in found.note
    assert len(asked) == 1
    # A commit needs no look-up.
    found = map_base("base_model", "owner/base", GIVEN, hub)
    assert (found.value, found.kind) == (f"hub:owner/base@{GIVEN}", "mapped")
    assert found.note.startswith("not verified")


def test_the_configs_are_the_folders_with_a_folder_per_split() -> None:
    files = ("README.md", "data/train-0.parquet", "en/train/0000.parquet", "en/test/0000.parquet")
    assert Repository("a/b", COMMIT, files).list_configs() == ["en"]


@pytest.mark.parametrize("text", ["train[5:]", "train+test", "train[10%:20%]", "train[:0]"])
def test_other_slices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not supported|has no rows"):
        parse_split(text)


def test_local_files_need_no_commit(in_tmp: Path) -> None:
    Path("own/chats").mkdir(parents=True)
    Path("own/chats/train.jsonl").write_text("{}\n")
    assert find_sources(Dataset("own/chats", split="train[:5]"), Offline())[0] == [
        {"path": "own/chats", "mode": "replace", "split": "train", "limit": 5}
    ]
    # A single file has no splits.
    assert find_sources(Dataset("own/chats/train.jsonl"), Offline())[0] == [
        {"path": "own/chats/train.jsonl", "mode": "replace"}
    ]
    assert paths(Dataset("json", files=("a.jsonl", "b.json.gz")), Offline()) == ["a.jsonl", "b.json.gz"]
    assert paths(Dataset("gcs://bucket/a.jsonl"), Offline()) == ["gs://bucket/a.jsonl"]
    for path in ("notes.docx", "own"):
        Path("own/chats/train.jsonl").unlink(missing_ok=True)
        with pytest.raises(ValueError, match="no file that ingest can read"):
            paths(Dataset(path), Offline())
    assert map_base("base_model", "./own", "", Offline()).value == "./own"
