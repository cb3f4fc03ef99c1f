"""GPU checks and benchmarks are valid without a GPU; `make rehearse-gpu` runs some of them."""

import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.gpu import LADDER
from infra.gpu_kit.slim import main as slim
from nightshift.core.errors import StageError
from tasks.sft import Attention, SftParams
from tests.gpu import SECTION, Check, checks, find_fault, main, rehearsal, select
from tests.helpers.sft import shipped_params

ALL = [*checks()]


@pytest.mark.parametrize("check", ALL, ids=[check.name for check in ALL])
def test_the_parameters_of_every_check_are_valid(check: Check) -> None:
    SftParams(**{**shipped_params(), **SECTION, **check.changes})


def test_checks_have_unique_names_and_existing_references() -> None:
    for some in (ALL, [*rehearsal()]):
        names = [check.name for check in some]
        assert len(set(names)) == len(names)
        assert {check.like for check in some if check.like} <= set(names)
    tried = {check.changes.get("attn_implementation") for check in ALL}
    # That in C is for CPUs.
    assert set(get_args(Attention)) - {"auto", "avx512_per_example"} <= tried
    assert {rung.attention for rung in LADDER} - {"fastest"} <= set(get_args(Attention))


def test_chosen_checks_bring_those_that_they_are_compared_with() -> None:
    known = {check.name: check for check in ALL}
    assert select(known, ["zero1-fp32"]) == ["cpu-fp32", "single-fp32", "zero1-fp32"]
    assert select(known, []) == list(known)


def test_an_unknown_check_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no check is named zero7; known are cpu-fp32, single-fp32"):
        main(out=tmp_path, work=tmp_path, seconds=1, at_once=1, rehearse=True, only=["zero7"])


def result(*losses: float, **more: Any) -> dict[str, Any]:
    return {
        "codes": [0],
        "losses": list(losses),
        "gib": 1.0,
        "selftest": {"isolation": {"proven": True}},
        **more,
    }


def verdict(found: dict[str, Any], **more: Any) -> str | None:
    others = {"other": result(2.0, 1.0), "tested": found}
    return find_fault(Check("tested", {}, **more), others)


def test_losses_are_compared_with_those_of_another_check() -> None:
    assert verdict(result(2.0, 1.0005), like="other") is None
    assert (
        verdict(result(2.0, 1.1), like="other") == "losses differ by 0.1 from those of other, more than 0.001"
    )
    assert "losses differ" in str(verdict(result(2.0), like="other"))


def test_a_check_may_fail_only_for_a_missing_package() -> None:
    lacks = result(codes=[2], error=["error: sft.attn_implementation=x does not work on this machine: y"])
    assert verdict(lacks, may_lack=True) is None
    # What is missing is listed below the first line.
    error = [
        "12:00:00 a log line",
        "error: params.yaml: this machine cannot do what sft requests",
        "  sft.adapter=qlora needs bitsandbytes; run `pip install -e '.[gpu]'`",
    ]
    assert verdict({**lacks, "error": error}, may_lack=True) is None
    assert "needs bitsandbytes" in str(verdict({**lacks, "error": error}))
    assert "does not work on this machine" in str(verdict(lacks))
    crashed = result(codes=[1], error=["Traceback", "RuntimeError: CUDA error"])
    assert verdict(crashed, may_lack=True) == "codes [1]: ['RuntimeError: CUDA error']"


def test_isolation_attempts_and_memory_are_checked() -> None:
    unproven = result(2.0, selftest={"isolation": {}})
    assert verdict(unproven) == "isolation is not proven"
    assert verdict(result(1.0), attempts=4) == "codes [0]: never ran out of memory"
    assert verdict(result(1.0, codes=[10, 0]), attempts=4) is None
    assert verdict(result(1.0, planned_gib=1.05), wide=True) is None
    assert verdict(result(1.0, planned_gib=1.2), wide=True) == "1.00 GiB were allocated, 1.20 planned"


def test_a_wheel_is_repacked_without_unneeded_files(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    record = "some/__init__.py,sha256=a,1\nsome/_C.so,sha256=b,9\nsome-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in {
            "some/__init__.py": "1",
            "some/_C.so": "9",
            "some-1.0.dist-info/RECORD": record,
        }.items():
            file.writestr(name, text)
    (tmp_path / "slim").mkdir()
    slim(wheel, tmp_path / "slim", r"_C\.so")
    with zipfile.ZipFile(tmp_path / "slim" / wheel.name) as file:
        assert file.namelist() == ["some/__init__.py", "some-1.0.dist-info/RECORD"]
        assert b"_C.so" not in file.read("some-1.0.dist-info/RECORD")
