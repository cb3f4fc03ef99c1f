"""Backend `transformers`: a local model in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nightshift.core.errors import ConfigError
from nightshift.replies import Generate, OnReply, Reply, Request, Result, request_key


def load_local(folder: Path, model_name: str, sampling: dict[str, Any]) -> Generate:
    """Load a model and return its generate function.

    A batch holds the answers to one request, sampled with a seed derived from the request. An answer
    does not depend on other requests, so a rebuild from scratch is bit-identical. For volume, serve the
    model and use the backend `openai`.

    Args:
        folder: Folder with model and tokenizer; safetensors only.
        model_name: Backend, model, revision and sampling parameters, as one string.
        sampling: Sampling parameters: temperature, top_p and max_new_tokens.

    Raises:
        ConfigError: The model has no chat template.
    """
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Half precision gains nothing on most CPUs, and rounding differs between them.
    dtype = "auto" if device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    model = model.to(device).eval()
    if not tokenizer.chat_template:
        raise ConfigError(f"augment.model: {folder} has no chat template; choose an instruct model")
    # Its chat template may end an answer with another token than the one that ends a text.
    own = model.generation_config.eos_token_id
    stops = torch.tensor(own if own is not None else tokenizer.eos_token_id, device=device)

    def generate(requests: Sequence[Request], on_reply: OnReply) -> list[Result]:
        results: list[Result] = []
        for number, request in enumerate(tqdm(requests, "paraphrase", unit="call", disable=None)):
            torch.manual_seed(int(request_key(request, model_name)[:15], 16))
            inputs = tokenizer.apply_chat_template(
                request.prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(device)
            length = inputs["input_ids"].shape[1]
            with torch.inference_mode():
                output = model.generate(
                    **inputs,
                    do_sample=True,
                    num_return_sequences=request.answers,
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                    **sampling,
                )
            answers = output[:, length:]
            # A truncated text is not an answer.
            whole = torch.isin(answers, stops).any(dim=1).tolist()
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            reply = Reply(
                tuple(text if done else "" for text, done in zip(texts, whole, strict=True)),
                int(output.numel()),
            )
            on_reply(number, reply)
            results.append(reply)
        return results

    return generate
