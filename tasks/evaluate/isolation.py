"""Whether a model gives the examples of a padded batch the results that they have alone."""

from typing import Any

import torch
from transformers import GenerationConfig

# Tokens of two prompts that are compared in a batch and alone.
LONG, SHORT = 24, 12
# Maximum difference, as a share of the likelihood or of the standard deviation of the logits, by rounding.
TOLERANCE, HALF_TOLERANCE = 1e-4, 0.1


@torch.inference_mode()
def find_mixing(model: Any) -> str | None:
    """Return where a batch changes the results of its examples, or None if it does not.

    Some recurrent models let the padding of a shorter prompt through.

    Args:
        model: Model that scores and generates, as a `tasks.evaluate.model.Model`.
    """
    tolerance = TOLERANCE if model.model.dtype == torch.float32 else HALF_TOLERANCE
    size = model.model.config.get_text_config().vocab_size
    tokens = [(17 * i + 3) % size for i in range(LONG)]
    requests = [(("", ""), prompt, tokens[:3]) for prompt in (tokens, tokens[-SHORT:])]
    together = [nats for nats, _ in model._loglikelihood_tokens(requests)]
    alone = [model._loglikelihood_tokens([request])[0][0] for request in requests]
    if any(abs(one - other) > tolerance * abs(other) for one, other in zip(together, alone, strict=True)):
        return "that is scored"
    ids = torch.tensor([tokens, [0] * (LONG - SHORT) + tokens[-SHORT:]], device=model.device)
    mask = torch.ones_like(ids)
    mask[1, : LONG - SHORT] = 0
    padded, unpadded = generate_two(model.model, ids, mask), generate_two(model.model, ids[1:, -SHORT:])
    for one, other in zip(padded, unpadded, strict=True):
        if not (one[1] - other[0]).square().mean().sqrt() <= tolerance * other[0].std():
            return "that is continued"
        if one[1].argmax() != other[0].argmax():
            break
    return None


def generate_two(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Generate two tokens greedily, and return the logits of each, shape (n_rows, vocab)."""
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        generation_config=GenerationConfig(
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return [logits.float() for logits in made.logits]
