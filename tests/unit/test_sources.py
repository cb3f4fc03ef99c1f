"""The data inside the installed packages."""

from collections import Counter

from tasks.sources import packages
from tasks.text import canonical


def test_every_element_has_one_conversation_that_alternates() -> None:
    rows = list(packages.elements())
    assert len(rows) == 118
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_each_item_has_four_different_choices_and_one_of_them_is_true() -> None:
    items = list(packages.element_items())
    assert len({item["id"] for item in items}) == len(items) == 641
    for item in items:
        assert len(set(item["choices"])) == 4
    gold = next(item for item in items if item["id"] == "symbol/Gold")
    assert gold["choices"][gold["answer"]] == "The symbol for Gold is Au."
    # The true answer has no favourite place.
    places = Counter(item["answer"] for item in items)
    assert all(120 < places[place] < 200 for place in range(4))


def test_no_benchmark_wording_is_trained() -> None:
    trained = {canonical(m["content"]) for row in packages.elements() for m in row["messages"]}
    asked = {canonical(item["question"]) for item in packages.element_items()}
    assert trained.isdisjoint(asked)


def test_the_dialogs_are_many_and_often_repeated() -> None:
    rows = list(packages.dialogs())
    assert len(rows) == 2026
    assert len({str(row) for row in rows}) == 899
