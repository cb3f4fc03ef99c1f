"""Score texts that start with the same tokens, and process these once.

All prompts of a benchmark start with the system prompt and the same examples, and the choices of a question
often with the same words. The KV cache of such a start is computed once, and copied for each text that goes
on from it.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tasks.evaluate.asker import Answer, Request
from tasks.evaluate.scores import Item

# Tokens of texts that are processed together. More would not be faster, and need memory for their logits.
TOKENS_TOGETHER = 512


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens, some of which are scored.

    Attributes:
        tokens: Token ids. The last one can be scored, but is not processed: it predicts nothing here.
        scored: Positions of the scored tokens, in ascending order; the first token has no prediction.
    """

    tokens: Sequence[int]
    scored: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its continuations.

    Attributes:
        prompt: Token ids of the prompt.
        start: Token ids that all continuations start with.
        rests: Token ids of each continuation after them.
        numbers: Numbers of the continuations among all requests.
    """

    prompt: Sequence[int]
    start: Sequence[int]
    rests: Sequence[Sequence[int]]
    numbers: Sequence[int]

    @property
    def cost(self) -> int:
        """Number of tokens to process, with padding."""
        return len(self.prompt) + len(self.start) + len(self.rests) * max(map(len, self.rests))


@dataclass(frozen=True, slots=True)
class Processed:
    """What a model has processed, to go on from there.

    Attributes:
        cache: KV cache.
        mask: 1 for a token, 0 for padding, shape (n_texts, n_tokens).
    """

    cache: Any
    mask: torch.Tensor

    def select(self, rows: Sequence[int]) -> "Processed":
        """Return some of the texts, each as often as listed; the cache is changed, not copied."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.reorder_cache(index)
        return Processed(self.cache, self.mask[index])

    def repeat(self, count: int) -> "Processed":
        """Return copies of a single text."""
        return Processed(copy.deepcopy(self.cache), self.mask).select([0] * count)


def keeps_all(model: Any) -> bool:
    """Return whether the cache keeps all tokens; a sliding window or a state cannot skip padding."""
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def score_texts(
    model: Any, texts: Sequence[Text], batch_size: int, on_progress: Callable[[int], None]
) -> list[Answer]:
    """Return the score of each text: its log-likelihood (nats), and whether it is the likeliest one.

    Args:
        model: Causal language model.
        texts: Texts.
        batch_size: Maximum number of texts that are processed together; 1 for models that mix them.
        on_progress: Called with the number of texts that were done.
    """
    length, before, size = 0, None, 1
    if has_cache := keeps_all(model):
        (length, before), size = process_start(model, texts), batch_size
    answers: dict[int, Answer] = {}
    for batch in batch_by_length([len(text.tokens) - length for text in texts], size):
        rests = [
            Text(texts[i].tokens[length:], [position - length for position in texts[i].scored]) for i in batch
        ]
        found, _ = process(model, rests, before and before.repeat(len(batch)), has_cache=has_cache)
        answers |= zip(batch, found, strict=True)
        on_progress(len(batch))
    return [answers[i] for i in range(len(texts))]


def score_requests(
    model: Any, requests: Sequence[Request], batch_size: int, on_progress: Callable[[int], None]
) -> list[Answer]:
    """Return the score of each continuation of a prompt, of at least two tokens.

    Args:
        model: Causal language model whose cache keeps all tokens.
        requests: (texts, prompt tokens, continuation tokens).
        batch_size: Maximum number of continuations that are processed together.
        on_progress: Called with the number of requests that were done.
    """
    questions = group_by_prompt(requests)
    length, before = process_start(model, [Text(question.prompt) for question in questions])
    answers: dict[int, Answer] = {}
    for batch in batch_questions(questions, batch_size):
        found = score_questions(model, batch, length, before and before.repeat(len(batch)))
        answers |= found
        on_progress(len(found))
    return [answers[i] for i in range(len(requests))]


def score_questions(
    model: Any, questions: Sequence[Question], length: int, before: Processed | None
) -> dict[int, Answer]:
    """Return number of the request -> score of the continuation.

    Args:
        model: Causal language model.
        questions: Questions.
        length: Number of tokens of the prompts that are processed already.
        before: What was processed.
    """
    prompts = [question.prompt[length:] for question in questions]
    texts = [
        Text([*prompt, *one.start], range(len(prompt), len(prompt) + len(one.start)))
        for prompt, one in zip(prompts, questions, strict=True)
    ]
    starts, processed = process(model, texts, before)
    answers = {
        number: found
        for question, found in zip(questions, starts, strict=True)
        for number in question.numbers
    }
    members = [
        # The last token before a rest is not processed yet: it predicts the first one.
        (row, number, Text([texts[row].tokens[-1], *rest], range(1, len(rest) + 1)))
        for row, question in enumerate(questions)
        for number, rest in zip(question.numbers, question.rests, strict=True)
        if rest
    ]
    if members:
        going_on = processed.select([row for row, _, _ in members])
        rests, _ = process(model, [text for _, _, text in members], going_on)
        for (_, number, _), (nats, is_likeliest) in zip(members, rests, strict=True):
            first, was_likeliest = answers[number]
            answers[number] = first + nats, was_likeliest and is_likeliest
    return answers


def group_by_prompt(requests: Sequence[Request]) -> list[Question]:
    """Return the questions of requests, the most expensive first, so that too little memory fails at once."""
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (_, prompt, _) in enumerate(requests):
        by_prompt[tuple(prompt)].append(number)
    questions = []
    for tokens, numbers in by_prompt.items():
        start = common_start([requests[number][2] for number in numbers])
        rests = [requests[number][2][len(start) :] for number in numbers]
        questions.append(Question(tokens, start, rests, numbers))
    return sorted(questions, key=lambda question: (-question.cost, question.prompt))


def batch_questions(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Yield the questions in batches, as long as their continuations fit into one."""
    return batch_fitting(questions, lambda batch: sum(len(one.numbers) for one in batch) <= size)


def batch_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of texts, the longest first: at most `size`, with at most `TOKENS_TOGETHER` if padded.

    Example:
        >>> list(batch_by_length([40, 600, 200, 180, 30], size=2))
        [[1], [2, 3], [0, 4]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return batch_fitting(
        longest_first,
        lambda batch: len(batch) <= size and len(batch) * lengths[batch[0]] <= TOKENS_TOGETHER,
    )


def batch_fitting(items: Iterable[Item], fits: Callable[[list[Item]], bool]) -> Iterator[list[Item]]:
    """Yield the items in batches as large as fit; an item that does not is a batch of its own."""
    batch: list[Item] = []
    for item in items:
        if batch and not fits([*batch, item]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def process_start(model: Any, texts: Sequence[Text]) -> tuple[int, Processed | None]:
    """Process what all texts start with, before their first scored token.

    Returns:
        Number of its tokens, and what was processed; 0 and None if the texts share nothing or are too few.
    """
    # Every text has to keep a token to process.
    limits = [min([len(text.tokens) - 2, *(position - 1 for position in text.scored[:1])]) for text in texts]
    length = min([len(common_start([text.tokens for text in texts])), *limits])
    if len(texts) < 2 or length < 1:
        return 0, None
    return length, process(model, [Text(texts[0].tokens[: length + 1])])[1]


@torch.inference_mode()
def process(
    model: Any, texts: Sequence[Text], before: Processed | None = None, *, has_cache: bool = True
) -> tuple[list[Answer], Processed]:
    """Return the score of each text, and what the model has processed.

    The logits of tokens that predict no scored token are not computed, except by the few models that always
    compute all.

    Args:
        model: Causal language model.
        texts: Texts.
        before: What they go on from; its cache is changed.
        has_cache: Whether the cache keeps all tokens; without it, nothing can go on from these texts.
    """
    tokens = [torch.tensor(text.tokens[:-1], device=model.device) for text in texts]
    inputs = pad_sequence(tokens, batch_first=True)
    own = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
    mask = torch.cat([before.mask, own], dim=1) if before else own
    width = inputs.shape[1]
    # At least one: without any, some models compute all.
    needed = sorted({position - 1 for text in texts for position in text.scored} or {width - 1})
    # Places would be moved to the first device, and the logits are on the last one: the last logits in a row.
    kept = width - needed[0] if hasattr(model, "hf_device_map") else torch.tensor(needed)
    going_on: dict[str, Any] = {}
    if before:
        going_on = {"past_key_values": before.cache, "position_ids": mask.cumsum(1)[:, -width:] - 1}
    found = model(inputs, attention_mask=mask, use_cache=has_cache, logits_to_keep=kept, **going_on)
    logits = found.logits
    if logits.shape[1] != len(needed):
        logits = logits[:, [place - width + logits.shape[1] for place in needed]]
    row_of = {place: row for row, place in enumerate(needed)}
    answers = [
        likelihood(rows[[row_of[i - 1] for i in text.scored]], [text.tokens[i] for i in text.scored])
        for rows, text in zip(logits, texts, strict=True)
    ]
    return answers, Processed(found.get("past_key_values"), mask)


def common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens that all sequences start with.

    Example:
        >>> common_start([[5, 2, 7], [5, 2], [5, 2, 8]])
        [5, 2]
    """
    columns = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    return [tokens[0] for tokens in columns]


def likelihood(logits: torch.Tensor, tokens: Sequence[int]) -> Answer:
    """Return the log-likelihood (nats) of tokens, and whether each is the likeliest one.

    Args:
        logits: Logits that predict them, shape (n_tokens, vocab).
        tokens: Token ids; without any, the likelihood is 0 nats.
    """
    target = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    nats = logits.float().log_softmax(-1)
    return float(nats.gather(1, target[:, None]).sum()), bool((nats.argmax(-1) == target).all())
