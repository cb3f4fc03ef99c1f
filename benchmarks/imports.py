"""Measure which example files of other tools become a params.yaml that passes the check.

`python -m benchmarks.imports --axolotl ../axolotl --llamafactory ../LLaMA-Factory --trl ../trl`, with
checkouts of the tools, prints the figures of docs/importing.md. The Hub is not asked: every repository gets
the same invented commit. Only files of supervised fine-tuning on text are counted.
"""

import argparse
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.importers.hub import Kind, Repository
from infra.importers.result import Result, build, require_valid
from infra.importers.tools import TOOLS
from nightshift.core.errors import ConfigError
from nightshift.core.stage import print_line, run_main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Keys of Axolotl and of LLaMA-Factory that make a file something else than supervised fine-tuning on text.
_OTHERS = """
    rl reward_model process_reward_model pretraining_dataset streaming qat quantization unfrozen_parameters
    processor_type is_multimodal diffusion kd_trainer image_max_pixels video_max_pixels audio_sampling_rate
"""
OTHERS = _OTHERS.split()
# TRL's commands in its documentation.
COMMAND = re.compile(r"(?:trl sft|trl/scripts/sft\.py)\s(?P<options>(?:[^\n`]*\\\n)*[^\n`]*)")


@dataclass(frozen=True, slots=True)
class AnyCommit:
    """A Hub on which every repository has the same commit."""

    def find(self, kind: Kind, identity: str, revision: str) -> Repository:  # noqa: ARG002 - as in Lookup
        """Return a repository without a list of its files."""
        return Repository(identity if "/" in identity else f"someone/{identity}", COMMIT)


@dataclass(frozen=True, slots=True)
class Example:
    """An example file of a tool: its name, the folder it is read in, and its content."""

    name: str
    folder: Path
    config: dict[str, Any]


def axolotl_examples(root: Path) -> Iterator[Example]:
    """Yield the examples of Axolotl that are supervised fine-tuning on text."""
    for file in sorted(root.glob("examples/**/*.y*ml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if "datasets" in config and not any(config.get(key) for key in OTHERS):
            yield Example(file.relative_to(root).as_posix(), file.parent, config)


def llamafactory_examples(root: Path) -> Iterator[Example]:
    """Yield the examples of LLaMA-Factory that are supervised fine-tuning on text."""
    for file in sorted(root.glob("examples/**/*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        is_text = not any(config.get(key) for key in OTHERS)
        if config.get("stage") == "sft" and config.get("do_train") and is_text:
            # The tool reads dataset_info.json in the folder from which it is started.
            yield Example(file.relative_to(root).as_posix(), root, config)


def trl_examples(root: Path) -> Iterator[Example]:
    """Yield TRL's example file, and the commands of `trl sft` in its documentation, as config files."""
    for file in sorted(root.glob("examples/cli_configs/*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        yield Example(file.relative_to(root).as_posix(), root, config)
    files = [root / "README.md", root / "trl/scripts/sft.py", *sorted(root.glob("docs/source/*.md"))]
    for file in files:
        for found in COMMAND.finditer(file.read_text(encoding="utf-8")):
            config = read_options(found["options"])
            if "model_name_or_path" in config and "dataset_name" in config:
                line = file.read_text(encoding="utf-8")[: found.start()].count("\n") + 1
                yield Example(f"{file.relative_to(root).as_posix()}:{line}", root, config)


def read_options(text: str) -> dict[str, Any]:
    r"""Return the options of a command, as in a config file.

    Example:
        >>> read_options("--lora_r 8 \\\n --lora_target_modules q_proj v_proj --use_peft")
        {'lora_r': 8, 'lora_target_modules': ['q_proj', 'v_proj'], 'use_peft': True}
    """
    given: dict[str, list[Any]] = {}
    key = ""
    for word in shlex.split(text.replace("\\\n", " "), comments=True):
        if word.startswith("--"):
            key = word.removeprefix("--")
            given[key] = []
        elif key:
            given[key].append(yaml.safe_load(word))
    return {key: values[0] if len(values) == 1 else values or True for key, values in given.items()}


def import_example(tool: str, example: Example) -> tuple[str, list[str], Result | None]:
    """Import an example: its outcome, why it is refused, and the result."""
    used = TOOLS[tool]
    found = used.translate(example.config, example.folder, AnyCommit())
    lost = set(example.config) - {
        word for one in found if not one.is_default for word in re.split(r" and |, |[.\[]", one.key)
    }
    if lost:
        raise AssertionError(f"{example.name}: no finding for {', '.join(sorted(lost))}")
    try:
        result = build(used.title, found, Path(example.name))
        if essential := result.list_essential():
            return "refused", essential, result
        require_valid(result.text)
    except ConfigError as err:
        return "invalid", [str(err)], None
    return "imported", [], result


def measure(tool: str, examples: Iterator[Example], *, verbose: bool) -> dict[str, Any]:
    """Import all examples of a tool; return the counts, and the commonest reasons."""
    outcomes, reasons, kinds = Counter[str](), Counter[str](), Counter[str]()
    for example in examples:
        outcome, why, result = import_example(tool, example)
        outcomes[outcome] += 1
        reasons.update({line.partition(";")[0][:100] for line in why})
        kinds.update(one.kind for one in (result.found if result else ()) if not one.is_default)
        if verbose and why:
            print_line(f"{example.name}: {outcome}: {'; '.join(why)[:300]}")
    total = sum(outcomes.values())
    return {
        "tool": TOOLS[tool].title,
        "files": total,
        **outcomes,
        "share": round(outcomes["imported"] / total, 3),
        "findings": dict(kinds),
        "reasons": dict(reasons.most_common(12)),
    }


READERS = {"axolotl": axolotl_examples, "llamafactory": llamafactory_examples, "trl": trl_examples}


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the command-line arguments."""
    for tool in READERS:
        parser.add_argument(f"--{tool}", type=Path, help=f"checkout of {TOOLS[tool].title}")
    parser.add_argument("--verbose", action="store_true", help="print why each file is refused")


def main(*, verbose: bool, **roots: Path | None) -> None:
    """Print the result of each tool as JSON."""
    for tool, root in roots.items():
        if root:
            result = measure(tool, READERS[tool](root.resolve()), verbose=verbose)
            print_line(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_main(main, declare)
