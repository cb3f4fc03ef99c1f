"""Which model training results in, and how preference tuning is described."""

from pathlib import Path
from typing import Any

import pytest

from nightshift.core.files import write_json, write_text
from nightshift.core.trained import describe_tuning, read_tuning, trained_model

RECORD = {"method": "dpo", "beta": 0.1, "loss_type": "sigmoid", "steps": 9, "rows": 1200}
HELD_OUT = {"rows": 50, "eval_rewards/accuracies": 0.82, "eval_rewards/margins": 0.4321}


def test_the_model_of_sft_is_the_result_unless_a_tuned_one_has_weights(in_tmp: Path) -> None:
    assert trained_model() == Path("data/sft/model")
    write_json(Path("data/prefer/model/off.json"), {"method": None})
    assert trained_model() == Path("data/sft/model")
    write_text(Path("other/data/prefer/model/adapter_model.safetensors"), "")
    assert trained_model(Path("other")) == Path("other/data/prefer/model")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"method": None}, None),
        ({"held_out": {}}, "Tuned by DPO (beta 0.1) on 1,200 pairs of answers."),
        (
            {"held_out": HELD_OUT},
            "Tuned by DPO (beta 0.1) on 1,200 pairs of answers; on 50 held-out ones: accuracy 0.820, "
            "margin 0.432.",
        ),
        (
            {"method": "kto", "held_out": {"rows": 50, "eval_rewards/chosen": 0.1}},
            "Tuned by KTO (beta 0.1) on 1,200 answers.",
        ),
    ],
)
def test_the_description_has_the_figures_that_there_are(
    in_tmp: Path, changes: dict[str, Any], text: str | None
) -> None:
    assert describe_tuning() is None
    write_json(Path("data/prefer/record/prefer.json"), RECORD | changes)
    assert describe_tuning() == text
    assert (read_tuning() is None) == (text is None)
