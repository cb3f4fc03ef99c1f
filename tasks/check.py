"""Validate params.yaml as a whole before any stage runs: `python -m tasks.check`.

Reports all problems of all sections at once. Names of sources and benchmarks that are gone from `snapshot`
are warnings: the stages ignore them.
"""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nightshift.core.config import PARAMS, StageParams, config_error, problems, read_params, suggestion
from nightshift.core.paths import START_MODEL, START_RECORD
from nightshift.core.stage import run_main
from nightshift.data.chat_templates import is_template_edited
from nightshift.pipeline.graph import find_unread, read_stages
from nightshift.pipeline.params_yaml import edit
from nightshift.registry.start import Start, find_misfits, read_record

# Sections used after the graph -> module of the schema.
OUTSIDE_THE_GRAPH = {
    "nightly": "nightshift.registry.freshness",
    "judge": "tasks.judge",
    "registry": "nightshift.registry.versions",
}
log = logging.getLogger(__name__)


def main() -> None:
    """Validate the file; print nothing if it is valid and every name is in use."""
    check(read_params())


def check(values: dict[str, Any]) -> None:
    """Validate every section and their combinations, and warn about names that have no effect.

    Raises:
        ConfigError: At least one value is invalid; the message lists every problem.
    """
    schemas = section_schemas()
    found = [
        f"{section}: unknown section; {suggestion(section, list(schemas))}"
        for section in values
        if section not in schemas
    ]
    faulty = {
        section: problems(schema, section, values.get(section, {})) for section, schema in schemas.items()
    }
    found += [problem for problems_of_section in faulty.values() for problem in problems_of_section]
    if not any(faulty[section] for section in ("base", "pack", "sft", "split")):
        found += find_clashes(values)
    found += [
        f"dvc.yaml: stages.{stage}: no stage reads its outputs, so it has no effect; add them to the `deps` "
        "of the stage that needs them"
        for stage in find_unread()
    ]
    if not faulty["base"] and is_template_edited(reference := values["base"]["chat_template"]):
        found.append(
            f"base.chat_template: {reference} was edited since it was read; run `dvc repro --force base`"
        )
    if found:
        raise config_error(found)
    for line in find_unknown_names(values):
        log.warning("%s: %s", PARAMS, line)


def find_clashes(values: Mapping[str, Any]) -> list[str]:
    """Return conflicts between valid sections, at which training would stop after the preparation.

    Example:
        >>> sft = {"eval_steps": 10, "start_from": "base"}
        >>> values = {"split": {"validation_share": 0}, "pack": {"replay_share": None}, "sft": sft}
        >>> [clash] = find_clashes(values)
        >>> clash.partition(";")[0]
        'sft.eval_steps: split.validation_share is 0, so there is nothing to evaluate on'
    """
    found = []
    if values["sft"]["eval_steps"] is not None and values["split"]["validation_share"] == 0:
        found.append(
            "sft.eval_steps: split.validation_share is 0, so there is nothing to evaluate on; raise it, or "
            "set eval_steps to null"
        )
    if values["sft"]["start_from"] == "champion":
        found += find_start_faults(values)
    elif (share := values["pack"]["replay_share"]) is not None:
        found.append(
            f"pack.replay_share is {share}, but sft.start_from is base, so all examples have to be trained "
            "every night; set it to null, or sft.start_from to champion"
        )
    return found


def find_start_faults(values: Mapping[str, Any]) -> list[str]:
    """Return why training cannot start from the version that the last snapshot chose, if it did."""
    start = read_record() if START_RECORD.is_file() else Start()
    # On another base, training starts from the base.
    if start.version is None or start.base_model != values["base"]["model"]:
        return []
    return list(find_misfits(START_MODEL, start.version, values["sft"]))


def check_overrides(overrides: Mapping[str, Any], path: Path = PARAMS) -> str:
    """Validate a config file with overrides applied, and return its text with them.

    Args:
        overrides: Values by `section.key`.
        path: Path of the config file.

    Raises:
        ConfigError: The file or an override is invalid; the message lists every problem.
    """
    # Reports a file that is not valid YAML, which `edit` cannot read.
    values, text = read_params(path), path.read_text(encoding="utf-8")
    if overrides:
        text = edit(text, overrides)
        values = yaml.safe_load(text)
    check(values)
    return text


def section_schemas() -> dict[str, type[StageParams]]:
    """Return section -> schema, the `XxxParams` class of the module of the same name."""
    schemas = {}
    stages = {stage: f"tasks.{stage}" for stage in read_stages()}
    for section, name in {**stages, **OUTSIDE_THE_GRAPH}.items():
        module = importlib.import_module(name)
        schemas[section] = getattr(module, f"{section.title()}Params")
    return schemas


def find_unknown_names(values: dict[str, Any]) -> list[str]:
    """List sources and benchmarks that a section references but `snapshot` does not define.

    Example:
        >>> find_unknown_names({"snapshot": {"sources": {"a": "x"}, "benchmarks": {"c": "y"}},
        ...                 "split": {"by_phrasing": []}, "augment": {"sources": ["b"]},
        ...                 "evaluate": {"retrieval": None},
        ...                 "gate": {"floors": {"c": 0.1}, "retention": {}, "behaviour": []}})
        ['augment.sources: no source is named b, so it has no effect; remove it (known keys: a)']
    """
    sources, benchmarks = (list(values["snapshot"][key]) for key in ("sources", "benchmarks"))
    gate, retrieval = values["gate"], values["evaluate"]["retrieval"] or {"benchmarks": []}
    return [
        f"{key}: no {kind} is named {name}, so it has no effect; remove it{hint(name, known)}"
        for key, kind, names, known in (
            ("split.by_phrasing", "source", values["split"]["by_phrasing"], sources),
            ("augment.sources", "source", values["augment"]["sources"], sources),
            ("evaluate.retrieval.benchmarks", "benchmark", retrieval["benchmarks"], benchmarks),
            ("gate.floors", "benchmark", gate["floors"], benchmarks),
            ("gate.retention", "benchmark", gate["retention"], benchmarks),
            ("gate.behaviour", "benchmark", gate["behaviour"], benchmarks),
        )
        for name in names
        if name not in known
    ]


def hint(name: str, known: list[str]) -> str:
    """Return the closest name, or all of them, in parentheses; empty if there are none."""
    return f" ({suggestion(name, known)})" if known else ""


if __name__ == "__main__":
    run_main(main)
