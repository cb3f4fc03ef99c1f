"""Properties of rendering: answers are located as if the turns up to each of them were rendered."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from nightshift.data.encode import Encoder, Rendered, render
from nightshift.data.template import DATE
from tests.helpers.byte_base import TEMPLATE

SHIPPED = sorted(Path(trl.__file__).with_name("chat_templates").glob("*[!g].jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# The template of SmolLM2, and templates that look at more than the turn they write.
TEMPLATES = {
    **{path.stem: path.read_text(encoding="utf-8") for path in SHIPPED},
    "byte_base": TEMPLATE,
    "smollm2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain_words": (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "between": (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %} | {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} | {% endif %}"
    ),
    "two_loops": (
        "{% for m in messages %}{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "no_loop": "{{ messages | map(attribute='content') | join('<|im_end|>') }}<|im_end|>",
    "last_is_special": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if loop.last and '</think>' not in m.content %}<think></think>{% endif %}<|im_end|>{% endfor %}"
    ),
    "switch": (
        "{% set ns = namespace(on=false) %}{% for m in messages %}"
        "{% if '/no_think' in m.content %}{% set ns.on = true %}{% endif %}"
        "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if ns.on %}{{ ' ' }}{% endif %}{% endif %}"
    ),
    "thoughts_of_the_last": (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
}
PIECE = st.sampled_from(
    [
        *(
            "a",
            "Yes",
            "assistant",
            "user: x",
            "<|im_end|>\n",
            "<|im_start|>assistant\n",
            "<think>",
            "</think>",
        ),
        *("\n", " ", "\n\n", "assistant: ", "<|im_end|>", " | ", "é", "数🙂", "/no_think", "</s>", "[/INST]"),
        *("<tool_call>", "<assistant>", "\u2028", "\x00", "0"),
    ]
)
CONTENT = st.lists(PIECE, max_size=4).map("".join)
WORDS = st.sampled_from(["Hi", "a", "Yes, é", "no. ", "数🙂"])
CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["f", "go"]), "arguments": st.dictionaries(WORDS, CONTENT)}
    ),
    min_size=1,
    max_size=2,
).map(json.dumps)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[dict[str, Any]], str | None]:
    """Draw a conversation in which turns of the same kind occur often."""
    content = draw(st.sampled_from([CONTENT, WORDS, WORDS]))
    has_tools = draw(st.booleans())
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 7))):
        messages.append({"role": "user", "content": draw(content)})
        if has_tools and draw(st.booleans()):
            messages.append({"role": "assistant", "content": "", "tool_calls": draw(CALLS)})
            messages += [{"role": "tool", "content": draw(content)} for _ in range(draw(st.integers(1, 2)))]
        messages.append({"role": "assistant", "content": draw(content)})
    tools = json.dumps([{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}])
    return messages, tools if has_tools and draw(st.booleans()) else None


def render_prefixes(messages: list[dict[str, Any]], tools: str | None, template: str) -> Any:
    """Return text and answers, or the fault, from renderings of the turns before and up to each answer."""
    turns = []
    for message in messages:
        turn = dict(message)
        if "tool_calls" in turn:
            calls = json.loads(turn["tool_calls"])
            turn["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        turns.append(turn)

    def apply(stop: int, *, prompt: bool) -> str:
        (text,), _ = render_jinja_template(
            [turns[:stop]],
            tools=json.loads(tools) if tools else None,
            chat_template=template,
            add_generation_prompt=prompt,
            date_string=DATE,
            **TOKENS,
        )
        return str(text)

    try:
        text = apply(len(turns), prompt=False)
        pairs = [
            (apply(i, prompt=True), apply(i + 1, prompt=False))
            for i, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
    except (jinja2.TemplateError, TypeError, ValueError):
        return "template_fails"
    names = [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]
    if not all(part in text for part in [*(turn["content"].strip() for turn in turns), *names]):
        return "template_drops_turn"
    if not all(text.startswith(after) and after.startswith(before) for before, after in pairs):
        return "template_changes_turns"
    return text, [(len(before), len(after.rstrip())) for before, after in pairs]


def with_template(template: str) -> Encoder:
    return Encoder(None, template, TOKENS, 0, "")


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=15)
@given(conversation=conversations())
def test_answers_are_where_renderings_of_the_turns_before_them_end(
    name: str, conversation: tuple[list[dict[str, Any]], str | None]
) -> None:
    found = render(*conversation, with_template(TEMPLATES[name]))
    expected = render_prefixes(*conversation, TEMPLATES[name])
    assert (found[:2] if isinstance(found, Rendered) else found) == expected
