"""Run the stage: score the models that have no scores yet, then put all scores side by side."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tasks import supervise
from tasks.config import load_params
from tasks.errors import StageError
from tasks.evaluate import EvaluateParams
from tasks.evaluate.scores import ALL_SCORES, metrics
from tasks.files import (
    file_digest,
    read_json,
    read_rows,
    replaced,
    text_digest,
    tree_digest,
    write_json,
    write_rows,
)
from tasks.stage import DATA, print_line, run_main, write_summary
from tasks.state import state_dir

BASE = DATA / "base" / "model"
CANDIDATE = DATA / "sft" / "model"
CHAMPION = DATA / "champion"
TEST = DATA / "split" / "test.parquet"
BENCHMARKS = DATA / "benchmarks"
TARGET = DATA / "evaluate" / "scores.parquet"
METRICS = DATA / "evaluate" / "metrics.json"
MODELS = DATA / "evaluate" / "models.json"


def main() -> None:
    """Write the scores of every item under every model, their aggregates, and the models' digests."""
    params = load_params(EvaluateParams, "evaluate")
    models = find_models()
    memo = {name: memo_file(adapter, params) for name, adapter in models.items()}
    missing = {str(memo[name]): models[name] for name in models if not memo[name].is_file()}
    threads = max(1, (os.cpu_count() or 1) // max(1, len(missing)))
    with ThreadPoolExecutor(max_workers=max(1, len(missing))) as pool:
        work = [
            pool.submit(score, Path(target), adapter, params, threads) for target, adapter in missing.items()
        ]
        for one in work:
            one.result()
    rows = [{"model": name, **row} for name in models for row in read_rows(memo[name])]
    write_rows(TARGET, rows, ALL_SCORES)
    write_json(METRICS, metrics(rows))
    digests = {name: tree_digest(path) if path else None for name, path in models.items()}
    write_json(MODELS, digests)
    write_summary("evaluate", rows_in=len(rows), rows_out=len(rows), models=sorted(models))


def find_models() -> dict[str, Path | None]:
    """Name the models to compare and their adapters; the base has none, a champion may not exist."""
    models: dict[str, Path | None] = {"base": None, "candidate": CANDIDATE}
    if read_json(CHAMPION / "champion.json")["version"] is not None:
        models["champion"] = CHAMPION / "model"
    return models


def memo_file(adapter: Path | None, params: EvaluateParams) -> Path:
    """Name the scores by all that decides them: code, base, adapter, items and how many are asked."""
    key = text_digest(
        tree_digest(Path(__file__).parent),
        file_digest(BASE.with_name("base.json")),
        tree_digest(adapter) if adapter else "",
        tree_digest(BENCHMARKS),
        file_digest(TEST),
        str(params.limit),
    )
    return state_dir() / "memo" / "scores" / f"{key}.parquet"


def score(target: Path, adapter: Path | None, params: EvaluateParams, threads: int) -> None:
    """Score one model in a process of its own.

    Raises:
        StageError: It ended without a result.
    """
    work = target.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {
        "base": str(BASE),
        "adapter": str(adapter) if adapter else None,
        "benchmarks": [str(path.parent) for path in sorted(BENCHMARKS.glob("*/task.yaml"))],
        "test": str(TEST),
        "target": str(work / "scores.parquet"),
        "limit": params.limit,
        "batch_size": params.batch_size,
    }
    write_json(work / "job.json", job)
    name = adapter.parent.name if adapter else "base"
    code = supervise.run(
        [sys.executable, "-m", "tasks.evaluate.score", str(work / "job.json")],
        on_line=lambda line: print_line(f"[{name}] {line}"),
        env={
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "HF_DATASETS_CACHE": str(work / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
        },
    )
    if code or not (work / "scores.parquet").is_file():
        raise StageError(f"evaluate: scoring {name} ended with code {code}; the reason stands above")
    with replaced(target) as temporary:
        shutil.copyfile(work / "scores.parquet", temporary)
    shutil.rmtree(work)


if __name__ == "__main__":
    run_main(main)
