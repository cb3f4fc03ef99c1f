"""Every chat template that is known by name: trained as it is asked, or refused, as docs/models.md says.

`python -m tests.integration.test_templates` writes the table in docs/models.md anew.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nightshift.data.chat_templates import list_templates
from nightshift.data.encode import IGNORED, Encoded, Encoder, Fault, encode_batch, load_encoder
from nightshift.data.template import freeze_dates
from nightshift.registry.served_model import encode_prompt, generate, has_stopped
from tasks.base import BaseParams, set_template
from tests.helpers.checkouts import ROOT
from tests.helpers.templates import make_model, make_tokenizer, save_tokenizer

PAGE = ROOT / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- templates -->\n).*(?=<!-- /templates -->)", re.DOTALL)
NAMES = list(list_templates())
ASKED = [{"role": "user", "content": "Who wrote it?"}]
ANSWER = {"role": "assistant", "content": "Ada wrote it."}
CALL = json.dumps([{"name": "weather", "arguments": {"city": "Rome"}}])
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one round": [*ASKED, ANSWER],
    "two rounds": [*ASKED, ANSWER, {"role": "user", "content": "When?"}, {**ANSWER, "content": "In 1843."}],
    "system turn": [{"role": "system", "content": "Be brief."}, *ASKED, ANSWER],
    "tool call": [
        {"role": "user", "content": "Rain in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "dry", "name": "weather"},
        {"role": "assistant", "content": "No."},
    ],
    "reasoning": [*ASKED, {**ANSWER, "reasoning": "It is about the engine."}],
}


def make_base(name: str, folder: Path) -> Encoder:
    """Write the tokenizer of a small base with a template, as the base stage does, and load it."""
    tokenizer = make_tokenizer(list_templates()[name].read_text(encoding="utf-8"))
    tokenizer.chat_template = freeze_dates(tokenizer.chat_template)
    return load_encoder(save_tokenizer(tokenizer, folder))


def encode(kind: str, encoder: Encoder) -> list[Encoded] | Fault:
    """Encode a conversation; ingest leaves out the reasoning that a template does not render."""
    messages = CONVERSATIONS[kind]
    if encoder.template and not encoder.template.has_reasoning:
        messages = [{key: one for key, one in turn.items() if key != "reasoning"} for turn in messages]
    (found,) = encode_batch([(messages, json.dumps([WEATHER]) if kind == "tool call" else None)], encoder)
    return found


def describe(kind: str, encoder: Encoder) -> str:
    """Return what training makes of a conversation."""
    found = encode(kind, encoder)
    if isinstance(found, Fault):
        return f"{found.reason}: {found.detail}" if found.detail else found.reason
    assert encoder.template
    if kind == "reasoning" and not encoder.template.has_reasoning:
        return "trained without it"
    return "trained" if len(found) == 1 else "trained, one text per answer"


def write_table(folder: Path) -> str:
    """Return the table of all templates as Markdown."""
    lines = [f"| template | {' | '.join(CONVERSATIONS)} |", "|---" * (len(CONVERSATIONS) + 1) + "|"]
    for name in NAMES:
        encoder = make_base(name, folder / name)
        lines.append(" | ".join([f"| `{name}`", *(describe(kind, encoder) for kind in CONVERSATIONS)]) + " |")
    return "\n".join(["", *lines, "", ""])


def test_the_documentation_says_what_every_template_does(tmp_path: Path) -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found
    assert found[0] == write_table(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_trained_after_the_prompt_that_evaluation_and_serving_give(
    name: str, tmp_path: Path
) -> None:
    from tasks.evaluate.model import Model

    encoder = make_base(name, tmp_path)
    tokenizer = make_tokenizer(freeze_dates(list_templates()[name].read_text(encoding="utf-8")))
    asked = CONVERSATIONS["system turn"]
    (found,) = encode_batch([(asked, None)], encoder)
    if isinstance(found, Fault):
        asked = CONVERSATIONS["two rounds"]
        (found,) = encode_batch([(asked, None)], encoder)
    if isinstance(found, Fault):
        # The table has the reason.
        assert found.reason in ("template_drops_turn", "template_fails")
        return
    last = found[-1]
    trained = [i for i, label in enumerate(last.labels.tolist()) if label != IGNORED]
    # The last answer is one piece at the end.
    start = next(i for i in reversed(trained) if i - 1 not in trained)
    prompt = last.input_ids[:start].tolist()
    served = tokenizer.apply_chat_template(asked[:-1], add_generation_prompt=True)["input_ids"]
    model = Model(make_model(tokenizer), tokenizer, 1)
    assert prompt == served
    assert prompt == model.tok_encode(model.render(asked[:-1]))


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gptoss", "chatml", "nemotron_3_nano"])
def test_a_given_answer_is_scored_where_a_trained_one_starts(name: str, tmp_path: Path) -> None:
    from tasks.evaluate.model import Model

    encoder = make_base(name, tmp_path)
    tokenizer = make_tokenizer(freeze_dates(list_templates()[name].read_text(encoding="utf-8")))
    model = Model(make_model(tokenizer), tokenizer, 1)
    (found,) = encode_batch([([*ASKED, ANSWER], None)], encoder)
    assert not isinstance(found, Fault)
    whole = tokenizer.decode(found[0].input_ids)
    assert whole.startswith(model.apply_chat_template(ASKED) + ANSWER["content"])


def test_a_model_stops_at_the_token_that_it_learned_though_its_base_ends_texts_with_another() -> None:
    import torch

    tokenizer = make_tokenizer(list_templates()["chatml"].read_text(encoding="utf-8") + "{#<|im_end|>#}")
    model = make_model(tokenizer)
    assert tokenizer.eos_token == "</s>"
    set_template(model, tokenizer, None)
    conversation = [*ASKED, ANSWER]
    ids = tokenizer.apply_chat_template(conversation, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _, new = generate(model.eval(), tokenizer, ASKED, 64)
    assert tokenizer.decode(new) == "Ada wrote it.<|im_end|>"
    assert has_stopped(model, new)


def test_the_start_token_is_the_same_in_texts_training_evaluation_and_serving(tmp_path: Path) -> None:
    from tasks.evaluate.model import Model

    source = list_templates()["chatml"].read_text(encoding="utf-8") + "{#<|im_start|><|im_end|>#}"
    tokenizer = make_tokenizer(source, adds_start=True)
    encoder = load_encoder(save_tokenizer(tokenizer, tmp_path))
    conversations = [[{"role": "text", "content": "Tin."}], [*ASKED, ANSWER]]
    found = encode_batch([(one, None) for one in conversations], encoder)
    text, chat = [one for sequences in found if not isinstance(sequences, Fault) for one in sequences]
    assert tokenizer.decode(text.input_ids) == "<s>Tin.</s>"
    assert text.labels[0] == IGNORED
    # This template writes no start token, so no part of the system does.
    assert tokenizer.bos_token_id not in chat.input_ids
    model = Model(make_model(tokenizer), tokenizer, 1)
    assert tokenizer.bos_token_id not in model.tok_encode(model.apply_chat_template(ASKED))


def test_without_a_template_evaluation_and_serving_ask_in_paragraphs_after_the_start_token() -> None:
    from tasks.evaluate.model import Model

    tokenizer = make_tokenizer("", adds_start=True)
    tokenizer.chat_template = None
    served = encode_prompt(tokenizer, ASKED)["input_ids"][0].tolist()
    model = Model(make_model(tokenizer), tokenizer, 1)
    assert tokenizer.decode(served) == "<s>Who wrote it?\n\n"
    assert model.tok_encode(model.apply_chat_template(ASKED)) == served


def test_a_prompt_format_starts_as_the_tokenizer_starts_texts() -> None:
    for adds_start, start in ((True, "<s>Below is"), (False, "Below is")):
        tokenizer = make_tokenizer("", adds_start=adds_start)
        set_template(make_model(tokenizer), tokenizer, "alpaca")
        assert tokenizer.apply_chat_template(ASKED, tokenize=False).startswith(start)


def test_parameters_name_a_template_or_a_file(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "x", "dtype": "float32", "special_tokens": {}, "added_tokens": []}
    (tmp_path / "own.jinja").write_text("x")
    for reference in (None, "qwen3", str(tmp_path / "own.jinja")):
        assert BaseParams(**given, chat_template=reference).chat_template == reference
    with pytest.raises(ValueError, match="did you mean qwen3"):
        BaseParams(**given, chat_template="qwen33")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        new = write_table(Path(temporary))
    PAGE.write_text(TABLE.sub(lambda _: new, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
