"""Which stages may run, according to DVC."""

from pathlib import Path

import pytest

from nightshift.pipeline import graph


def test_stages_downstream_of_a_change_may_rerun(in_tmp: Path) -> None:
    stages = "{a: {outs: [data/a]}, b: {deps: [data/a], outs: [data/b]}, c: {outs: [c]}}"
    Path("dvc.yaml").write_text(f"stages: {stages}", encoding="utf-8")
    assert graph.find_reruns({"a": "params.yaml modified"}) == {
        "a": "params.yaml modified",
        "b": "if the output of a changes",
    }


def test_dvc_status_becomes_one_line_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    report = '{"sft": [{"changed deps": {"params.yaml": {"sft.seed": "modified"}}}, "changed command"]}'

    class Done:
        returncode, stdout, stderr = 0, report, ""

    monkeypatch.setattr(graph.subprocess, "run", lambda *_, **__: Done)
    assert graph.changed_stages() == {"sft": "params.yaml, changed command"}
    assert graph.changed_paths("sft") == {"params.yaml", "changed command"}
    assert graph.changed_paths("gate") == set()
