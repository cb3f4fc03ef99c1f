"""One cell of the table of architectures: train in one way, then evaluate and reload, in this process."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from nightshift.core.files import read_rows, write_json, write_rows
from nightshift.core.paths import PACKED
from nightshift.data.encode import Fault, encode_batch, load_encoder
from nightshift.registry.served_model import load
from tasks.evaluate.model import Model, load_model
from tasks.evaluate.score import heldout_losses
from tasks.pack import ROWS
from tasks.sft import SftParams
from tasks.sft import __main__ as stage
from tasks.sft.callbacks import Progress
from tasks.sft.job import Job
from tasks.sft.machine import probe_machine
from tasks.sft.proof import Proof
from tasks.sft.rows import read_sizes
from tasks.sft.worker import build_trainer, finish
from tests.helpers.sft import WHOLE_SET, conversation, packed_row, shipped_params

# Examples in each row, and the parameters that differ. All train on the four examples in one step.
LAYOUTS: dict[str, tuple[tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "packed": (((0, 1), (2, 3)), {"per_device_train_batch_size": 2}),
    "unpacked": (((0,), (1,), (2,), (3,)), {"gradient_accumulation_steps": 4}),
    "micro-batch 2": (
        ((0,), (1,), (2,), (3,)),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
}
QUESTIONS = (("Why?", ("Yes", "No, never")), ("Where was it put?", ("Here", "There now")))


def run_cell(base: Path, folder: Path, adapter: str | None, layout: str) -> None:
    """Train two steps, and compare losses, scores and the reloaded model with plain transformers.

    Args:
        base: Folder of the base model.
        folder: Empty folder, the working directory.
        adapter: lora, or None for full fine-tuning.
        layout: Key of `LAYOUTS`.

    Raises:
        ConfigError: The stage refuses to train, before it starts.
        AssertionError: A result differs.
    """
    rows, changes = LAYOUTS[layout]
    write_inputs(folder, base, rows)
    options = {"adapter": adapter, "attn_implementation": "auto", "num_train_epochs": 2, "lora_r": 4}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, **options, **changes}
    params = SftParams(**{**shipped_params(), **WHOLE_SET, **small})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "probe_in_subprocess", probe_machine)
        sizes = read_sizes(PACKED)
        job = stage.build_job(params, sizes)
        stage.prepare_rows(job, sizes)
    train(job)
    require_same_scores(base, job.folder / "output" / "model")
    require_same_after_merge(base, job.folder / "output" / "model")


def train(job: Job) -> None:
    """Train a job with its self-tests, and compare the losses with those of plain transformers."""
    proof = Proof(job)
    set_seed(job.params.seed)
    trainer = build_trainer(job, [proof])
    proof.trainer = trainer
    expected = plain_loss(AutoModelForCausalLM.from_pretrained(job.base, attn_implementation="eager"))
    trainer.eval_dataset = trainer.train_dataset.select(range(len(read_rows(PACKED))))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    trainer.state.log_history.clear()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[1] < losses[0]
    finish(trainer, job, Progress(job), None)  # type: ignore[arg-type]


def plain_loss(model: Any) -> float:
    """Compute the loss of all examples, one at a time, in nats per labelled token."""
    model.eval()
    nats, tokens = 0.0, 0
    for row in read_rows(PACKED):
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            ids, labels = (torch.tensor(row[key][part])[None] for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nats += cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            tokens += int((labels[0, 1:] != -100).sum())
            start += length
    return nats / tokens


def require_same_scores(base: Path, model: Path) -> None:
    """Require that evaluation in batches gives the likelihoods and answers of the model's own forward."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    loaded = load_model(str(base), str(model))
    scorer = Model(loaded, tokenizer, batch_size=4)
    assert scorer.max_length > 0
    found = scorer.choice_likelihoods(QUESTIONS)
    plain = load_plain(base, model)
    for (question, choices), likelihoods in zip(QUESTIONS, found, strict=True):
        for choice, likelihood in zip(choices, likelihoods, strict=True):
            prompt, rest = scorer._encode_pair(scorer.render_prompt(question), choice)
            ids = torch.tensor([prompt + rest])
            with torch.no_grad():
                logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = -cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
            assert likelihood == pytest.approx(expected, rel=1e-4)
    require_same_heldout_loss(base, scorer, plain)
    prompts = [scorer.render_prompt(question) for question, _ in QUESTIONS]
    answers = scorer.generate_greedy(prompts, max_new_tokens=4)
    assert answers == [generate(plain, scorer, prompt, 4) for prompt in prompts]


def require_same_heldout_loss(base: Path, scorer: Model, plain: Any) -> None:
    """Require that the loss on the test set is that of the model's own forward."""
    examples = [conversation(i) for i in range(2)]
    encoder = load_encoder(base)
    found = list(heldout_losses(scorer, encoder, examples))
    for row, example in zip(found, examples, strict=True):
        (one,) = encode_batch([(example["messages"], None)], encoder)
        assert not isinstance(one, Fault)
        ids, labels = (torch.tensor(part)[None].long() for part in (one[0].input_ids, one[0].labels))
        with torch.no_grad():
            logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
        expected = cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        assert row["score"] == pytest.approx(expected, rel=1e-4)


def generate(model: Any, scorer: Model, prompt: str, count: int) -> str:
    """Generate the likeliest tokens, each from a forward pass over all tokens before it."""
    ids = list(scorer.tok_encode(prompt))
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == scorer.eot_token_id:
            break
    return scorer.tok_decode(ids[start:]).strip()


def load_plain(base: Path, model: Path) -> Any:
    """Load a trained model as transformers and PEFT do, with eager attention."""
    from peft import PeftModel

    is_adapter = (model / "adapter_config.json").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(base if is_adapter else model, attn_implementation="eager")
    return (PeftModel.from_pretrained(loaded, model) if is_adapter else loaded).eval()


def require_same_after_merge(base: Path, model: Path) -> None:
    """Require that the served model keeps its logits when it is merged, saved and loaded."""
    ids = torch.arange(100, 120)[None]
    served, _ = load(base, model, "float32")
    with torch.no_grad():
        expected = served(input_ids=ids, use_cache=False).logits
    assert torch.allclose(load_plain(base, model)(input_ids=ids, use_cache=False).logits, expected, atol=1e-4)
    if hasattr(served, "merge_and_unload"):
        served = served.merge_and_unload(safe_merge=True)
    served.save_pretrained("exported")
    AutoTokenizer.from_pretrained(base).save_pretrained("exported")
    whole, _ = load(base, Path("exported"), "float32")
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=ids, use_cache=False).logits, expected, atol=1e-3)


def write_inputs(folder: Path, base: Path, numbers: tuple[tuple[int, ...], ...]) -> None:
    """Write the inputs of the stage, with tokens of a byte vocabulary."""
    rows = [packed_row(row) for row in numbers]
    for row in rows:
        row["input_ids"] = [100 + token % 150 for token in row["input_ids"]]
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        row["labels"] = [token if label != -100 else -100 for token, label in pairs]
    shutil.copytree(base, folder / "data" / "base" / "model")
    write_json(folder / "data" / "base" / "base.json", {"files": {}, "model": str(base)})
    write_rows(folder / "data" / "pack" / "train.parquet", rows, ROWS)
