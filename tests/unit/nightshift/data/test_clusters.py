"""Related evaluation items form clusters, which the gate's tests count once."""

import pytest

from nightshift.data.benchmarks import HELDOUT, Question
from nightshift.data.clusters import find_clusters
from tasks.decontaminate import DecontaminateParams
from tests.helpers.questions import with_forms

PARAMS = DecontaminateParams(ngram_size=13, min_question_words=5, max_containment=0.8, max_drop_rate=1.0)
LONG = "In the year that the old bridge over the river was closed, who was the mayor of the town?"


def clusters(*questions: Question) -> list[list[str]]:
    """Return the clusters, each as the sorted ids of its items; ids are unique here."""
    found: dict[str, list[str]] = {}
    for row in find_clusters(with_forms(questions), PARAMS):
        found.setdefault(row["cluster"], []).append(row["item"])
    return sorted(sorted(items) for items in found.values())


def ask(item: str, text: str, cluster: str | None = None, benchmark: str = "facts") -> Question:
    return Question(benchmark, item, text, cluster)


def test_items_that_name_a_cluster_are_one_also_in_two_benchmarks() -> None:
    found = clusters(
        ask("1", "Who found gold?", "gold"),
        ask("2", "What is its symbol?", "gold", benchmark="reworded"),
        ask("3", "Who found tin?", "tin"),
        ask("4", "Something else"),
    )
    assert found == [["1", "2"]]


def test_an_item_and_its_paraphrases_are_one_cluster() -> None:
    found = clusters(
        ask("1", "Who found gold?"),
        Question("facts", "2", "By whom was the metal of kings discovered?", None, "1"),
        Question("facts", "3", "Name the discoverer of Au.", None, "1"),
        Question("other", "4", "Name somebody."),
    )
    assert found == [["1", "2", "3"]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who found gold?", "who FOUND gold"),
        (LONG, f"Please answer. {LONG}"),
        ("What is the chemical symbol of gold?", "Tell me, what is the chemical symbol of gold, and why?"),
        ("这座山在哪个国家的哪个省呢?", "请问这座山在哪个国家的哪个省呢?"),
    ],
)
def test_the_same_question_in_two_items_is_one_cluster(one: str, other: str) -> None:
    assert clusters(ask("1", one), ask("2", other), ask("3", "Where does the sun set?")) == [["1", "2"]]


def test_questions_without_words_are_not_related() -> None:
    assert clusters(ask("1", "?!"), ask("2", "..."), ask("3", "😀")) == []


def test_a_template_relates_nothing() -> None:
    names = [f"element{letter}" for letter in "abcdefghijklmno"]
    asked = [
        ask(name, f"Which symbol stands for {name} in the periodic table of the elements?") for name in names
    ]
    assert clusters(*asked[:3]) == []
    assert clusters(*asked) == []


def test_wordings_of_an_item_connect_it_with_every_item_that_shares_one() -> None:
    found = clusters(
        ask("1", "Who was the first king of the land?"),
        ask("1", "What was the name of the first king?"),
        ask("2", "Who was the first king of the land?"),
        ask("3", "What was the name of the first king?"),
    )
    assert found == [["1", "2", "3"]]


def test_examples_of_a_group_or_with_one_prompt_are_one_cluster_and_questions_about_a_document_are_not() -> (
    None
):
    document = "The town lies on a river. It has a bridge, a school and two mills. Its market is on Mondays. "
    found = clusters(
        ask("1", "How are you?", "customer 7", HELDOUT),
        ask("2", "What does it cost to send a letter?", "customer 7", HELDOUT),
        ask("3", f"{document}On which day is the market held in town?", None, HELDOUT),
        ask("4", f"{document}How many mills did the people build there?", None, HELDOUT),
        ask("5", "Where is my parcel now, please?", None, HELDOUT),
        ask("6", "Where is my parcel now, please?", None, HELDOUT),
    )
    assert found == [["1", "2"], ["5", "6"]]
