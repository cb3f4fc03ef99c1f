"""Ask a model: prompts and answers, whatever engine computes them."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from nightshift.data.encode import Encoded
from nightshift.data.template import find_answer_prefix, read_template
from tasks.evaluate.retrieval import add_documents

# Result for a sequence that exceeds the context length; the model does not run on it.
TOO_LONG = (-math.inf, False)
# Tokens of a sequence in a model without a maximum.
UNLIMITED = 2**20
Request = tuple[tuple[str, str], list[int], list[int]]
Answer = tuple[float, bool]
Find = Callable[[str], Sequence[str]]


class Asker(TemplateLM):
    """A causal language model for lm-eval, without the engine that runs it.

    An engine has the abstract methods of lm-eval's `TemplateLM` except `_loglikelihood_tokens`, and the two
    methods here that raise NotImplementedError.
    """

    # Called with the number of requests done, and of all requests of the benchmark.
    on_progress: Callable[[int, int], None] | None = None

    def prepare(self, tokenizer: Any, find: Find | None) -> None:
        """Read how prompts are written.

        Args:
            tokenizer: Tokenizer of the base model.
            find: Function that retrieves the documents for a question; None disables retrieval.
        """
        self._find = find
        self._template = read_template(tokenizer)
        self._prefix = find_answer_prefix(self._template) if self._template else ""
        self._done, self._total = 0, 0

    @property
    def retrieves(self) -> bool:
        """Whether documents are placed before each question."""
        return self._find is not None

    def score_continuations(self, requests: Sequence[Request]) -> Sequence[Answer]:
        """Return the log-likelihood (nats) of each continuation, and whether it is the likeliest one.

        Args:
            requests: (texts, prompt tokens, continuation tokens) that fit into the context.
        """
        raise NotImplementedError

    def sequence_losses(self, sequences: Sequence[Encoded]) -> Iterator[float]:
        """Yield the summed negative log-likelihood (nats) of the labels of each sequence."""
        raise NotImplementedError

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
        self.begin(len(requests))
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

    def begin(self, total: int) -> None:
        """Start to count the requests of a benchmark."""
        self._done, self._total = 0, total

    def advance(self, count: int) -> None:
        """Count requests that are done."""
        self._done += count
        if self.on_progress:
            self.on_progress(self._done, self._total)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
        **_: Any,
    ) -> list[Answer]:
        """Return the likelihoods of lm-eval requests (texts, prompt tokens, continuation tokens)."""
        fits = [len(prompt) + len(rest) <= self.max_length for _, prompt, rest in requests]
        fitting = [request for request, does_fit in zip(requests, fits, strict=True) if does_fit]
        self.begin(len(fitting))
        answers = iter(self.score_continuations(fitting))
        return [next(answers) if does_fit else TOO_LONG for does_fit in fits]


def context_length(config: Any) -> int:
    """Return the maximum tokens of a sequence; of a model with more than text, those of its text model.

    Models without positions, such as Mamba, have no maximum.

    Args:
        config: transformers' config of the model.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED
