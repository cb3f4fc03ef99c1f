"""TRL's trainer bound to the plan: its learning rates, token-weighted losses, verified checkpoints."""

from typing import Any

import torch
from trl import SFTTrainer

from nightshift.data.encode import IGNORED
from tasks.sft import SftParams
from tasks.sft.fused import LossHead
from tasks.sft.loss import summed_loss, token_lengths
from tasks.sft.plan import Plan
from tasks.sft.planned import Planned

# Config entries of a mixture of experts that TRL changes.
ROUTER = ("output_router_logits", "router_aux_loss_coef")


class Trainer(Planned, SFTTrainer):
    """SFTTrainer on packed rows in the order of the plan."""

    def __init__(
        self, *, params: SftParams, plan: Plan, filler: dict[str, Any], loss: str, **more: Any
    ) -> None:
        """Build the trainer.

        Args:
            params: `sft` section of params.yaml.
            plan: Compiled plan.
            filler: Row without labels that completes a batch.
            loss: Loss computation: chunked or logits.
            more: Keyword arguments of SFTTrainer.
        """
        self.params, self.filler = params, filler
        # Whether a mixture of experts has a router loss is up to its config, not to TRL's default.
        text = more["model"].config.get_text_config()
        router = {key: getattr(text, key) for key in ROUTER if hasattr(text, key)}
        trained = [(weight, weight.data) for weight in more["model"].parameters() if weight.requires_grad]
        super().__init__(**more)
        for key, value in router.items():
            setattr(text, key, value)
        if params.adapter == "qlora" and not (self.args.fsdp and self.args.bf16):
            # TRL rounds what trains beside 4-bit weights to bfloat16, in which small updates are lost. FSDP2
            # shards weights of one dtype only.
            for weight, data in trained:
                weight.data = data
        # `compute_loss` divides by the tokens of the whole step.
        self.loss_is_scaled_for_ga = True
        self.lengths = torch.ones(1)
        self.follow(params, plan)
        self.head = LossHead(self.model.get_output_embeddings()) if loss == "chunked" else None
        if params.neftune_noise_alpha is not None:
            self.model.get_input_embeddings().register_forward_hook(self.add_noise)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - transformers' signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum the negative log-likelihoods of a batch, divided by the labelled tokens of the whole step.

        Requested outputs contain logits, and the loss then comes from them.
        """
        if self.params.neftune_noise_alpha is not None and model.training:
            self.lengths = token_lengths(inputs)
        head = None if return_outputs else self.head
        total, outputs = summed_loss(model, inputs, self.params.label_smoothing_factor, head)
        if model.training and getattr(outputs, "aux_loss", None) is not None:
            total = total + self.router_loss(outputs.aux_loss, inputs["labels"])
        # Gradients are averaged over ranks, but num_items_in_batch counts the tokens of all ranks.
        loss = total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        if model.training:
            self.total_loss += loss.detach()
        return (loss, outputs) if return_outputs else loss

    def router_loss(self, aux_loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the router loss of a mixture of experts, with its weight in the sum over labelled tokens.

        transformers adds it to the mean loss of a batch; here each batch counts by its labelled tokens.
        """
        coefficient: float = self.model.config.get_text_config().router_aux_loss_coef
        return coefficient * aux_loss.to(labels.device) * (labels[:, 1:] != IGNORED).sum()

    def add_noise(self, module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Add NEFTune noise to embeddings, shape (n_rows, n_tokens, width), scaled by example length.

        transformers scales by the length of the whole row, which is too little noise for a packed row.
        Source: Jain et al., arXiv 2310.05914.
        """
        if not module.training:
            return output
        alpha = self.params.neftune_noise_alpha or 0.0
        magnitude = alpha / torch.sqrt(self.lengths.to(output.device) * output.size(-1))
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * magnitude[..., None].to(output.dtype)

    def measure(self) -> dict[str, float]:
        """Return the loss in nats per labelled token of the validation set: no mean of means."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.eval_batches():
            inputs = self._prepare_inputs(self.data_collator(batch))
            with self.compute_loss_context_manager():
                total, _outputs = summed_loss(self.model_wrapped, inputs, head=self.head)
            sums += torch.stack([total.double(), (inputs["labels"][:, 1:] != IGNORED).sum().double()])
        nats, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {"eval_loss": nats / tokens, "eval_tokens": tokens}
