"""Typed parameters: params.yaml is the only source, with one section per stage.

Each stage declares its own `XxxParams` next to its code, so changing one schema does not invalidate the
cache of another stage. Unknown keys are errors with a suggestion.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nightshift.core.errors import ConfigError

PARAMS = Path("params.yaml")
Count = Annotated[int, Field(strict=True, ge=1)]


class StageParams(BaseModel):
    """Base class of every parameter section: no unknown keys, no NaN, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


P = TypeVar("P", bound=StageParams)


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects a key that occurs twice, of which PyYAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002 - PyYAML's signature
        """Build a mapping.

        Raises:
            yaml.constructor.ConstructorError: A key occurs twice.
        """
        seen = set()
        for key_node, _ in node.value:
            # A key that is no scalar is rejected below.
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_params(path: Path = PARAMS) -> dict[str, Any]:
    """Read the whole config file.

    Raises:
        ConfigError: The file is missing, is not text, is not valid YAML, or is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: not found; run from the folder that contains it") from err
    except IsADirectoryError as err:
        raise ConfigError(f"{path}: is a folder; give the file in it") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"{path}: not UTF-8 text: {err}; save it as UTF-8") from err
    except yaml.YAMLError as err:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(err)}; fix the reported line") from err
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must map sections to values, got {type(values).__name__}")
    return values


def problems(model: type[StageParams], section: str, values: object) -> list[str]:
    """List every problem with one section, each with key, value and fix.

    Example:
        >>> class PackParams(StageParams):
        ...     max_length: int
        >>> problems(PackParams, "pack", {"max_lenght": 8})
        ['pack.max_lenght: unknown key; did you mean max_length?', 'pack.max_length: missing; add it']
    """
    try:
        model.model_validate(values)
    except ValidationError as err:
        return sorted(_describe(model, section, error) for error in err.errors())
    return []


def load_params(model: type[P], section: str, path: Path = PARAMS) -> P:
    """Read and validate one section.

    Raises:
        ConfigError: The section is missing or invalid; the message lists every problem.
    """
    values = read_params(path).get(section, {})
    if found := problems(model, section, values):
        raise config_error(found, path)
    return model.model_validate(values)


def config_error(found: list[str], path: Path = PARAMS) -> ConfigError:
    """Build one error that lists all problems."""
    return ConfigError("\n  ".join([f"{path}: {len(found)} problem(s)", *found]))


def count_or_share(unit: str, *, optional: bool = False) -> BeforeValidator:
    """Return a validator of a number from 1, or a share between 0 and 1.

    Args:
        unit: What is counted.
        optional: Whether None is valid, too.

    Example:
        >>> count_or_share("rows").func(0)
        Traceback (most recent call last):
        ValueError: must be a number of rows from 1, or a share between 0 and 1, got 0
    """

    def require(value: object) -> object:
        is_number = type(value) is int and value >= 1
        if is_number or (type(value) is float and 0 < value < 1) or (optional and value is None):
            return value
        raise ValueError(f"must be a number of {unit} from 1, or a share between 0 and 1, got {value!r}")

    return BeforeValidator(require)


def suggestion(word: str, known: list[str]) -> str:
    """Suggest the closest known key, or list all known keys.

    Example:
        >>> suggestion("lerning_rate", ["learning_rate", "seed"])
        'did you mean learning_rate?'
        >>> suggestion("zzz", ["learning_rate", "seed"])
        'known keys: learning_rate, seed'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"


def _describe(model: type[StageParams], section: str, error: Any) -> str:
    """Format one pydantic error as `section.key: problem, value; fix`."""
    loc = [str(part) for part in error["loc"] if part != "[key]"]
    key = ".".join([section, *loc])
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {suggestion(loc[-1], _keys_at(model, loc[:-1]))}"
        case "missing":
            return f"{key}: missing; add it"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case "literal_error":
            known = re.findall(r"'([^']+)'", error["ctx"]["expected"])
            close = difflib.get_close_matches(str(error["input"]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"{key}: {error['msg']}, got {error['input']!r}{hint}"
    return f"{key}: {error['msg']}, got {error['input']!r}"


def _keys_at(schema: Any, loc: list[str]) -> list[str]:
    """Return the keys of the section, or of the nested section at a location."""
    for part in loc:
        schema = _model_in(schema) or schema
        is_dict = get_origin(schema) is dict
        schema = get_args(schema)[1] if is_dict else schema.model_fields[part].annotation
    found = _model_in(schema)
    return list(found.model_fields) if found else []


def _model_in(schema: Any) -> type[BaseModel] | None:
    """Return the model among a type and the types of its union."""
    some = (schema,) if get_origin(schema) is dict else (schema, *get_args(schema))
    return next((one for one in some if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _one_line(err: yaml.YAMLError) -> str:
    """Return the problem and its position, without the lines that PyYAML quotes."""
    problem, mark = getattr(err, "problem", None), getattr(err, "problem_mark", None)
    if problem and mark:
        return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(err).split())
