"""Properties of the report's charts and comparisons."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tasks.report.__main__ import cut
from tasks.report.changes import count_rows
from tasks.report.chart import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, draw, thin, ticks

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
