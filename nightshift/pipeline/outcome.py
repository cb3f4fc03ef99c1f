"""How a run of the pipeline ended: the name of its final state in Prefect, and one sentence."""

from collections.abc import Mapping
from typing import Any

# Verdict of the gate -> name of the final state.
STATES = {"promote": "Promoted", "hold": "Held", "reject": "Rejected"}
# The training is not worth the night; a newer night is due.
SKIPPED, MISSED = "Skipped", "Missed"
OUTCOMES = ("WaitingForApproval", "NothingNew", SKIPPED, MISSED, *STATES.values())


def describe_outcome(board: Mapping[str, Any], *, has_changed: bool, is_judged: bool) -> tuple[str, str]:
    """Return the name of the final state of a run, one of `OUTCOMES`, and its message.

    Args:
        board: Scoreboard of the run.
        has_changed: Whether any stage had new input.
        is_judged: Whether the gate came to a new decision.

    Example:
        >>> gate = {"verdict": "hold", "reason": "no gain"}
        >>> board = {"promoted": False, "waits": None, "version": 3, "champion": 2, "gate": gate}
        >>> describe_outcome(board, has_changed=True, is_judged=True)
        ('Held', 'version 3 is not promoted: no gain; version 2 remains the champion')
        >>> describe_outcome(board, has_changed=False, is_judged=False)
        ('NothingNew', 'no stage has new input; version 2 remains the champion')
        >>> describe_outcome(board, has_changed=True, is_judged=False)
        ('NothingNew', 'what is new does not change the model; version 2 remains the champion')
        >>> describe_outcome({**board, "promoted": True}, has_changed=False, is_judged=False)
        ('Promoted', 'version 3 is the champion: no gain')
    """
    gate, version, champion = board["gate"], board["version"], board["champion"]
    unchanged = f"version {champion} remains the champion" if champion else "there is no champion yet"
    # An interrupted night may be promoted by one without new input.
    if board["promoted"] and version != champion:
        return "Promoted", f"version {version} is the champion: {gate['reason']}"
    if board["waits"]:
        command = promote_command(version)
        return "WaitingForApproval", f"version {version} awaits `{command}`: {board['waits']}; {unchanged}"
    if not has_changed:
        return "NothingNew", f"no stage has new input; {unchanged}"
    # The night after a promotion compares the champion with itself.
    if not is_judged or version == champion:
        return "NothingNew", f"what is new does not change the model; {unchanged}"
    return STATES[gate["verdict"]], f"version {version} is not promoted: {gate['reason']}; {unchanged}"


def promote_command(version: int) -> str:
    """Return the command with which a person promotes a version."""
    return f"nightshift promote {version} --reason TEXT"
