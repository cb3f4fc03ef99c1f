"""lm-eval's HFLM with a single prefill per prompt and optional retrieval."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from nightshift.core.hardware import cpu_has_bf16
from nightshift.data.encode import IGNORED, Encoded
from tasks.evaluate.asker import Answer, Asker, Find, Request, context_length
from tasks.evaluate.isolation import find_mixing
from tasks.evaluate.prefixes import Text, keeps_all, score_requests, score_texts

log = logging.getLogger(__name__)


class Model(Asker, HFLM):
    """A causal language model for lm-eval.

    lm-eval processes a prompt again for each choice. Here what several texts start with is processed once:
    2 to 4 times fewer tokens. Likelihoods are summed in float32 and differ from lm-eval's by rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, find: Find | None = None) -> None:
        """Wrap a loaded model.

        Args:
            model: Loaded transformers or PEFT model.
            tokenizer: Tokenizer of the base model.
            batch_size: Sequences per forward pass.
            find: Function that retrieves the documents for a question; None disables retrieval.
        """
        # A chat template writes the start token itself.
        starts = False if tokenizer.chat_template else None
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=starts,
            max_length=context_length(model.config),
        )
        self.prepare(tokenizer, find)
        if batch_size > 1 and (fault := find_mixing(self)):
            log.warning(
                "this model gives an example %s other results in a batch than alone; scoring one by one",
                fault,
            )
            self.batch_size_per_gpu = 1

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run lm-eval's forward pass, and count its requests."""
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run lm-eval's generation, and count its requests."""
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self.advance(len(context))
        return tokens

    def score_continuations(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """Return the log-likelihood (nats) of each continuation, and whether it is the likeliest one."""
        if all(len(prompt) > 1 for _, prompt, _ in requests) and keeps_all(self.model):
            return score_requests(self.model, requests, int(self.batch_size), self.advance)
        return list(HFLM._loglikelihood_tokens(self, list(requests), disable_tqdm=True))

    def sequence_losses(self, sequences: Sequence[Encoded]) -> Iterator[float]:
        """Yield the summed negative log-likelihood (nats) of the labels of each sequence."""
        self.begin(len(sequences))
        texts = [
            Text(one.input_ids.tolist(), ((one.labels[1:] != IGNORED).nonzero()[0] + 1).tolist())
            for one in sequences
        ]
        for nats, _ in score_texts(self.model, texts, int(self.batch_size), self.advance):
            yield -nats


def load_model(base: str, adapter: str | None) -> Any:
    """Load the base with its adapter, if any, or the fully fine-tuned weights, for scoring.

    If the stage gave this process several GPUs, no single one holds the model, and its layers are spread.
    A CPU without bf16 computes it several times as slowly as float32, which is more accurate.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_full_model = adapter and not (Path(adapter) / "adapter_config.json").is_file()
    dtype = "auto" if device == "cuda" or cpu_has_bf16() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        adapter if is_full_model else base,
        dtype=dtype,
        device_map="auto" if torch.cuda.device_count() > 1 else None,
        trust_remote_code=False,
    )
    if adapter and not is_full_model:
        model = PeftModel.from_pretrained(model, adapter)
    # The router loss of a mixture of experts is part of training only, and refuses the masks of a cache.
    if getattr(text := model.config.get_text_config(), "output_router_logits", False):
        text.output_router_logits = False
    if device == "cpu" and (head := model.get_output_embeddings()):
        head.register_forward_pre_hook(copy_slice)
    return model.eval() if hasattr(model, "hf_device_map") else model.to(device).eval()


def copy_slice(head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:  # noqa: ARG001 - a hook
    """Copy the last states of a batch before they become logits.

    They are a slice, which PyTorch 2.13 multiplies with weights in bf16 a hundred times as slowly on a CPU.
    """
    return inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:]
