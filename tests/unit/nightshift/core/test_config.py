"""params.yaml is typed and complete, and all errors are reported at once."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from nightshift.core.config import StageParams, load_params, problems
from nightshift.core.errors import ConfigError


class DemoParams(StageParams):
    max_length: Annotated[int, Field(strict=True, ge=2)]
    learning_rate: float


class Choice(StageParams):
    mode: Literal["append", "replace"] = "append"


class NestedParams(StageParams):
    one: Choice | None = None
    named: dict[str, Choice] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_1e_4_is_parsed_as_a_float(tmp_path: Path) -> None:
    path = write(tmp_path, "demo: {max_length: 8, learning_rate: 1e-4}")
    assert load_params(DemoParams, "demo", path).learning_rate == 0.0001


def test_all_problems_of_a_section_are_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path, "demo: {max_length: 1, learning_rat: 0.1}")
    with pytest.raises(ConfigError) as caught:
        load_params(DemoParams, "demo", path)
    assert str(caught.value).splitlines()[1:] == [
        "  demo.learning_rat: unknown key; did you mean learning_rate?",
        "  demo.learning_rate: missing; add it",
        "  demo.max_length: Input should be greater than or equal to 2, got 1",
    ]


@pytest.mark.parametrize("value", ["true", '"8"', "8.0"])
def test_int_fields_reject_other_types(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, f"demo: {{max_length: {value}, learning_rate: 0.1}}")
    with pytest.raises(ConfigError, match=r"demo\.max_length"):
        load_params(DemoParams, "demo", path)


def test_nan_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path, "demo: {max_length: 8, learning_rate: .nan}")
    with pytest.raises(ConfigError, match=r"demo\.learning_rate"):
        load_params(DemoParams, "demo", path)


@pytest.mark.parametrize("text", ["demo: [", "- 1", ""])
def test_a_file_that_is_not_a_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"params\.yaml: "):
        load_params(DemoParams, "demo", write(tmp_path, text))


def test_a_missing_file_a_folder_and_a_binary_file_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(ConfigError, match=f"^{path}: not found; "):
        load_params(DemoParams, "demo", path)
    with pytest.raises(ConfigError, match=f"^{tmp_path}: is a folder; give the file in it$"):
        load_params(DemoParams, "demo", tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=f"^{path}: not UTF-8 text: .*; save it as UTF-8$"):
        load_params(DemoParams, "demo", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demo: {max_length: 8, max_length: 9, learning_rate: 1}", "the key max_length occurs twice"),
        ("demo: {max_length: 8, learning_rate: 1}\ndemo: {}\n", r"the key demo occurs twice[^;]*line 2"),
    ],
)
def test_a_key_that_occurs_twice_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_params(DemoParams, "demo", write(tmp_path, text))


@pytest.mark.parametrize("text", ["demo: {a: 1, a: 2}", "demo: [", "demo: {a: b: c}", "a: \x01", "\t- 1"])
def test_an_error_in_the_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"params\.yaml: not valid YAML: .+; fix the reported line$"
    ) as caught:
        load_params(DemoParams, "demo", write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_keys_and_values_of_nested_sections_get_a_suggestion_that_quotes_no_value() -> None:
    values = {"one": {"mod": "secret"}, "named": {"mode": {"mdoe": 1, "mode": "replce"}, "b": {"mode": "x"}}}
    assert problems(NestedParams, "demo", values) == [
        "demo.named.b.mode: Input should be 'append' or 'replace', got 'x'",
        "demo.named.mode.mdoe: unknown key; did you mean mode?",
        "demo.named.mode.mode: Input should be 'append' or 'replace', got 'replce'; did you mean replace?",
        "demo.one.mod: unknown key; did you mean mode?",
    ]


def test_equal_keys_of_different_mappings_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "demo: {max_length: 8, learning_rate: 8}\nother: [{a: 1}, {a: 1}]")
    assert load_params(DemoParams, "demo", path).max_length == 8
