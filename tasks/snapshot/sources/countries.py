"""General knowledge about countries, from the installed package `countryinfo` (MIT).

A retention benchmark: none of these facts are in the training data, so a loss here is forgetting.
"""

import random
from collections.abc import Iterator
from typing import Any

CHOICES = 4
# Few models know more countries; the base model of the demo is small.
COUNTRIES = 90
# Former names and parts of other countries in the list.
LEFT_OUT = ("Burma", "Hong Kong", "Serbia and Montenegro")


def country_items(seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield two multiple-choice items for each of the most populous countries: capital and continent.

    Yields:
        id, slice (capital or continent), cluster (the country), question, choices (4 full answers), answer
        (correct index).
    """
    countries = _countries()
    capitals = sorted({capital for _, capital, _ in countries})
    continents = sorted({continent for _, _, continent in countries})
    for name, capital, continent in countries:
        yield _item(
            f"capital/{name}",
            f"What is the capital of {name}?",
            f"The capital of {name} is {{}}.",
            (capital, capitals),
            seed,
        )
        yield _item(
            f"continent/{name}",
            f"On which continent is {name}?",
            f"{name} is in {{}}.",
            (continent, continents),
            seed,
        )


def _countries() -> list[tuple[str, str, str]]:
    """Return (name, capital, continent) of the most populous countries, most populous first."""
    from countryinfo import all_countries

    found = []
    for country in all_countries():
        facts = country.info()
        name, capital, continent = facts["name"], facts.get("capital"), facts.get("region")
        if name not in LEFT_OUT and capital and continent and facts.get("population"):
            found.append((-facts["population"], name, capital, continent.replace("Americas", "America")))
    return [(name, capital, continent) for _, name, capital, continent in sorted(found)[:COUNTRIES]]


def _item(name: str, question: str, answer: str, value: tuple[str, list[str]], seed: int) -> dict[str, Any]:
    """Build an item; the distractors are drawn with a seed that depends only on the item."""
    true, values = value
    rng = random.Random(f"{seed}/{name}")
    options = [true, *rng.sample([other for other in values if other != true], CHOICES - 1)]
    rng.shuffle(options)
    fact, country = name.split("/")
    return {
        "id": name,
        "slice": fact,
        "cluster": country,
        "question": question,
        "choices": [answer.format(option) for option in options],
        "answer": options.index(true),
    }
