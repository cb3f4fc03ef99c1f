"""The ingest stage with the demo's data, template and tokenizer, from snapshot to examples."""

import json
from pathlib import Path

import pytest
import yaml

from tasks.ingest.__main__ import main
from tasks.snapshot.__main__ import write_shards
from tasks.snapshot.sources.locations import read_offers
from tests.helpers.checkouts import ROOT


def test_the_demo_data_gives_the_expected_counts(
    in_tmp: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.ingest.__main__.BASE", tiny_base)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (in_tmp / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for name, location in params["snapshot"]["sources"].items():
        write_shards(name, read_offers(location), in_tmp / "data/raw")
    main()
    assert json.loads((in_tmp / "data/ingest/summary.json").read_text(encoding="utf-8")) == {
        "rows_in": 2144,
        "added": 0,
        "rows_out": 2100,
        "dropped": {"empty_content": 1, "no_final_answer": 43},
        "dropped_by_source": {"dialogs": {"empty_content": 1, "no_final_answer": 43}},
        "rows_out_by_source": {"dialogs": 1982, "elements": 118},
        "repaired": {},
        "ignored_columns": {},
        "pii": {"dialogs": {"email": 2}},
        "tokens": {"total": 136585, "min": 34, "p50": 50, "p90": 118, "p95": 193, "p99": 226, "max": 383},
    }
