"""Save the base model as safetensors with its tokenizer: a model reference -> data/base.

The reference is `package:<name>` (an installed package that carries a GGUF), a local folder, or
`hub:<id>@<commit>`. base.json records the reference and the digest of every file, so that later
steps can verify that an adapter is used with the weights it was trained on.
"""

import contextlib
import importlib.util
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import field_validator

from nightshift.core.config import StageParams, load_params
from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json, write_json
from nightshift.core.paths import BASE, BASE_RECORD
from nightshift.core.stage import run_main, write_summary
from nightshift.core.state import user_path
from nightshift.data.chat_templates import OWN as PROMPT_FORMATS
from nightshift.data.chat_templates import find_template
from nightshift.data.template import (
    ASSISTANT,
    CALLS,
    TEMPLATE_ERRORS,
    USER,
    Template,
    freeze_dates,
    make_chat,
    read_template,
    render_answer,
)
from nightshift.hub import explain_hub_errors
from nightshift.registry.rounding import cast_weights, stored_dtypes

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
    model, tokenizer = load(params.model, params.dtype)
    add_tokens(model, tokenizer, params)
    set_template(model, tokenizer, params.chat_template)
    save(model, tokenizer, params.dtype, BASE, stored_dtypes(Path(model.name_or_path)))
    digests = {path.name: file_digest(path) for path in sorted(BASE.iterdir())}
    record = {"model": params.model, "dtype": params.dtype, "chat_template": params.chat_template}
    given = {key: value for key, value in record.items() if value is not None}
    write_json(BASE_RECORD, {**given, "files": digests})
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
        folder = user_path(model)
    require_plain(model, folder)
    if not any(folder.glob("*.safetensors")):
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise DataError(
            f"base.model: {model}: no safetensors in {folder}, which contains {names}; convert the weights, "
            "other formats are not supported"
        )
    return folder, None


def load(reference: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Load the causal language model of a reference, without rounding any weight, and its tokenizer.

    Args:
        reference: Model reference.
        dtype: Precision in which it will be stored.

    Returns:
        Model in that precision if all its weights have it, else in float32: GGUF weights are dequantized to
        float32 and rounded only once, when saved. And the tokenizer.

    Raises:
        DataError: The files are missing or cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, gguf = locate(reference)
    # `locate` has already downloaded a Hub model.
    options: dict[str, Any] = {"gguf_file": gguf, "trust_remote_code": False, "local_files_only": True}
    try:
        is_half = dtype == "bfloat16" and {*stored_dtypes(folder).values()} == {"BF16"}
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16 if is_half else torch.float32,
            use_safetensors=None if gguf else True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as err:
        reason = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
        raise DataError(
            f"base.model: {reference}: cannot be loaded from {folder} ({reason}); use a causal language "
            "model supported by transformers, with all of its files"
        ) from err
    if gguf:
        # save_pretrained rejects a model that is still marked as quantised.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
    return model, tokenizer


def require_plain(model: str, folder: Path) -> None:
    """Check that a folder contains a whole model with its own weights, not quantised.

    Raises:
        DataError: It does not; the message contains the remedy.
    """
    where = f"base.model: {model}"
    if (folder / "adapter_config.json").is_file():
        on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise DataError(
            f"{where}: is an adapter on {on}; merge it into its base (PEFT: merge_and_unload), or set "
            "base.model to its base and make it the champion with `nightshift adopt`"
        )
    if not (folder / "config.json").is_file():
        raise DataError(f"{where}: no config.json in this folder; correct the path")
    if quantised := read_json(folder / "config.json").get("quantization_config"):
        method = quantised.get("quant_method", "unknown method")
        raise DataError(
            f"{where}: the weights are quantised ({method}); use the repository with the original weights, "
            "and sft.adapter: qlora to train on a 4-bit copy of them"
        )


def add_tokens(model: Any, tokenizer: Any, params: BaseParams) -> None:
    """Add the tokens of base.added_tokens and base.special_tokens; new embeddings are the mean of all others.

    Raises:
        DataError: A special token is not in the vocabulary.
    """
    import torch

    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(params.added_tokens) if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    for role, token in params.special_tokens.items():
        if token not in known and token not in new:
            raise DataError(
                f"base.special_tokens: {role}: {token!r} is not in the vocabulary; correct it, or list it in "
                "base.added_tokens too"
            )
        setattr(tokenizer, role, token)
        for config in (model.config.get_text_config(), model.generation_config):
            if role != "unk_token":
                setattr(config, f"{role}_id", tokenizer.convert_tokens_to_ids(token))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight[rows:] = layer.weight[:rows].mean(dim=0, dtype=torch.float32)
    if new:
        log.info("base: added %s to the vocabulary; train their embeddings", ", ".join(new))


def set_template(model: Any, tokenizer: Any, reference: str | None) -> None:
    """Set the chat template that training, evaluation and serving share, and stop where it ends an answer.

    Raises:
        DataError: The template renders no question with its answer, or ends it with no token of the
            vocabulary.
    """
    source: str | None
    if reference is not None:
        path = find_template(reference)
        source = path.read_text(encoding="utf-8")
        # Templates of instruct models write this token themselves.
        if path.parent == PROMPT_FORMATS and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
            source = "{{ bos_token }}" + source
    else:
        own = tokenizer.chat_template
        source = own.get("default") if isinstance(own, dict) else own
    if not source:
        log.warning("base: no chat template; only plain texts can be trained (base.chat_template)")
        return
    tokenizer.chat_template = freeze_dates(source)
    own_stops = model.generation_config.eos_token_id
    stops = set(own_stops if isinstance(own_stops, list) else [] if own_stops is None else [own_stops])
    learned = {tokenizer.convert_tokens_to_ids(stop) for stop in find_stop_tokens(tokenizer, reference)}
    # The files of a base that has them already stay the same: a champion refers to them by their digests.
    if not learned <= stops:
        model.generation_config.eos_token_id = sorted(stops | learned)


def find_stop_tokens(tokenizer: Any, reference: str | None) -> Iterator[str]:
    """Yield the tokens with which the chat template ends an answer, and a call if it renders calls.

    Raises:
        DataError: The template renders no question with its answer, or ends it with no token of the
            vocabulary.
    """
    where = f"base.chat_template: {reference or 'that of the tokenizer'}"
    template = cast("Template", read_template(tokenizer))
    try:
        part = render_answer(make_chat(template, None, [USER, ASSISTANT]), 1)
    except TEMPLATE_ERRORS as err:
        reason = str(err) or type(err).__name__
        raise DataError(f"{where}: cannot render a question with its answer: {reason}; use another") from err
    if part is None:
        raise DataError(f"{where}: an answer does not follow from its prompt; use another one")
    if not (stop := part.stop_token(template)):
        tail = part.text.rpartition(str(ASSISTANT["content"]))[2]
        raise DataError(
            f"{where}: ends an answer with {tail!r}, which is no token of the vocabulary, so the model could "
            "not stop; add the template's tokens with base.added_tokens, or use another template"
        )
    yield stop
    calling = {**ASSISTANT, "content": "", "tool_calls": CALLS}
    with contextlib.suppress(*TEMPLATE_ERRORS):
        part = render_answer(make_chat(template, None, [USER, calling]), 1)
        if part and (stop := part.stop_token(template)):
            yield stop


def save(
    model: Any, tokenizer: Any, dtype: str, target: Path, stored: Mapping[str, str] | None = None
) -> None:
    """Save a model as safetensors with its tokenizer, replacing the target folder.

    Args:
        model: Model in float32, or in `dtype`.
        tokenizer: Its tokenizer.
        dtype: Precision of the stored weights.
        target: Folder to write.
        stored: Dtype of each weight in the checkpoint; see `nightshift.registry.rounding`.
    """
    import torch

    # Never overwrite in place: the kept base of a champion may be hard-linked to these files.
    shutil.rmtree(target, ignore_errors=True)
    cast_weights(model, getattr(torch, dtype), stored or {}).save_pretrained(target)
    # Otherwise tokenizer_config.json would record this loading option.
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(target)
    log.info("base: %.1f M parameters", model.num_parameters() / 1e6)


if __name__ == "__main__":
    run_main(main, is_online=True)
