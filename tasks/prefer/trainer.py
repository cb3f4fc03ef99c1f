"""TRL's DPOTrainer and KTOTrainer bound to the plan, with the reference computed once, before step 1."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from trl import DPOTrainer, KTOTrainer

from nightshift.core.errors import StageError
from nightshift.core.files import atomic_write
from tasks.prefer.job import REFERENCE, PreferJob
from tasks.prefer.rows import ANSWERS, NO_ROW
from tasks.sft.planned import Planned

# Adapter that TRL adds as a second copy of the first; the reference is computed before it could differ.
TRLS_COPY = "ref"
Example = Mapping[str, Any]


class Tuner(Planned):
    """What both trainers have in common: rows by their numbers, and the log-probabilities of the reference.

    Attributes:
        job: Job.
        rows: All rows once, in order.
        filler: Row that completes a batch.
        watch: Called after each batch of the reference, as it takes longer than a step.
        reference: Name -> summed log-probabilities of the answers of each row under the model before step 1,
            in nats, shape (n_rows + 1, n_answers); the last row is that of the filler.
    """

    _signature_columns: Any
    _metrics: Any
    _total_train_tokens: Any
    data_collator: Any
    eval_dataset: Any
    job: PreferJob
    rows: Any
    watch: Callable[[], None]
    reference: dict[str, torch.Tensor]

    def __init__(
        self, *, job: PreferJob, filler: dict[str, Any], watch: Callable[[], None], rows: Any, **more: Any
    ) -> None:
        """Build the trainer; the arguments are the attributes, and those of TRL's trainer."""
        self.job, self.filler, self.watch, self.rows = job, filler, watch, rows
        self.data, self.reference = job.data, {}
        super().__init__(**more)
        if job.params.adapter:
            self.model.delete_adapter(TRLS_COPY)
        self._signature_columns = [*rows.column_names, "position", "other_row"]
        self.collate = self.data_collator
        self.data_collator = self.collate_numbered
        # Nothing computes the loss from hidden states by the function of `tasks.sft`.
        self.head = None
        self.follow(job.params, job.plan)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Return the rows as they are: the stage has encoded them."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """Return the rows as they are; see `prepare_reference`, which uses the wrapped model."""
        return dataset

    def collate_numbered(self, rows: Sequence[Example]) -> dict[str, Any]:
        """Return a batch with the numbers of its rows."""
        return {**self.collate(rows), "row": torch.tensor([one["row"] for one in rows])}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - transformers' signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute TRL's loss, the mean over the rows of a batch, with the stored reference."""
        given = self.with_reference(inputs, "train")
        loss = super().compute_loss(model, given, return_outputs, num_items_in_batch)
        if (inputs["row"] == NO_ROW).all():
            # A step whose rows are skipped.
            loss = loss * 0.0
        if model.training:
            self.total_loss += loss.detach()
        return loss

    def with_reference(self, inputs: dict[str, Any], side: str) -> dict[str, Any]:
        """Return a batch with the log-probabilities of the reference instead of the row numbers."""
        raise NotImplementedError

    def find_numbers(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the reference by row, shape (n, n_answers)."""
        return self.reference[name].to(self.args.device)[numbers]

    @torch.no_grad()
    def log_probabilities(self, model: Any, inputs: Mapping[str, Any], prefix: str = "") -> torch.Tensor:
        """Return the log-probabilities of the answers of a batch in nats, shape (n_rows, n_answers).

        Args:
            model: Model, or the wrapped one.
            inputs: Batch; TRL's loss computes them in the same way.
            prefix: Start of the names of the sequences in the batch.
        """
        ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
        labels = ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, -100)
        with self.compute_loss_context_manager():
            outputs = model(
                input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False
            )
        sums = outputs.log_probs.float().sum(dim=1)
        return torch.stack(sums.chunk(len(ids) // len(inputs["row"])), dim=1)

    def prepare_reference(self) -> None:
        """Read the log-probabilities of the reference, or compute and write them before step 1.

        The wrapped model computes them as it computes its own, so that both are equal at step 1.

        Raises:
            StageError: Training resumes, and the file is missing.
        """
        file = Path(self.args.output_dir) / REFERENCE
        if not file.is_file():
            if self.state.global_step:
                raise StageError(
                    f"{file}: not found, but training resumes from step {self.state.global_step}; delete "
                    f"{file.parent}, so that it starts anew"
                )
            self.model_wrapped.eval()
            found = self.measure_reference()
            self.model_wrapped.train()
            if self.is_world_process_zero():
                with atomic_write(file) as temporary:
                    save_file(found, temporary)
            self.accelerator.wait_for_everyone()
        self.reference = load_file(file)

    def measure_reference(self) -> dict[str, torch.Tensor]:
        """Compute the log-probabilities of both sides; see `reference`."""
        sides = {"train": self.rows, **({"eval": self.eval_dataset} if self.job.eval_rows else {})}
        return {side: self.measure_all(rows) for side, rows in sides.items()}

    def measure_all(self, rows: Any, number: str = "row", prefix: str = "") -> torch.Tensor:
        """Return the log-probabilities of all rows, and 0 for the filler, shape (n_rows + 1, n_answers).

        Args:
            rows: Rows.
            number: Column with the numbers of the rows.
            prefix: See `log_probabilities`.
        """
        found = torch.zeros(len(rows) + 1, len(ANSWERS[str(self.job.prefer.method)]), device=self.args.device)
        for batch in self.eval_batches(rows):
            inputs = self._prepare_inputs(self.data_collator(batch))
            values = self.log_probabilities(self.model_wrapped, inputs, prefix)
            numbers = torch.tensor([one.get(number, NO_ROW) for one in batch], device=self.args.device)
            found[numbers[numbers != NO_ROW]] = values[numbers != NO_ROW]
            self.watch()
        total: torch.Tensor = self.accelerator.reduce(found, reduction="sum")
        return total.cpu()

    def measure(self) -> dict[str, float]:
        """Return the mean loss and rewards over the rows of the validation set."""
        total: Any = 0.0
        for batch in self.eval_batches():
            inputs = self._prepare_inputs(self.data_collator(batch))
            given = self.find_numbers("eval", inputs["row"])
            ratios = self.log_probabilities(self.model_wrapped, inputs) - given
            table = self.tabulate(ratios.double(), inputs)
            total = total + table[inputs["row"] != NO_ROW].sum(dim=0)
        return self.summarize(self.accelerator.reduce(total, reduction="sum").tolist())

    def tabulate(self, ratios: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return what is summed over the rows, shape (n_rows, n_sums); see `summarize`.

        Args:
            ratios: Log-probabilities less those of the reference, in nats, shape (n_rows, n_answers).
            inputs: Batch.
        """
        raise NotImplementedError

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics of an evaluation from the sums over all rows."""
        raise NotImplementedError

    def first_loss(self, rows: Sequence[Example]) -> float:
        """Return the loss of some rows while the model equals its reference."""
        raise NotImplementedError

    def sample(self) -> list[Example]:
        """Return the rows with which the proofs are made."""
        raise NotImplementedError


class PairTuner(Tuner, DPOTrainer):
    """DPOTrainer on pairs, in the order of the plan."""

    def with_reference(self, inputs: dict[str, Any], side: str) -> dict[str, Any]:
        """Return a batch with the log-probabilities of both answers."""
        found = self.find_numbers(side, inputs["row"])
        given = {key: value for key, value in inputs.items() if key != "row"}
        return {**given, "ref_chosen_logps": found[:, 0], "ref_rejected_logps": found[:, 1]}

    def tabulate(self, ratios: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return loss, both rewards, accuracy, margin and 1 of each pair."""
        beta = self.job.prefer.beta
        lengths = inputs["completion_mask"].sum(dim=1).chunk(2)
        losses = pair_loss(ratios, lengths, beta, self.job.prefer.loss_type)
        chosen, rejected = (beta * ratios).unbind(dim=1)
        values = (losses, chosen, rejected, (chosen > rejected).double(), chosen - rejected)
        return torch.stack([*values, torch.ones_like(chosen)], dim=1)

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the means over the pairs."""
        *totals, count = sums
        names = ("loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")))
        return {f"eval_{name}": total / count for name, total in zip(names, totals, strict=True)}

    def first_loss(self, rows: Sequence[Example]) -> float:  # noqa: ARG002 - the same for all pairs
        """Return the loss of every pair."""
        return first_loss(self.job.prefer.beta, self.job.prefer.loss_type)

    def sample(self) -> list[Example]:
        """Return the two shortest pairs."""
        return sorted(self.rows, key=lambda row: len(row["prompt_ids"]) + len(row["chosen_ids"]))[:2]


class AnswerTuner(Tuner, KTOTrainer):
    """KTOTrainer on single answers, in the order of the plan.

    The rows of the plan have only numbers: `position` in it, `row`, and `other_row`, whose answer behind the
    prompt of the row estimates the KL term. Tokens are looked up.
    """

    def collate_numbered(self, rows: Sequence[Example]) -> dict[str, Any]:
        """Look up the tokens of numbered rows; return a batch with their numbers."""
        found = [self.look_up(one) for one in rows]
        if any("position" in one for one in rows):
            # A filler among rows of the plan.
            found = [{"KL_completion_ids": one["completion_ids"], **one} for one in found]
        positions = [one.get("position", NO_ROW) for one in rows]
        return {**super().collate_numbered(found), "position": torch.tensor(positions)}

    def look_up(self, example: Example) -> Example:
        """Return a row of the plan with its tokens, and those of the answer of the other row."""
        if "position" not in example:
            return example
        row, other = (
            self.filler if number == NO_ROW else self.rows[number]
            for number in (example["row"], example["other_row"])
        )
        return {**row, "KL_completion_ids": other["completion_ids"]}

    def measure_reference(self) -> dict[str, torch.Tensor]:
        """Compute the log-probabilities of both sides, and of the other answers by position in the plan."""
        return {
            **super().measure_reference(),
            "other": self.measure_all(self.train_dataset, "position", "KL_"),
        }

    def with_reference(self, inputs: dict[str, Any], side: str) -> dict[str, Any]:
        """Return a batch with the log-probabilities of its answers, and of the other answers."""
        given = {key: value for key, value in inputs.items() if key not in ("row", "position")}
        own = self.find_numbers(side, inputs["row"])[:, 0]
        return {
            **given,
            "ref_logps": own,
            "ref_KL_logps": self.find_numbers("other", inputs["position"])[:, 0],
        }

    def tabulate(self, ratios: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss without the KL term, and reward and 1 for a good or for a bad answer."""
        prefer, good = self.job.prefer, inputs["label"].double()
        rewards = prefer.beta * ratios[:, 0]
        weights = prefer.desirable_weight * good + prefer.undesirable_weight * (1 - good)
        losses = weights * (1 - torch.sigmoid(torch.where(good > 0, rewards, -rewards)))
        return torch.stack([losses, rewards * good, rewards * (1 - good), good, 1 - good], dim=1)

    def summarize(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean loss, the mean rewards of good and of bad answers, and their difference."""
        loss, chosen, rejected, good, bad = sums
        found = {"eval_loss": loss / (good + bad)}
        if good:
            found["eval_rewards/chosen"] = chosen / good
        if bad:
            found["eval_rewards/rejected"] = rejected / bad
        if good and bad:
            found["eval_rewards/margins"] = chosen / good - rejected / bad
        return found

    def first_loss(self, rows: Sequence[Example]) -> float:
        """Return half the mean weight of the answers."""
        prefer = self.job.prefer
        labels = [self.look_up(row)["label"] for row in rows]
        weights = [prefer.desirable_weight if good else prefer.undesirable_weight for good in labels]
        return sum(weights) / len(weights) / 2

    def sample(self) -> list[Example]:
        """Return the first two rows of the plan that are not skipped."""
        dataset: Any = self.train_dataset
        positions = [i for i, row in enumerate(self.plan.order) if row != NO_ROW]
        return [dataset[i] for i in positions[:2]]


def pair_loss(
    ratios: torch.Tensor, lengths: Sequence[torch.Tensor], beta: float, loss_type: str
) -> torch.Tensor:
    """Return the loss of each pair, shape (n_pairs,), as TRL defines it.

    Args:
        ratios: Log-probabilities of both answers less those of the reference, in nats, shape (n_pairs, 2).
        lengths: Tokens of the chosen and of the rejected answers, each of shape (n_pairs,).
        beta: Strength of the reference.
        loss_type: sigmoid, hinge or ipo.
    """
    margin = ratios[:, 0] - ratios[:, 1]
    if loss_type == "sigmoid":
        return -logsigmoid(beta * margin)
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    return (ratios[:, 0] / lengths[0] - ratios[:, 1] / lengths[1] - 1 / (2 * beta)) ** 2


def first_loss(beta: float, loss_type: str) -> float:
    """Return the loss of every pair while the model equals its reference.

    Example:
        >>> first_loss(0.1, "sigmoid"), first_loss(0.1, "hinge"), round(first_loss(0.5, "ipo"), 9)
        (0.6931471805599453, 1.0, 1.0)
    """
    return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * beta) ** 2}[loss_type]
