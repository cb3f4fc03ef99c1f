"""Proofs before step 1 of preference tuning; every fault that they catch is silent.

Loss: while the model equals its reference, its loss is known, such as ln 2 for DPO. Reference: its
log-probabilities are those of transformers' eager path, one answer at a time without padding. Gradients:
those of a batch are the mean of those of its rows, and reach every weight that trains. Start: every trained
weight is that of `sft`. Saving: as in `tasks.sft.proof`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import TrainerCallback

from nightshift.core.errors import StageError
from nightshift.core.files import write_figures
from tasks.prefer.job import RESULT, PreferJob
from tasks.prefer.rows import ANSWERS
from tasks.prefer.trainer import Example, Tuner
from tasks.sft import selftest
from tasks.sft.proof import check_saving, eager, randomized, trainable
from tasks.sft.reload import find_trained, is_same, read_weights
from tasks.sft.selftest import Gradients, PackedRow

# Maximum error of a log-probability by rounding, in nats per token.
PER_TOKEN = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}
# Maximum distance of the first loss from its known value.
OF_LOSS = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 5e-2}
SELFTEST = "selftest.json"


class Proof(TrainerCallback):
    """Compute the reference, run all checks before step 1, and measure the held-out pairs at the end."""

    def __init__(self, job: PreferJob) -> None:
        self.job = job
        self.trainer: Tuner | None = None

    def on_train_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Prepare the reference, and run the checks unless training resumes."""
        assert self.trainer
        self.trainer.prepare_reference()
        file = self.job.folder / "output" / SELFTEST
        # Later the model differs from its reference.
        if state.global_step and file.is_file():
            return
        with torch.random.fork_rng():
            results = run_checks(self.trainer, self.job)
        if self.trainer.is_world_process_zero():
            write_figures(file, results)

    def on_train_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write what the training changed on the held-out pairs."""
        assert self.trainer
        if state.global_step < self.job.plan.steps:
            return
        held_out = {}
        if self.job.eval_rows:
            self.trainer.model_wrapped.eval()
            held_out = {"rows": len(self.trainer.eval_dataset), **self.trainer.measure()}
            self.trainer.log({key: value for key, value in held_out.items() if key != "rows"})
        if self.trainer.is_world_process_zero():
            write_figures(self.job.folder / "output" / RESULT, held_out)


def run_checks(trainer: Tuner, job: PreferJob) -> dict[str, Any]:
    """Run all checks on two rows.

    Raises:
        StageError: A check fails; training must not start.
    """
    rows = trainer.sample()
    start = check_start(trainer, job)
    loss = check_loss(trainer, job, rows)
    reference = check_reference(trainer, job)
    gradients = check_gradients(trainer, job, rows)
    saving = check_saving(
        trainer,
        job,
        as_example(shortest(trainer)[0], ANSWERS[str(job.prefer.method)][0]),
        job.folder / "rehearsal",
    )
    trainer.model_wrapped.train()
    return {
        "start": {"weights": start},
        "loss": loss,
        "reference": reference,
        "gradients": gradients,
        "saving": saving,
    }


def check_start(trainer: Tuner, job: PreferJob) -> int:
    """Compare every trained weight with that of `sft`, and return their number.

    Raises:
        StageError: One differs.
    """
    live, saved = find_trained(trainer), read_weights(job.model, job)
    # Another strategy than that of `sft` may store the weights in half precision.
    other = [
        name
        for name, weight in live.items()
        if name not in saved or not is_same(saved[name].to(weight.dtype), weight.detach())
    ]
    if other:
        raise StageError(
            f"self-test: the model to tune is not that of sft: {len(other)} of {len(live)} weights differ, "
            f"such as {other[0]}; this is a bug, report it"
        )
    return len(live)


def collate(trainer: Tuner, rows: list[Example]) -> dict[str, Any]:
    """Return pairs as a batch on the device."""
    collator: Any = trainer.data_collator
    batch: dict[str, Any] = trainer._prepare_inputs(collator(rows))
    return batch


def loss_of(trainer: Tuner, model: Any, rows: list[Example]) -> torch.Tensor:
    """Compute the loss by the training function itself, without a trace in its metrics."""
    before = trainer._total_train_tokens
    total = trainer.total_loss.clone()
    with trainer.compute_loss_context_manager():
        loss: torch.Tensor = trainer.compute_loss(model, collate(trainer, rows))
    trainer._total_train_tokens, trainer.total_loss = before, total
    for metrics in trainer._metrics.values():
        metrics.clear()
    return loss


def check_loss(trainer: Tuner, job: PreferJob, rows: list[Example]) -> dict[str, Any]:
    """Compare the loss of the wrapped model with that of a model that equals its reference.

    Raises:
        StageError: The loss differs.
    """
    expected = trainer.first_loss(rows)
    with torch.no_grad():
        found = loss_of(trainer, trainer.model_wrapped, rows).item()
    if not abs(found - expected) <= OF_LOSS[job.backend.precision] * max(1.0, expected):
        raise StageError(
            f"self-test: the first loss is {found:.6g}, but {expected:.6g} if the model equals its "
            "reference; this is a bug, report it"
        )
    return {"found": float(f"{found:.6g}"), "expected": float(f"{expected:.6g}"), "proven": True}


def check_reference(trainer: Tuner, job: PreferJob) -> dict[str, Any]:
    """Compare the log-probabilities of the reference with transformers' own, one answer at a time.

    Raises:
        StageError: They differ by more than rounding.
    """
    worst = 0.0
    for row in shortest(trainer):
        for column, name in enumerate(ANSWERS[str(job.prefer.method)]):
            found = trainer.reference["train"][row["row"], column].item()
            with eager(trainer):
                expected = plain_log_probability(trainer, row["prompt_ids"], row[name])
            worst = max(worst, abs(found - expected) / len(row[name]))
    if not worst <= PER_TOKEN[job.backend.precision]:
        raise StageError(
            f"self-test: the log-probabilities of the reference differ from those of the plain model by "
            f"{worst:.3g} nats per token; set prefer.method to null, and report this"
        )
    return {"nats_per_token": float(f"{worst:.2g}"), "proven": True}


@torch.no_grad()
def plain_log_probability(trainer: Tuner, prompt: list[int], answer: list[int]) -> float:
    """Return the log-probability of an answer in nats, from the logits of a sequence without padding."""
    ids = torch.tensor([[*prompt, *answer]], device=trainer.args.device)
    with trainer.compute_loss_context_manager():
        logits = trainer.model_wrapped(input_ids=ids, use_cache=False).logits
    found = logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    return float(found.gather(1, ids[0, len(prompt) :, None]).sum())


def check_gradients(trainer: Tuner, job: PreferJob, rows: list[Example]) -> dict[str, Any]:
    """Compare the gradients of a batch with the mean of those of its rows; they must reach all weights."""
    # With other weights than those of the reference, the KL term of KTO would depend on the batch.
    with nullcontext() if job.prefer.method == "kto" else randomized(trainer):
        together = backward(trainer, rows, 1.0)
        alone = [backward(trainer, [row], 1 / len(rows)) for row in rows]
    return selftest.check_gradients(together, alone, job.backend.precision, list(trainable(trainer)))


def backward(trainer: Tuner, rows: list[Example], scale: float) -> Gradients:
    """Compute the gradients of the trainable weights of the unwrapped model, and leave none in it."""
    loss = loss_of(trainer, trainer.model, rows) * scale
    return list(torch.autograd.grad(loss, list(trainable(trainer).values()), allow_unused=True))


def shortest(trainer: Tuner) -> list[Example]:
    """Return the two rows with the fewest tokens before their answers."""
    return sorted(trainer.rows, key=lambda row: len(row["prompt_ids"]))[:2]


def as_example(row: Example, name: str) -> PackedRow:
    """Return a prompt with an answer as an example with labels on the answer."""
    ids = [*row["prompt_ids"], *row[name]]
    labels = [-100] * len(row["prompt_ids"]) + list(row[name])
    return selftest.crop({"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]})
