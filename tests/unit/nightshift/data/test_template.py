"""How often a conversation is rendered; tests/property/test_template.py has where its answers are."""

from typing import Any

import pytest

from nightshift.data.template import Template, find_kinds, locate_answers, make_chat
from tests.helpers.byte_base import TEMPLATE


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which the number of turns of each rendering is added."""
    sizes: list[int] = []
    context = Template.context

    def record(template: Template, turns: Any, functions: Any, *, prompt: bool) -> dict[str, Any]:
        sizes.append(len(turns))
        return context(template, turns, functions, prompt=prompt)

    monkeypatch.setattr(Template, "context", record)
    return sizes


def alternate(count: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(count)]


def test_a_long_conversation_is_rendered_a_few_times(rendered: list[int]) -> None:
    chat = make_chat(Template(TEMPLATE, {}), None, alternate(400))
    text = chat.render()
    found = locate_answers(chat, text)
    assert found
    assert [text[start:stop] for start, stop in found] == [f"turn {i}<|im_end|>" for i in range(1, 400, 2)]
    # The whole, the first two answers, the prompt of the last, and the whole with marks.
    assert rendered == [400, 1, 2, 3, 4, 399, 400]


def test_agents_with_many_calls_are_rendered_a_few_times(rendered: list[int]) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "}]"}}}]
    turns = [
        {"role": "user", "content": "go"},
        *[
            turn
            for i in range(100)
            for turn in (
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "content": str(i)},
            )
        ],
        {"role": "assistant", "content": "done"},
    ]
    chat = make_chat(Template(TEMPLATE, {}), None, turns)
    text = chat.render()
    found = locate_answers(chat, text)
    assert found
    assert {text[start:stop] for start, stop in found[:-1]} == {'f {"x": "}]"}<|im_end|>'}
    assert sum(rendered) < 5 * len(turns)


def test_a_short_conversation_is_rendered_up_to_each_answer(rendered: list[int]) -> None:
    chat = make_chat(Template(TEMPLATE, {}), None, alternate(6))
    locate_answers(chat, chat.render())
    assert rendered == [6, 1, 2, 3, 4, 5]


def test_a_turn_with_a_marker_of_the_template_has_a_kind_of_its_own() -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    turns = alternate(10)
    turns[5]["content"] = "a</think>b"
    kinds = find_kinds(make_chat(Template(template, {}), None, turns))
    # The first turn is preceded by nothing of the kind.
    assert kinds[1] == kinds[3]
    assert len({kinds[i] for i in (3, 5, 7)}) == 3
    assert kinds[7] == kinds[9]


def test_a_tool_that_is_not_an_object_is_rejected() -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        make_chat(Template(TEMPLATE, {}), ["weather"], alternate(2))


@pytest.mark.parametrize("number", [10, 12, 17])
def test_a_marker_in_the_middle_that_changes_the_prompt_is_found(number: int) -> None:
    """From the turn with /no_think on, the prompt is no longer what comes before the answer."""
    template = (
        "{% set ns = namespace(on=false) %}{% for m in messages %}"
        "{% if '/no_think' in m.content %}{% set ns.on = true %}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if ns.on %}<think></think>{% endif %}{% endif %}"
    )
    plain = make_chat(Template(template, {}), None, alternate(20))
    assert len(locate_answers(plain, plain.render()) or []) == 10
    turns = alternate(20)
    turns[number]["content"] += " /no_think"
    chat = make_chat(Template(template, {}), None, turns)
    assert locate_answers(chat, chat.render()) is None
