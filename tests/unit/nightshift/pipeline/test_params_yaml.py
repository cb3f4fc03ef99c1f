"""Edited values are read back the same by both YAML parsers: PyYAML, and ruamel, which DVC uses."""

from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from nightshift.pipeline.params_yaml import edit

TEXT = "# first\na:\n  block:\n    x: 1\n  # next\n  flow: {y: 2} # end\n  word: text\n  items: [a]\n"
VALUES: tuple[Any, ...] = (
    {"chats": {"path": "https://host:8443/a.jsonl", "mode": "replace", "limit": 0.5}},
    {"chats": {"path": "a[1], b: c #d.jsonl", "columns": {"output": "best answer"}}},
    {"yes": {"path": "on"}, "no": {"path": "1e5"}},
    "hub:a/b@c",
    "no",
    "1.5",
    "null",
    "",
    "a: b",
    ["x:y", "plain", "2024-01-01", "~"],
    [],
    {},
    None,
    1e-05,
    True,
)


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("key", ["a.block", "a.flow", "a.word", "a.items", "a.flow.y"])
def test_an_edited_value_is_read_back(key: str, value: Any) -> None:
    text = edit(TEXT, {key: value})
    for values in (yaml.safe_load(text), YAML(typ="safe").load(text)):
        for part in key.split("."):
            values = values[part]
        assert values == value
    assert "# first" in text
    assert "# next" in text
