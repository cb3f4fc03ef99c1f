"""Corpora for benchmarks: real text with known near-duplicates, and any number of chats."""

import ast
import math
import random
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from nightshift.data.text import Shingles, canonical, jaccard

# Share of the words that an edit changes; 0 changes only case and punctuation.
EDITS = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.15)
SHORTEST, LONGEST = 30, 330


def real_documents(count: int) -> list[str]:
    """Collect docstrings of the installed packages, 30 to 330 words each, without canonical duplicates.

    Raises:
        SystemExit: The installed packages contain too few.
    """
    folder = Path(sysconfig.get_paths()["purelib"])
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.py")):
        for text in docstrings(file):
            words = text.split()
            for start in range(0, len(words), LONGEST):
                part = words[start : start + LONGEST]
                if len(part) >= SHORTEST:
                    found.setdefault(canonical(" ".join(part)), " ".join(part))
        if len(found) >= count:
            return list(found.values())[:count]
    raise SystemExit(f"{folder}: only {len(found)} documents of {count}; install more packages")


def docstrings(file: Path) -> Iterator[str]:
    """Yield the docstrings of a module; none if the file is not valid Python 3."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def with_edits(documents: Sequence[str], count: int, seed: int) -> list[str]:
    """Append edited copies of random documents, with words replaced, inserted and deleted."""
    rng = random.Random(seed)
    vocabulary = [word for text in documents[:2000] for word in text.split()]
    edited = []
    for text in rng.sample(documents, count):
        words = text.split()
        share = rng.choice(EDITS)
        if share == 0.0:
            edited.append(" ".join(words).upper().replace(",", ";"))
            continue
        for _ in range(max(1, round(len(words) * share))):
            at = rng.randrange(len(words))
            replacement = rng.choice([[rng.choice(vocabulary)], [words[at], rng.choice(vocabulary)], []])
            words[at : at + 1] = replacement
        edited.append(" ".join(words))
    return [*documents, *edited]


def true_pairs(sets: Sequence[Shingles], threshold: float) -> set[tuple[int, int]]:
    """Find all pairs at or above a similarity threshold, with an exact prefix-filter join.

    Source: Bayardo et al., Scaling up all pairs similarity search (2007); Xiao et al., PPJoin (2008).
    """
    frequency = Counter(shingle for one in sets for shingle in one)
    ranked = [sorted(one, key=lambda shingle: (frequency[shingle], shingle)) for one in sets]
    index: dict[str, list[int]] = defaultdict(list)
    pairs = set()
    for i in sorted(range(len(sets)), key=lambda number: len(sets[number])):
        prefix = ranked[i][: len(ranked[i]) - int(-(-threshold * len(ranked[i]) // 1)) + 1]
        candidates = {other for shingle in prefix for other in index[shingle]}
        for other in candidates:
            long_enough = len(sets[other]) >= threshold * len(sets[i])
            if long_enough and jaccard(sets[i], sets[other]) >= threshold:
                pairs.add((min(i, other), max(i, other)))
        for shingle in prefix:
            index[shingle].append(i)
    return pairs


def chats(count: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield conversations of about 60 words from real phrases; one in twenty repeats an earlier one."""
    rng = random.Random(seed)
    phrases = [
        " ".join(words[i : i + 6])
        for text in real_documents(4000)
        for words in [canonical(text).split()]
        for i in range(0, len(words) - 6, 6)
    ]
    recent: list[tuple[str, str]] = []
    for number in range(count):
        if recent and number % 20 == 0:
            question, answer = rng.choice(recent)
        else:
            question = " ".join(rng.choices(phrases, k=3)) + "?"
            answer = " ".join(rng.choices(phrases, k=7)) + "."
            recent = [*recent[-99:], (question, answer)]
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lognormal_chats(count: int, seed: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield conversations of running text with lognormal lengths, as in human conversations.

    A question and its answer have 12 to 420 words, median 110: up to 1,000 tokens, 250 on average.
    """
    rng = random.Random(seed)
    words = (word for text in real_documents(4000) for word in text.split())
    for _ in range(count):
        size = min(420, max(12, round(rng.lognormvariate(math.log(110), 0.7))))
        half = rng.randint(size // 3, size // 2)
        question, answer = (" ".join(islice(words, n)) for n in (half, size - half))
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
