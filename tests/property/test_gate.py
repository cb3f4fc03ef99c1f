"""Laws of the gate."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate.decision import decide
from tests.gate import PARAMS as SHIPPED

PARAMS = SHIPPED.model_copy(update={"n_resamples": 1000, "min_items": 10})
ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=10, max_size=40)


def rows(model: str, right: list[bool]) -> list[dict[str, Any]]:
    same = {"model": model, "slice": "s", "status": "ok", "answer": None}
    return [{"benchmark": "test", "item": "t", "score": 20.0, "tokens": 10, **same}] + [
        {"benchmark": "facts", "item": str(i), "score": float(ok), **same} for i, ok in enumerate(right)
    ]


def verdict(candidate: list[bool], base: list[bool]) -> str:
    table = rows("candidate", candidate) + rows("base", base)
    return str(decide(table, {"base": None, "candidate": "c"}, [], [], PARAMS)["verdict"])


@settings(max_examples=30, deadline=None)
@given(ANSWERS)
def test_what_is_promoted_over_another_is_never_beaten_by_it(
    pairs: list[tuple[bool, bool]],
) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    if verdict(ours, theirs) == "promote":
        assert verdict(theirs, ours) == "reject"


@settings(max_examples=30, deadline=None)
@given(ANSWERS)
def test_a_model_is_never_promoted_over_itself_or_for_fewer_right_answers(
    pairs: list[tuple[bool, bool]],
) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    assert verdict(ours, ours) == "hold"
    if sum(ours) <= sum(theirs):
        assert verdict(ours, theirs) != "promote"
