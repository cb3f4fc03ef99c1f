"""When a stage has dropped too many rows."""

from collections import Counter
from pathlib import Path

import pytest

from nightshift.core.errors import DataError
from nightshift.data.drops import Drops, require_drop_rate


def check(read: dict[str, int], dropped: dict[str, dict[str, int]], limit: float = 0.5) -> None:
    """Check counts of read and dropped rows; rows dropped with reason `known` are harmless."""
    drops = Drops(Counter(read))
    for source, counts in dropped.items():
        for reason, count in counts.items():
            for number in range(count):
                drops.add(source, reason, f"{source}:{number}: {reason}")
    where = (Path("data/x/gone.parquet"), "x.max_drop_rate")
    require_drop_rate(drops, limit, where, "fix them", harmless=("known",))


def test_a_drop_rate_above_the_limit_is_an_error() -> None:
    check({"a": 40}, {"a": {"bad": 20}})
    with pytest.raises(DataError) as caught:
        check({"a": 40}, {"a": {"bad": 14, "worse": 7}})
    assert str(caught.value).splitlines() == [
        "data/x/gone.parquet: 21 of 40 rows of all sources are dropped (bad 14, worse 7), more than "
        "x.max_drop_rate=0.5; fix them, or raise the limit",
        *(f"  a:{number}: bad" for number in range(5)),
    ]


def test_each_source_above_the_limit_is_listed_with_some_rows() -> None:
    with pytest.raises(DataError) as caught:
        check({"a": 100, "b": 20, "c": 12}, {"a": {"bad": 30}, "b": {"bad": 15}, "c": {"bad": 12}})
    first, *shown = str(caught.value).splitlines()
    assert first.startswith(
        "data/x/gone.parquet: 15 of 20 rows of b are dropped (bad 15); "
        "12 of 12 rows of c are dropped (bad 12), more than "
    )
    assert shown == [f"  {source}:{number}: bad" for source in "bc" for number in range(5)]


def test_a_few_dropped_rows_are_accepted_unless_a_source_loses_all() -> None:
    check({"a": 100, "b": 10}, {"b": {"bad": 9}})
    check({"a": 3}, {"a": {"bad": 2}})
    with pytest.raises(DataError, match="10 of 11 rows of b"):
        check({"a": 100, "b": 11}, {"b": {"bad": 10}})
    with pytest.raises(DataError, match="2 of 2 rows of b"):
        check({"a": 100, "b": 2}, {"b": {"bad": 2}})


def test_harmless_rows_count_neither_as_read_nor_as_dropped() -> None:
    check({"a": 1000}, {"a": {"known": 960, "bad": 20}})
    check({"a": 1000}, {"a": {"known": 1000}})
    with pytest.raises(DataError, match=r"21 of 40 rows of all sources are dropped \(bad 21\)"):
        check({"a": 1000}, {"a": {"known": 960, "bad": 21}})


def test_a_limit_of_one_accepts_everything() -> None:
    check({"a": 20, "b": 20}, {"a": {"bad": 20}, "b": {"bad": 20}}, limit=1.0)
