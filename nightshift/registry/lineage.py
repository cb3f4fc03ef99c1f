"""Lineage of a version: written when it is registered, read by `nightshift trace`.

`lineage.json` contains code, data down to the shard, base, environment, training run and verdict;
`rows.parquet` lists every training example with its shard and line, also those of the version from which
training started. `params.yaml` and `dvc.lock`, which identifies the data, are byte-identical copies.
`scores.parquet` has the scores of all models, without the texts of test examples, which `nightshift forget`
could not remove from it.
"""

import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from nightshift.core.errors import GateError
from nightshift.core.files import iterate_rows, read_json, read_rows, write_json, write_rows
from nightshift.core.paths import (
    BASE_RECORD,
    BENCHMARKS,
    CHAMPION_RECORD,
    DATA,
    EFFECTIVE,
    GATE,
    PACKED,
    PREFERENCES,
    RAW,
    SCORES,
    START_RECORD,
    START_ROWS,
    TRAINING_RUN,
)
from nightshift.core.trained import read_tuning
from nightshift.data.benchmarks import OF_TEST_EXAMPLES, task_digests
from nightshift.data.schemas import ALL_SCORES, Score
from nightshift.raw.shards import read_digests, used_names
from nightshift.registry.start import read_start
from nightshift.tracking.runs import git_commit

KEPT = (Path("params.yaml"), Path("dvc.lock"))
ENGINES = ("accelerate", "datasets", "deepspeed", "lm-eval", "peft", "torch", "transformers", "trl")
ROWS = pa.schema([("id", pa.string()), ("origin", pa.string())])


def write_lineage(folder: Path) -> None:
    """Write the lineage to a folder, from the files of the checkout."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted({*trained_rows(), *started_rows()})
    write_rows(folder / "rows.parquet", [{"id": one, "origin": origin} for one, origin in rows], ROWS)
    write_rows(folder / SCORES.name, map(without_text, iterate_rows(SCORES)), ALL_SCORES)
    for path in KEPT:
        shutil.copyfile(path, folder / path.name)
    by_shard = Counter(origin.rpartition(":")[0] for _, origin in rows)
    digests = read_digests(RAW)
    shards = [
        {"shard": name, "sha256": digests[name], "examples": by_shard[name]}
        for name in used_names(RAW, sorted(digests))
    ]
    summaries = {path.parent.name: read_json(path) for path in sorted(DATA.glob("*/summary.json"))}
    write_json(
        folder / "lineage.json",
        {
            "code": git_commit(),
            "changed": changed_code(),
            "shards": shards,
            "summaries": summaries,
            "base": read_json(BASE_RECORD),
            "start": read_json(START_RECORD),
            "gate": read_json(GATE),
            "tasks": task_digests(BENCHMARKS),
            "best": read_json(CHAMPION_RECORD)["best"],
            "training": read_json(TRAINING_RUN),
            "effective": read_json(EFFECTIVE),
            "preferences": read_tuning(),
            "environment": describe_environment(),
        },
    )


def without_text(row: Score) -> dict[str, Any]:
    """Return a score without the texts, if it is that of a test example."""
    is_test = row["benchmark"] in OF_TEST_EXAMPLES
    return {**row, **(dict.fromkeys(("question", "expected", "answer")) if is_test else {})}


def describe_environment() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine a training, and the machine."""
    versions = {name: importlib.metadata.version(name) for name in ENGINES}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def changed_code() -> list[str]:
    """Return the code files that differ from the commit; params.yaml is kept as a copy instead."""
    names = subprocess.run(
        ["git", "diff", "--name-only", "HEAD", "--", "*.py", "dvc.yaml", "constraints.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return names.stdout.split("\n")[:-1]


def row_counts(summary: dict[str, Any]) -> tuple[str, ...]:
    """Format a stage's row counts: in, added, out, and dropped by reason.

    Example:
        >>> row_counts({"rows_in": 4000, "added": 0, "rows_out": 3999, "dropped": {"duplicate": 1}})
        ('4,000', '0', '3,999', 'duplicate 1')
    """
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in summary["dropped"].items())
    return *(f"{summary[key]:,}" for key in ("rows_in", "added", "rows_out")), dropped or "none"


def trained_rows() -> Iterator[tuple[str, str]]:
    """Yield (example, origin) of every span of the packed rows, and (id, origin) of every comparison."""
    for row in iterate_rows(PACKED, ["example_ids", "origins"]):
        yield from zip(row["example_ids"], row["origins"], strict=True)
    if read_tuning():
        for row in iterate_rows(PREFERENCES, ["id", "origin", "side"]):
            if row["side"] == "train":
                yield row["id"], row["origin"]


def started_rows() -> Iterator[tuple[str, str]]:
    """Yield (example, origin) of what the version was trained on from which training started."""
    if read_start().version is not None:
        for row in iterate_rows(START_ROWS):
            yield row["id"], row["origin"]


@contextmanager
def open_lineage(name: str, version: int, file: str = "") -> Iterator[Path]:
    """Download the lineage of a version, or one of its files, to a temporary folder.

    Raises:
        GateError: The version has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        uri = f"models:/{name}/{version}/artifacts/lineage/{file}".removesuffix("/")
        try:
            found = Path(download_artifacts(uri, dst_path=folder))
        except (MlflowException, OSError) as err:
            what = f"lineage/{file}".removesuffix("/")
            raise GateError(f"registry: version {version} of {name} has no {what}: {err}") from err
        yield found


def find_rows(folder: Path, wanted: str) -> list[dict[str, Any]]:
    """Return the training examples with an id, or with an origin (`source/shard:line`)."""
    return [row for row in read_rows(folder / "rows.parquet") if wanted in (row["id"], row["origin"])]
