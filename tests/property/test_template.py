"""Properties of rendering: each answer follows from its prompt, as if the turns up to it were rendered."""

import json
import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from nightshift.data.encode import Encoder, Fault, render
from nightshift.data.template import Template, freeze_dates
from tests.helpers.byte_base import TEMPLATE

SHIPPED = sorted(Path(trl.__file__).with_name("chat_templates").glob("*[!g].jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# The template of SmolLM2, and templates that look at more than the turn they write.
TEMPLATES = {
    **{path.stem: freeze_dates(path.read_text(encoding="utf-8")) for path in SHIPPED},
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
    has_tools, has_reasoning = draw(st.booleans()), draw(st.booleans())
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 7))):
        messages.append({"role": "user", "content": draw(content)})
        if has_tools and draw(st.booleans()):
            messages.append({"role": "assistant", "content": "", "tool_calls": draw(CALLS)})
            messages += [{"role": "tool", "content": draw(content)} for _ in range(draw(st.integers(1, 2)))]
        messages.append({"role": "assistant", "content": draw(content)})
        if has_reasoning and draw(st.booleans()):
            messages[-1]["reasoning"] = draw(WORDS)
    tools = json.dumps([{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}])
    return messages, tools if has_tools and draw(st.booleans()) else None


def render_prefixes(messages: list[dict[str, Any]], tools: str | None, template: str) -> Any:
    """Return texts and answers, or the fault, from renderings of the turns before and up to each answer."""
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
            **TOKENS,
        )
        return str(text)

    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    try:
        text = apply(len(turns), prompt=False)
        pairs = [(apply(i, prompt=True), apply(i + 1, prompt=False)) for i in answers]
        bare = [apply(i, prompt=False) for i in answers]
    except (jinja2.TemplateError, TypeError, ValueError):
        return "template_fails"
    if all(text.startswith(after) and after.startswith(before) for before, after in pairs):
        shown = {text: turns}
        found = [(text, [(len(before), len(after.rstrip())) for before, after in pairs])]
    else:
        asked = [turns[i] for i in answers]
        follow = [follow_prompt(*one) for one in zip(asked, pairs, bare, strict=True)]
        if None in follow:
            return "template_changes_turns"
        shown = {one: turns[: i + 1] for i, one in zip(answers, follow, strict=True) if one}
        found = [
            (one, [(len(before), len(one))]) for one, (before, _) in zip(follow, pairs, strict=True) if one
        ]
    if not all(turn["content"].strip() in one for one, some in shown.items() for turn in some):
        return "template_drops_turn"
    return found


def follow_prompt(turn: dict[str, Any], pair: tuple[str, str], bare: str) -> str | None:
    """Return the turns up to an answer, after the prompt for it."""
    before, after = pair
    if after.startswith(before):
        return after.rstrip()
    if not (before.startswith(bare) and after.startswith(bare)):
        return None
    common = len(os.path.commonprefix([before, after]))  # noqa: RUF071
    opened = before[common:].strip()
    if opened == "<think>":
        content = turn["content"]
        inside = content.split("</think>")[0].split("<think>")[-1] if "</think>" in content else ""
        thought = "\n".join(one.strip() for one in (inside, turn.get("reasoning", "")) if one.strip())
        return f"{before}{thought}\n</think>\n\n{after[common:].lstrip()}".rstrip()
    return None if opened else (before + after[common:]).rstrip()


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=15)
@given(conversation=conversations())
def test_answers_are_where_renderings_of_the_turns_before_them_end(
    name: str, conversation: tuple[list[dict[str, Any]], str | None]
) -> None:
    # Without tokens to stop at, the texts are those of the template alone.
    encoder = Encoder(None, Template(TEMPLATES[name], TOKENS), 0, None, "")
    found = render(*conversation, encoder)
    expected = render_prefixes(*conversation, TEMPLATES[name])
    if not isinstance(found, Fault):
        # Calls that do not fit have other forms, which only this function tries.
        assert [one[:2] for one in found] == expected or "tool_calls" in str(conversation)
    elif found.reason != "template_drops_tools":
        assert found.reason == expected or "tool_calls" in str(conversation)
