"""The processes that score models: what each does, with which engine, and where."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nightshift.core.errors import StageError
from nightshift.core.files import iterate_rows, read_rows, tree_digest, write_json, write_rows
from nightshift.core.hardware import available_memory, cpu_has_bf16, may_have_gpu
from nightshift.core.paths import BENCHMARKS, CLEAN_TRAIN, TEST
from nightshift.core.stage import OFFLINE, print_line
from nightshift.data.benchmarks import HELDOUT, TEST_ANSWERS, read_benchmarks
from nightshift.data.schemas import SCORES
from nightshift.pipeline import supervise
from tasks.evaluate import EvaluateParams
from tasks.evaluate.answers import Answers
from tasks.evaluate.gpus import ROOM, find_places, largest
from tasks.evaluate.scores import DONE, PROGRESS, WHOLE, Part, join_parts
from tasks.evaluate.servers import name_weights, read_server
from tasks.evaluate.vllm import (
    VLLM_PYTHON,
    find_unsupported,
    find_vllm,
    serve_arguments,
    serve_remedy,
    vllm_command,
    vllm_python,
)

CPU = "cpu"
# Processes on a CPU, at most.
CPU_PROCESSES = 4


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model and its benchmarks.

    Attributes:
        base: Folder of the base model.
        base_digest: Digest of the base model.
        adapter: Folder of the adapter or full weights; None for the base model itself.
        documents: Documents placed before each question; 0 for none.
        benchmarks: Names of the benchmarks.
    """

    base: Path
    base_digest: str
    adapter: Path | None
    documents: int
    benchmarks: list[str]

    @property
    def lora(self) -> Path | None:
        """Folder of the adapter, if the model has one on its base."""
        is_lora = self.adapter and (self.adapter / "adapter_config.json").is_file()
        return self.adapter if is_lora else None

    @property
    def weights(self) -> Path:
        """Folder of the base with which the adapter is used, or of the full weights."""
        return self.adapter if self.adapter and not self.lora else self.base

    @property
    def weights_name(self) -> str:
        """Name of these weights on a server."""
        return name_weights(self.base_digest if self.weights == self.base else str(digest(self)))

    @property
    def served_name(self) -> str:
        """Name of the model on a server."""
        return f"{self.weights_name}-{str(digest(self))[:12]}" if self.lora else self.weights_name


def digest(model: EvaluatedModel) -> str | None:
    """Return the digest of a model's adapter or weights, or None for the base."""
    return tree_digest(model.adapter) if model.adapter else None


def device() -> str:
    """Return `cpu` or the name of the GPU, whose kernels round differently; a CPU may have no bf16."""
    if may_have_gpu():
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return CPU if cpu_has_bf16() else f"{CPU}, float32"


def group_by_weights(models: dict[str, EvaluatedModel]) -> dict[Path, list[str]]:
    """Return folder of weights -> names of the models that one server can serve."""
    groups: dict[Path, list[str]] = {}
    for name, model in models.items():
        groups.setdefault(model.weights, []).append(name)
    return groups


def find_problems(models: dict[str, EvaluatedModel], params: EvaluateParams) -> list[str]:
    """Return why the engine cannot score models in the same way as the other engines.

    Raises:
        ConfigError: The server rejects the key.
        StageError: The server does not answer.
    """
    if params.engine == "transformers":
        return []
    found = [
        f"evaluate.engine: {params.engine} cannot score {name}: it has {feature}; set it to transformers"
        for name, model in models.items()
        for feature in find_unsupported(model.weights, model.lora)
    ]
    if params.engine == "vllm":
        if find_vllm(python := vllm_python()) is None:
            found.append(
                f"evaluate.engine: vllm, but {python} has no vLLM; create an environment for it "
                f"(`python -m venv DIR`, `DIR/bin/pip install vllm`) and set {VLLM_PYTHON}=DIR/bin/python"
            )
        return found
    served = read_server(params.endpoint).models
    for weights, names in group_by_weights(models).items():
        if (first := models[names[0]]).weights_name not in served:
            adapters = [lora.absolute() for name in names if (lora := models[name].lora)]
            folder = weights.absolute()
            arguments = serve_arguments(folder, first.weights_name, adapters, first.base.absolute())
            found.append(
                f"evaluate.endpoint: {params.endpoint.base_url} does not serve {first.weights_name}, which "
                f"is {folder}; start it with `{serve_remedy(folder, arguments)}`, or set evaluate.engine to "
                "vllm"
            )
    return found


def score_missing(
    models: dict[str, EvaluatedModel],
    missing: dict[str, dict[str, str]],
    params: EvaluateParams,
    answers: Answers | None,
) -> None:
    """Compute the missing scores.

    Each process loads one model after the other, and scores its part of the items. A server has all of them.

    Raises:
        StageError: A process exited before it had scored its part.
    """
    if not missing:
        return
    asked = {name: models[name] for name in missing}
    if params.engine == "transformers":
        places = find_places_for(list(asked.values()))
        jobs = [(list(asked), Part(number, len(places)), place) for number, place in enumerate(places)]
    else:
        jobs = [(names, WHOLE, {}) for names in group_by_weights(asked).values()]
    show = progress_printer(missing, count_items(params, answers))

    def score(names: Sequence[str], part: Part, place: dict[str, str]) -> None:
        job = build_job({name: asked[name] for name in names}, missing, params, answers, part)
        run_job(job, place, partial(show, part))

    # Servers share the GPUs: one after the other.
    parts = jobs[0][1].total
    with ThreadPoolExecutor(max_workers=parts) as pool:
        for _ in pool.map(lambda one: score(*one), jobs):
            pass
    for target in {Path(target) for targets in missing.values() for target in targets.values()}:
        join_files(target, parts)


def join_files(target: Path, total: int) -> None:
    """Join the scores of all parts of a benchmark, unless one process had all items."""
    files = [Part(number, total).file(target) for number in range(total)]
    if total > 1:
        write_rows(target, join_parts([read_rows(file) for file in files]), SCORES)
        for file in files:
            file.unlink()


def progress_printer(
    missing: dict[str, dict[str, str]], items: dict[str, int]
) -> Callable[[Part, str], None]:
    """Return a function that prints the lines of a process, with its progress among all items.

    Args:
        missing: Model -> benchmarks to score.
        items: Benchmark -> number of its items.
    """
    total = sum(items[benchmark] for targets in missing.values() for benchmark in targets)
    done: dict[tuple[str, str, Part], int] = {}

    def show(part: Part, line: str) -> None:
        if line.startswith(DONE):
            name, benchmark = line.removeprefix(DONE).split(" ")
            done[name, benchmark, part] = len(part.select(range(items[benchmark])))
        elif line.startswith(PROGRESS):
            name, benchmark, share = line.removeprefix(PROGRESS).split(" ")
            some, whole = map(int, share.split("/"))
            done[name, benchmark, part] = len(part.select(range(items[benchmark]))) * some // whole
        else:
            print_line(line if part.total == 1 else f"[{part.number + 1} of {part.total}] {line}")
            return
        print_line(f"step {sum(done.values())}/{total} {name}: {benchmark}")

    return show


def count_items(params: EvaluateParams, answers: Answers | None) -> dict[str, int]:
    """Return the number of items of each benchmark that a model is scored on."""
    counts = {one.name: len(one.items) for one in read_benchmarks(BENCHMARKS)}
    limited = {
        name: count if params.limit is None else min(count, params.limit) for name, count in counts.items()
    }
    held_out = {HELDOUT: sum(1 for _ in iterate_rows(TEST, ["id"]))}
    return {**limited, **held_out, TEST_ANSWERS: len(answers.ids) if answers else 0}


def find_places_for(models: Sequence[EvaluatedModel]) -> list[dict[str, str]]:
    """Return the environment of each process that scores at the same time.

    A process has some CPU cores, or one GPU, or as many GPUs as the largest model needs. A CPU's memory holds
    the largest model as often as there are processes.
    """
    weights = [{model.weights, model.lora or model.weights} for model in models]
    if (found := device()).startswith(CPU):
        # Without bf16, weights take twice the bytes of their files.
        factor = ROOM if found == CPU else 2 * ROOM
        needed = int(factor * largest(weights))
        cores = os.cpu_count() or 1
        count = max(1, min(cores, CPU_PROCESSES, available_memory() // (needed or 1)))
        return [{"OMP_NUM_THREADS": str(cores // count)}] * count
    import torch

    if torch.cuda.device_count() == 1:
        return [{}]
    return find_places(weights)


def build_job(
    models: dict[str, EvaluatedModel],
    targets: dict[str, dict[str, str]],
    params: EvaluateParams,
    answers: Answers | None = None,
    part: Part = WHOLE,
) -> dict[str, Any]:
    """Build the job of one process, which scores a part of the items and writes its files of the `targets`.

    With a server, all models have the same weights.
    """
    first = next(iter(models.values()))
    command = None
    if params.engine == "vllm":
        adapters = sorted({model.lora for model in models.values() if model.lora})
        arguments = serve_arguments(first.weights, first.weights_name, adapters, first.base)
        # A CPU without bf16 scores in float32, as with transformers.
        arguments += ["--dtype", "float32"] if device() == f"{CPU}, float32" else []
        command = vllm_command(first.weights, arguments, adapters, params.vllm)
    return {
        "engine": params.engine,
        "part": part,
        "models": {
            name: {
                "base": str(model.base),
                "adapter": str(model.adapter) if model.adapter else None,
                "documents": model.documents,
                "targets": targets[name],
                "weights": str(model.weights),
                "weights_name": model.weights_name,
                "served": model.served_name,
                "lora": str(model.lora.absolute()) if model.lora else None,
            }
            for name, model in models.items()
        },
        "vllm": command,
        "endpoint": params.endpoint.model_dump(),
        "train": str(CLEAN_TRAIN),
        "benchmarks": str(BENCHMARKS),
        "test": str(TEST),
        "answers": asdict(answers) if answers else None,
        "limit": params.limit,
        "batch_size": params.batch_size,
    }


def run_job(job: dict[str, Any], place: dict[str, str], on_line: Callable[[str], None]) -> None:
    """Score the models of a job in a separate process, with the environment variables of its place.

    Raises:
        StageError: The process exited before it had scored all benchmarks.
    """
    with tempfile.TemporaryDirectory(prefix="nightshift-") as work:
        file = Path(work) / "job.json"
        write_json(file, job)
        code = supervise.run(
            [sys.executable, "-m", "tasks.evaluate.score", str(file)],
            on_line=on_line,
            env={
                **place,
                # Busy-waiting threads are ten times slower on shared CPU cores.
                "OMP_WAIT_POLICY": "PASSIVE",
                **OFFLINE,
                "HF_DATASETS_CACHE": f"{work}/datasets",
                "TOKENIZERS_PARALLELISM": "false",
                # Progress is reported in lines; bars would fill the log.
                "TQDM_DISABLE": "1",
            },
        )
    targets = [Path(target) for one in job["models"].values() for target in one["targets"].values()]
    if code or not all(job["part"].file(target).is_file() for target in targets):
        raise StageError(
            f"evaluate: scoring {', '.join(job['models'])} exited with code {code}, see the error above; "
            "finished benchmarks are cached, rerun to resume"
        )
