"""lm-eval's HFLM with a single prefill per prompt and optional retrieval."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from nightshift.core.cpu import cpu_has_bf16
from nightshift.data.encode import IGNORED, Encoded
from tasks.evaluate.asker import Answer, Asker, Find, Request, context_length
from tasks.evaluate.isolation import find_mixing

log = logging.getLogger(__name__)


class Model(Asker, HFLM):
    """A causal language model for lm-eval.

    lm-eval processes a prompt again for each choice. Here the choices share their prompt's KV cache:
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
        if all(len(prompt) > 1 for _, prompt, _ in requests) and self._has_full_cache():
            return self._by_prompt(requests)
        return list(HFLM._loglikelihood_tokens(self, list(requests), disable_tqdm=True))

    @torch.inference_mode()
    def sequence_losses(self, sequences: Sequence[Encoded]) -> Iterator[float]:
        """Yield the summed negative log-likelihood (nats) of the labels of each sequence.

        They run one at a time: a batch would hold the logits of all its tokens over the whole vocabulary.
        """
        self.begin(len(sequences))
        for one in sequences:
            ids = torch.tensor(one.input_ids[None], dtype=torch.long, device=self.device)
            labels = torch.tensor(one.labels[1:], dtype=torch.long, device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            yield float(cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            self.advance(1)

    def _has_full_cache(self) -> bool:
        """Return whether the cache keeps all tokens; a sliding window or a state cannot skip padding."""
        layers = DynamicCache(config=self.model.config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    def _by_prompt(self, requests: Sequence[Request]) -> list[Answer]:
        """Process each prompt once, then its continuations with the KV cache."""
        by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, prompt, _) in enumerate(requests):
            by_prompt[tuple(prompt)].append(number)
        # Longest first, so that running out of memory fails at once.
        groups = sorted(by_prompt.items(), key=lambda group: (-len(group[0]), group[0]))
        answers: dict[int, Answer] = {}
        for batch in self._batches(groups):
            numbers = [number for _, members in batch for number in members]
            rests = [requests[number][2] for number in numbers]
            answers |= zip(numbers, self._score_batch(batch, rests), strict=True)
            self.advance(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _batches(
        self, groups: Sequence[tuple[tuple[int, ...], list[int]]]
    ) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Group prompts as long as their continuations fit into one batch."""
        batch: list[tuple[tuple[int, ...], list[int]]] = []
        for group in groups:
            if batch and sum(len(members) for _, members in [*batch, group]) > self.batch_size:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @torch.inference_mode()
    def _score_batch(
        self, batch: Sequence[tuple[tuple[int, ...], list[int]]], rests: Sequence[list[int]]
    ) -> list[Answer]:
        """Return the likelihoods of the continuations of a batch of prompts.

        The last token of a prompt is processed with the continuations: it predicts their first token.
        """
        prompts, mask = self._padded([prompt[:-1] for prompt, _ in batch])
        cache = self.model(prompts, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
        repeats = torch.tensor([len(members) for _, members in batch], device=self.device)
        rows = torch.repeat_interleave(torch.arange(len(batch), device=self.device), repeats)
        cache.reorder_cache(rows)
        starts = mask.sum(1)[rows]
        lasts = [prompt[-1] for prompt, members in batch for _ in members]
        inputs, is_read = self._padded([[last, *rest[:-1]] for last, rest in zip(lasts, rests, strict=True)])
        logits = self.model(
            inputs,
            attention_mask=torch.cat([mask[rows], is_read], dim=1),
            position_ids=starts[:, None] + torch.arange(inputs.shape[1], device=self.device),
            past_key_values=cache,
        ).logits
        found = []
        for row, rest in zip(logits, rests, strict=True):
            target = torch.tensor(rest, device=self.device)
            likelihoods = row[: len(rest)].float().log_softmax(-1)
            is_likeliest = bool((likelihoods.argmax(-1) == target).all())
            found.append((float(likelihoods.gather(1, target[:, None]).sum()), is_likeliest))
        return found

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return right-padded token ids and attention mask, both shape (n_sequences, longest)."""
        tokens = [torch.tensor(list(one), device=self.device) for one in sequences]
        ids = pad_sequence(tokens, batch_first=True)
        mask = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
        return ids, mask


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
    return model.eval() if hasattr(model, "hf_device_map") else model.to(device).eval()
