"""Rendering with a chat template, and the place of each answer in the rendered text.

An answer is what an assistant turn adds to the prompt for it. To locate it, the turns before it and up
to it are rendered as well; doing that for every answer takes time quadratic in the turns. So the first
answers of each kind and the last are located that way. The others follow from where the template's loop
over the messages starts each turn, provided that this gives the same places for the first and the last.

Some templates render a turn differently once others follow: they drop the reasoning of earlier answers
(Qwen3, gpt-oss). Then one text cannot show every answer as the model will give it, and each gets a text
of its own, which ends with it.
"""

import contextlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import jinja2

# What a template raises for a conversation that it does not expect.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError),
    *(TypeError, ValueError),
)
# Answers of each kind that are located by rendering the turns before them and up to them.
SAMPLES = 2
# Encloses the number of a loop where a pass of it starts.
MARK = "\0"
# A prompt that ends inside a block for reasoning, as those of DeepSeek do.
OPENED = re.compile(r"<(\w+)>\s*\Z")
# A template that prints today's date gets a fixed one, the fallback of Llama 3's: otherwise a row would have
# other tokens every night.
TODAY = date(2024, 7, 26)
STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(?P<format>[^"']*)\1\s*\)""")
# Separates reasoning that is part of the content, as in data made with DeepSeek.
START_OF_REASONING, END_OF_REASONING = "<think>", "</think>"
# A text of the conversations that show what a template does.
PROBE = "qzxjkv"
USER, ASSISTANT = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE[::-1]}
CALLS = [{"type": "function", "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}]
# First and last + 1 character; None if the template renders the turn differently in the conversation.
Place = tuple[int, int] | None


class Part(NamedTuple):
    """A rendered text with its answers.

    Attributes:
        text: The text.
        answers: Span of the content and stop token of each answer that is trained, in order.
        n_turns: Number of turns in the text.
        is_divisible: Whether each round, from a user turn to the answer, starts where an answer ends.
    """

    text: str
    answers: list[tuple[int, int]]
    n_turns: int
    is_divisible: bool

    def stop_token(self, template: "Template") -> str:
        """Return the token with which the text ends; empty if it ends with none."""
        return max((one for one in template.added_tokens if self.text.endswith(one)), key=len, default="")


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, and what it depends on.

    Attributes:
        source: Jinja source.
        special_tokens: bos_token, eos_token and others, by their names in the template.
        added_tokens: Tokens that the tokenizer never splits; one of them ends an answer.
        closing: Token that the template adds to the end of a conversation, after that of the last answer.
        has_reasoning: Whether it renders the reasoning of an answer.
    """

    source: str
    special_tokens: Mapping[str, str]
    added_tokens: tuple[str, ...] = ()
    closing: str = ""
    has_reasoning: bool = False

    def render(
        self, turns: Sequence[Mapping[str, Any]], functions: list[Any] | None, *, prompt: bool = False
    ) -> str:
        """Render turns like `apply_chat_template` of transformers, without the closing token.

        transformers' function would copy all turns on each call, which takes longer than to render them.
        """
        text = _compile(self.source).render(self.context(turns, functions, prompt=prompt))
        return text.rstrip().removesuffix(self.closing) if self.closing and not prompt else text

    def context(
        self, turns: Sequence[Mapping[str, Any]], functions: list[Any] | None, *, prompt: bool
    ) -> dict[str, Any]:
        """Return the variables of a template, as transformers passes them."""
        return {
            "messages": turns,
            "tools": functions,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.special_tokens,
        }


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation and its chat template.

    Attributes:
        template: Chat template.
        functions: Tools, as JSON schemas.
        turns: Turns in the form that templates expect.
    """

    template: Template
    functions: list[Any] | None
    turns: Sequence[Mapping[str, Any]]

    def render(self, stop: int | None = None, *, prompt: bool = False) -> str:
        """Render the turns before `stop`, None for all, perhaps with the prompt for an answer."""
        return self.template.render(self.turns[:stop], self.functions, prompt=prompt)

    def find_starts(self, text: str) -> Iterator[list[int]]:
        """Yield, for each loop that may be the one over the messages, the start of each turn.

        Args:
            text: The rendered conversation.

        Yields:
            Positions of the turns in the text, then the length of the text. A loop with one pass less
            than there are turns leaves out the system turn.
        """
        context = self.template.context(self.turns, self.functions, prompt=False)
        marked = _mark_loops(self.template.source).render(context)
        pieces = re.split(f"{MARK}([0-9]+){MARK}", marked)
        if not "".join(pieces[::2]).startswith(text):
            return
        starts: defaultdict[str, list[int]] = defaultdict(list)
        position = 0
        for piece, loop in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            starts[loop].append(position)
        for found in starts.values():
            if len(self.turns) - 1 <= len(found) <= len(self.turns):
                yield [*([0] * (len(self.turns) - len(found))), *found, len(text)]


def load_template(source: str, special_tokens: Mapping[str, str], added_tokens: Sequence[str]) -> Template:
    """Return a chat template with what two short conversations show about it.

    Args:
        source: Jinja source.
        special_tokens: bos_token, eos_token and others, by their names in the template.
        added_tokens: Tokens that the tokenizer never splits.
    """
    tokens, eos = dict.fromkeys([*added_tokens, *special_tokens.values()]), special_tokens.get("eos_token")
    template = Template(source, special_tokens, tuple(tokens))
    # What it raises for these conversations is a fault of the rows that are like them.
    with contextlib.suppress(*TEMPLATE_ERRORS):
        asked = template.render([USER, ASSISTANT, USER], None).rstrip()
        # Phi-3 ends a turn with <|end|>, and every conversation with <|endoftext|> as well.
        if eos and asked.endswith(eos) and asked.removesuffix(eos).rstrip().endswith(template.added_tokens):
            template = replace(template, closing=eos)
        thought = make_chat(template, None, [USER, {**ASSISTANT, "reasoning": PROBE * 2}])
        part = render_answer(thought, 1)
        template = replace(template, has_reasoning=part is not None and PROBE * 2 in part.text)
    return template


def read_template(tokenizer: Any) -> Template | None:
    """Return the chat template of a tokenizer of transformers, if it has one."""
    if not tokenizer.chat_template:
        return None
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return load_template(tokenizer.chat_template, special, added)


def find_answer_prefix(template: Template) -> str:
    """Return what the template writes between a prompt and the content of an answer without reasoning.

    Most write nothing; Qwen3 an empty block for reasoning, gpt-oss the name of the channel.
    """
    part = render_answer(make_chat(template, None, [USER, ASSISTANT]), 1)
    return part.text[part.answers[0][0] :].partition(str(ASSISTANT["content"]))[0] if part else ""


def freeze_dates(template: str) -> str:
    """Replace today's date in a template by a fixed one, so that a row has the same tokens every night.

    Example:
        >>> freeze_dates("Today: {{ strftime_now('%d %b %Y') }}")
        "Today: {{ '26 Jul 2024' }}"
    """
    return STRFTIME.sub(lambda found: repr(TODAY.strftime(found["format"])), template)


def make_chat(template: Template, functions: list[Any] | None, turns: Sequence[Mapping[str, Any]]) -> Chat:
    """Return a chat whose turns have their reasoning under each of its names, as in transformers.

    Raises:
        ValueError: A tool is not a JSON object.
    """
    from transformers.utils.chat_template_utils import _alias_reasoning_fields

    if not all(isinstance(function, dict) for function in functions or ()):
        raise ValueError("a tool is not a JSON object")
    return Chat(template, functions, _alias_reasoning_fields(turns))


def render_answers(chat: Chat) -> list[Part] | None:
    """Render a conversation, and locate the answers that are trained.

    Returns:
        One text with all answers if the template renders each of them in the conversation as the model
        would give it; else one text for each answer. None if an answer does not follow from its prompt.
    """
    text = chat.render()
    if (places := locate_answers(chat, text)) is not None and not _loses_reasoning(chat, text):
        return [_with_stop_tokens(chat, text, places, len(chat.turns))]
    parts = [render_answer(chat, i) for i, turn in enumerate(chat.turns) if is_answer(turn)]
    found = [part._replace(is_divisible=False) for part in parts if part]
    return found if len(found) == len(parts) else None


def render_answer(chat: Chat, i: int) -> Part | None:
    """Render the turns up to answer `i`, as the model would be asked and answer at that point.

    DeepSeek's prompt opens a block for reasoning, and its template then leaves the block out. There, the
    text is the prompt, the reasoning, the end of the block and the rest of the answer.

    Returns:
        The text up to the answer's stop token; None if the answer does not follow from its prompt.
    """
    before, after = chat.render(i, prompt=True), chat.render(i + 1)
    if not after.startswith(before):
        bare = chat.render(i)
        if not (before.startswith(bare) and after.startswith(bare)):
            return None
        header, body = before.removeprefix(bare), after.removeprefix(bare)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(header, body, strict=False)))
        opened, rest = header[common:], body[common:]
        if block := OPENED.fullmatch(opened):
            reasoning = "\n".join(reasoning_of(chat.turns[i]))
            rest = f"{reasoning}\n</{block[1]}>\n\n{rest.lstrip()}"
        elif opened.strip():
            return None
        after = before + rest
    text = after.rstrip()
    return _with_stop_tokens(chat, text, [(len(before), len(text))], i + 1)


def _with_stop_tokens(chat: Chat, text: str, places: list[tuple[int, int]], n_turns: int) -> Part:
    """Extend each answer to its stop token.

    GLM's templates end an answer with nothing: the token that starts the next turn stops the generation.

    Args:
        chat: The conversation.
        text: Its rendering up to turn `n_turns`.
        places: Answers.
        n_turns: Number of turns in the text.
    """
    added = chat.template.added_tokens
    if not added or all(text.endswith(added, start, end) for start, end in places):
        return Part(text, places, n_turns, is_divisible=True)
    if places[-1][1] == len(text):
        text += _find_next_token(chat, text, n_turns)
    token = _compile_tokens(added)
    found = [token.match(text, end) for _, end in places]
    ends = [one.end() if one else end for one, (_, end) in zip(found, places, strict=True)]
    spans = [
        (start, end if text.endswith(added, start, end) else longer)
        for (start, end), longer in zip(places, ends, strict=True)
    ]
    return Part(text, spans, n_turns, is_divisible=False)


def _find_next_token(chat: Chat, text: str, n_turns: int) -> str:
    """Return the token with which the turn after a text starts; empty if it starts with none."""
    *_, last = chat.turns[:n_turns]
    follows = {"role": "tool", "content": PROBE, "name": PROBE} if last.get("tool_calls") else USER
    following = chat.turns[n_turns] if n_turns < len(chat.turns) else follows
    token = _compile_tokens(chat.template.added_tokens)
    # Where the template drops the reasoning once a turn follows, a short conversation tells.
    plain = {**ASSISTANT, **{key: last[key] for key in ("tool_calls",) if key in last}}
    for before, known in ((chat.turns[:n_turns], text), ([USER, plain], None)):
        with contextlib.suppress(*TEMPLATE_ERRORS):
            shown = known or chat.template.render(before, chat.functions).rstrip()
            longer = chat.template.render([*before, following], chat.functions)
            if longer.startswith(shown) and (found := token.match(longer, len(shown))):
                return found[0]
    return ""


@lru_cache(maxsize=8)
def _compile_tokens(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Compile a pattern for any of the tokens; of two with the same start, the longer one."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _loses_reasoning(chat: Chat, text: str) -> bool:
    """Return whether the rendered conversation lacks the reasoning of an answer that is trained."""
    return chat.template.has_reasoning and not all(
        piece in text for turn in chat.turns if is_answer(turn) for piece in reasoning_of(turn)
    )


def reasoning_of(turn: Mapping[str, Any]) -> list[str]:
    """Return the reasoning of a turn, also if it is a part of the content.

    Example:
        >>> reasoning_of({"content": "<think>Count.</think>Two"}), reasoning_of({"content": "Two"})
        (['Count.'], [])
    """
    thought, end, _ = (turn["content"] or "").partition(END_OF_REASONING)
    found = [thought.rpartition(START_OF_REASONING)[2] if end else "", turn.get("reasoning_content") or ""]
    return [piece.strip() for piece in found if piece.strip()]


def visible(turn: Mapping[str, Any], template: Template) -> str:
    """Return the content of a turn that its template must render, without reasoning that it may drop."""
    content = str(turn["content"] or "")
    is_split = template.has_reasoning and turn["role"] == "assistant"
    return (content.rpartition(END_OF_REASONING)[2] if is_split else content).strip()


def drops_tools(chat: Chat) -> bool:
    """Return whether the template leaves out a tool, or the name, a key or a value of a call.

    A name may occur in the text for another reason. So all of them are replaced by words that occur
    nowhere else.
    """
    words: list[str] = []

    def mark(value: Any) -> Any:
        """Replace the keys and texts of a JSON value."""
        if isinstance(value, dict):
            return {new_word(): mark(one) for one in value.values()}
        if isinstance(value, list):
            return [mark(one) for one in value]
        return new_word() if isinstance(value, str) and value else value

    def mark_arguments(function: Mapping[str, Any]) -> Any:
        """Replace the arguments of a call, which may be JSON."""
        arguments = function["arguments"]
        return json.dumps(mark(json.loads(arguments))) if isinstance(arguments, str) else mark(arguments)

    def new_word() -> str:
        words.append(f"{PROBE}{len(words)}q")
        return words[-1]

    turns: list[dict[str, Any]] = []
    for turn in chat.turns:
        turns.append(dict(turn))
        if calls := turn.get("tool_calls"):
            functions = [call["function"] for call in calls]
            turns[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": new_word(), "arguments": mark_arguments(one)}}
                for one in functions
            ]
    tools = [_rename(tool, new_word()) for tool in chat.functions or ()]
    try:
        text = chat.template.render(turns, tools or None)
    except TEMPLATE_ERRORS:
        # The template knows some functions by their names; it has rendered the conversation itself.
        return False
    return not all(word in text for word in words)


def _rename(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool under another name."""
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


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
            if places[i] is None:
                return None
    if len(places) < len(answers):
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
    constants = find_constants(chat.template.source)
    kinds: dict[int, Any] = {}
    before: tuple[Any, ...] = ()
    so_far: set[str] = set()
    for i, turn in enumerate(chat.turns):
        calls = (json.dumps(call) for call in turn.get("tool_calls", ()))
        content = turn["content"] or ""
        text = "\n".join([content, turn.get("reasoning_content") or "", *calls])
        inside = {constant for constant in constants if constant in text}
        so_far |= inside
        marks = frozenset(constant for constant in inside if not constant.isidentifier())
        edges = (content[:1].isspace(), content[-1:].isspace(), bool(content.strip()))
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


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    """Return the template as transformers compiles it, with the extensions of chat templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled: jinja2.Template = _compile_jinja_template(template)
    return compiled
