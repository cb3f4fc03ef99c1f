"""Preference tuning: off by default, proven before step 1, and resumed exactly."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.config import load_params
from nightshift.core.errors import ConfigError, DataError, StageError
from nightshift.core.files import read_json, tree_digest, write_rows
from nightshift.core.trained import describe_tuning, trained_model
from nightshift.data.schemas import PLACED_PREFERENCES
from tasks.prefer import PreferParams
from tasks.prefer import __main__ as stage
from tasks.prefer.job import training_params
from tasks.sft import SftParams
from tests.helpers.checkouts import ROOT
from tests.helpers.prefer import comparison, make_preferences, make_start, prefer_section, write_params
from tests.helpers.sft import sft_params

HELD_OUT = {"dpo": 5, "kto": 10}
# Twelve steps of two ranks: of 8 pairs, or of 16 answers.
LONG = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 2, "max_steps": 12}
EPOCHS = {"dpo": 6, "kto": 3}


def start_stage(folder: Path, environment: dict[str, str], state: str) -> subprocess.Popen[str]:
    """Start the stage as a program with its own state."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.prefer"],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "NIGHTSHIFT_HOME": str(folder / state)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_without_a_method_the_model_of_sft_is_the_result(in_tmp: Path) -> None:
    write_params(in_tmp, method=None)
    stage.main()
    assert read_json(Path("data/prefer/model/off.json")) == {"method": None}
    assert trained_model() == Path("data/sft/model")
    assert describe_tuning() is None
    assert read_json(Path("data/prefer/summary.json"))["rows_in"] == 0


@pytest.mark.parametrize(("method", "first", "rows"), [("kto", 0.5, 16), ("dpo", math.log(2), 8)])
def test_a_killed_run_resumes_exactly_and_ends_with_a_tuned_model(
    tmp_path: Path,
    tiny_base: Path,
    clean_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    first: float,
    rows: int,
) -> None:
    make_preferences(tmp_path, tiny_base)
    start = tree_digest(make_start(tmp_path))
    write_params(
        tmp_path,
        {"strategy": "zero2", "num_processes": 2},
        method=method,
        **LONG,
        num_train_epochs=EPOCHS[method],
    )
    process = start_stage(tmp_path, clean_environment, "killed")
    assert process.stdout
    before = []
    for line in process.stdout:
        before.append(line)
        if "step 2/12" in line:
            os.kill(process.pid, signal.SIGTERM)
    output = "".join(before)
    assert process.wait(timeout=60) != 0, output
    assert "prefer: received SIGTERM" in output
    assert not (tmp_path / "data/prefer/record/prefer.json").exists()
    digests = []
    for state in ("killed", "undisturbed"):
        output, _ = start_stage(tmp_path, clean_environment, state).communicate(timeout=300)
        assert ("resuming from checkpoint-" in output) == (state == "killed"), output
        digests.append(tree_digest(tmp_path / "data/prefer/model"))
        tested = read_json(tmp_path / "data/prefer/record/selftest.json")
        assert tested["loss"]["found"] == pytest.approx(first, abs=1e-6)
        assert tested["gradients"]["weights_reached"] == tested["start"]["weights"] == 28
    assert digests[0] == digests[1] != start
    record = read_json(tmp_path / "data/prefer/record/prefer.json")
    assert (record["method"], record["rows"], record["steps"]) == (method, rows, 12)
    assert record["held_out"]["rows"] == HELD_OUT[method]
    assert record["held_out"]["eval_rewards/margins"] > 0
    plan = read_json(tmp_path / "data/prefer/record/plan.json")
    assert (plan["steps"], plan["fillers"], len(plan["order"])) == (12, 0, 48)
    monkeypatch.chdir(tmp_path)
    assert trained_model() == Path("data/prefer/model")
    assert f"Tuned by {method.upper()} (beta 0.1) on {rows} " in str(describe_tuning())
    # Checkpoints and rows are gone, and the same run is not computed again.
    output, _ = start_stage(tmp_path, clean_environment, "killed").communicate(timeout=300)
    assert "step 1/12" not in output
    assert tree_digest(tmp_path / "data/prefer/model") == digests[0]


@pytest.fixture
def build(in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that builds the trainer, with its proofs, in this process."""
    from transformers import set_seed

    from tasks.prefer.proof import Proof
    from tasks.prefer.rows import write_comparisons
    from tasks.prefer.worker import build_trainer
    from tasks.sft.machine import probe_machine

    make_preferences(in_tmp, tiny_base)
    monkeypatch.setattr("tasks.prefer.__main__.probe_in_subprocess", probe_machine)

    def build_one(adapter: str | None = "lora", **changes: Any) -> Any:
        make_start(in_tmp, adapter=adapter)
        write_params(in_tmp, {"adapter": adapter}, **changes)
        prefer = load_params(PreferParams, "prefer")
        sides = stage.read_sides(prefer)
        job = stage.build_job(prefer, load_params(SftParams, "sft"), sides)
        (job.folder / "output").mkdir(parents=True, exist_ok=True)
        write_comparisons(job.rows, sides["train"])
        assert job.eval_rows
        write_comparisons(job.eval_rows, sides["validation"])
        set_seed(0)
        proof = Proof(job)
        trainer = build_trainer(job, [proof])
        proof.trainer = trainer
        return trainer

    return build_one


@pytest.mark.parametrize(
    ("method", "adapter", "loss_type", "first"),
    [
        ("dpo", "lora", "sigmoid", math.log(2)),
        ("dpo", None, "sigmoid", math.log(2)),
        ("dpo", "lora", "ipo", 25.0),
        ("kto", "lora", "sigmoid", 0.5),
        ("kto", None, "sigmoid", 0.5),
    ],
)
def test_the_first_loss_is_known_and_the_second_is_lower(
    build: Callable[..., Any], method: str, adapter: str | None, loss_type: str, first: float
) -> None:
    trainer = build(adapter, method=method, loss_type=loss_type)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert losses[1] < losses[0]
    tested = read_json(trainer.job.folder / "output" / "selftest.json")
    assert tested["reference"]["nats_per_token"] < 1e-5
    assert tested["saving"]["proven"]
    held_out = read_json(trainer.job.folder / "output" / "preference.json")
    assert held_out["rows"] == HELD_OUT[method]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_trainer_ends_with_the_same_weights(build: Callable[..., Any], method: str) -> None:
    found = []
    for resume in (None, "checkpoint-1"):
        trainer = build(method=method, max_steps=2)
        folder = trainer.job.folder
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
        found.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert all(bool((weight == found[1][name]).all()) for name, weight in found[0].items())
    # The model is no longer its reference, which is therefore read.
    assert (folder / "reference.safetensors").is_file()
    (folder / "reference.safetensors").unlink()
    with pytest.raises(StageError, match="not found, but training resumes from step 1"):
        build(method=method, max_steps=2).train(resume_from_checkpoint=str(folder / "checkpoint-1"))


def test_planted_faults_are_found(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.prefer import proof
    from tasks.prefer.trainer import Tuner

    trainer = build()
    trainer.model_wrapped = trainer.model
    trainer.prepare_reference()
    pairs = [trainer.rows[0], trainer.rows[1]]
    proof.check_loss(trainer, trainer.job, pairs)
    proof.check_reference(trainer, trainer.job)
    right = trainer.reference["train"]
    # The log-probabilities of other rows.
    trainer.reference["train"] = right.roll(1, dims=0)
    with pytest.raises(StageError, match="log-probabilities of the reference differ"):
        proof.check_reference(trainer, trainer.job)
    with pytest.raises(StageError, match=r"the first loss is .*, but 0\.693147"):
        proof.check_loss(trainer, trainer.job, pairs)
    # Both answers without their first token.
    trainer.reference["train"] = right
    real = Tuner.log_probabilities
    monkeypatch.setattr(
        Tuner,
        "log_probabilities",
        lambda self, model, inputs, _prefix: real(
            self,
            model,
            {
                **inputs,
                "completion_mask": inputs["completion_mask"].roll(1, dims=1) & inputs["completion_mask"],
            },
        ),
    )
    trainer.reference["train"] = trainer.measure_all(trainer.rows)
    with pytest.raises(StageError, match="nats per token"):
        proof.check_reference(trainer, trainer.job)


def test_a_start_that_is_not_the_model_of_sft_is_found(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.prefer.worker.set_peft_model_state_dict", lambda *_: None)
    with pytest.raises(StageError, match="not that of sft: 14 of 28 weights"):
        build().train()


def test_swapped_answers_swap_their_log_probabilities(build: Callable[..., Any]) -> None:
    trainer = build()
    trainer.model_wrapped = trainer.model
    rows = list(trainer.rows)
    swapped = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    found, mirrored = trainer.measure_all(rows), trainer.measure_all(swapped)
    assert (found - mirrored.flip(1)).abs().max() < 1e-4
    assert (found[:-1, 0] - found[:-1, 1]).abs().min() > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "qlora"}, "sft.adapter=qlora is not supported; set lora"),
        ({"strategy": "zero3"}, "sft.strategy=zero3 is not supported; set zero2 or ddp"),
        ({"torch_compile": True}, "sft.torch_compile=True is not supported; set it to false"),
    ],
)
def test_what_is_not_proven_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_params(sft_params(**changes), PreferParams(**prefer_section()))


def test_data_without_pairs_is_refused(in_tmp: Path, tiny_base: Path) -> None:
    make_preferences(in_tmp, tiny_base)
    rows = [comparison(i, chosen=None, example_id=None) for i in range(3)]
    write_rows(Path("data/decontaminate/preferences.parquet"), rows, PLACED_PREFERENCES)
    with pytest.raises(DataError, match=r"no pair of a chosen and a rejected .*'unpaired': 3"):
        stage.read_sides(PreferParams(**prefer_section()))
