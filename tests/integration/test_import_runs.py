"""Two examples of Axolotl, imported, are trained on the text that Axolotl would train, up to a version."""

import copy
import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from infra.cli.app import app
from nightshift.core.config import read_params
from nightshift.core.files import read_json, read_rows, write_json
from nightshift.core.paths import CHAMPION_RECORD, PACKED
from nightshift.pipeline.params_yaml import edit
from tests.helpers.checkouts import ROOT, Checkout, make_checkout
from tests.helpers.own_data import LAYOUTS, Words
from tests.helpers.plain_bases import make_base

EXAMPLES = {"phi": "axolotl-phi2-ft.yml", "llama": "axolotl-lora-8b.yml"}
ROWS = [
    {"instruction": "Name the capital of the country.", "input": "Norway", "output": "Oslo"},
    {"instruction": "Count to three.", "input": "", "output": "1, 2, 3"},
]
# Written by AlpacaPromptTokenizingStrategy and AlpacaPrompter of Axolotl 0.18.0 (src/axolotl/prompters.py and
# prompt_tokenizers.py) for ROWS with the tokenizer of the demo's base, without a beginning-of-sequence token:
# the ids, and how many of them are the prompt.
EXPECTED = [
    (
        [
            *(19798, 314, 354, 5785, 338, 6601, 253, 3856, 28, 20054, 351, 354, 3007, 338, 2433, 2030, 2468),
            *(30, 9517, 253, 2426, 338, 13674, 32873, 260, 3116, 30, 198, 198, 3757, 20880, 42, 198, 5820),
            *(260, 3575, 282, 260, 1798, 30, 198, 198, 3757, 18100, 42, 198, 27737, 2384, 198, 198, 3757),
            *(14212, 42, 198, 11062, 5365, 0),
        ],
        54,
    ),
    (
        [
            *(19798, 314, 354, 5785, 338, 6601, 253, 3856, 30, 9517, 253, 2426, 338, 13674, 32873, 260, 3116),
            *(30, 198, 198, 3757, 20880, 42, 198, 9825, 288, 1296, 30, 198, 198, 3757, 14212, 42, 198, 33),
            *(28, 216, 34, 28, 216, 35, 0),
        ],
        34,
    ),
]
# What a machine without a GPU cannot run, or a test need not.
OVERRIDES = {
    "base.dtype": "float32",
    "sft.attn_implementation": "auto",
    "sft.optim": "adamw_torch",
    "sft.precision": "fp32",
    "sft.strategy": "single",
    "split.validation_share": 0.2,
    "split.test_share": 0.3,
    "gate.min_items": 20,
    # Puts both ROWS into the training set.
    "split.seed": 1,
}


@pytest.fixture
def imported(in_tmp: Path, tokenizer: Any) -> Callable[[str, Path], None]:
    """Return a function that imports an example in a folder, with a local base and local rows."""

    def run(kind: str, folder: Path) -> None:
        make_base(kind, copy.deepcopy(tokenizer), folder / "plain")
        words = Words(0)
        rows = [*ROWS, *(LAYOUTS["alpaca"](words, number) for number in range(240))]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = yaml.safe_load((ROOT / "tests" / "examples" / EXAMPLES[kind]).read_text())
        config |= {"base_model": "./plain", "datasets": [{"path": "./rows.jsonl", "type": "alpaca"}]}
        (folder / "axolotl.yml").write_text(yaml.safe_dump(config))

    return run


def write_overrides(params: Path) -> None:
    params.write_text(edit(params.read_text(), OVERRIDES))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_trained_tokens_are_those_of_axolotl(
    imported: Callable[[str, Path], None], in_tmp: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, in_tmp / name)
    imported(kind, in_tmp)
    done = CliRunner().invoke(app, ["import", "axolotl.yml", "--write"])
    assert done.exit_code == 0, done.output
    write_overrides(Path("params.yaml"))
    monkeypatch.setattr(
        "tasks.snapshot.__main__.update_champion", lambda: write_json(CHAMPION_RECORD, {"version": None})
    )
    for stage in ("snapshot", "base", "ingest", "dedupe", "split", "augment", "decontaminate", "pack"):
        is_folder = (ROOT / "tasks" / stage).is_dir()
        import_module(f"tasks.{stage}.__main__" if is_folder else f"tasks.{stage}").main()
    begin = [1] if kind == "llama" else []
    packed = [(row["input_ids"], row["labels"]) for row in read_rows(PACKED)]
    for ids, prompt in EXPECTED:
        whole = begin + ids
        labels = [-100] * (len(begin) + prompt) + ids[prompt:]
        places = [(row, i) for row, _ in packed for i in range(len(row)) if row[i : i + len(whole)] == whole]
        assert len(places) == 1
        row, start = places[0]
        found = next(labels for ids, labels in packed if ids is row)
        assert found[start : start + len(whole)] == labels


@pytest.mark.long
@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_imported_example_becomes_a_version(
    imported: Callable[[str, Path], None],
    tmp_path: Path,
    tiny_base: Path,
    clean_environment: dict[str, str],
    kind: str,
) -> None:
    folder = make_checkout(tmp_path / "checkout", tiny_base)
    shutil.copy(ROOT / "params.yaml", folder / "params.yaml")
    imported(kind, folder)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    # The code of the checkout, not the installed one.
    more = {"MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(folder)}
    checkout = Checkout(folder, {**clean_environment, **more})
    checkout.type("nightshift", "import", "axolotl.yml", "--write")
    write_overrides(folder / "params.yaml")
    checkout.type("dvc", "repro", "gate")
    params = read_params(folder / "params.yaml")
    plan = read_json(folder / "data/sft/plan.json")
    assert params["sft"]["num_train_epochs"] == plan["order"].count(0) == 4
    assert read_json(folder / "data/gate/gate.json")["verdict"] in ("promote", "hold", "reject")
    checkout.type("python", "-m", "tasks.register")
    assert read_json(folder / "data/register/version.json")["version"] == 1
