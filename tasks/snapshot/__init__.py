"""Fetch external inputs as files: new data, benchmarks, and the champion's identity.

The first stage of the graph. DVC runs it when its parameters change or an output is missing; the flow
runs it every night. Sources (params.yaml) become immutable shards
`data/raw/<source>/<arrival>.<suffix>`; a shard is written only if its bytes are new, so a night without
new data changes nothing. A source in mode `replace` is exported as a whole: `data/raw/versions.json` lists
the shards of its newest export, and the others are withdrawn. Benchmarks become `data/benchmarks/<name>/`;
the registry's champion becomes `data/champion/`, and the version from which training starts, if
`sft.start_from` asks for one, `data/start/`. Sources and benchmarks that are no longer in params.yaml are
kept but not used.

The outputs have `persist: true` in dvc.yaml: DVC neither removes them before a run nor replaces them
with those of an earlier run.
"""

import re
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator, field_validator

from nightshift.core.config import StageParams
from nightshift.data.benchmarks import HELDOUT
from tasks.snapshot.sources.locations import Source
from tasks.snapshot.sources.packages import BENCHMARK_PACKAGES

LONGEST_NAME = 64


def require_name(name: object) -> object:
    """Return the name of a source or benchmark if it can be the name of a folder.

    Raises:
        ValueError: It cannot.
    """
    if not isinstance(name, str) or not re.fullmatch(rf"[a-z][a-z0-9_]{{0,{LONGEST_NAME - 1}}}", name):
        raise ValueError(
            f"{name!r} is used as a folder name; use only a-z, 0-9 and _, start with a letter, and use at "
            f"most {LONGEST_NAME} characters"
        )
    return name


Name = Annotated[str, BeforeValidator(require_name)]


class SnapshotParams(StageParams):
    """Sources and benchmarks to fetch.

    Attributes:
        sources: Source name -> location, or location with options; see `tasks.snapshot.sources.locations`.
        benchmarks: Benchmark name -> `package:<name>`, `lm-eval:<task>`, or a folder with task.yaml and
            items.jsonl.
        until: Moment after which a file must not have changed to be fetched, or None.
    """

    sources: dict[Name, Source]
    benchmarks: dict[Name, str]
    until: AwareDatetime | None = None

    @field_validator("sources")
    @classmethod
    def _sources_exist(cls, values: dict[str, Source]) -> dict[str, Source]:
        if not values:
            raise ValueError("no sources; add one, such as `chats: data/chats/*.jsonl`")
        return values

    @field_validator("benchmarks")
    @classmethod
    def _benchmarks_are_known(cls, values: dict[str, str]) -> dict[str, str]:
        if HELDOUT in values:
            raise ValueError(f"{HELDOUT!r} is reserved for the held-out examples; use another name")
        for location in values.values():
            name = location.removeprefix("package:")
            if location.startswith("package:") and name not in BENCHMARK_PACKAGES:
                raise ValueError(f"{location!r} is unknown; known packages: {', '.join(BENCHMARK_PACKAGES)}")
        return values
