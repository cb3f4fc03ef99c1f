"""Fetch external inputs as files: new data, benchmarks, and the champion's identity.

The first stage of the graph. DVC runs it when its parameters change or an output is missing; the flow
runs it every night. Sources (params.yaml) become immutable shards
`data/raw/<source>/<arrival>.<suffix>`; a shard is written only if its bytes are new, so a night without
new data changes nothing. Benchmarks become `data/benchmarks/<name>/`; the registry's champion becomes
`data/champion/`. Sources and benchmarks that are no longer in params.yaml are kept but not used.

The outputs have `persist: true` in dvc.yaml: DVC neither removes them before a run nor replaces them
with those of an earlier run.
"""

import re
from typing import Any

from pydantic import field_validator

from nightshift.core.config import StageParams
from nightshift.data.benchmarks import HELDOUT
from tasks.snapshot.sources.locations import Location, require_location, require_query
from tasks.snapshot.sources.packages import BENCHMARK_PACKAGES


class SnapshotParams(StageParams):
    """Sources and benchmarks to fetch.

    Attributes:
        sources: Source name -> location; see `tasks.snapshot.sources.locations`.
        benchmarks: Benchmark name -> `package:<name>`, `lm-eval:<task>`, or a folder with task.yaml and
            items.jsonl.
    """

    sources: dict[str, Location]
    benchmarks: dict[str, str]

    @field_validator("sources", mode="before")
    @classmethod
    def _queries_are_complete(cls, values: Any) -> Any:
        for location in values.values() if isinstance(values, dict) else ():
            if isinstance(location, dict):
                require_query(location)
        return values

    @field_validator("sources", "benchmarks")
    @classmethod
    def _names_are_folders(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"{name!r} is used as a folder name; use only a-z, 0-9 and _, and start with a letter"
                )
        return values

    @field_validator("sources")
    @classmethod
    def _sources_are_known(cls, values: dict[str, Location]) -> dict[str, Location]:
        for location in values.values():
            if isinstance(location, str):
                require_location(location)
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
