"""Materialise the base model as safetensors and tokenizer: a model reference -> data/base.

The reference is `package:<name>` (an installed package that carries a GGUF), a local folder, or
`hub:<id>@<commit>`. base.json records the reference and the digest of every file, so that an
adapter can later prove that it stands on the same weights.
"""

import importlib.util
import logging
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from tasks.config import StageParams, load_params
from tasks.errors import DataError
from tasks.files import file_digest, write_json
from tasks.stage import DATA, run_main, write_summary

TARGET = DATA / "base" / "model"
RECORD = DATA / "base" / "base.json"
HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")
log = logging.getLogger(__name__)


class BaseParams(StageParams):
    """The model to fine-tune.

    Attributes:
        model: Reference: `package:<name>`, a local folder, or `hub:<id>@<commit>`.
        dtype: Precision of the stored weights.
    """

    model: str
    dtype: Literal["bfloat16", "float32"]

    @field_validator("model")
    @classmethod
    def _hub_revision_is_a_commit(cls, value: str) -> str:
        if value.startswith("hub:") and not HUB.fullmatch(value):
            raise ValueError(
                f"{value!r} must be hub:<owner>/<name>@<40 hex digits of a commit>; a branch may move"
            )
        return value


def main() -> None:
    """Load the reference and save it in one canonical form."""
    params = load_params(BaseParams, "base")
    folder, gguf = locate(params.model)
    save(folder, gguf, params.dtype, TARGET)
    digests = {path.name: file_digest(path) for path in sorted(TARGET.iterdir())}
    write_json(RECORD, {"model": params.model, "dtype": params.dtype, "files": digests})
    write_summary("base", rows_in=0, rows_out=0, files=len(digests))


def locate(model: str) -> tuple[Path, str | None]:
    """Find the folder of a model reference, and the GGUF file in it if there is one.

    Raises:
        DataError: The package, folder or file does not exist.
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
        where = snapshot_download(
            found["id"],
            revision=found["commit"],
            allow_patterns=patterns,
            ignore_patterns=["*.bin"],
        )
        return Path(where), None
    if not (Path(model) / "config.json").is_file():
        raise DataError(f"base.model: {model}: no config.json in this folder; correct the path")
    return Path(model), None


def save(folder: Path, gguf: str | None, dtype: str, target: Path) -> None:
    """Load a causal language model and its tokenizer and save both as safetensors and JSON.

    Raises:
        DataError: The tokenizer has no chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The tokenizer's file keeps `local_files_only`, whose default is whether HF_HUB_OFFLINE is set.
    options: dict[str, Any] = {"gguf_file": gguf, "trust_remote_code": False, "local_files_only": True}
    # GGUF weights are dequantised in float32 and rounded once, at the end.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=None if gguf else True, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: the tokenizer has no chat template; use an instruct model")
    if gguf:
        # save_pretrained refuses a model that still calls itself quantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    model.to(getattr(torch, dtype)).save_pretrained(target)
    tokenizer.save_pretrained(target)
    log.info("base: %.1f M parameters", model.num_parameters() / 1e6)


if __name__ == "__main__":
    run_main(main)
