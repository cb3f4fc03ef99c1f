"""The model card."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from nightshift.core.config import load_params
from nightshift.core.files import write_json, write_rows, write_text
from nightshift.registry import card
from tasks.gate import GateParams
from tests.helpers.checkouts import ROOT
from tests.helpers.gate import PARAMS

COMMIT = "0123456789" * 4


def score(model: str, benchmark: str, value: float | None, item: int) -> dict[str, Any]:
    status = "skipped" if value is None else "ok"
    return {"model": model, "benchmark": benchmark, "score": value, "item": item, "status": status}


@pytest.fixture
def folder(in_tmp: Path) -> Path:
    """Return a checkout after a gate that had nothing to compare."""
    write_text(Path("params.yaml"), (ROOT / "params.yaml").read_text(encoding="utf-8"))
    write_json(card.BASE_RECORD, {"model": f"hub:owner/name@{COMMIT}"})
    write_json(card.GATE, {"verdict": "hold", "reason": "the candidate is the champion"})
    return in_tmp


@pytest.mark.parametrize(
    ("adapter", "library"), [("lora", "peft"), ("qlora", "peft"), (None, "transformers")]
)
def test_the_card_has_the_metadata_of_the_hub(folder: Path, adapter: str | None, library: str) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["sft"]["adapter"] = adapter
    write_text(folder / "params.yaml", yaml.safe_dump(params))
    card.write_card(folder / "README.md", "facts", PARAMS)
    found = ModelCard.load(folder / "README.md")
    assert (found.data.base_model, found.data.library_name) == ("owner/name", library)
    assert found.data.tags == ["nightshift", "sft", adapter or "full-fine-tune"]
    assert found.data.pipeline_tag == "text-generation"
    assert f"`hub:owner/name@{COMMIT}`" in found.text
    assert "## Gate verdict: hold\n\nthe candidate is the champion" in found.text
    assert "The loss on held-out examples was not compared." in found.text


def test_a_loss_that_could_not_be_computed_is_reported_as_not_compared(folder: Path) -> None:
    compared = {"reference": "base", "loss": None, "reference_loss": 2.1}
    write_json(card.GATE, {"verdict": "error", "reason": "held-out loss: not a finite number", **compared})
    card.write_card(folder / "README.md", "facts", PARAMS)
    assert "The loss on held-out examples was not compared." in (folder / "README.md").read_text()


@pytest.mark.usefixtures("folder")
def test_scores_have_intervals_and_items_without_a_score_do_not_count() -> None:
    rows = [score("base", "facts", float(i < 9), i) for i in range(10)]
    rows += [score("base", "facts", None, 10), score("base", "test", 30.0, 0)]
    rows += [score("base", "f1", i / 10, i) for i in range(11)]
    f1, facts = card.score_models(rows, load_params(GateParams, "gate"))
    # Wilson's interval for 9 of 10.
    assert card.score_cells(facts) == ("facts", "base", "90.0%", "59.6% to 98.2%", "10")
    assert (f1["mean"], f1["n"]) == (pytest.approx(0.5), 11)
    assert 0.25 < f1["low"] < 0.4 < 0.6 < f1["high"] < 0.75


def test_equal_files_give_an_equal_card(folder: Path) -> None:
    write_rows(card.SCORES, [], card_schema())
    card.write_card(folder / "a.md", "facts", PARAMS)
    card.write_card(folder / "b.md", "facts", PARAMS)
    assert (folder / "a.md").read_bytes() == (folder / "b.md").read_bytes()


def card_schema() -> Any:
    from nightshift.data.schemas import ALL_SCORES

    return ALL_SCORES


def test_a_gain_on_the_test_set_is_described(folder: Path) -> None:
    gain = {"unit": "nats per token", "items": 120, "mean": 0.44, "low": 0.37, "high": 0.51, "alpha": 0.05}
    compared = {"reference": "base", "loss": 1.87, "reference_loss": 2.31, "gain": gain}
    write_json(card.GATE, {"verdict": "promote", "reason": "gain: better", "checks": [], **compared})
    card.write_card(folder / "README.md", "name", PARAMS)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        "No benchmark was scored.\n\nCompared with the base, the loss on 120 test examples fell from 2.310 "
        "to 1.870 nats per token (-19.0%, 95% interval -22.1% to -16.0%).\n"
    ) in text
