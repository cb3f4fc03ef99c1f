"""Score models: the program that the stage runs for the models with missing scores."""

import argparse
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nightshift.core.files import iterate_rows, read_json, read_rows, write_rows
from nightshift.core.stage import print_line, run_main, skip_bitsandbytes
from nightshift.data.benchmarks import HELDOUT, TEST_ANSWERS, read_benchmarks
from nightshift.data.encode import Encoder, Fault, count_supervised, encode_batch, load_encoder
from nightshift.data.schemas import SCORES
from tasks.evaluate.answers import Answers
from tasks.evaluate.asker import Asker, Find
from tasks.evaluate.kinds import score_answers, score_benchmark
from tasks.evaluate.retrieval import build_documents, build_index
from tasks.evaluate.scores import DONE, PROGRESS, Part

# Time between two progress lines.
REPORT_SECONDS = 10.0
Load = Callable[[dict[str, Any], Find | None], Asker]


def main(job_file: Path) -> None:
    """Score the models of a job; the scores of each benchmark are saved as soon as it is done."""
    job = read_json(job_file)
    for name in ("httpx", "httpx2", "lm_eval"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of every model that was loaded by others.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    find = None
    if documents := max(one["documents"] for one in job["models"].values()):
        rows = iterate_rows(Path(job["train"]), ["id", "messages", "parent_id"])
        find = build_index(build_documents(rows), documents)
    # Models of the same folders one after the other: they are loaded once.
    models = sorted(job["models"].items(), key=lambda item: (item[1]["base"], item[1]["adapter"] or ""))
    with open_engine(job) as load:
        for name, one in models:
            score_model(name, load(one, find if one["documents"] else None), one, job)


@contextmanager
def open_engine(job: dict[str, Any]) -> Iterator[Load]:
    """Yield the function that loads a model of the job: the engine in this process, or a server."""
    if job["engine"] == "transformers":
        yield loader(job["batch_size"])
        return
    from tasks.evaluate.served import open_server

    first = next(iter(job["models"].values()))
    with open_server(job, AutoTokenizer.from_pretrained(first["base"])) as load:
        yield load


def loader(batch_size: int) -> Load:
    """Return a function that loads models, one at a time, and a model of the same folders only once."""
    skip_bitsandbytes()
    from tasks.evaluate.model import Model, load_model

    model: Model | None = None
    loaded = None

    def load(one: dict[str, Any], find: Find | None) -> Asker:
        nonlocal model, loaded
        tokenizer = AutoTokenizer.from_pretrained(one["base"])
        if model and loaded == (one["base"], one["adapter"]):
            model.prepare(tokenizer, find)
            return model
        if model:
            # Its memory is part of reference cycles.
            model = None
            gc.collect()
        loaded = one["base"], one["adapter"]
        model = Model(load_model(*loaded), tokenizer, batch_size, find)
        return model

    return load


def score_model(name: str, model: Asker, one: dict[str, Any], job: dict[str, Any]) -> None:
    """Score a model on its benchmarks.

    Args:
        name: Name of the model.
        model: The model.
        one: The model in the job.
        job: The job of this process.
    """
    root, part = Path(job["benchmarks"]), Part(*job["part"])
    benchmarks = {benchmark.name: benchmark for benchmark in read_benchmarks(root)}
    for benchmark, target in one["targets"].items():
        file = part.file(Path(target))
        model.on_progress = reporter(f"{name} {benchmark}")
        if benchmark == HELDOUT:
            examples = part.select(read_rows(Path(job["test"])))
            found = heldout_losses(model, load_encoder(Path(one["base"])), examples)
        elif benchmark == TEST_ANSWERS:
            answers = Answers(**job["answers"])
            found = score_answers(model, load_encoder(Path(one["base"])), Path(job["test"]), answers, part)
        else:
            found = score_benchmark(model, benchmarks[benchmark], root / benchmark, job["limit"], part)
        # A killed run may have left it.
        if not file.is_file():
            write_rows(file, found, SCORES)
        print_line(f"{DONE}{name} {benchmark}")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("job_file", type=Path, help="job file written by tasks.evaluate")


def reporter(label: str) -> Callable[[int, int], None]:
    """Return a function that prints how much of a model's benchmark is done, every `REPORT_SECONDS`."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            print_line(f"{PROGRESS}{label} {done}/{total}")

    return report


def heldout_losses(
    model: Asker, encoder: Encoder, examples: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the summed negative log-likelihood (nats) of each held-out example's answers.

    Sum and token count are separate, so that a mean over any subset is token-weighted.

    An example that exceeds the context length, or that the chat template does not render, is skipped.
    The candidate's template renders every example that passed ingest; that of a champion on another base
    may not.
    """
    longest = model.max_length
    encoded = encode_batch([(example["messages"], example["tools"]) for example in examples], encoder)
    fitting = [
        one
        for one in encoded
        if not isinstance(one, Fault) and max(len(part.input_ids) for part in one) <= longest
    ]
    losses = model.sequence_losses([part for one in fitting for part in one])
    for example, one in zip(examples, encoded, strict=True):
        row = {
            "benchmark": HELDOUT,
            "item": example["id"],
            "slice": example["source"],
            "score": None,
            "tokens": None,
            "status": "ok",
            "question": next(
                (t["content"] for t in example["messages"] if t["role"] in ("user", "text")), None
            ),
            "expected": example["messages"][-1]["content"],
            "answer": None,
        }
        if isinstance(one, Fault):
            yield row | {"status": "skipped", "answer": str(one)}
            continue
        row["tokens"] = sum(count_supervised(part.labels[1:]) for part in one)
        if (length := max(len(part.input_ids) for part in one)) > longest:
            reason = f"{length} tokens exceed the model's context of {longest}"
            yield row | {"status": "skipped", "answer": reason}
            continue
        loss = sum(islice(losses, len(one)))
        if math.isfinite(loss):
            yield row | {"score": loss}
        else:
            yield row | {"status": "error", "answer": f"the loss is {loss}"}


if __name__ == "__main__":
    run_main(main, declare)
