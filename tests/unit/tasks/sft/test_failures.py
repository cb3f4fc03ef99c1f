"""The reason why training stopped determines the next attempt."""

from pathlib import Path

import pytest

from nightshift.core.errors import StageError, TrainingError
from tasks.sft.failures import (
    HANG,
    Attempt,
    clear_failure,
    is_out_of_memory,
    plan_next_attempt,
    read_attempt,
    read_failure,
    write_failure,
    write_unknown,
)
from tasks.sft.result import is_finished


def test_out_of_memory_halves_the_micro_batch_until_one_row_is_left(tmp_path: Path) -> None:
    write_failure(tmp_path, "out_of_memory", "out of memory: 2 GiB")
    error = plan_next_attempt(tmp_path, 4, 1)
    assert isinstance(error, TrainingError)
    assert (error.kind, error.exit_code) == ("out_of_memory", 10)
    assert "uses 2 rows per forward pass instead of 4" in str(error)
    assert read_attempt(tmp_path) == Attempt(halvings=1)
    assert "uses 1 rows per forward pass instead of 2" in str(plan_next_attempt(tmp_path, 4, 1))
    last = plan_next_attempt(tmp_path, 4, 1)
    assert last.exit_code == 2
    assert "one row does not fit" in str(last)


def test_damaged_records_of_an_attempt_do_not_stop_the_next_one(tmp_path: Path) -> None:
    write_failure(tmp_path, "out_of_memory", "out of memory: 2 GiB")
    plan_next_attempt(tmp_path, 4, 1)
    (tmp_path / "output" / "model").mkdir(parents=True)
    for path in (*tmp_path.glob("*.json"), tmp_path / "job.json", tmp_path / "output" / "finished.json"):
        path.write_bytes(b'{"skipped": [')
    assert read_attempt(tmp_path) == Attempt()
    assert read_failure(tmp_path) is None
    assert not is_finished(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error, NCCL version 2.28.9\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
        "Triton Error [CUDA]: out of memory",
        "HIP out of memory. Tried to allocate 20.00 MiB",
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp",
        "cudaErrorMemoryAllocation",
        "std::bad_alloc",
    ],
)
def test_out_of_memory_errors_of_all_libraries_are_recognized(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    outer = ValueError("the compiled graph failed")
    outer.__cause__ = RuntimeError(text)
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("out of resource: shared memory, Required: 232448, Hardware limit: 101376"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error"),
        KeyError("memory"),
    ],
)
def test_other_errors_are_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
    assert is_out_of_memory(MemoryError())


def test_rows_with_a_bad_loss_are_skipped_once(tmp_path: Path) -> None:
    write_failure(tmp_path, "loss", "loss nan at step 7, rows [3]", (7,))
    error = plan_next_attempt(tmp_path, 1, 1)
    assert error.exit_code == 11
    attempt = read_attempt(tmp_path)
    assert attempt == Attempt(skipped=(7,))
    again = plan_next_attempt(tmp_path, 1, 1)
    assert (again.exit_code, type(again)) == (2, StageError)


def test_a_hang_is_retried_once(tmp_path: Path) -> None:
    (tmp_path / HANG.format(rank=0)).write_text("")
    (tmp_path / HANG.format(rank=1)).write_text("Timeout!")
    error = plan_next_attempt(tmp_path, 1, 1)
    assert error.exit_code == 12
    assert "hang-1.txt" in str(error)
    assert plan_next_attempt(tmp_path, 1, 1).exit_code == 2


def test_the_failure_of_the_first_rank_is_reported(tmp_path: Path) -> None:
    write_failure(tmp_path, "preempted", "received SIGTERM; saved at step 3")
    write_failure(tmp_path, "error", "the other rank is gone")
    assert "received SIGTERM" in str(plan_next_attempt(tmp_path, 1, 143))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("failure")] == ["failure.json"]
    clear_failure(tmp_path)
    assert "exited with code 137" in str(plan_next_attempt(tmp_path, 1, 137))


@pytest.mark.parametrize("kind", ["out_of_memory", "loss", "hang", "preempted"])
def test_every_kind_of_failure_has_a_distinct_exit_code(kind: str) -> None:
    codes = [TrainingError(k, "").exit_code for k in TrainingError.EXIT_CODES]
    assert len(set(codes)) == 4
    assert TrainingError(kind, "").exit_code not in (0, 1, 2)  # type: ignore[arg-type]


def test_an_unknown_error_keeps_its_traceback_and_promises_nothing(tmp_path: Path) -> None:
    try:
        raise KeyError("no such layer")
    except KeyError as err:
        write_unknown(tmp_path, "1", err)
    message = str(plan_next_attempt(tmp_path, 1, 1))
    assert message.startswith("sft: unknown error KeyError: 'no such layer'; traceback in ")
    assert "run again" not in message.lower()
    text = (tmp_path / "traceback-1.txt").read_text()
    assert 'raise KeyError("no such layer")' in text
    clear_failure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_checkpoint_nothing_resumes(tmp_path: Path) -> None:
    assert str(plan_next_attempt(tmp_path, 1, 137)).endswith("Another run starts over")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    assert str(plan_next_attempt(tmp_path, 1, 137)).endswith("Another run resumes from checkpoint-20")


def test_the_lost_connection_to_a_killed_rank_is_no_reason(tmp_path: Path) -> None:
    write_unknown(tmp_path, "0", RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert (tmp_path / "traceback-0.txt").is_file()
    assert "the ranks exited with code 247" in str(plan_next_attempt(tmp_path, 1, 247))
