"""What ingest makes of the layouts in use, as docs/data.md says: trained as meant, or refused with a reason.

`python -m tests.integration.test_layouts` writes the table in docs/data.md anew.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.errors import DataError
from nightshift.data.encode import IGNORED, Encoded, Encoder, Fault, encode_batch, load_encoder
from nightshift.raw.checks import compile_special_tokens
from nightshift.raw.faults import RowError
from nightshift.raw.formats import shard_suffix
from nightshift.raw.options import SourceOptions, write_options
from nightshift.raw.streams import Limits
from tasks.ingest.rows import Outcome, Privacy, Rules
from tests.helpers.byte_base import SPECIAL, make_byte_base
from tests.helpers.checkouts import ROOT
from tests.helpers.layouts import LAYOUTS, Layout
from tests.helpers.outcomes import convert_shards

PAGE = ROOT / "docs" / "data.md"
TABLE = re.compile(r"(?<=<!-- layouts -->\n).*(?=<!-- /layouts -->)", re.DOTALL)
LIMITS = Limits(row_bytes=10**6, shard_bytes=10**9, ratio=200)
RULES = Rules(compile_special_tokens(SPECIAL), Privacy("report"))


def read(layout: Layout, raw: Path, encoder: Encoder) -> str:
    """Return what ingest makes of a file, row by row."""
    suffix = shard_suffix(layout.file)
    if suffix is None:
        return "refused: no format that is read"
    path = raw / "mine" / f"000001{suffix}"
    path.parent.mkdir(parents=True)
    path.write_bytes(layout.content)
    write_options(raw, {"mine": SourceOptions(**layout.options)})
    try:
        found = [describe(outcome, encoder) for outcome in convert_shards(raw, LIMITS, RULES)]
    except DataError as err:
        return f"stopped: {str(err).replace(f'{raw}/mine', 'mine')}"
    return "; ".join(found)


def describe(outcome: Outcome, encoder: Encoder) -> str:
    """Return the turns of a row, in bold what is trained, and what was changed or not read; or the fault.

    A bad answer, from which only preference tuning learns, is struck through.
    """
    compared = outcome.compared or {}
    bad = compared.get("rejected")
    if bad and isinstance(outcome.result, RowError):
        turns = [f"{turn['role']} {quote(turn['content'])}" for turn in compared["prompt"]]
        return f"compared: {', '.join([*turns, strike(bad)])}"
    if isinstance(outcome.result, RowError):
        detail = f" ({outcome.result.detail})" if outcome.result.detail else ""
        return f"refused: {outcome.result.reason}{detail}"
    messages, tools = outcome.result["messages"], outcome.result["tools"]
    (found,) = encode_batch([(messages, tools)], encoder)
    if isinstance(found, Fault):
        return f"refused: {found.reason}"
    (encoded,) = found
    trained = iter(labelled(encoded, encoder))
    turns = [f"tools {quote(tools)}"] if tools else []
    for message in messages:
        has_labels = message["role"] in ("assistant", "text") and message.get("train") is not False
        text = next(trained) if has_labels else message["content"]
        shown = f"{message['role']} {quote(text)}"
        turns.append(f"**{shown}**" if has_labels else shown)
    assert next(trained, None) is None
    turns += [strike(bad)] if bad else []
    more = [f"not read: {', '.join(sorted(outcome.ignored))}"] if outcome.ignored else []
    more += [f"repaired: {', '.join(sorted(outcome.repaired))}"] if outcome.repaired else []
    return "; ".join([f"trained: {', '.join(turns)}", *more])


def strike(answer: list[dict[str, Any]]) -> str:
    """Return a bad answer, struck through."""
    return f"~~{answer[0]['role']} {quote(answer[0]['content'])}~~"


def labelled(encoded: Encoded, encoder: Encoder) -> list[str]:
    """Return the texts that have labels, each up to its stop token."""
    texts: list[list[int]] = [[]]
    stop = encoder.tokenizer.token_to_id("<|im_end|>")
    for token in encoded.labels.tolist():
        if token in (IGNORED, stop):
            texts += [[]] if texts[-1] else []
        else:
            texts[-1].append(token)
    return [encoder.tokenizer.decode(ids) for ids in texts if ids]


def quote(text: str) -> str:
    """Return a text as code, with all its spaces."""
    return f"`{text}`" if text == text.strip() else f'`"{text}"`'


def write_table(folder: Path) -> str:
    """Return the table of all layouts as Markdown."""
    encoder = load_encoder(make_byte_base(folder / "base"))
    lines = []
    for title, layouts in LAYOUTS.items():
        lines += [f"### {title}", "", "| layout | file | result |", "|---|---|---|"]
        for number, layout in enumerate(layouts):
            options = f", `{json.dumps(layout.options)}`" if layout.options else ""
            result = read(layout, folder / f"{title}-{number}", encoder)
            cells = (f"{layout.name}{options}", f"`{layout.file}`", result)
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "⏎") for cell in cells) + " |"
            )
        lines.append("")
    return "\n".join(["", *lines, ""])


def test_the_documentation_says_what_becomes_of_every_layout(tmp_path: Path) -> None:
    found = TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found
    assert found[0] == write_table(tmp_path)
    assert sum(map(len, LAYOUTS.values())) >= 60


@pytest.mark.parametrize(
    "layout", [one for group in LAYOUTS.values() for one in group], ids=lambda one: one.name
)
def test_the_names_of_the_layouts_are_unique(layout: Layout) -> None:
    same = [one for group in LAYOUTS.values() for one in group if (one.name, one.file) == layout[:2]]
    assert len(same) == 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        new = write_table(Path(temporary))
    PAGE.write_text(TABLE.sub(lambda _: new, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
