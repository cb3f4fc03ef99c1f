"""A training starts from the champion's weights, through the real launcher, and resumes exactly."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from nightshift.core.files import read_json, tree_digest, write_json
from nightshift.registry.bases import base_digest
from nightshift.registry.start import Start
from tests.helpers.cells import load_plain, plain_loss
from tests.helpers.sft import history, make_folder, run_sft, start_sft
from tests.integration.test_training_faults import PACKED, STEPS, ranks, wait_for_line

MODEL, START = Path("data/sft/model"), Path("data/start")
CHAMPIONS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"adapter": None, "learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def champions(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Callable[[str], Path]:
    """Return a function that trains an adapter, or full weights, from the base, once."""
    folder = make_folder(tmp_path_factory.mktemp("champions"), tiny_base, PACKED)

    def train(name: str) -> Path:
        kept = folder / "champions" / name
        if not kept.exists():
            done = run_sft(folder, clean_environment, name, **CHAMPIONS[name])
            assert done.returncode == 0, done.stdout
            shutil.copytree(folder / MODEL, kept)
        return kept

    return train


@pytest.fixture
def start_at(in_tmp: Path, tiny_base: Path, champions: Callable[[str], Path]) -> Callable[..., Path]:
    """Return a function that makes a folder whose training starts from a version."""

    def start(champion: str, base: str = base_digest({})) -> Path:
        folder = make_folder(in_tmp, tiny_base, PACKED)
        shutil.copytree(champions(champion), folder / START / "model")
        found = Start(2, tree_digest(folder / START / "model"), base, "package:first")
        write_json(folder / START / "start.json", asdict(found))
        return folder

    return start


@pytest.mark.parametrize(
    ("champion", "strategy"),
    [
        ("lora", "single"),
        ("full", "single"),
        *(pytest.param("lora", name, marks=pytest.mark.long) for name in ("zero2", "zero3", "fsdp2")),
        *(pytest.param("full", name, marks=pytest.mark.long) for name in ("zero3", "fsdp2")),
    ],
)
def test_the_first_loss_is_that_of_the_champion(
    start_at: Callable[..., Path],
    tiny_base: Path,
    clean_environment: dict[str, str],
    champion: str,
    strategy: str,
) -> None:
    folder = start_at(champion)
    changes = {**CHAMPIONS[champion], "start_from": "champion", "strategy": strategy}
    done = run_sft(folder, clean_environment, "state", **changes)
    assert done.returncode == 0, done.stdout
    assert "training starts from version 2, whose weights are trained further" in done.stdout
    losses = history(folder, "state")
    assert losses[0] == pytest.approx(plain_loss(load_plain(tiny_base, folder / START / "model")), rel=1e-5)
    assert losses[0] < plain_loss(AutoModelForCausalLM.from_pretrained(tiny_base)) - 0.01
    assert losses[-1] < losses[0]
    effective = read_json(folder / "data/sft/effective.json")
    assert effective["start_from"] == {"requested": "champion", "effective": "champion"}
    assert effective["start"]["version"] == 2


def test_on_another_base_training_starts_from_the_base_and_says_so(
    start_at: Callable[..., Path], tiny_base: Path, clean_environment: dict[str, str]
) -> None:
    folder = start_at("lora", base="b" * 32)
    # Its rank does not matter then.
    done = run_sft(folder, clean_environment, "state", start_from="champion", lora_r=4)
    assert done.returncode == 0, done.stdout
    reason = f"version 2 was trained on another base: package:first, digest {'b' * 32}"
    assert f"training starts from the base: {reason}" in done.stdout
    expected = plain_loss(AutoModelForCausalLM.from_pretrained(tiny_base))
    assert history(folder, "state")[0] == pytest.approx(expected, rel=1e-5)
    effective = read_json(folder / "data/sft/effective.json")
    assert effective["start_from"] == {"requested": "champion", "effective": "base"}
    assert effective["start"]["reason"] == reason


def test_a_killed_training_from_the_champion_resumes_exactly(
    start_at: Callable[..., Path], clean_environment: dict[str, str]
) -> None:
    folder, steps = start_at("lora"), {**STEPS, "start_from": "champion"}
    done = run_sft(folder, clean_environment, "undisturbed", **steps)
    assert done.returncode == 0, done.stdout
    undisturbed, losses = tree_digest(folder / MODEL), history(folder, "undisturbed")
    process = start_sft(folder, clean_environment, "killed", **steps)
    wait_for_line(process, "step 7/12")
    ranks(process)[0].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    done = run_sft(folder, clean_environment, "killed", **steps)
    assert done.returncode == 0, done.stdout
    assert "resuming from checkpoint-" in done.stdout
    assert tree_digest(folder / MODEL) == undisturbed
    assert history(folder, "killed") == losses


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lora_r": 4}, "sft.lora_r is 4, but version 2, from which training starts"),
        ({"adapter": None}, "sft.adapter is null, but version 2, from which training starts"),
        (
            {"lora_target_modules": ["q_proj"]},
            "sft.lora_target_modules is ['q_proj'], but version 2, from which training starts",
        ),
    ],
)
def test_an_adapter_of_another_shape_is_refused_before_anything_is_launched(
    start_at: Callable[..., Path], clean_environment: dict[str, str], changes: dict[str, Any], problem: str
) -> None:
    folder = start_at("lora")
    done = run_sft(folder, clean_environment, "state", start_from="champion", **changes)
    assert done.returncode == 2, done.stdout
    assert problem in done.stdout
    assert not (folder / "state" / "checkpoints").exists()
