"""The model as MLflow serves it: a pyfunc chat model from code, an adapter on a referenced base.

MLflow's transformers flavor saves PEFT models that load without an error and generate garbage. This
model loads both parts with their own libraries and checks the base against its digests. It finds the
base through `NIGHTSHIFT_BASE`, at its path at registration, or among the champions' kept bases. MLflow
copies this file into the model, so it imports nothing from the project; `nightshift chat` and `export`
use its functions.
"""

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from mlflow.pyfunc import ChatModel
from mlflow.types.llm import ChatCompletionResponse, ChatMessage, ChatParams

# No library may fetch code from a hub; see `nightshift/__init__.py`, which a served model lacks.
sys.modules["kernels"] = None  # type: ignore[assignment]
# Maximum number of new tokens, unless the request has max_tokens.
MAX_NEW_TOKENS = 512
# Prompts to check whether two loaded models are identical.
PROBES = ("What is the chemical symbol of Gold?", "Who are you?", "Write one sentence about the sea.")
PROBE_TOKENS = 16
# Environment variable that is set while the model is logged. MLflow then loads it twice and asks for an
# answer; a fresh process does so afterwards, with the registered files.
LOGGED = "NIGHTSHIFT_LOGGED"


class TooLongError(ValueError):
    """The conversation is longer than the model's context."""


class AdapterChat(ChatModel):
    """Chat with the adapter on its base. Greedy decoding: temperature, top_p, n and stop are ignored."""

    def load_context(self, context: Any) -> None:
        """Find and verify the base, load the adapter on it, and move both to a GPU if there is one."""
        if os.environ.get(LOGGED):
            return
        base = find_base(Path(context.artifacts["base_reference"]))
        self.model, self.tokenizer = load(base, Path(context.artifacts["model"]))
        self.model.to(fastest_device())

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow's signature
        messages: list[ChatMessage],
        params: ChatParams | None = None,
    ) -> ChatCompletionResponse:
        """Answer a conversation."""
        if os.environ.get(LOGGED):
            return build_response("", 0, 0, is_complete=False)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if params and (params.custom_inputs or {}).get("probe"):
            n_prompt, new = generate(self.model, self.tokenizer, turns, PROBE_TOKENS, forced=True)
            text = str(self.tokenizer.decode(new))
        else:
            limit = (params.max_tokens if params else None) or MAX_NEW_TOKENS
            n_prompt, new = generate(self.model, self.tokenizer, turns, limit)
            text = str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()
        return build_response(text, n_prompt, len(new), is_complete=has_stopped(self.model, new))


def build_response(text: str, n_prompt: int, n_new: int, *, is_complete: bool) -> ChatCompletionResponse:
    """Build the response with an answer.

    Args:
        text: Answer.
        n_prompt: Tokens of the conversation.
        n_new: Tokens of the answer.
        is_complete: Whether the model ended the answer.
    """
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop" if is_complete else "length",
    }
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
    return ChatCompletionResponse.from_dict(
        {"id": uuid.uuid4().hex, "model": "nightshift", "choices": [choice], "usage": usage}
    )


def find_base(reference: Path, *places: Path) -> Path:
    """Return the folder of the base in a reference, verified.

    Args:
        reference: base_reference.json of a version.
        places: Folders to search in addition to those in the reference.

    Raises:
        FileNotFoundError: No folder contains the base. If NIGHTSHIFT_BASE is set, only that folder is
            searched.
    """
    named = json.loads(reference.read_text("utf-8"))
    if place := os.environ.get("NIGHTSHIFT_BASE"):
        places = (Path(place),)
    else:
        places = (*places, *(Path(named[key]) for key in ("path", "kept") if key in named))
    faults = []
    for folder in places:
        fault = find_fault(folder, named["files"])
        if fault is None:
            return folder
        faults.append(fault)
    remedy = f"set NIGHTSHIFT_BASE to a folder with the files of the base {named['model']}"
    raise FileNotFoundError(f"{'; '.join(faults)}; {remedy}")


def find_fault(base: Path, digests: dict[str, str]) -> str | None:
    """Check every file of the base against its SHA-256; return the first problem, or None."""
    for name, digest in digests.items():
        if not (base / name).is_file():
            return f"{base / name}: not found"
        with (base / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{base / name}: not the base that this adapter was trained on"
    return None


def load(base: Path, adapter: Path, dtype: str = "auto") -> tuple[Any, Any]:
    """Load base, adapter and tokenizer.

    Args:
        base: Folder of the base.
        adapter: Folder of the adapter, or of full model weights.
        dtype: Data type of the weights in memory, such as float32; auto keeps that of the files.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_whole = not (adapter / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(
        adapter if is_whole else base, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    if not is_whole:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(base)


def fastest_device() -> str:
    """Return cuda if it is available, otherwise cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def encode_prompt(tokenizer: Any, turns: list[dict[str, str]]) -> Any:
    """Encode a conversation and the prompt for an answer; without a chat template, each turn is a paragraph.

    Returns:
        Tensors by name, such as input_ids, shape (1, n_tokens).
    """
    if not tokenizer.chat_template:
        text = "".join(f"{turn['content']}\n\n" for turn in turns)
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def generate(
    model: Any,
    tokenizer: Any,
    turns: list[dict[str, str]],
    limit: int,
    *,
    forced: bool = False,
    **options: Any,
) -> tuple[int, Any]:
    """Generate an answer, greedily unless `options` say otherwise; the same files give the same answer.

    Args:
        model: Model with or without an adapter.
        tokenizer: Tokenizer of the base.
        turns: Conversation, role and content of each turn.
        limit: Maximum number of new tokens.
        forced: Whether to ignore the stop token and generate exactly `limit` tokens, so that no model
            can return an empty answer.
        options: Further arguments for `generate` of transformers.

    Returns:
        Number of tokens of the conversation, and the new tokens, shape (at most limit,).

    Raises:
        TooLongError: The conversation leaves no room for an answer.
    """
    inputs = encode_prompt(tokenizer, turns).to(model.device)
    n_prompt = inputs["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", sys.maxsize)
    if n_prompt >= context:
        raise TooLongError(
            f"the conversation has {n_prompt} tokens, the model's context is {context} tokens; "
            "start a new one"
        )
    limit = min(limit, context - n_prompt)
    least = limit if forced else 0
    options = {"do_sample": False, **options}
    output = model.generate(**inputs, min_new_tokens=least, max_new_tokens=limit, **options)
    return n_prompt, output[0, n_prompt:]


def has_stopped(model: Any, new: Any) -> bool:
    """Return whether new tokens, shape (n,), end with a stop token of the model."""
    stops = model.generation_config.eos_token_id
    return len(new) > 0 and int(new[-1]) in (stops if isinstance(stops, list) else [stops])


def stream(model: Any, tokenizer: Any, turns: list[dict[str, str]], limit: int) -> Generator[str, None, None]:
    """Yield the answer of `generate` in whole words as they come; closing stops the generation."""
    from transformers import TextIteratorStreamer

    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    is_closed = Event()
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(
            generate,
            model,
            tokenizer,
            turns,
            limit,
            streamer=pieces,
            stopping_criteria=[lambda *_, **__: is_closed.is_set()],
        )
        # Any end of the generation, also an error, ends the iteration.
        work.add_done_callback(lambda _: pieces.end())
        try:
            yield from filter(None, pieces)
            work.result()
        finally:
            is_closed.set()


def answer_probes(model: Any, tokenizer: Any) -> list[str]:
    """Return the answers of a model to the probes, with special tokens; see `PROBES`."""
    conversations = [[{"role": "user", "content": question}] for question in PROBES]
    answers = (generate(model, tokenizer, turns, PROBE_TOKENS, forced=True) for turns in conversations)
    return [str(tokenizer.decode(new)) for _, new in answers]


def main() -> None:
    """Print the probe answers of the model whose URI comes on the standard input, as a line of JSON."""
    import mlflow

    # Needed later, and imported while the other process works.
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    served = mlflow.pyfunc.load_model(sys.stdin.read().strip())
    requests = [
        {"messages": [{"role": "user", "content": question}], "custom_inputs": {"probe": "yes"}}
        for question in PROBES
    ]
    answers = [served.predict(request)["choices"][0]["message"]["content"] for request in requests]
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    from nightshift.core.stage import run_main, skip_bitsandbytes

    skip_bitsandbytes()
    run_main(main)
elif not __package__:
    # MLflow loads this file as a model, not as a module of the package.
    from mlflow.models import set_model

    set_model(AdapterChat())
