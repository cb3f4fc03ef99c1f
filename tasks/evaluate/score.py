"""Score one model: the program that the stage runs for each model with missing scores."""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from nightshift.core.files import iterate_rows, read_json, read_rows, write_rows
from nightshift.core.stage import print_line, run_main
from nightshift.data.benchmarks import HELDOUT, TEST_ANSWERS, read_benchmarks
from nightshift.data.encode import (
    IGNORED,
    Encoded,
    Encoder,
    Fault,
    count_supervised,
    encode_batch,
    load_encoder,
)
from nightshift.data.schemas import SCORES
from tasks.evaluate.answers import Answers
from tasks.evaluate.kinds import score_answers, score_benchmark
from tasks.evaluate.model import Model, context_length, load_model
from tasks.evaluate.retrieval import build_documents, build_index
from tasks.evaluate.scores import DONE, PROGRESS

# Time between two progress lines.
REPORT_SECONDS = 10.0


def main(job_file: Path) -> None:
    """Score the model of a job; the scores of each benchmark are saved as soon as it is done."""
    job = read_json(job_file)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    find = None
    if job["documents"]:
        rows = iterate_rows(Path(job["train"]), ["id", "messages", "parent_id"])
        find = build_index(build_documents(rows), job["documents"])
    loaded = load_model(job["base"], job["adapter"])
    model = Model(loaded, AutoTokenizer.from_pretrained(job["base"]), job["batch_size"], find)
    root = Path(job["benchmarks"])
    benchmarks = {benchmark.name: benchmark for benchmark in read_benchmarks(root)}
    for name, target in job["targets"].items():
        report = reporter(name)
        model.on_progress = report
        if name == HELDOUT:
            encoder = load_encoder(Path(job["base"]))
            found = heldout_losses(loaded, encoder, read_rows(Path(job["test"])), report)
        elif name == TEST_ANSWERS:
            encoder = load_encoder(Path(job["base"]))
            found = score_answers(model, encoder, Path(job["test"]), Answers(**job["answers"]))
        else:
            found = score_benchmark(model, benchmarks[name], root / name, job["limit"])
        write_rows(Path(target), found, SCORES)
        print_line(f"{DONE}{name}")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    parser.add_argument("job_file", type=Path, help="job file written by tasks.evaluate")


def reporter(benchmark: str) -> Callable[[int, int], None]:
    """Return a function that prints how much of a benchmark is done, at most every `REPORT_SECONDS`."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            print_line(f"{PROGRESS}{benchmark} {done}/{total}")

    return report


@torch.inference_mode()
def heldout_losses(
    model: Any, encoder: Encoder, examples: Sequence[dict[str, Any]], report: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """Yield the summed negative log-likelihood (nats) of each held-out example's answers.

    Sum and token count are separate, so that a mean over any subset is token-weighted. Examples run one
    at a time: a batch would hold the logits of all its tokens over the whole vocabulary.

    An example that exceeds the context length, or that the chat template does not render, is skipped.
    The candidate's template renders every example that passed ingest; that of a champion on another base
    may not.
    """
    longest = context_length(model.config)
    encoded = encode_batch([(example["messages"], example["tools"]) for example in examples], encoder)
    for number, (example, one) in enumerate(zip(examples, encoded, strict=True)):
        report(number, len(examples))
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
        loss = sum(sequence_loss(model, part) for part in one)
        if math.isfinite(loss):
            yield row | {"score": loss}
        else:
            yield row | {"status": "error", "answer": f"the loss is {loss}"}


def sequence_loss(model: Any, encoded: Encoded) -> float:
    """Return the summed negative log-likelihood (nats) of the labels of one sequence."""
    ids = torch.tensor(encoded.input_ids[None], dtype=torch.long, device=model.device)
    labels = torch.tensor(encoded.labels[1:], dtype=torch.long, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))


if __name__ == "__main__":
    run_main(main, declare)
