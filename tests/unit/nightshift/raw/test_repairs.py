"""Repairs are counted with an example; without them, no character changes."""

from nightshift.raw.repairs import arrange, cut, repair
from nightshift.raw.turns import Call, Conversation, Turn

MOJIBAKE = "Caf\u00c3\u00a9"


def test_mojibake_is_repaired_only_if_asked_for() -> None:
    text = Conversation([Turn("user", MOJIBAKE)])
    assert repair(text) == text
    assert repair(text, fix_encoding=True).turns == [Turn("user", "Café")]


def test_line_ends_are_counted_at_their_first_place() -> None:
    found = repair(Conversation([Turn("user", "a\r\nb"), Turn("assistant", "c\r\nd")]))
    assert [turn.content for turn in found.turns] == ["a\nb", "c\nd"]
    assert found.changes == {"line_ends": ("a\r\nb", "a\nb")}


def test_turns_of_one_speaker_are_joined_but_not_if_only_one_is_trained() -> None:
    call, other = Call("f", {}), Call("g", {})
    turns = [
        Turn("system", "s"),
        Turn("system", "t"),
        Turn("user", "a"),
        Turn("assistant", "b"),
        Turn("assistant", "", (call,)),
        Turn("assistant", "", (other,)),
        Turn("tool", "1"),
        Turn("tool", "2"),
        Turn("assistant", "c", train=False),
        Turn("assistant", "d"),
    ]
    found = arrange(Conversation(turns))
    assert found.turns == [
        Turn("system", "s\n\nt"),
        Turn("user", "a"),
        Turn("assistant", "b", (call, other)),
        *turns[6:],
    ]
    assert list(found.changes) == ["joined_turns"]


def test_an_empty_system_turn_is_removed() -> None:
    found = arrange(Conversation([Turn("system", " \n"), Turn("user", "a"), Turn("assistant", "b")]))
    assert [turn.role for turn in found.turns] == ["user", "assistant"]
    assert found.changes == {"empty_system": ("system, user, assistant", "user, assistant")}


def test_an_example_shows_the_place_that_changed() -> None:
    assert cut("a" * 100 + "b" * 100, "a" * 100 + "c") == ("…" + "a" * 20 + "b" * 59, "…" + "a" * 20 + "c")
