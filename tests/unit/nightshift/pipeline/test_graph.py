"""The stage graph defined in dvc.yaml."""

from pathlib import Path

import pytest

from nightshift.core.errors import ConfigError
from nightshift.pipeline.graph import find_unread, stage_order


def write(folder: Path, text: str) -> Path:
    path = folder / "dvc.yaml"
    path.write_text(text)
    return path


def test_stages_come_after_their_inputs(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        stages:
          last: {cmd: x, deps: [data/b/rows.json]}
          middle: {cmd: x, deps: [data/a], outs: [data/b]}
          first: {cmd: x, metrics: [{data/a/x.json: {cache: false}}]}
        """,
    )
    assert stage_order(path) == ["first", "middle", "last"]


def test_independent_stages_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: {b: {cmd: x}, a: {cmd: x}, c: {cmd: x}}")
    assert stage_order(path) == ["b", "a", "c"]


def test_a_stage_that_no_other_reads_is_found(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        stages:
          ingest: {cmd: x, outs: [data/ingest]}
          filter: {cmd: x, deps: [data/ingest], outs: [data/filter]}
          gate: {cmd: x, deps: [data/ingest/rows.json], outs: [data/gate]}
        """,
    )
    assert find_unread(path) == ["filter"]


def test_a_cycle_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "stages: {a: {deps: [y], outs: [x]}, b: {deps: [x], outs: [y]}}")
    with pytest.raises(ConfigError, match="form a cycle"):
        stage_order(path)


@pytest.mark.parametrize("text", ["", "stages: {}"])
def test_a_file_without_stages_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="defines no stage"):
        stage_order(write(tmp_path, text))
