"""Properties of the report's charts and comparisons."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.gate.decision import decide
from tasks.report.advice import Outcome
from tasks.report.changes import count_rows
from tasks.report.chart import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, draw, thin, ticks
from tasks.report.compare import compare
from tasks.report.evidence import Evidence
from tasks.report.filters import cut
from tasks.report.summary import summarize
from tests.helpers.gate import PARAMS
from tests.helpers.report import heldout, score

VALUES = st.floats(-1e6, 1e6, allow_nan=False)
CURVES = st.lists(VALUES, min_size=1, max_size=1000).map(lambda values: list(enumerate(values, start=1)))


@given(st.floats(-1000, 1000), st.floats(1e-6, 1e6))
def test_ticks_are_few_ascending_and_within_the_range(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 6
    assert sorted(set(found)) == found
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in found)


@given(CURVES)
def test_a_curve_is_inside_the_plot_area_and_has_few_points(curve: list[tuple[int, float]]) -> None:
    chart = draw("loss", {"training": curve})
    assert chart
    points = chart.lines[0].points
    assert len(points) <= MAX_POINTS
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)


@given(st.lists(VALUES, min_size=301, max_size=900))
def test_a_thinned_curve_keeps_its_weighted_mean(values: list[float]) -> None:
    points, size = thin(list(enumerate(values)))
    last = len(values) - size * (len(points) - 1)
    weights = [size] * (len(points) - 1) + [last]
    mean = sum(weight * y for weight, (_, y) in zip(weights, points, strict=True)) / len(values)
    assert math.isclose(mean, sum(values) / len(values), rel_tol=1e-6, abs_tol=1e-3)


@given(st.text(), st.integers(1, 50))
def test_a_truncated_text_reports_the_omitted_characters(text: str, length: int) -> None:
    shown = cut(text, length)
    if len(text) <= length:
        assert shown == text
    else:
        assert shown == f"{text[:length]} … ({len(text) - length} more characters)"


IDS = st.dictionaries(st.integers(0, 30).map(str), st.sampled_from(["facts", "chats"]))


@given(IDS, IDS)
def test_every_example_is_added_removed_or_kept(before: dict[str, str], after: dict[str, str]) -> None:
    counts = count_rows(before, after).values()
    assert sum(one["removed"] + one["kept"] for one in counts) == len(before)
    assert sum(one["added"] + one["kept"] for one in counts) == len(after)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=5), st.lists(st.integers(0, 20), min_size=2, max_size=5)
)
def test_the_summary_names_a_benchmark_or_slice_that_got_worse(learned: list[int], kept: list[int]) -> None:
    """Of 20 questions of each slice, the candidate knows this many, and the base ten."""
    params = PARAMS.model_copy(update={"retention": {"kept": 0.5}, "min_items": 2})
    rows = [
        score(model, 20 * k + i, float(i < right), benchmark=name, slice=str(k))
        for name, counts in (("learned", learned), ("kept", kept))
        for k, count in enumerate(counts)
        for model, right in (("candidate", count), ("base", 10))
        for i in range(20)
    ]
    rows += [heldout(model, "t1", 10.0, 10) for model in ("candidate", "base")]
    gate = decide(rows, {"candidate": "c", "base": None}, (), params)
    evidence = Evidence(gate, compare(rows, "base", params), {}, params)
    text = summarize(evidence, Outcome(1, None, is_champion=False, waits=None))[1]
    worse = sum(count < 10 for count in (*learned, *kept))
    assert ("No slice is worse." in text) == (worse == 0)
    assert (f"slices, {worse} got worse: " in text) == (worse > 0)
    for name, counts in (("learned", learned), ("kept", kept)):
        assert (f"{name} (" in text) == (sum(counts) < 10 * len(counts))
    is_rejected = any(one["name"] == "slices" and one["verdict"] == "reject" for one in gate["checks"])
    assert ", significant)" in text or not is_rejected
