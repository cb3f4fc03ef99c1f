"""Remote sources: an object store, the Hub and a database, each real and on this machine."""

import io
import logging
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightshift.core.errors import ConfigError, DataError
from nightshift.core.memo import Memo
from tasks.snapshot.__main__ import write_shards
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.database import query_offer
from tasks.snapshot.sources.locations import read_offers
from tasks.snapshot.sources.stores import explain_store_errors, remote_offers
from tests.helpers.checkouts import ROOT
from tests.helpers.hub import COMMIT, serve_hub


def contents(location: Any) -> list[tuple[str, bytes]]:
    return [(offer.suffix, b"".join(offer.chunks)) for offer in read_offers(location)]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """Create a bucket on a local S3 server on a free port and point the environment to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="chats")
        yield client
    server.stop()


def test_objects_of_a_bucket_are_read_by_glob_and_by_name(bucket: Any, tmp_path: Path) -> None:
    large = b"".join(b'{"text": "%d"}\n' % i for i in range(500_000))
    for key, body in (("n/b.jsonl", b"2\n"), ("n/a.jsonl.gz", b"1"), ("n/x.txt", b"x"), ("big.jsonl", large)):
        bucket.put_object(Bucket="chats", Key=key, Body=body)
    assert contents("s3://chats/n/*.jsonl*") == [(".jsonl.gz", b"1"), (".jsonl", b"2\n")]
    # More than one chunk of 4 MiB.
    (shard,) = write_shards("s", read_offers("s3://chats/big.jsonl"), tmp_path)
    assert shard.read_bytes() == large
    assert write_shards("s", read_offers("s3://chats/big.jsonl"), tmp_path) == []


def test_a_missing_bucket_is_an_error_with_the_location(bucket: Any) -> None:
    for name in ("a.jsonl", "*.jsonl"):
        with pytest.raises(DataError) as caught:
            contents(f"s3://nowhere/{name}")
        assert f"s3://nowhere/{name}: there is no bucket 'nowhere'; correct the name" in str(caught.value)
    with pytest.raises(DataError, match=r"s3://chats/none-\*\.jsonl matches no file"):
        contents("s3://chats/none-*.jsonl")


def test_of_a_folder_of_a_bucket_all_readable_objects_are_read(
    bucket: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.create_bucket(Bucket="tree")
    for key in (
        "f/b/2.jsonl",
        "f/a.jsonl",
        "f/README.md",
        "f/.hidden/x.jsonl",
        "f/dataset_info.json",
        "g/c.csv",
    ):
        bucket.put_object(Bucket="tree", Key=key, Body=key.encode())
    for location in ("s3://tree/f", "s3://tree/f/", "s3://tree/f*"):
        caplog.clear()
        found = list(read_offers(location))
        prefix = "f/" if location.endswith("*") else ""
        assert [offer.name for offer in found] == [f"{prefix}a.jsonl", f"{prefix}b/2.jsonl"]
        assert [b"".join(offer.chunks) for offer in found] == [b"f/a.jsonl", b"f/b/2.jsonl"]
        (warning,) = (one.getMessage() for one in caplog.records if one.name.startswith("tasks."))
        assert warning.endswith("1 file(s) are not data and are ignored: tree/f/README.md")
    assert [offer.name for offer in read_offers("s3://tree")] == ["f/a.jsonl", "f/b/2.jsonl", "g/c.csv"]


def test_an_object_that_exists_is_that_object_whatever_it_is_called(bucket: Any) -> None:
    for key in ("odd/a[1].jsonl", "odd/a1.jsonl"):
        bucket.put_object(Bucket="chats", Key=key, Body=key.encode())
    assert contents("s3://chats/odd/a[1].jsonl") == [(".jsonl", b"odd/a[1].jsonl")]
    assert contents("s3://chats/odd/a?1].jsonl") == [(".jsonl", b"odd/a[1].jsonl")]


def test_the_splits_of_a_bucket_are_told_apart(bucket: Any) -> None:
    for key in ("splits/train/0.jsonl", "splits/test/0.jsonl"):
        bucket.put_object(Bucket="chats", Key=key, Body=key.encode())
    with pytest.raises(DataError, match="s3://chats/splits has the splits test, train; set `split: train`"):
        contents("s3://chats/splits")
    assert [offer.name for offer in read_offers("s3://chats/splits", "train")] == ["train/0.jsonl"]


def test_an_object_that_did_not_change_is_not_downloaded_again(bucket: Any, tmp_path: Path) -> None:
    def take_in() -> int:
        offers = [replace(offer, chunks=counted(offer.chunks)) for offer in read_offers("s3://chats/again/*")]
        with Memo("sources", {}, tmp_path / "memo") as memo:
            return len(write_shards("s", offers, tmp_path / "raw", memo=memo))

    def counted(chunks: Any) -> Iterator[bytes]:
        read.append(1)
        yield from chunks

    read: list[int] = []
    bucket.put_object(Bucket="chats", Key="again/a.jsonl", Body=b"1\n")
    assert (take_in(), take_in(), len(read)) == (1, 0, 1)
    bucket.put_object(Bucket="chats", Key="again/a.jsonl", Body=b"2\n")
    assert (take_in(), len(read)) == (1, 2)


# Changes to the environment, and the error of the library.
UNUSABLE = [
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "NoCredentialsError: Unable to locate"),
    ({"AWS_SECRET_ACCESS_KEY": None}, "PartialCredentialsError: Partial credentials found"),
    ({"AWS_PROFILE": "none"}, r"ProfileNotFound: The config profile \(none\) could not be found"),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "EndpointConnectionError: Could not connect"),
    ({"AWS_ENDPOINT_URL": "nonsense"}, "ValueError: Invalid endpoint: nonsense"),
]


@pytest.mark.parametrize(("changes", "error"), UNUSABLE)
@pytest.mark.parametrize("location", ["s3://chats/n/a.jsonl", "s3://chats/n/*.jsonl"])
@pytest.mark.usefixtures("bucket")
def test_missing_credentials_and_an_unreachable_store_are_errors_with_the_location(
    location: str, changes: dict[str, str | None], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    # No credentials of the user and of the machine.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in changes.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    remedy = "check the location, the network, and the store's credentials and endpoint in the environment"
    with pytest.raises(DataError, match=rf"^snapshot\.sources: {re.escape(location)}: {error}.*; {remedy}$"):
        contents(location)
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("location", ["s3://chats/n/a.jsonl", "s3://chats/n/*.jsonl", "s3://chats/n"])
def test_a_rejected_request_is_an_error_with_the_location(bucket: Any, location: str) -> None:
    from s3fs import S3FileSystem

    def require_keys(after: int) -> None:
        """Let the server accept that many requests without checking their keys."""
        url = f"{bucket.meta.endpoint_url}/moto-api/reset-auth"
        httpx.post(url, content=str(after), trust_env=False).raise_for_status()

    S3FileSystem.clear_instance_cache()
    require_keys(0)
    try:
        with pytest.raises(DataError, match=rf"^snapshot\.sources: {re.escape(location)}: PermissionError: "):
            contents(location)
    finally:
        require_keys(1_000_000)
        S3FileSystem.clear_instance_cache()


def test_an_unknown_error_of_a_store_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a bug"), explain_store_errors("s3://chats/a.jsonl"):
        raise RuntimeError("a bug")


def test_a_missing_store_library_is_an_error_with_the_extra_to_install() -> None:
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from tasks.snapshot.sources.locations import read_offers\n"
        "try: list(read_offers('gs://bucket/a.jsonl'))\n"
        "except Exception as err: print(type(err).__name__, err)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError ")
    assert "pip install -e '.[gcs]'" in done.stdout


def test_any_fsspec_file_system_is_read_in_the_same_way() -> None:
    import fsspec

    with fsspec.open("memory://chats/a.jsonl", "wb") as file:
        file.write(b"1\n")
    found = [(offer.suffix, list(offer.chunks)) for offer in remote_offers("memory://chats/*.jsonl")]
    assert found == [(".jsonl", [b"1\n"])]


def parquet(text: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), buffer)
    return buffer.getvalue()


HUB_FILES = {
    "README.md": b"# Data",
    "load.py": b"raise SystemExit('a script of the repository ran')",
    "data/train-1.parquet": parquet("one"),
    "data/train-0.parquet": parquet("zero"),
    "data/test-0.parquet": parquet("test"),
}


def ask_hub(
    location: str, environment: dict[str, str], split: str | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Read a location in a separate process, since the client reads its endpoint only on import."""
    code = (
        "import sys\n"
        "from tasks.snapshot.sources.locations import read_offers\n"
        f"for offer in read_offers({location!r}, {split!r}):\n"
        "    print(offer.suffix, len(b''.join(offer.chunks)))\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**environment, **more}, check=False
    )


def test_the_parquet_files_of_a_commit_are_read_and_no_script_runs(tmp_path: Path) -> None:
    with serve_hub({"datasets/owner/name": HUB_FILES}) as hub:
        environment = hub.environment(tmp_path)
        found = ask_hub(f"hub:owner/name@{COMMIT}/data/train-*", environment)
        by_split = ask_hub(f"hub:owner/name@{COMMIT}", environment, "train")
        several = ask_hub(f"hub:owner/name@{COMMIT}", environment)
        missing = ask_hub(f"hub:owner/other@{COMMIT}", environment)
        offline = ask_hub(f"hub:owner/name@{COMMIT}", environment, HF_HUB_OFFLINE="1")
    gone = ask_hub(f"hub:owner/name@{COMMIT}", environment)
    sizes = [len(HUB_FILES[f"data/train-{i}.parquet"]) for i in (0, 1)]
    assert found.stdout.splitlines() == [f".parquet {size}" for size in sizes], found.stderr
    assert by_split.stdout == found.stdout
    assert f"hub:owner/name@{COMMIT} has the splits test, train; set `split: train`" in several.stderr
    assert f"DataError: snapshot.sources: hub:owner/other@{COMMIT}: RepositoryNotFoundError" in missing.stderr
    assert "DataError: " in offline.stderr
    assert "HF_HUB_OFFLINE=1 blocks the Hub; unset it" in offline.stderr
    assert f"DataError: snapshot.sources: hub:owner/name@{COMMIT}: ConnectError: " in gone.stderr
    assert not list(tmp_path.rglob("load.py"))


NOTES = "SELECT id, text, 'a%' AS mark FROM notes ORDER BY id"


def query(sql: str) -> Iterator[Offer]:
    yield query_offer(sql, "WAREHOUSE_URL")


def rows_of(sql: str) -> list[bytes]:
    return [b"".join(offer.chunks) for offer in query(sql)]


@pytest.fixture
def warehouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "warehouse.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE notes (id INTEGER, text TEXT)")
        database.executemany("INSERT INTO notes VALUES (?, ?)", [(i, f"Nöte {i}") for i in range(12_000)])
    monkeypatch.setenv("WAREHOUSE_URL", f"sqlite:///{path}")
    return path


def test_query_rows_become_json_lines_and_unchanged_rows_no_new_shard(
    warehouse: Path, tmp_path: Path
) -> None:
    (shard,) = write_shards("notes", query(NOTES), tmp_path / "raw")
    lines = shard.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12_000
    assert lines[11_999] == '{"id": 11999, "mark": "a%", "text": "Nöte 11999"}'
    assert write_shards("notes", query(NOTES), tmp_path / "raw") == []
    with sqlite3.connect(warehouse) as database:
        database.execute("INSERT INTO notes VALUES (12000, 'new')")
    assert len(write_shards("notes", query(NOTES), tmp_path / "raw")) == 1


def test_a_query_that_fails_or_returns_no_rows_is_an_error(warehouse: Path) -> None:
    with pytest.raises(DataError, match="WAREHOUSE_URL: OperationalError: no such table: none"):
        rows_of("SELECT * FROM none ORDER BY 1")
    with pytest.raises(DataError, match="returns no rows"):
        rows_of("DELETE FROM notes -- order by")
    with sqlite3.connect(warehouse) as database:
        assert database.execute("SELECT count(*) FROM notes").fetchone() == (12_000,)
    with pytest.raises(DataError, match="a value of type bytes cannot be converted to JSON"):
        rows_of("SELECT x'00' AS b ORDER BY 1")


PASSWORDS = (
    "mysql+nothing://me:hush%40hush@127.0.0.1/x",
    "no url with hush",
    "sqlite://me:hush%40hush@127.0.0.1/x",
    "sqlite:////nowhere/hush@hush/x.sqlite",
)


@pytest.mark.parametrize("url", PASSWORDS)
def test_the_url_with_its_password_is_in_no_message_and_no_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WAREHOUSE_URL", url)
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ConfigError, DataError), match="WAREHOUSE_URL") as caught:
        write_shards("notes", query(NOTES), tmp_path / "raw")
    assert "hush" not in f"{caught.value} {caplog.text}"
    assert caught.value.__suppress_context__ or "hush" not in repr(caught.value.__cause__)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_unset_environment_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WAREHOUSE_URL", raising=False)
    with pytest.raises(ConfigError, match="WAREHOUSE_URL: not set"):
        rows_of(NOTES)
