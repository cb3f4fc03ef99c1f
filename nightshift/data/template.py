"""Rendering with a chat template, and the place of each answer in the rendered text.

An answer is what an assistant turn adds to the prompt for it. To locate it, the turns before it and up
to it are rendered as well; doing that for every answer takes time quadratic in the turns. So the first
answers of each kind and the last are located that way. The others follow from where the template's loop
over the messages starts each turn, provided that this gives the same places for the first and the last.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2

# Fallback date of Llama 3's templates. With a fixed date, a row has the same tokens every night.
DATE = "26 Jul 2024"
# Answers of each kind that are located by rendering the turns before them and up to them.
SAMPLES = 2
# Encloses the number of a loop where a pass of it starts.
MARK = "\0"
# First and last + 1 character; None if the template renders the turn differently in the conversation.
Place = tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and its chat template.

    Attributes:
        template: Jinja source.
        special_tokens: bos_token, eos_token and others, by their names in the template.
        functions: Tools, as JSON schemas.
        turns: Turns in the form that templates expect.
    """

    template: str
    special_tokens: Mapping[str, str]
    functions: list[Any] | None
    turns: Sequence[Mapping[str, Any]]

    def render(self, stop: int | None = None, *, prompt: bool = False) -> str:
        """Render the turns before `stop` like `apply_chat_template` of transformers.

        transformers' function would copy all turns on each call, which takes longer than to render them.

        Args:
            stop: Number of turns; None for all.
            prompt: Whether to add the generation prompt.
        """
        return _compile(self.template).render(self._context(self.turns[:stop], prompt=prompt))

    def find_starts(self, text: str) -> Iterator[list[int]]:
        """Yield, for each loop that may be the one over the messages, the start of each turn.

        Args:
            text: The rendered conversation.

        Yields:
            Positions of the turns in the text, then the length of the text. A loop with one pass less
            than there are turns leaves out the system turn.
        """
        marked = _mark_loops(self.template).render(self._context(self.turns, prompt=False))
        pieces = re.split(f"{MARK}([0-9]+){MARK}", marked)
        if "".join(pieces[::2]) != text:
            return
        starts: defaultdict[str, list[int]] = defaultdict(list)
        position = 0
        for piece, loop in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            starts[loop].append(position)
        for found in starts.values():
            if len(self.turns) - 1 <= len(found) <= len(self.turns):
                yield [*([0] * (len(self.turns) - len(found))), *found, len(text)]

    def _context(self, turns: Sequence[Mapping[str, Any]], *, prompt: bool) -> dict[str, Any]:
        """Return the variables of a template, as transformers passes them."""
        return {
            "messages": turns,
            "tools": self.functions,
            "documents": None,
            "add_generation_prompt": prompt,
            "date_string": DATE,
            **self.special_tokens,
        }


def make_chat(
    template: str,
    special_tokens: Mapping[str, str],
    functions: list[Any] | None,
    turns: Sequence[Mapping[str, Any]],
) -> Chat:
    """Return a chat whose turns have their reasoning under each of its names, as in transformers.

    Raises:
        ValueError: A tool is not a JSON object.
    """
    from transformers.utils.chat_template_utils import _alias_reasoning_fields

    if not all(isinstance(function, dict) for function in functions or ()):
        raise ValueError("a tool is not a JSON object")
    return Chat(template, special_tokens, functions, _alias_reasoning_fields(turns))


def locate_answers(chat: Chat, text: str) -> list[tuple[int, int]] | None:
    """Locate the assistant's turns in a rendered conversation.

    Args:
        chat: The conversation.
        text: Its rendering.

    Returns:
        Span of the content and stop token of each assistant turn that may be trained, in order. None if the
        template renders a turn differently when others follow.
    """
    answers = [i for i, turn in enumerate(chat.turns) if is_answer(turn)]
    kinds = find_kinds(chat) if len(answers) > SAMPLES + 1 else {}
    seen: Counter[Any] = Counter()
    places: dict[int, Place] = {}
    for i in answers:
        seen[kinds.get(i)] += 1
        if not kinds or seen[kinds[i]] <= SAMPLES or i == answers[-1]:
            places[i] = _locate(chat, text, i)
    if len(places) < len(answers) and None not in places.values():
        places |= _infer(chat, text, kinds, places) or {i: _locate(chat, text, i) for i in answers}
    found = [place for _, place in sorted(places.items()) if place]
    return found if len(found) == len(answers) else None


def is_answer(turn: Mapping[str, Any]) -> bool:
    """Return whether a turn is the assistant's and may be trained."""
    return turn["role"] == "assistant" and turn.get("train") is not False


def find_kinds(chat: Chat) -> dict[int, Any]:
    """Return a kind for each assistant turn: what a template may look at in the turns up to it.

    Two turns of a kind, and the turns before them, have the same role and fields and contain the same
    string constants of the template (such as </think>). The conversations up to them contain the same
    constants, too.
    """
    constants = find_constants(chat.template)
    kinds: dict[int, Any] = {}
    before: tuple[Any, ...] = ()
    so_far: set[str] = set()
    for i, turn in enumerate(chat.turns):
        text = "\n".join([turn["content"], *(json.dumps(call) for call in turn.get("tool_calls", ()))])
        inside = {constant for constant in constants if constant in text}
        so_far |= inside
        marks = frozenset(constant for constant in inside if not constant.isidentifier())
        edges = (turn["content"][:1].isspace(), turn["content"][-1:].isspace(), bool(turn["content"].strip()))
        now = (turn["role"], frozenset(turn), min(2, len(turn.get("tool_calls", ()))), edges, marks)
        if is_answer(turn):
            kinds[i] = (before, now, frozenset(so_far))
        before = now
    return kinds


@lru_cache(maxsize=8)
def find_constants(template: str) -> tuple[str, ...]:
    """Return the template's string constants, sorted."""
    tree = _compile(template).environment.parse(template)
    values = (node.value for node in tree.find_all(jinja2.nodes.Const))
    return tuple(sorted({value for value in values if isinstance(value, str) and value.strip()}))


def _locate(chat: Chat, text: str, i: int) -> Place:
    """Locate turn `i` by rendering the turns before it and up to it."""
    before = chat.render(i, prompt=True)
    after = chat.render(i + 1) if i + 1 < len(chat.turns) else text
    if not (text.startswith(after) and after.startswith(before)):
        return None
    # The model does not generate the text after the stop token (a line break in ChatML).
    return len(before), len(after.rstrip())


def _infer(
    chat: Chat, text: str, kinds: Mapping[int, Any], known: Mapping[int, Place]
) -> dict[int, Place] | None:
    """Infer the places of all answers from the starts of the turns; None unless the known ones result."""
    for starts in chat.find_starts(text):
        prompts = {kinds[i]: text[starts[i] : place[0]] for i, place in known.items() if place}
        places: dict[int, Place] = {
            i: (starts[i] + len(prompts[kind]), len(text[: starts[i + 1]].rstrip()))
            for i, kind in kinds.items()
            if text.startswith(prompts[kind], starts[i])
        }
        if len(places) == len(kinds) and known.items() <= places.items():
            return places
    return None


@lru_cache(maxsize=8)
def _mark_loops(template: str) -> jinja2.Template:
    """Compile the template so that each pass of a loop starts with the number of the loop."""
    environment = _compile(template).environment
    tree = environment.parse(template)
    for number, loop in enumerate(tree.find_all(jinja2.nodes.For)):
        mark = jinja2.nodes.TemplateData(f"{MARK}{number}{MARK}", lineno=loop.lineno)
        loop.body.insert(0, jinja2.nodes.Output([mark], lineno=loop.lineno).set_environment(environment))
    return environment.from_string(tree)


def _compile(template: str) -> jinja2.Template:
    """Return the template as transformers compiles and caches it, with the extensions of chat templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled: jinja2.Template = _compile_jinja_template(template)
    return compiled
