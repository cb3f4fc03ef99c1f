"""All new examples are trained, and a share of those that the start of the training was trained on."""

from typing import Any

from nightshift.data.replay import Replay, is_replayed


def row(name: str, parent: str | None = None, source: str = "chats") -> dict[str, Any]:
    """Return the columns that are read."""
    return {"id": name, "parent_id": parent, "source": source}


def test_new_examples_are_all_trained_and_older_ones_by_share() -> None:
    rows = [*enumerate(row(str(number)) for number in range(1000))]
    replay = Replay(0.1, 0, {str(number) for number in range(900)})
    drawn = [number for number, _ in replay.draw(rows)]
    assert drawn[-100:] == list(range(900, 1000))
    assert 60 <= len(drawn) - 100 <= 120
    assert replay.replayed == {"chats": len(drawn) - 100}
    assert replay.left_out == {"chats": 1000 - len(drawn)}


def test_without_a_trained_version_nothing_is_left_out() -> None:
    rows = [(3, row("a")), (5, row("b"))]
    replay = Replay()
    assert list(replay.draw(rows)) == rows
    assert (replay.replayed, replay.left_out) == ({}, {})


def test_the_extreme_shares_train_all_and_none() -> None:
    rows = [*enumerate(row(str(number)) for number in range(50))]
    trained = {str(number) for number in range(50)}
    assert list(Replay(1.0, 0, trained).draw(rows)) == rows
    assert list(Replay(0.0, 0, trained).draw(rows)) == []


def test_a_new_paraphrase_of_a_trained_example_is_not_new() -> None:
    replay = Replay(0.0, 0, {"a", "d"})
    rows = [*enumerate([row("b", "a"), row("c", "x"), row("d", "y", "facts")])]
    assert [one["id"] for _, one in replay.draw(rows)] == ["c"]
    assert replay.left_out == {"chats": 1, "facts": 1}


def test_another_seed_chooses_other_examples() -> None:
    names = [str(number) for number in range(1000)]
    first, second = ({name for name in names if is_replayed(name, 0.5, seed)} for seed in (0, 1))
    assert 150 <= len(first & second) <= 350
