"""Options of each source, which the snapshot writes next to the shards for the stages that read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nightshift.core.config import StageParams, count_or_share
from nightshift.core.files import read_json, write_json

# In data/raw: name of each source -> its options that differ from the default.
OPTIONS = "options.json"


Limit = Annotated[int | float | None, count_or_share("rows", optional=True)]
Text = Annotated[str, Field(min_length=1)]


class SourceOptions(StageParams):
    """How the rows of a source are read and used.

    Attributes:
        columns: Key that a format defines, such as `instruction` -> column of the source that holds it.
        roles: Role or speaker as the source names it -> system, user, assistant or tool.
        input_separator: Text between a question and each of its contexts, such as Alpaca's `input`.
        preference: Rows with a chosen and a rejected answer, or an answer with a rating: `refuse` them,
            train on the `chosen` answers only, or also `compare` them with the rejected ones in preference
            tuning.
        train_on: `all` answers of a conversation, or the `last` one only.
        split: Split of the data set to read, such as train, or `all`; None reads all files, of which none may
            name several splits.
        limit: Rows to use: the first n, or a share of them by the hash of their content; None uses all.
        weight: Times that each example is trained per epoch; 0.5 trains every second one.
        mode: `append`: rows stay in use when the source no longer has them. `replace`: the newest export is
            the whole source.
        group_by: Column whose value keeps rows on the same side of the split.
    """

    columns: dict[str, str] = Field(default_factory=dict)
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field(default_factory=dict)
    input_separator: str = "\n\n"
    preference: Literal["refuse", "chosen", "compare"] = "refuse"
    train_on: Literal["all", "last"] = "all"
    split: Text | None = None
    limit: Limit = None
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    mode: Literal["append", "replace"] = "append"
    group_by: Text | None = None


def write_options(raw: Path, options: Mapping[str, SourceOptions]) -> None:
    """Write the options of all sources in use, without the location that a subclass adds."""
    keys = set(SourceOptions.model_fields)
    listed = {name: one.model_dump(exclude_defaults=True, include=keys) for name, one in options.items()}
    write_json(raw / OPTIONS, listed)


def read_weights(raw: Path) -> dict[str, float]:
    """Return source -> weight, of the sources whose weight is not 1."""
    return {source: one["weight"] for source, one in _read(raw).items() if "weight" in one}


def read_options(raw: Path, source: str) -> SourceOptions:
    """Return the options of a source; the defaults for manually added data."""
    return SourceOptions.model_validate(_read(raw).get(source, {}))


def _read(raw: Path) -> dict[str, Any]:
    """Return source -> options that differ from the default; empty for manually added data."""
    path = raw / OPTIONS
    return dict(read_json(path)) if path.is_file() else {}
