"""The retrieval baseline, which looks answers up instead of learning them."""

from typing import Any

from tasks.evaluate.retrieval import add_documents, build_documents, build_index


def row(name: str, *turns: tuple[str, str], parent: str | None = None) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": name, "messages": messages, "parent_id": parent}


def test_a_document_is_a_question_with_its_answer_or_a_chunk_of_a_text() -> None:
    chat = [
        ("system", "Be brief."),
        ("user", "Q1?"),
        ("assistant", "A1."),
        ("user", "Q2?"),
        ("assistant", "A2."),
    ]
    found = list(build_documents([row("a", *chat), row("b", ("text", "word " * 450))]))
    assert found[:2] == ["Q1?\nA1.", "Q2?\nA2."]
    assert [len(text.split()) for text in found[2:]] == [200, 200, 50]


def test_only_the_first_of_an_example_and_its_paraphrases_is_indexed() -> None:
    rows = [
        row("a", ("user", "A?"), ("assistant", "1")),
        row("a1", ("user", "A again?"), ("assistant", "1"), parent="a"),
        # The example itself asked an evaluation question and was removed.
        row("b1", ("user", "B again?"), ("assistant", "2"), parent="b"),
        row("b2", ("user", "B once more?"), ("assistant", "2"), parent="b"),
    ]
    assert list(build_documents(rows)) == ["A?\n1", "B again?\n2"]


def test_the_document_with_the_rarest_shared_words_comes_first() -> None:
    find = build_index(["What is tin? A metal.", "What is gold? Au.", "What is snow? Ice."], 2)
    assert find("what about GOLD")[0] == "What is gold? Au."
    assert len(find("what about gold")) == 2


def test_equally_near_documents_keep_their_order_and_are_indexed_once() -> None:
    find = build_index(["gold b", "gold c", "gold b", "gold d", "iron"], 2)
    assert find("gold") == ["gold b", "gold c"]


def test_a_question_without_a_known_word_finds_nothing_and_is_unchanged() -> None:
    find = build_index(["gold", "iron"], 2)
    assert (find("zzz"), find("?!")) == ([], [])
    assert add_documents("Who?", []) == "Who?"
