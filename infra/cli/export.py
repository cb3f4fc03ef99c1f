"""Export a version as full weights that every server loads: adapter merged into its base, and verified.

The folder contains safetensors, the tokenizer with its chat template, the generation config, the model
card and `export.json`: what was exported, and how far its logits differ from the adapter on its base.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from transformers import AutoConfig, AutoModelForCausalLM

from nightshift.core.errors import GateError, StageError
from nightshift.core.files import read_json, write_json
from nightshift.core.stage import OFFLINE
from nightshift.core.state import tools_environment
from nightshift.registry.rounding import cast_weights, stored_dtypes
from nightshift.registry.served_model import PROBES, encode_prompt, generate, load
from nightshift.registry.versions import DIGEST, open_model
from tasks.sft.checkpoints import find_non_finite

ANSWER_TOKENS = 32
# Allowed difference of logits, as a share of their standard deviation. With thirty layers in float32,
# merging causes 2e-5, an adapter scaled 1 % too low 3e-2. Storing the weights adds 4 eps (bfloat16) to
# 9 eps (float16) of the dtype, 20 eps with a random adapter; computing in bfloat16 alone adds 24 eps.
MERGE_BOUND, ROUNDING_BOUND = 1e-3, 32
# Name of the script in llama.cpp, and in packages of llama.cpp.
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
GGUF_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
log = logging.getLogger(__name__)


def export(
    version: ModelVersion, target: Path, dtype: str | None = None, *, with_gguf: bool = False
) -> dict[str, Any]:
    """Export a version to a folder, which appears only when it is complete and verified.

    All checks compute in float32, so that only the weights can differ: first the merged model, then the
    stored files.

    Args:
        version: Version of the registered model.
        target: Output folder; it must not exist yet.
        dtype: Dtype of the stored weights, such as float32; None for the dtype of the base.
        with_gguf: Whether to write model.gguf too.

    Returns:
        Content of export.json.

    Raises:
        GateError: The folder already exists, or the exported model answers differently from the version.
        StageError: The GGUF converter is missing or fails.
    """
    if target.exists():
        raise GateError(f"{target}: already exists; remove it or choose another folder")
    converter = find_converter() if with_gguf else None
    with atomic_directory(target) as folder, open_model(version) as (base, adapter):
        stored = getattr(torch, dtype) if dtype else AutoConfig.from_pretrained(base).dtype
        bound = MERGE_BOUND + ROUNDING_BOUND * torch.finfo(stored).eps
        require_finite(adapter, "do not use this version")
        model, tokenizer = load(base, adapter, "float32")
        answers = [answer(model, tokenizer, question) for question in PROBES]
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload(safe_merge=True)
        differences: dict[str, Any] = {"merged": compare("merged model", model, answers, MERGE_BOUND)}
        # Rounded weights may flip a near-tie, the merge in float32 may not.
        require_same_answers(model, tokenizer, answers)
        # Training disables the KV cache.
        model.config.use_cache = True
        cast_weights(model, stored, stored_dtypes(base)).save_pretrained(folder)
        # Otherwise this loading option would be saved with the tokenizer.
        tokenizer.init_kwargs.pop("local_files_only", None)
        tokenizer.save_pretrained(folder)
        require_finite(folder, "use --dtype float32, which rounds no weight")
        model, tokenizer = load(folder, folder, "float32")
        differences["stored"] = compare(f"{stored} weights", model, answers, bound)
        if converter:
            write_gguf(converter, folder, GGUF_TYPES[stored])
            model = load_gguf(folder)
            differences["gguf"] = compare("model.gguf", model, answers, bound) if model else None
        write_card(version, folder)
        record = {
            "model": version.name,
            "version": int(version.version),
            "adapter_digest": version.tags[DIGEST],
            "base": read_json(adapter.with_name("base_reference.json"))["model"],
            "dtype": str(stored).removeprefix("torch."),
            "differences": differences,
        }
        write_json(folder / "export.json", record)
    return record


def require_finite(folder: Path, remedy: str) -> None:
    """Check every weight in a folder's safetensors.

    Raises:
        GateError: A weight is NaN or infinite.
    """
    if name := find_non_finite(folder):
        raise GateError(f"export: {name} is not finite; nothing was written; {remedy}")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` when the block succeeds."""
    folder = target.absolute().with_name(f".{target.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> tuple[Any, Any]:
    """Answer a question greedily.

    Returns:
        Token ids of the conversation with its answer, shape (1, n_tokens), and their logits, shape
        (n_tokens, n_vocabulary), float32.
    """
    turns = [{"role": "user", "content": question}]
    prompt = encode_prompt(tokenizer, turns)["input_ids"]
    _, new = generate(model, tokenizer, turns, ANSWER_TOKENS)
    ids = torch.cat([prompt[0], new])[None]
    return ids, model(input_ids=ids).logits[0]


@torch.no_grad()
def compare(what: str, model: Any, expected: Sequence[tuple[Any, Any]], bound: float) -> dict[str, float]:
    """Compare a model's logits on the expected answers to the probes.

    Args:
        what: Description of the model, for the error message.
        model: Model in float32.
        expected: Results of `answer`, one for each probe.
        bound: Largest allowed difference, as a share of the standard deviation of the expected logits.

    Returns:
        Largest difference and its bound, as such shares.

    Raises:
        GateError: A difference exceeds the bound.
    """
    shares = [
        float((model(input_ids=ids).logits[0] - logits).abs().max() / logits.std())
        for ids, logits in expected
    ]
    # Python's max ignores a NaN that does not come first.
    largest = float(np.max(shares))
    if not largest <= bound:
        raise GateError(
            f"export: {what}: logits differ by up to {largest:.2g} of their standard deviation (limit: "
            f"{bound:.2g}); nothing was written; use --dtype float32, which rounds no weight"
        )
    return {"largest": float(f"{largest:.3g}"), "bound": float(f"{bound:.3g}")}


def require_same_answers(model: Any, tokenizer: Any, expected: Sequence[tuple[Any, Any]]) -> None:
    """Compare a model's greedy answers to the probes with the expected ones.

    Raises:
        GateError: An answer differs.
    """
    same = sum(
        torch.equal(answer(model, tokenizer, question)[0], ids)
        for question, (ids, _) in zip(PROBES, expected, strict=True)
    )
    if same < len(expected):
        raise GateError(
            f"export: {same} of {len(expected)} greedy answers of the merged model are those of the adapter "
            "on its base; nothing was written; the adapter was not merged correctly, report this"
        )


def find_converter() -> list[str]:
    """Return the command of llama.cpp's GGUF converter.

    Raises:
        StageError: The converter is not on PATH.
    """
    for name in CONVERTERS:
        if found := shutil.which(name, path=tools_environment()["PATH"]):
            return [sys.executable, found] if name.endswith(".py") else [found]
    raise StageError(
        f"export: none of {', '.join(CONVERTERS)} is on PATH; clone https://github.com/ggml-org/llama.cpp, "
        "add its folder to PATH and install `sentencepiece` in Nightshift's environment, or omit --gguf"
    )


def write_gguf(converter: list[str], folder: Path, outtype: str) -> None:
    """Convert the exported weights to `model.gguf` in the same folder.

    Raises:
        StageError: The converter fails.
    """
    command = [*converter, str(folder), "--outfile", str(folder / "model.gguf"), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **OFFLINE})
    if done.returncode:
        raise StageError(f"export: {converter[-1]} failed: {done.stderr.strip()[-2000:]}")


def load_gguf(folder: Path) -> Any | None:
    """Load `model.gguf` in float32, or return None if transformers cannot read this architecture."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32, trust_remote_code=False
        ).eval()
    except ValueError as err:
        log.warning("export: model.gguf was not checked: %s", err)
        return None


def write_card(version: ModelVersion, folder: Path) -> None:
    """Copy the version's model card, with `library_name: transformers` since these are full weights."""
    uri = f"models:/{version.name}/{version.version}/artifacts/README.md"
    try:
        with tempfile.TemporaryDirectory() as work:
            card = ModelCard.load(download_artifacts(uri, dst_path=work))
    except (MlflowException, OSError) as err:
        log.warning("export: version %s has no model card: %s", version.version, err)
        return
    card.data.library_name = "transformers"
    card.save(folder / "README.md")
