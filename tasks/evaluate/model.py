"""lm-eval's HFLM with a single prefill per prompt and optional retrieval."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from nightshift.core.cpu import cpu_has_bf16
from nightshift.data.template import find_answer_prefix, read_template
from tasks.evaluate.isolation import find_mixing
from tasks.evaluate.retrieval import add_documents

# Result for a sequence that exceeds the context length; the model does not run on it.
TOO_LONG = (-math.inf, False)
# Tokens of a sequence in a model without a maximum.
UNLIMITED = 2**20
Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]
log = logging.getLogger(__name__)


class Model(HFLM):
    """A causal language model for lm-eval.

    lm-eval processes a prompt again for each choice. Here the choices share their prompt's KV cache:
    2 to 4 times fewer tokens. Likelihoods are summed in float32 and differ from lm-eval's by rounding.
    """

    # Called with the number of requests done, and of all requests of the benchmark.
    on_progress: Callable[[int, int], None] | None = None

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, find: Callable[[str], Sequence[str]] | None = None
    ) -> None:
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
        self._find = find
        self._template = read_template(tokenizer)
        self._prefix = find_answer_prefix(self._template) if self._template else ""
        if batch_size > 1 and (fault := find_mixing(self)):
            log.warning(
                "this model gives an example %s other results in a batch than alone; scoring one by one",
                fault,
            )
            self.batch_size_per_gpu = 1

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> str:
        """Render a conversation up to where a given answer starts; lm-eval compares answers there."""
        return self.render(chat_history) + self._prefix

    def without_prefix(self, prompt: str) -> str:
        """Return a prompt from `apply_chat_template` as it is when the model writes the answer."""
        return prompt.removesuffix(self._prefix)

    def render(self, turns: list[dict[str, Any]]) -> str:
        """Render a conversation and the prompt for an answer, with the retrieved documents.

        Without a chat template, each turn is a paragraph.
        """
        turns = self.add_notes(turns)
        if self._template is None:
            return "".join(f"{turn['content']}\n\n" for turn in turns)
        return self._template.render(turns, None, prompt=True)

    def chat_template(self, chat_template: bool | str = False) -> str:  # noqa: ARG002, FBT001, FBT002
        """Return the chat template for lm-eval's records; empty if there is none."""
        return self._template.source if self._template else ""

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:  # noqa: FBT001, FBT002
        """Decode tokens; of a generated answer, what follows the reasoning."""
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))
        if not (skip_special_tokens and self._prefix and self._template):
            return text
        # The prefix ends with the token that starts the content: </think>, or <|message|> of gpt-oss.
        start = self._prefix.rstrip()[self._prefix.rstrip().rfind("<") :]
        answer = str(self.tokenizer.decode(tokens)).rpartition(start)[2]
        return re.sub("|".join(map(re.escape, self._template.added_tokens)), "", answer)

    def add_notes(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add the retrieved documents, if any, to the last turn of a conversation if that is a question."""
        *before, last = turns
        if not self._find or last["role"] != "user":
            return turns
        return [*before, {**last, "content": add_documents(last["content"], self._find(last["content"]))}]

    def choice_likelihoods(self, questions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Return the log-likelihood (nats) of each choice after its question; -inf if too long.

        Args:
            questions: (question, choices) pairs.
        """
        requests = [
            Instance("loglikelihood", {}, (self.render_prompt(question), choice), idx=0)
            for question, choices in questions
            for choice in choices
        ]
        answers = iter(self.loglikelihood(requests))
        return [[next(answers)[0] for _ in choices] for _, choices in questions]

    def generate_greedy(self, prompts: Sequence[str], max_new_tokens: int) -> list[str | None]:
        """Generate greedy continuations; None if prompt and answer exceed the context length."""
        fits = [len(self.tok_encode(prompt)) + max_new_tokens <= self.max_length for prompt in prompts]
        options = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False}
        requests = [
            Instance("generate_until", {}, (prompt, options), idx=0)
            for prompt, does_fit in zip(prompts, fits, strict=True)
            if does_fit
        ]
        self._done, self._total = 0, len(requests)
        texts = iter(self.generate_until(requests, disable_tqdm=True))
        return [next(texts).strip() if does_fit else None for does_fit in fits]

    def render_prompt(self, question: str) -> str:
        """Render a single question with the chat template."""
        return self.apply_chat_template([{"role": "user", "content": question}])

    def loglikelihood(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> list[Answer]:
        """Return the likelihoods of lm-eval requests, without a progress bar in the log."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run lm-eval's forward pass, and count its requests."""
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run lm-eval's generation, and count its requests."""
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return tokens

    def _advance(self, count: int) -> None:
        self._done += count
        if self.on_progress:
            self.on_progress(self._done, self._total)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,  # noqa: FBT001, FBT002 - lm-eval's signature
        override_bs: int | None = None,
    ) -> list[Answer]:
        """Return the likelihoods of lm-eval requests (texts, prompt tokens, continuation tokens)."""
        fits = [len(prompt) + len(rest) <= self.max_length for _, prompt, rest in requests]
        fitting = [request for request, does_fit in zip(requests, fits, strict=True) if does_fit]
        self._done, self._total = 0, len(fitting)
        if all(len(prompt) > 1 for _, prompt, _ in fitting) and self._has_full_cache():
            answers = iter(self._by_prompt(fitting))
        else:
            answers = iter(super()._loglikelihood_tokens(fitting, disable_tqdm, override_bs))
        return [next(answers) if does_fit else TOO_LONG for does_fit in fits]

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
            self._advance(len(numbers))
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


def context_length(config: Any) -> int:
    """Return the maximum tokens of a sequence; of a model with more than text, those of its text model.

    Models without positions, such as Mamba, have no maximum.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def load_model(base: str, adapter: str | None) -> Any:
    """Load the base with its adapter, if any, or the fully fine-tuned weights, for scoring.

    A CPU without bf16 computes it several times as slowly as float32, which is more accurate.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_full_model = adapter and not (Path(adapter) / "adapter_config.json").is_file()
    dtype = "auto" if device == "cuda" or cpu_has_bf16() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        adapter if is_full_model else base, dtype=dtype, trust_remote_code=False
    )
    if adapter and not is_full_model:
        model = PeftModel.from_pretrained(model, adapter)
    # The router loss of a mixture of experts is part of training only, and refuses the masks of a cache.
    if getattr(text := model.config.get_text_config(), "output_router_logits", False):
        text.output_router_logits = False
    return model.to(device).eval()
