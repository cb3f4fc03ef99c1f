"""Save the base model as safetensors with its tokenizer: a model reference -> data/base.

The reference is `package:<name>` (an installed package that carries a GGUF), a local folder, or
`hub:<id>@<commit>`. base.json records the reference and the digest of every file, so that later
steps can verify that an adapter is used with the weights it was trained on.
"""

import importlib.util
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, write_json
from nightshift.core.paths import BASE, BASE_RECORD
from nightshift.core.stage import run_main, write_summary
from nightshift.data.chat_templates import find_template
from nightshift.hub import explain_hub_errors

SpecialToken = Literal["bos_token", "eos_token", "pad_token", "unk_token"]
HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")
log = logging.getLogger(__name__)


class BaseParams(StageParams):
    """The model to fine-tune.

    Attributes:
        model: Model reference: `package:<name>`, a local folder, or `hub:<id>@<commit>`.
        dtype: Precision of the stored weights.
        chat_template: Name or file of a chat template; None for the tokenizer's own.
        special_tokens: Role, such as eos_token -> token; it replaces the tokenizer's own.
        added_tokens: Tokens to add to the vocabulary.
    """

    model: str
    dtype: Literal["bfloat16", "float32"]
    chat_template: str | None
    special_tokens: dict[SpecialToken, str]
    added_tokens: list[str]

    @field_validator("chat_template")
    @classmethod
    def _chat_template_exists(cls, value: str | None) -> str | None:
        if value is not None:
            find_template(value)
        return value

    @field_validator("model")
    @classmethod
    def _hub_revision_is_a_commit(cls, value: str) -> str:
        if value.startswith("hub:") and not HUB.fullmatch(value):
            raise ValueError(
                f"{value!r} must be hub:<owner>/<name>@<40 hex digits of a commit>; a branch may move"
            )
        return value


def main() -> None:
    """Load the model and save it in one canonical format."""
    params = load_params(BaseParams, "base")
    save(*load(params.model), params.dtype, BASE)
    digests = {path.name: file_digest(path) for path in sorted(BASE.iterdir())}
    write_json(BASE_RECORD, {"model": params.model, "dtype": params.dtype, "files": digests})
    write_summary("base", rows_in=0, rows_out=0, files=len(digests))


def locate(model: str) -> tuple[Path, str | None]:
    """Return the folder of a model reference, and the name of its GGUF file, if any.

    Raises:
        DataError: The package, folder or file does not exist, or the Hub download fails.
    """
    if model.startswith("package:"):
        name = model.removeprefix("package:").replace("-", "_")
        spec = importlib.util.find_spec(name)
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
        if not files:
            raise DataError(
                f"base.model: {model}: no installed package {name!r} with a .gguf file; install it"
            )
        return files[0].parent, files[0].name
    if found := HUB.fullmatch(model):
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        with explain_hub_errors(f"base.model: {model}"):
            folder = Path(snapshot_download(found["id"], revision=found["commit"], allow_patterns=patterns))
    else:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise DataError(f"base.model: {model}: no config.json in this folder; correct the path")
    if not any(folder.glob("*.safetensors")):
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise DataError(
            f"base.model: {model}: no safetensors in {folder}, which contains {names}; convert the weights, "
            "other formats are not supported"
        )
    return folder, None


def load(reference: str) -> tuple[Any, Any]:
    """Load the causal language model of a reference in float32, and its tokenizer.

    Raises:
        DataError: The files are missing or cannot be loaded, or the tokenizer has no chat template.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, gguf = locate(reference)
    # `locate` has already downloaded a Hub model.
    options: dict[str, Any] = {"gguf_file": gguf, "trust_remote_code": False, "local_files_only": True}
    try:
        # GGUF weights are dequantised to float32 and rounded only once, when saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=None if gguf else True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        reason = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
        raise DataError(
            f"base.model: {reference}: cannot be loaded from {folder} ({reason}); use a causal language "
            "model supported by transformers, with all of its files"
        ) from err
    if not tokenizer.chat_template:
        raise DataError(f"base.model: {reference}: the tokenizer has no chat template; use an instruct model")
    if gguf:
        # save_pretrained rejects a model that is still marked as quantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def save(model: Any, tokenizer: Any, dtype: str, target: Path) -> None:
    """Save a model as safetensors with its tokenizer, replacing the target folder."""
    import torch

    # Never overwrite in place: the kept base of a champion may be hard-linked to these files.
    shutil.rmtree(target, ignore_errors=True)
    model.to(getattr(torch, dtype)).save_pretrained(target)
    # Otherwise tokenizer_config.json would record this loading option.
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(target)
    log.info("base: %.1f M parameters", model.num_parameters() / 1e6)


if __name__ == "__main__":
    run_main(main, is_online=True)
