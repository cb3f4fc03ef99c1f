"""Tokens and labels: transformers' own chat template, and an assistant mask that covers the answers."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import DataError
from nightshift.data.encode import Encoded, Encoder, Fault, encode_batch, load_encoder
from nightshift.data.template import freeze_dates, load_template


@pytest.fixture(scope="module")
def encoder(tiny_base: Path) -> Encoder:
    return load_encoder(tiny_base)


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def encode(messages: Sequence[Mapping[str, Any]], encoder: Encoder) -> list[Encoded]:
    (sequences,) = encode_batch([(messages, None)], encoder)
    assert not isinstance(sequences, Fault), str(sequences)
    return sequences


def labelled(messages: list[dict[str, Any]], encoder: Encoder, tokenizer: Any) -> str:
    (encoded,) = encode(messages, encoder)
    return str(tokenizer.decode([label for label in encoded.labels if label != -100]))


def test_only_answers_and_their_stop_tokens_are_labelled(encoder: Encoder, tokenizer: Any) -> None:
    messages = chat("Hi", "Hello.", "Who?", "Me.")
    assert labelled(messages, encoder, tokenizer) == "Hello.<|im_end|>Me.<|im_end|>"


def test_tokens_equal_those_of_transformers(encoder: Encoder, tokenizer: Any) -> None:
    conversations = [
        chat("Hi", "Hello."),
        [{"role": "system", "content": "Be brief."}, *chat("naïve 🙂?", "Ünïcode 数 1,234.5\n\n  x")],
    ]
    encoded = [one for messages in conversations for one in encode(messages, encoder)]
    expected = [tokenizer.apply_chat_template(m, tokenize=True)["input_ids"] for m in conversations]
    assert [one.input_ids.tolist() for one in encoded] == expected


def test_labels_are_exact_with_spaces_and_emoji_at_the_edges(encoder: Encoder, tokenizer: Any) -> None:
    assert labelled(chat("é", "naïve 🙂!"), encoder, tokenizer) == "naïve 🙂!<|im_end|>"


def test_plain_text_is_fully_labelled_and_ends_with_the_stop_token(encoder: Encoder, tokenizer: Any) -> None:
    messages = [{"role": "text", "content": "Gallium melts in the hand."}]
    assert labelled(messages, encoder, tokenizer) == "Gallium melts in the hand.<|im_end|>"


def with_template(template: str, encoder: Encoder) -> Encoder:
    loaded = load_template(template, {}, ["<|im_end|>"])
    return replace(encoder, template=loaded)


def test_a_template_with_a_date_gets_a_fixed_date(encoder: Encoder, tokenizer: Any) -> None:
    template = "{{ strftime_now('%d %b %Y') }}:{% for m in messages %} {{ m['content'] }}{% endfor %}"
    (encoded,) = encode(chat("Hi", "Hello"), with_template(freeze_dates(template), encoder))
    assert tokenizer.decode(encoded.input_ids) == "26 Jul 2024: Hi Hello"


def test_a_template_that_prints_today_in_another_way_is_rejected(tiny_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "chat_template.jinja").write_text("{{ strftime_now(format) }}")
    with pytest.raises(DataError, match="prints today's date"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ raise_exception('no') }}", "template_fails"),
        ("{{ messages.nothing.there }}", "template_fails"),
        ("{{ messages[0].content }}", "template_drops_turn"),
        (
            "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "template_changes_turns",
        ),
    ],
)
def test_an_unusable_template_is_a_fault_with_a_remedy(template: str, fault: str, encoder: Encoder) -> None:
    (found,) = encode_batch([(chat("a", "b"), None)], with_template(template, encoder))
    assert isinstance(found, Fault)
    assert found.reason == fault
    assert "base.chat_template" in str(found) or "fix the turns" in str(found)


def test_a_template_that_omits_tool_calls_is_a_fault(encoder: Encoder, tokenizer: Any) -> None:
    calls = json.dumps([{"name": "weather", "arguments": {"city": "Bern"}}])
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "dry", "name": "weather"},
        {"role": "assistant", "content": "No."},
    ]
    assert encode_batch([(messages, None)], encoder) == [Fault("template_drops_tools")]
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    whole = labelled(messages, with_template(template, encoder), tokenizer)
    assert whole == '{"name": "weather", "arguments": {"city": "Bern"}}<|im_end|>No.<|im_end|>'


def test_a_round_starts_with_each_user_turn_after_an_answer(encoder: Encoder, tokenizer: Any) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    conversations = [
        [*system, *chat("Hi", "Hello.", "Who?", "Me.")],
        chat("a", "b"),
        [
            *system,
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": "weather"},
            {"role": "tool", "content": "dry", "name": "weather"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "Sun?"},
            {"role": "assistant", "content": "Yes."},
        ],
    ]
    texts = []
    for messages in conversations:
        (one,) = encode(messages, encoder)
        edges = pairwise([*one.rounds.tolist(), len(one.input_ids)])
        texts.append([tokenizer.decode(one.input_ids[start:stop]) for start, stop in edges])
    assert [len(rounds) for rounds in texts] == [2, 1, 2]
    assert texts[0][1] == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n"
    assert texts[2][0].endswith("<|im_start|>assistant\nNo.<|im_end|>\n")


def test_a_plain_text_has_no_rounds(encoder: Encoder) -> None:
    (encoded,) = encode([{"role": "text", "content": "Gallium melts."}], encoder)
    assert encoded.rounds.tolist() == []


def test_a_base_without_a_chat_template_trains_on_plain_texts_only(
    tiny_base: Path, tmp_path: Path, tokenizer: Any
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    plain = load_encoder(tmp_path)
    assert labelled([{"role": "text", "content": "Tin."}], plain, tokenizer) == "Tin.<|im_end|>"
    assert encode_batch([(chat("a", "b"), None)], plain) == [Fault("no_chat_template")]
    with pytest.raises(DataError, match=r"tokenizer\.json: not found"):
        load_encoder(tmp_path / "nowhere")
