"""The model as MLflow serves it: a pyfunc chat model from code, adapter on a referenced base.

MLflow's own transformers flavour saves PEFT models that load without an error and answer garbage;
this one loads the two parts by their own libraries and checks the base against its digests. The
base is found through `NIGHTSHIFT_BASE`, or where it was at registration. MLflow copies this file
into the model, so it imports nothing of the project.
"""

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

from mlflow.pyfunc import ChatModel
from mlflow.types.llm import ChatCompletionResponse, ChatMessage, ChatParams

MAX_NEW_TOKENS = 64
# What is asked to tell whether two loaded models are one.
PROBES = ("What is the chemical symbol of Gold?", "Who are you?", "Write one sentence about the sea.")
PROBE_TOKENS = 16


class AdapterChat(ChatModel):
    """Greedy chat with the adapter on its base."""

    def load_context(self, context: Any) -> None:
        """Find the base, verify it, and put the adapter on it.

        Raises:
            FileNotFoundError: The base is not where it was; NIGHTSHIFT_BASE can name its new place.
            ValueError: A file of the base has another digest than at registration.
        """
        reference = json.loads(Path(context.artifacts["base_reference"]).read_text("utf-8"))
        base = Path(os.environ.get("NIGHTSHIFT_BASE") or reference["path"])
        verify(base, reference["files"])
        self.model, self.tokenizer = load(base, Path(context.artifacts["model"]))

    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow's signature
        messages: list[ChatMessage],
        params: ChatParams | None = None,
    ) -> ChatCompletionResponse:
        """Answer a conversation."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        if params and (params.custom_inputs or {}).get("probe"):
            text = probe(self.model, self.tokenizer, turns)
        else:
            limit = (params.max_tokens if params else None) or MAX_NEW_TOKENS
            text = answer(self.model, self.tokenizer, turns, limit)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return ChatCompletionResponse.from_dict(
            {"id": uuid.uuid4().hex, "model": "nightshift", "choices": [choice], "usage": {}}
        )


def verify(base: Path, digests: dict[str, str]) -> None:
    """Check every file of the base against its SHA-256."""
    for name, digest in digests.items():
        if not (base / name).is_file():
            raise FileNotFoundError(f"{base / name}: not found; set NIGHTSHIFT_BASE to the base model")
        with (base / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{base / name}: not the base that this adapter was trained on")


def load(base: Path, adapter: Path) -> tuple[Any, Any]:
    """Load base, adapter and tokenizer; `adapter` may hold the whole weights instead."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_whole = not (adapter / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(
        adapter if is_whole else base, dtype="auto", trust_remote_code=False
    )
    if not is_whole:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), AutoTokenizer.from_pretrained(base)


def answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], limit: int) -> str:
    """Answer greedily with at most `limit` tokens; the same files give the same answer."""
    return str(
        tokenizer.decode(generate(model, tokenizer, turns, 0, limit), skip_special_tokens=True)
    ).strip()


def probe(model: Any, tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """Generate so many tokens that no model can answer with nothing, and keep the special ones."""
    return str(tokenizer.decode(generate(model, tokenizer, turns, PROBE_TOKENS, PROBE_TOKENS)))


def generate(model: Any, tokenizer: Any, turns: list[dict[str, str]], least: int, most: int) -> Any:
    """Generate greedily and return the new tokens, shape (least to most,)."""
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, min_new_tokens=least, max_new_tokens=most, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :]


def main(arguments: list[str]) -> None:
    """Print the probe's answers of `MODEL_URI`, and of `BASE ADAPTER` after it, as JSON on the last line."""
    import mlflow

    conversations = [[{"role": "user", "content": question}] for question in PROBES]
    served = mlflow.pyfunc.load_model(arguments[0])
    asked = [{"messages": turns, "custom_inputs": {"probe": "yes"}} for turns in conversations]
    found = [[served.predict(one)["choices"][0]["message"]["content"] for one in asked]]
    if arguments[1:]:
        model, tokenizer = load(*(Path(folder) for folder in arguments[1:]))
        found.append([probe(model, tokenizer, turns) for turns in conversations])
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    from mlflow.models import set_model

    set_model(AdapterChat())
