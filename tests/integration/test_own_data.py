"""From a file of one's own to trained rows, or to a verdict, without an edit by hand."""

import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from infra.cli import init, show
from nightshift.core.errors import DataError, StageError
from nightshift.core.files import jsonl, read_json, read_rows, write_json
from nightshift.core.paths import BASE, BASE_RECORD, CHAMPION_RECORD, PACKED
from nightshift.data.chat_templates import find_template
from nightshift.data.encode import load_encoder
from tests.helpers.checkouts import ROOT, Checkout, make_checkout
from tests.helpers.own_data import COUNT, LAYOUTS, write_rows

REFUSED = "kto"
Start = Callable[[str], str]
# Layout -> chat template of its base; SmolLM2's renders no tools, as the next test shows.
TEMPLATES = {"tools": "qwen2_5"}


@pytest.fixture
def start(in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return a function that runs `nightshift init` on a data set, with the stages in this process."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)

    def run_stage(_: Console, stage: str) -> None:
        if stage == "base":
            shutil.copytree(in_tmp / "base", BASE)
            write_json(BASE_RECORD, {"model": "base", "dtype": "float32", "files": {}})
        else:
            import_module(f"tasks.{stage}.__main__").main()

    monkeypatch.setattr(init, "run_stage", run_stage)
    monkeypatch.setattr(
        "tasks.snapshot.__main__.update_champion", lambda: write_json(CHAMPION_RECORD, {"version": None})
    )

    def start_with(layout: str) -> str:
        make_base(layout, tiny_base, in_tmp / "base")
        write_rows(layout, in_tmp / f"{layout}.jsonl")
        console = Console(width=200, force_terminal=False, record=True)
        init.init(console, [f"{layout}.jsonl"], "base", [])
        return console.export_text()

    return start_with


def make_base(layout: str, tiny_base: Path, target: Path) -> None:
    """Copy the small base, with a chat template that renders what the layout has."""
    shutil.copytree(tiny_base, target)
    if layout in TEMPLATES:
        shutil.copy(find_template(TEMPLATES[layout]), target / "chat_template.jinja")


def run(*stages: str) -> dict[str, Any]:
    """Run stages, and return the summary of the last one."""
    for stage in stages:
        folder = (ROOT / "tasks" / stage).is_dir()
        import_module(f"tasks.{stage}.__main__" if folder else f"tasks.{stage}").main()
    summary: dict[str, Any] = read_json(Path(f"data/{stages[-1]}/summary.json"))
    return summary


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {REFUSED}))
def test_every_row_of_a_data_set_is_trained_or_held_out(start: Start, layout: str) -> None:
    start(layout)
    split = run("dedupe", "split")
    assert split["rows_in"] == COUNT, read_json(Path("data/dedupe/summary.json"))
    assert min(split["rows_out_by_side"].values()) >= 8
    packed = run("augment", "decontaminate", "pack")
    assert (packed["rows_in"], packed["dropped"]) == (split["rows_out_by_side"]["train"], {})


def test_calls_are_refused_if_the_template_of_the_base_does_not_render_them(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEMPLATES, "tools", "chatml")
    with pytest.raises(DataError, match="template_fails"):
        start("tools")
    shutil.rmtree("base")
    shutil.rmtree(BASE)
    monkeypatch.delitem(TEMPLATES, "tools")
    with pytest.raises(DataError, match="template_drops_tools"):
        start("tools")


def test_rated_answers_are_refused_with_the_remedy(start: Start) -> None:
    before = Path("params.yaml").read_text(encoding="utf-8")
    with pytest.raises(DataError) as caught:
        start(REFUSED)
    assert "240 of 240 rows of all sources are dropped (preference 240)" in str(caught.value)
    assert "set `preference: chosen` to train on the chosen ones" in str(caught.value)
    assert Path("params.yaml").read_text(encoding="utf-8") == before


def test_what_is_chosen_and_what_is_not_read_is_printed(start: Start) -> None:
    printed = start("alpaca")
    assert "alpaca 240 none id_of_author" in " ".join(printed.split())
    assert "pack.max_length" in printed
    assert "the longest example has" in printed
    params = YAML(typ="safe").load(Path("params.yaml"))
    assert params["snapshot"]["sources"] == {"alpaca": {"path": "alpaca.jsonl", "mode": "replace"}}
    assert params["snapshot"]["benchmarks"] == {"countries": "package:countryinfo"}
    assert params["split"]["test_share"] == 0.3
    assert params["augment"]["sources"] == params["split"]["by_phrasing"] == []


def test_trained_tokens_are_marked(start: Start) -> None:
    start("code")
    run("dedupe", "split", "augment", "decontaminate", "pack")
    console = Console(width=200, force_terminal=False, record=True)
    show.show(console, "pack", 1)
    printed = console.export_text()
    assert "Write a function that returns" in printed.split(show.OPENING)[0]
    trained = printed.split(show.OPENING)[1].split(show.CLOSING)[0]
    assert "def f(" in trained
    assert "<|im_end|>" in trained
    console = Console(width=200, force_terminal=False, record=True)
    show.show(console, "ingest", 2)
    printed = console.export_text()
    assert printed.count("assistant: def f(") == 2
    assert '"completion": "def f(' in printed


@pytest.mark.long
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {REFUSED}))
def test_a_data_set_gets_a_verdict_in_two_commands(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str], layout: str
) -> None:
    checkout = Checkout(make_checkout(tmp_path / "checkout", tiny_base), clean_environment)
    shutil.copy(ROOT / "params.yaml", checkout.folder / "params.yaml")
    write_rows(layout, tmp_path / f"{layout}.jsonl")
    make_base(layout, tiny_base, tmp_path / "base")
    checkout.type("nightshift", "init", "--force", "--data", f"../{layout}.jsonl", "--model", "../base")
    checkout.type("dvc", "repro", "gate")
    gate = read_json(checkout.folder / "data/gate/gate.json")
    assert gate["gain"]["unit"] == "nats per token"
    assert gate["verdict"] in ("promote", "hold")
    assert gate["loss"] < gate["reference_loss"]


@pytest.mark.usefixtures("start")
def test_a_base_without_a_chat_template_gets_a_prompt_format(
    in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shutil.copytree(tiny_base, in_tmp / "plain")
    (plain / "chat_template.jinja").unlink()

    def run_stage(_: Console, stage: str) -> None:
        import_module("tasks.base" if stage == "base" else f"tasks.{stage}.__main__").main()

    monkeypatch.setattr(init, "run_stage", run_stage)
    rows = [{"instruction": f"Add one to {i}.", "input": f"{i}", "output": f"{i + 1}."} for i in range(60)]
    (in_tmp / "sums.jsonl").write_text(jsonl(rows))
    console = Console(width=200, force_terminal=False, record=True)
    init.init(console, ["sums.jsonl"], str(plain), [])
    assert "base.chat_template" in console.export_text()
    run("dedupe", "split", "augment", "decontaminate", "pack")
    row = read_rows(PACKED)[0]
    text = load_encoder(BASE).tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    assert text.startswith("Below is an instruction that describes a task, paired with an input that")
    assert re.search(
        r"### Instruction:\nAdd one to (\d+)\.\n\n### Input:\n\1\n\n### Response:\n\d+\.<\|im_end\|>", text
    )


def test_a_failed_stage_leaves_the_parameters_as_they_were(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Console, stage: str) -> None:
        raise StageError(f"{stage} failed")

    monkeypatch.setattr(init, "run_stage", fail)
    before = Path("params.yaml").read_text(encoding="utf-8")
    with pytest.raises(StageError, match="snapshot failed"):
        start("alpaca")
    assert Path("params.yaml").read_text(encoding="utf-8") == before
