"""The data in the installed packages."""

from collections import Counter
from pathlib import Path

from nightshift.data.benchmarks import questions, read_benchmarks
from nightshift.data.text import canonical
from tasks.snapshot.__main__ import write_benchmark
from tasks.snapshot.sources import packages
from tasks.snapshot.sources.countries import country_items


def test_every_element_has_one_conversation_with_alternating_roles() -> None:
    rows = list(packages.elements())
    assert len(rows) == 118
    for row in rows:
        roles = [m["role"] for m in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_each_item_has_four_different_choices_and_one_correct_answer() -> None:
    items = list(packages.element_items())
    assert len({item["id"] for item in items}) == len(items) == 641
    for item in items:
        assert len(set(item["choices"])) == 4
    gold = next(item for item in items if item["id"] == "symbol/Gold")
    assert gold["choices"][gold["answer"]] == "The symbol for Gold is Au."
    # The correct answer is spread evenly over the positions.
    places = Counter(item["answer"] for item in items)
    assert all(120 < places[place] < 200 for place in range(4))


def test_no_benchmark_wording_is_in_the_training_data() -> None:
    trained = {canonical(m["content"]) for row in packages.elements() for m in row["messages"]}
    for _, read_items in packages.BENCHMARK_PACKAGES.values():
        asked = {canonical(question) for item in read_items() for question in questions(item)}
        assert len(asked) >= 54
        assert trained.isdisjoint(asked)


def test_every_packaged_benchmark_has_the_required_format(tmp_path: Path) -> None:
    for location in packages.BENCHMARK_PACKAGES:
        write_benchmark(location.replace("/", "_"), f"package:{location}", tmp_path)
    found = {one.name: (one.kind, len(one.items)) for one in read_benchmarks(tmp_path)}
    assert found == {
        "countryinfo": ("choice", 180),
        "mendeleev": ("choice", 641),
        "mendeleev_reworded": ("invariance", 59),
        "mendeleev_written": ("generation", 54),
    }


def test_country_items_have_four_different_choices_and_balanced_answer_positions() -> None:
    items = {item["id"]: item for item in country_items()}
    france = items["capital/France"]
    assert france["choices"][france["answer"]] == "The capital of France is Paris."
    assert all(len(set(item["choices"])) == 4 for item in items.values())
    assert Counter(item["slice"] for item in items.values()) == {"capital": 90, "continent": 90}
    places = Counter(item["answer"] for item in items.values())
    assert all(25 < places[place] < 65 for place in range(4))


def test_generated_symbols_are_not_english_words() -> None:
    symbols = [item["references"][0] for item in packages.symbol_items()]
    assert len(set(symbols)) == 54
    assert not {"In", "As", "He", "At", "No"} & set(symbols)


def test_the_dialogs_contain_many_repetitions() -> None:
    rows = list(packages.dialogs())
    assert len(rows) == 2026
    assert len({str(row) for row in rows}) == 899
