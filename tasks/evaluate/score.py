"""Score one model: the program that the stage starts for each model it has no scores of yet."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.encode import FAULTS, IGNORED, Encoder, encode_batch, load_encoder
from tasks.errors import DataError
from tasks.evaluate.scores import SCORES
from tasks.files import read_json, read_jsonl, read_rows, write_rows
from tasks.stage import run_main


def main() -> None:
    """Score the model of the job named on the command line."""
    job = read_json(Path(sys.argv[-1]))
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = load_model(job["base"], job["adapter"])
    rows = [row for folder in job["benchmarks"] for row in score_benchmark(model, tokenizer, folder, job)]
    rows += heldout_losses(model, load_encoder(Path(job["base"])), read_rows(Path(job["test"])))
    write_rows(Path(job["target"]), rows, SCORES)


def load_model(base: str, adapter: str | None) -> Any:
    """Load the base, with the adapter if there is one, or the weights that were trained, for scoring."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_whole = adapter and not (Path(adapter) / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(
        adapter if is_whole else base, dtype="auto", trust_remote_code=False
    )
    if adapter and not is_whole:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval()


def score_benchmark(
    model: Any,
    tokenizer: Any,
    folder: str,
    job: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Run one lm-eval task and yield a row for each item.

    Raises:
        DataError: The benchmark has no items.
    """
    task = yaml.safe_load((Path(folder) / "task.yaml").read_text(encoding="utf-8"))["task"]
    items = read_jsonl(Path(folder) / "items.jsonl")
    if not items:
        raise DataError(f"{folder}/items.jsonl: no items; a benchmark needs at least one")
    asked = spread(len(items), job["limit"])
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=job["batch_size"]),
        tasks=[task],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        samples={task: asked},
        apply_chat_template=True,
        bootstrap_iters=0,
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
    )
    for sample in results["samples"][task]:
        item = sample["doc"]
        yield {
            "benchmark": task,
            "item": str(item["id"]),
            "slice": str(item.get("slice", task)),
            "score": float(sample["acc"]),
            "tokens": None,
            "choices": len(item["choices"]),
        }


def spread(count: int, limit: int | None) -> list[int]:
    """Choose at most `limit` of `count` positions, evenly apart.

    Example:
        >>> spread(10, 4)
        [0, 2, 5, 7]
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


@torch.no_grad()
def heldout_losses(
    model: Any,
    encoder: Encoder,
    examples: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield the summed negative log-likelihood (nats) of each held-out example's answers.

    The sum and the number of tokens stand apart, so that a mean over any set is token-weighted.

    Raises:
        DataError: An example cannot be encoded.
    """
    encoded = encode_batch([(example["messages"], example["tools"]) for example in examples], encoder)
    for example, one in zip(examples, encoded, strict=True):
        if isinstance(one, str):
            raise DataError(f"test example {example['id']} ({example['origin']}): {one}; {FAULTS[one]}")
        ids = torch.tensor(one.input_ids[None], dtype=torch.long, device=model.device)
        labels = torch.tensor(one.labels[1:], dtype=torch.long, device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        yield {
            "benchmark": "test",
            "item": example["id"],
            "slice": example["source"],
            "score": cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item(),
            "tokens": int((labels != IGNORED).sum()),
            "choices": None,
        }


if __name__ == "__main__":
    run_main(main)
