"""Faults injected during training: each ends with its exit code, and training resumes correctly."""

import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from nightshift.core.files import read_json, read_rows, tree_digest, write_rows
from nightshift.core.hardware import cpu_flags
from tasks.pack import ROWS
from tasks.sft import checkpoints, native
from tests.helpers import poisoned as poison
from tests.helpers import sft
from tests.helpers.processes import command_line
from tests.helpers.sft import history, make_folder, run_sft, start_sft

PACKED = ((0, 1), (2, 3), (4, 5), (6, 7))
# One row per step, a checkpoint every second step.
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 3,
    "save_steps": 2,
    "lora_dropout": 0.1,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return make_folder(tmp_path_factory.mktemp("faults"), tiny_base, PACKED)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, clean_environment: dict[str, str]) -> tuple[str, list[float]]:
    """Return the model digest and the losses of an uninterrupted training run."""
    done = run_sft(folder, clean_environment, "undisturbed", **STEPS)
    assert done.returncode == 0, done.stdout
    return tree_digest(folder / "data/sft/model"), history(folder, "undisturbed")


def training_folder(folder: Path, state: str) -> Path:
    (found,) = (folder / state / "checkpoints").iterdir()
    return found


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the training ended before {text!r}")


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the training processes."""
    below = psutil.Process(process.pid).children(recursive=True)
    commands = {process: command_line(process) for process in below}
    return [
        p for p, words in commands.items() if words[-3:-1] == ["-m", "tasks.sft.worker"] and "--" not in words
    ]


def require_exact_resume(
    folder: Path, environment: dict[str, str], state: str, undisturbed: tuple[str, list[float]]
) -> None:
    done = run_sft(folder, environment, state, **STEPS)
    assert done.returncode == 0, done.stdout
    assert "resuming from checkpoint-" in done.stdout
    assert tree_digest(folder / "data/sft/model") == undisturbed[0]


@pytest.mark.long
def test_kill_9_while_writing_a_checkpoint_resumes_from_the_previous_one(
    folder: Path, undisturbed: tuple[str, list[float]], clean_environment: dict[str, str]
) -> None:
    process = start_sft(folder, clean_environment, "killed-saving", **STEPS)
    wait_for_line(process, "step 3/12")
    (rank,) = ranks(process)
    saving = training_folder(folder, "killed-saving") / checkpoints.SAVING
    while not list(saving.glob("checkpoint-*/*.safetensors")):
        assert process.poll() is None
    rank.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    left = sorted(path.name for path in training_folder(folder, "killed-saving").glob("checkpoint-*"))
    # It was killed before the checkpoint got its final name or, on a fast machine, just after.
    assert left[0] == "checkpoint-2"
    require_exact_resume(folder, clean_environment, "killed-saving", undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_a_random_moment_changes_neither_losses_nor_weights(
    folder: Path, undisturbed: tuple[str, list[float]], clean_environment: dict[str, str], seed: int
) -> None:
    chance, state = random.Random(seed), f"killed-{seed}"
    process = start_sft(folder, clean_environment, state, **STEPS)
    wait_for_line(process, f"step {chance.randint(3, 10)}/12")
    time.sleep(chance.uniform(0, 0.3))
    ranks(process)[0].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    require_exact_resume(folder, clean_environment, state, undisturbed)
    assert history(folder, state) == undisturbed[1]


@pytest.mark.long
def test_decisions_based_on_losses_are_the_same_after_a_resume(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    # No loss falls by 90% or 100 nats: each evaluation halves the learning rate, the fourth is the last.
    watched = {
        **STEPS,
        "eval_steps": 2,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, "threshold": 0.9},
        "early_stopping_patience": 3,
        "early_stopping_min_delta": 100.0,
        "load_best_model_at_end": True,
    }
    done = run_sft(folder, clean_environment, "watched", **watched)
    assert done.returncode == 0, done.stdout
    # A step's learning rate is set at the end of the previous step, before that step's evaluation.
    rates = [1e-3] * 5 + [5e-4] * 2 + [2.5e-4]
    assert history(folder, "watched", "learning_rate") == pytest.approx(rates)
    expected = tree_digest(folder / "data/sft/model")
    process = start_sft(folder, clean_environment, "watched-killed", **watched)
    wait_for_line(process, "step 7/12")
    ranks(process)[0].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    again = run_sft(folder, clean_environment, "watched-killed", **watched)
    assert again.returncode == 0, again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert history(folder, "watched-killed", "learning_rate") == pytest.approx(rates)
    assert tree_digest(folder / "data/sft/model") == expected


def test_sigterm_saves_at_the_next_step_and_training_can_resume(
    folder: Path, undisturbed: tuple[str, list[float]], clean_environment: dict[str, str]
) -> None:
    process = start_sft(folder, clean_environment, "preempted", **{**STEPS, "save_steps": 2})
    wait_for_line(process, "step 3/12")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "error: sft: received SIGTERM; run again" in output
    newest = checkpoints.find_newest(training_folder(folder, "preempted"))
    assert newest is not None
    assert checkpoints.step(newest) >= 3
    require_exact_resume(folder, clean_environment, "preempted", undisturbed)


@pytest.mark.parametrize(
    "strategy",
    ["single", "zero2", *(pytest.param(name, marks=pytest.mark.long) for name in ("ddp", "zero1"))],
)
def test_with_the_kernels_of_this_machine_a_preempted_run_equals_a_straight_one(
    folder: Path, clean_environment: dict[str, str], strategy: str
) -> None:
    """On a CPU with bf16 this is attention in C, compiled anew for each state folder."""
    chosen = {
        **STEPS,
        **{"strategy": strategy, "num_processes": 1 if strategy == "single" else 2},
        **{"precision": "auto", "attn_implementation": "auto", "lora_dropout": 0.0, "num_train_epochs": 6},
    }
    done = run_sft(folder, clean_environment, f"straight-{strategy}", **chosen)
    assert done.returncode == 0, done.stdout
    expected = tree_digest(folder / "data/sft/model")
    kernel = read_json(folder / "data/sft/effective.json")["attn_implementation"]["effective"]
    assert kernel == ("avx512_per_example" if native.NEEDS in cpu_flags() else "sdpa_per_example")
    process = start_sft(folder, clean_environment, f"stopped-{strategy}", **chosen)
    wait_for_line(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    again = run_sft(folder, clean_environment, f"stopped-{strategy}", **chosen)
    assert again.returncode == 0, again.stdout
    assert "resuming from checkpoint-" in again.stdout
    assert tree_digest(folder / "data/sft/model") == expected


@pytest.fixture
def poisoned(tmp_path: Path, tiny_base: Path) -> Path:
    """Create a folder whose base has a NaN embedding for one token, which one row contains."""
    folder = make_folder(tmp_path, tiny_base, PACKED)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[2500] = float("nan")
    model.save_pretrained(folder / "data/base/model")
    rows = read_rows(folder / "data/pack/train.parquet")
    rows[2]["input_ids"][0] = 2500
    write_rows(folder / "data/pack/train.parquet", rows, ROWS)
    return folder


def test_a_nan_loss_is_reported_with_its_row_which_is_skipped_once(
    poisoned: Path, clean_environment: dict[str, str]
) -> None:
    folder = poisoned
    done = run_sft(folder, clean_environment, "nan", **{**STEPS, "num_train_epochs": 1})
    assert done.returncode == 11, done.stdout
    (attempt,) = (folder / "nan/checkpoints").glob("*/attempt.json")
    (step,) = read_json(attempt)["skipped"]
    assert f"loss nan at step {step}, rows [2] of data/pack/train.parquet" in done.stdout
    again = run_sft(folder, clean_environment, "nan", **{**STEPS, "num_train_epochs": 1})
    assert again.returncode == 0, again.stdout
    # The second attempt logged up to step 4.
    assert history(folder, "nan")[step - 5] == 0
    assert read_json(folder / "data/sft/plan.json")["tokens"][step - 1] == 0


@pytest.mark.long
def test_a_bad_loss_is_reported_with_its_step_even_if_nothing_is_logged(
    poisoned: Path, clean_environment: dict[str, str]
) -> None:
    rare = {**STEPS, "num_train_epochs": 1, "logging_steps": 100, "seed": 1}
    for _ in range(2):
        done = run_sft(poisoned, clean_environment, "nan-unlogged", **rare)
        assert done.returncode == 11, done.stdout
        attempt = training_folder(poisoned, "nan-unlogged") / "attempt.json"
        assert read_json(attempt)["skipped"] == [3]
        attempt.unlink()
    assert "resuming from checkpoint-2" in done.stdout


@pytest.fixture
def marked(tmp_path: Path, tiny_base: Path) -> Path:
    """Create a folder in which one row has the label that `tests.helpers.poisoned` looks for."""
    folder = make_folder(tmp_path, tiny_base, PACKED)
    rows = read_rows(folder / "data/pack/train.parquet")
    rows[2]["labels"][-1] = poison.LABEL
    write_rows(folder / "data/pack/train.parquet", rows, ROWS)
    return folder


def run_poisoned(
    folder: Path, environment: dict[str, str], fault: str, **changes: Any
) -> subprocess.CompletedProcess[str]:
    params = {**STEPS, "num_train_epochs": 1, **changes}
    return run_sft(folder, {**environment, "POISON": fault}, "poisoned", **params)


@pytest.mark.parametrize(
    ("fault", "changes", "step", "rows"),
    [
        ("gradient is NaN", {}, 3, "[2]"),
        ("gradient is NaN", {"seed": 3}, 4, "[2]"),
        pytest.param("gradient is infinite", {"seed": 3}, 4, "[2]", marks=pytest.mark.long),
        pytest.param("gradient is NaN", {"logging_steps": 100}, 3, "[2]", marks=pytest.mark.long),
        pytest.param("gradient is NaN", {"max_grad_norm": 0.0}, 3, "[2]", marks=pytest.mark.long),
        pytest.param(
            "gradient is NaN",
            {"gradient_accumulation_steps": 2, "save_steps": 1},
            2,
            "[2, 1]",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_non_finite_gradient_is_reported_with_its_row_and_corrupts_nothing(
    marked: Path, clean_environment: dict[str, str], fault: str, changes: dict[str, Any], step: int, rows: str
) -> None:
    done = run_poisoned(marked, clean_environment, fault, **changes)
    require_reported(done, marked, step, rows)
    again = run_poisoned(marked, clean_environment, fault, **changes)
    assert again.returncode == 0, again.stdout
    assert read_json(marked / "data/sft/plan.json")["tokens"][step - 1] == 0
    assert checkpoints.find_non_finite(marked / "data/sft/model") is None


@pytest.mark.parametrize(
    "strategy",
    [
        "zero2",
        *(pytest.param(strategy, marks=pytest.mark.long) for strategy in ("ddp", "zero0", "zero3", "fsdp2")),
    ],
)
def test_every_strategy_stops_at_a_non_finite_gradient_in_the_last_step(
    marked: Path, clean_environment: dict[str, str], strategy: str
) -> None:
    changes = {"strategy": strategy, "num_processes": 2, "seed": 3, "save_steps": 1}
    done = run_poisoned(marked, clean_environment, "gradient is NaN", **changes)
    require_reported(done, marked, 2, "[0, 2]")
    newest = checkpoints.find_newest(training_folder(marked, "poisoned"))
    assert newest is not None
    assert newest.name == "checkpoint-1"


def require_reported(done: subprocess.CompletedProcess[str], folder: Path, step: int, rows: str) -> None:
    """Require that training stopped at a gradient, reported its exact step and accepted no model."""
    assert done.returncode == 11, done.stdout
    assert "gradient norm " in done.stdout
    assert f"of a finite loss at step {step}, rows {rows} of data/pack/train.parquet" in done.stdout
    trained = training_folder(folder, "poisoned")
    assert read_json(trained / "attempt.json")["skipped"] == [step]
    assert not (trained / "output/finished.json").exists()


@pytest.mark.long
def test_an_infinite_loss_with_a_finite_gradient_is_found_on_saving(
    marked: Path, clean_environment: dict[str, str]
) -> None:
    # Nothing is logged before the end, so the checkpoint at step 4 is the first to detect the loss.
    rare = {"logging_steps": 100}
    for _ in range(2):
        done = run_poisoned(marked, clean_environment, "loss is infinite", **rare)
        assert done.returncode == 11, done.stdout
        assert "loss was not finite at steps 3 to 4, rows [2, 1] of data/pack/train.parquet" in done.stdout
        attempt = training_folder(marked, "poisoned") / "attempt.json"
        assert read_json(attempt)["skipped"] == [3, 4]
        attempt.unlink()
    assert "resuming from checkpoint-2" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "zero3", "num_processes": 2, "num_train_epochs": 2},
        {"strategy": "fsdp2", "num_processes": 2, "num_train_epochs": 2},
    ],
)
def test_a_non_finite_optimizer_state_is_never_saved(
    marked: Path, clean_environment: dict[str, str], changes: dict[str, Any]
) -> None:
    done = run_poisoned(marked, clean_environment, "state", **changes)
    assert done.returncode == 11, done.stdout
    assert "non-finite optimizer state or weights at steps 3 to 4" in done.stdout
    newest = checkpoints.find_newest(training_folder(marked, "poisoned"))
    assert newest is not None
    assert newest.name == "checkpoint-2"


@pytest.mark.long
def test_a_trained_model_with_a_non_finite_weight_is_rejected(
    marked: Path, clean_environment: dict[str, str]
) -> None:
    done = run_poisoned(marked, clean_environment, "file")
    assert done.returncode == 2, done.stdout
    assert "is not finite, so this model must not be used; lower sft.learning_rate" in done.stdout
    assert not (training_folder(marked, "poisoned") / "output/finished.json").exists()
    assert not (marked / "data/sft/model").exists()


@pytest.mark.long
def test_the_second_bad_loss_fails_permanently(poisoned: Path, clean_environment: dict[str, str]) -> None:
    # Two epochs contain the row twice: the first is skipped, the second is one too many.
    twice = {**STEPS, "num_train_epochs": 2}
    assert run_sft(poisoned, clean_environment, "nan-twice", **twice).returncode == 11
    last = run_sft(poisoned, clean_environment, "nan-twice", **twice)
    assert last.returncode == 2, last.stdout
    assert "rows were already skipped once" in last.stdout


def test_a_step_skipped_in_fp16_is_counted_and_does_not_advance_the_schedule(
    folder: Path, clean_environment: dict[str, str]
) -> None:
    poisoned = {**clean_environment, "POISON": "overflow"}
    changes = {
        **STEPS,
        "lr_scheduler_type": "linear",
        "learning_rate": 1.2e-3,
        "num_train_epochs": 3,
        "save_steps": 100,
    }
    done = run_sft(folder, poisoned, "overflow", **changes)
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if " skipped: " in line][-1].endswith(
        "step 5 skipped: gradients overflowed in fp16; the scaler halves its scale (3 skipped so far)"
    )
    plan = read_json(training_folder(folder, "overflow") / "job.json")["plan"]["learning_rate"]
    applied = [0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    assert history(folder, "overflow", "learning_rate") == pytest.approx([plan[i] for i in applied])


def test_fp16_that_skips_every_step_fails(folder: Path, clean_environment: dict[str, str]) -> None:
    done = run_sft(
        folder, {**clean_environment, "POISON": "overflows"}, "overflows", **{**STEPS, "num_train_epochs": 9}
    )
    assert done.returncode == 2
    assert "the gradients of the last 20 steps, up to step 23, overflowed in fp16; set sft." in done.stdout


@pytest.mark.long
def test_a_hung_step_ends_with_a_stack_trace(folder: Path, clean_environment: dict[str, str]) -> None:
    two = {**STEPS, "strategy": "ddp", "num_processes": 2, "step_timeout_seconds": 8}
    process = start_sft(folder, clean_environment, "hung", **two)
    wait_for_line(process, "step 3/6")
    ranks(process)[1].suspend()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 12, output
    assert "the next attempt resumes from the last checkpoint" in output
    trace = next(training_folder(folder, "hung").glob("hang-*.txt"))
    assert "Timeout" in output + trace.read_text()


@pytest.mark.long
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_losses(
    tmp_path: Path, tiny_base: Path, clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Logits of 600 labelled tokens per row: four rows take 3.2 GiB, two rows 2.4 GiB.
    monkeypatch.setattr(sft, "LENGTHS", (1200,) * 8)
    folder = make_folder(tmp_path, tiny_base, [(i,) for i in range(8)])
    one_epoch = {"num_train_epochs": 1}
    enough = run_sft(folder, clean_environment, "enough", **one_epoch)
    assert enough.returncode == 0, enough.stdout
    expected = history(folder, "enough")

    def run_limited() -> tuple[int, str]:
        limit = int(2.8 * 2**30)
        process = start_sft(
            folder,
            clean_environment,
            "scarce",
            lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            **one_epoch,
        )
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    code, output = run_limited()
    assert code == 10, output
    assert "the next attempt uses 2 rows per forward pass instead of 4" in output
    code, output = run_limited()
    assert code == 0, output
    effective = read_json(folder / "data/sft/effective.json")
    assert effective["per_device_train_batch_size"] == {"requested": 4, "effective": 2}
    assert effective["gradient_accumulation_steps"] == {"requested": 1, "effective": 2}
    assert history(folder, "scarce") == pytest.approx(expected, rel=1e-4)


@pytest.mark.long
def test_a_full_disk_is_reported_and_loses_no_checkpoint(
    folder: Path, undisturbed: tuple[str, list[float]], clean_environment: dict[str, str]
) -> None:
    process = start_sft(folder, clean_environment, "full", **STEPS)
    wait_for_line(process, "step 3/12")
    # Limit files to a few bytes, which affects a checkpoint like a full disk.
    (rank,) = ranks(process)
    resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (100, 100))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "cannot be written" in output
    assert "run again to resume from the last complete checkpoint" in output
    require_exact_resume(folder, clean_environment, "full", undisturbed)


def test_an_unwritable_state_folder_is_reported(folder: Path, clean_environment: dict[str, str]) -> None:
    process = start_sft(folder, {**clean_environment}, "../../../../../../sys/nightshift", **STEPS)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    assert "error: " in output.splitlines()[-1]
    assert "fix the permissions" in output.splitlines()[-1]
