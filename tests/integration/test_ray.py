"""Deduplication output is byte-identical on one machine and on a Ray cluster of two nodes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nightshift.core.files import file_digest, iterate_rows, write_rows
from nightshift.data.schemas import EXAMPLES
from tests.helpers.checkouts import ROOT

OUTPUTS = ("examples.parquet", "removed.parquet", "conflicts.parquet")


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Start a two-node cluster on this machine; Ray nodes do not find each other on loopback."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 * 2**20}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        assert sum(one["Alive"] for one in ray.nodes()) == 2
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def write_examples(folder: Path) -> None:
    """Write 12,000 conversations: unique, equal, near-duplicate, short and contradicting."""
    (folder / "data" / "ingest").mkdir(parents=True)

    def example(number: int, prompt: str, answer: str) -> dict[str, object]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        origin = f"made/000001.jsonl:{number}"
        return {
            "id": f"{number:016x}",
            "messages": messages,
            "source": "made",
            "origin": origin,
            "arrival": 1,
        }

    words = [" ".join(f"w{(number * step) % 9973}" for step in range(1, 41)) for number in range(2400)]
    rows = [example(i, text, "yes") for i, text in enumerate(words)]
    rows += [example(2400 + i, text, "yes") for i, text in enumerate(words)]
    rows += [example(4800 + i, text + " more", "yes") for i, text in enumerate(words)]
    rows += [example(7200 + i, text, "no") for i, text in enumerate(words)]
    rows += [example(9600 + i, f"who is {i % 1200}", f"nobody {i % 7}") for i in range(2400)]
    write_rows(folder / "data" / "ingest" / "examples.parquet", rows, EXAMPLES)


def run_dedupe(folder: Path, **environment: str) -> dict[str, str]:
    """Run the stage with an empty cache and return the digest of each output file."""
    shutil.rmtree(folder / "data" / "dedupe", ignore_errors=True)
    env = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-m", "tasks.dedupe"],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: file_digest(folder / "data" / "dedupe" / name) for name in OUTPUTS}


@pytest.mark.timeout(300)
def test_survivors_are_byte_identical_on_one_machine_and_on_two_nodes(
    tmp_path: Path, ray_address: str
) -> None:
    write_examples(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    native = run_dedupe(tmp_path, NIGHTSHIFT_HOME=str(tmp_path / "native"))
    assert len(list(iterate_rows(tmp_path / "data" / "dedupe" / "examples.parquet"))) > 4800
    assert len(list(iterate_rows(tmp_path / "data" / "dedupe" / "removed.parquet"))) > 4800
    cluster = run_dedupe(
        tmp_path,
        NIGHTSHIFT_HOME=str(tmp_path / "cluster"),
        DAFT_RUNNER="ray",
        RAY_ADDRESS=ray_address,
        RAY_USAGE_STATS_ENABLED="0",
    )
    assert cluster == native
