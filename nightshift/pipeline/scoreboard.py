"""Results of the last run for the terminal, stored as a JSON file."""

from pathlib import Path
from typing import Any

from nightshift.core.files import read_json, write_figures
from nightshift.core.paths import CHAMPION_RECORD, DATA, GATE, METRICS, OUTCOME, TRAINING_RUN, VERSION
from nightshift.core.state import state_dir
from nightshift.data.gain import describe_loss_change, is_loss_gain
from nightshift.pipeline.graph import stage_order
from nightshift.pipeline.outcome import promote_command


def scoreboard_file() -> Path:
    """Return the path of the last run's scoreboard."""
    return state_dir() / "scoreboard.json"


def collect() -> dict[str, Any]:
    """Collect the results of the run from the files of its stages, and write the scoreboard."""
    gate = read_json(GATE)
    trained = read_json(TRAINING_RUN)
    board = {
        "gate": gate,
        "metrics": read_json(METRICS),
        "tokens_per_second": trained["tokens_per_second"],
        "cpu_shares": trained["cpu_shares"],
        "training_run": trained["run_id"],
        "version": read_json(VERSION)["version"],
        **read_json(OUTCOME),
        "champion": read_json(CHAMPION_RECORD)["version"],
        "dropped": collect_dropped(),
    }
    write_figures(scoreboard_file(), board)
    return board


def collect_dropped() -> dict[str, dict[str, Any]]:
    """Return stage -> rows in and rows dropped by reason, for stages with drops, in graph order."""
    summaries = {stage: read_json(DATA / stage / "summary.json") for stage in stage_order()}
    return {
        stage: {"rows_in": summary["rows_in"], "dropped": summary["dropped"]}
        for stage, summary in summaries.items()
        if summary["dropped"]
    }


def format_rows(board: dict[str, Any]) -> list[tuple[str, str]]:
    """Format the scoreboard as (label, value) rows."""
    # A model without anything to be scored on is missing.
    candidate, base = (board["metrics"].get(model, {}) for model in ("candidate", "base"))
    gate = board["gate"]
    champion = board["version"] if board["promoted"] else board["champion"]
    table = []
    baseline = board["metrics"].get("retrieval", {})
    for benchmark in sorted(candidate.keys() - {"test"}):
        ours, theirs, found = candidate[benchmark], base[benchmark], baseline.get(benchmark, {})
        table += [
            (f"{benchmark}: base", f"{format_percent(theirs['accuracy'])} of {theirs['items']} questions"),
            (f"{benchmark}: new model", format_percent(ours["accuracy"])),
        ]
        for label, value in (("base with retrieval", found.get("accuracy")), ("chance", ours["chance"])):
            if value is not None:
                table.append((f"{benchmark}: {label}", format_percent(value)))
    if gate.get("gain"):
        table.append((f"gain over the {gate['reference']}", describe_gain(gate)))
    before, after = (format_loss(model.get("test", {}).get("loss")) for model in (base, candidate))
    table += [
        ("loss on the test set", f"base {before} -> new model {after}"),
        ("training speed", describe_speed(board)),
        ("gate", f"{gate['verdict']}: {gate['reason']}"),
        ("registered version", f"{board['version']}"),
        ("champion", f"version {champion}" if champion else "none yet"),
    ]
    if board["waits"]:
        table.append(("awaiting approval", f"{board['waits']}; {promote_command(board['version'])}"))
    for stage, found in board["dropped"].items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found["dropped"].items())
        count = sum(found["dropped"].values())
        table.append((f"dropped by {stage}", f"{count:,} of {found['rows_in']:,} rows: {reasons}"))
    return table


def describe_speed(board: dict[str, Any]) -> str:
    """Format the speed of training, and how much of a CPU the slowest rank had.

    Example:
        >>> describe_speed({"tokens_per_second": 349.6, "cpu_shares": [0.97, 0.52]})
        '350 tokens/s, on a CPU at least 52% of the time'
    """
    speed = f"{board['tokens_per_second']:.0f} tokens/s"
    # The file of an earlier version has no shares.
    shares = board.get("cpu_shares")
    return f"{speed}, on a CPU at least {min(shares):.0%} of the time" if shares else speed


def describe_gain(gate: dict[str, Any]) -> str:
    """Describe the gain of a gate.json, in points of accuracy or as a lower loss."""
    if is_loss_gain(gate):
        return describe_loss_change(gate)
    gain = gate["gain"]
    mean, low, high = (format_difference(gain[key]) for key in ("mean", "low", "high"))
    return (
        f"{mean} points on {gain['items']:,} questions of {', '.join(gain['benchmarks'])}, "
        f"{100 * (1 - gain['alpha']):g}% interval {low} to {high}"
    )


def format_percent(value: float | None) -> str:
    """Format a share as a percentage; None gives "none"."""
    return "none" if value is None else f"{value:.1%}"


def format_difference(share: float | None) -> str:
    """Format a difference of accuracies in percentage points with its sign; None gives "none"."""
    return "none" if share is None else f"{100 * share:+.1f}"


def format_loss(value: float | None) -> str:
    """Format a loss; see `format_percent`."""
    return "none" if value is None else f"{value:.3f}"
