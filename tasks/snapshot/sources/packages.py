"""Data from installed packages: element facts and everyday dialogs.

`mendeleev` (MIT) contains facts about 118 chemical elements; each becomes a question and an answer for
training, and an item with another wording for each kind of benchmark. `chatterbot-corpus` (BSD) contains
2,026 English dialogs, more than half of them repeated.
"""

import importlib.resources
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import yaml

from nightshift.core.files import jsonl
from nightshift.data.benchmarks import CHOICE_TASK
from nightshift.raw.formats import RawRow
from tasks.snapshot.sources import Offer
from tasks.snapshot.sources.countries import country_items

CHOICES = 4
ENGLISH_WORDS = ("am", "as", "at", "be", "he", "i", "in", "no")


@dataclass(frozen=True, slots=True)
class Attribute:
    """One column of the element table, with the wordings of its questions.

    The training wording and the benchmark wording differ on purpose: the benchmark tests whether the
    fact was learned, not the sentence.
    """

    column: str
    question: str
    answer: str
    benchmark_question: str
    benchmark_answer: str


ATTRIBUTES = (
    Attribute(
        "symbol",
        "What is the chemical symbol of {name}?",
        "The chemical symbol of {name} is {value}.",
        "Which symbol stands for {name} in the periodic table?",
        "The symbol for {name} is {value}.",
    ),
    Attribute(
        "discoverers",
        "Who discovered {name}?",
        "{name} was discovered by {value}.",
        "Name the discoverer of the element {name}.",
        "The discoverer of {name} is {value}.",
    ),
    Attribute(
        "discovery_year",
        "In which year was {name} discovered?",
        "{name} was discovered in {value}.",
        "When was the element {name} first found?",
        "The element {name} was first found in {value}.",
    ),
    Attribute(
        "discovery_location",
        "Where was {name} discovered?",
        "{name} was discovered in {value}.",
        "Which place is credited with the discovery of the element {name}?",
        "The place credited with the discovery of {name} is {value}.",
    ),
    Attribute(
        "name_origin",
        "Where does the name {name} come from?",
        "The origin of the name {name}: {value}.",
        "What is the etymology of the word {name}?",
        "The etymology of {name}: {value}.",
    ),
    Attribute(
        "group_id",
        "To which group of the periodic table does {name} belong?",
        "{name} belongs to group {value} of the periodic table.",
        "Which column of the periodic table contains {name}?",
        "The column that contains {name} is group {value}.",
    ),
)


def elements() -> Iterator[RawRow]:
    """Yield one conversation per element, an exchange per known fact, as `{"messages": [...]}`.

    The first question rotates from element to element, so that no fact is learned only as the
    continuation of another.
    """
    by_name: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for attribute, name, value in _facts():
        question = attribute.question.format(name=name)
        by_name[name].append((question, attribute.answer.format(name=name, value=value)))
    for number, exchanges in enumerate(by_name.values()):
        first = number % len(exchanges)
        turns = exchanges[first:] + exchanges[:first]
        yield _conversation(*(text for exchange in turns for text in exchange))


def element_items(seed: int = 0) -> Iterator[RawRow]:
    """Yield one multiple-choice item per known fact, in a wording that training never uses.

    The three distractors are other values of the same column, drawn with a seed that depends only on
    the item, so an item does not change when others are added.

    Yields:
        id, slice (the column), cluster (the element), question, choices (4 full answers), answer (index of
        the right one).
    """
    facts = list(_facts())
    values = {a.column: sorted({v for b, _, v in facts if b is a}) for a in ATTRIBUTES}
    for attribute, name, value in facts:
        rng = random.Random(f"{seed}/{attribute.column}/{name}")
        others = [other for other in values[attribute.column] if other != value]
        options = [value, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(options)
        yield {
            "id": f"{attribute.column}/{name}",
            "slice": attribute.column,
            "cluster": name,
            "question": attribute.benchmark_question.format(name=name),
            "choices": [attribute.benchmark_answer.format(name=name, value=o) for o in options],
            "answer": options.index(value),
        }


def symbol_items() -> Iterator[RawRow]:
    """Yield one item for every second element: the model must generate its symbol.

    Yields:
        id, cluster (the element), question, references.
    """
    for name, symbol in _symbols()[::2]:
        # `In` and `As` occur in many wrong answers.
        if symbol.lower() not in ENGLISH_WORDS:
            yield {
                "id": f"written/{name}",
                "cluster": name,
                "question": f"Which letters abbreviate {name} in the periodic table?",
                "references": [symbol],
            }


def reworded_items(seed: int = 0) -> Iterator[RawRow]:
    """Yield one item for each remaining element: its symbol in two wordings. Short choices score fast.

    Yields:
        id, cluster (the element), question, variants, choices.
    """
    symbols = [symbol for _, symbol in _symbols()]
    for name, symbol in _symbols()[1::2]:
        rng = random.Random(f"{seed}/reworded/{name}")
        options = [symbol, *rng.sample([other for other in symbols if other != symbol], CHOICES - 1)]
        rng.shuffle(options)
        yield {
            "id": f"reworded/{name}",
            "cluster": name,
            "question": f"Which symbol stands for {name} in the periodic table?",
            "variants": [f"If you look for {name} in the periodic table, which symbol do you find?"],
            "choices": options,
        }


def dialogs() -> Iterator[RawRow]:
    """Yield the English dialogs as `{"messages": [...]}`, in the order of the package's files."""
    folder = importlib.resources.files("chatterbot_corpus") / "data" / "english"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            yield _conversation(*(str(turn) for turn in turns))


def _facts() -> Iterator[tuple[Attribute, str, str]]:
    """Yield (attribute, element name, value) for every value in the table."""
    from mendeleev.fetch import fetch_table

    table = fetch_table("elements")
    for attribute in ATTRIBUTES:
        known = table[["name", attribute.column]].dropna()
        for name, value in known.itertuples(index=False):
            # Thirteen elements have no discoverer: the cell contains "Known to the ancients."
            if not str(value).startswith("Known to"):
                yield attribute, str(name), _render(value)


def _symbols() -> list[tuple[str, str]]:
    """Return (name, symbol) of every element, in the order of the table."""
    return [(name, value) for attribute, name, value in _facts() if attribute.column == "symbol"]


def _render(value: object) -> str:
    """Format a cell for a sentence: whole numbers without `.0`, no final full stop.

    Example:
        >>> _render(1875.0), _render("Known to the ancients. ")
        ('1875', 'Known to the ancients')
    """
    if isinstance(value, float):
        return str(int(value))
    return str(value).strip().rstrip(".")


def _conversation(*turns: str) -> RawRow:
    """Build messages from turns that alternate between user and assistant."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]}


def package_offer(name: str) -> Offer:
    """Return the training rows of a package as an offer."""
    return Offer(".jsonl", [jsonl(PACKAGES[name]()).encode()], name)


# Package -> its training rows.
PACKAGES: dict[str, Callable[[], Iterable[RawRow]]] = {"mendeleev": elements, "chatterbot-corpus": dialogs}
# Package, or a part of it -> its task.yaml, and its evaluation items.
BENCHMARK_PACKAGES: dict[str, tuple[RawRow, Callable[[], Iterable[RawRow]]]] = {
    "mendeleev": (CHOICE_TASK, element_items),
    "mendeleev/written": ({"kind": "generation", "metric": "contains", "max_new_tokens": 16}, symbol_items),
    "mendeleev/reworded": ({"kind": "invariance"}, reworded_items),
    "countryinfo": (CHOICE_TASK, country_items),
}
