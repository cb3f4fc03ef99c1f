"""Cache keys of scores, training runs and memos cover code, versions and inputs, and nothing else."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nightshift.core.config import load_params
from nightshift.core.files import read_json, write_json, write_rows
from nightshift.core.memo import Memo
from nightshift.core.paths import MODEL
from nightshift.data.encode import load_encoder
from nightshift.data.schemas import AUGMENTED, GROUPED
from nightshift.data.tokens import open_memo
from nightshift.registry.start import Start
from nightshift.replies import Failure
from tasks.augment import AugmentParams
from tasks.augment.propose import by_model
from tasks.dedupe import DedupeParams, signatures
from tasks.evaluate import __main__ as evaluate
from tasks.sft import __main__ as sft
from tests.helpers.checkouts import ROOT
from tests.helpers.sft import BACKEND, conversation, make_folder, sft_params
from tests.integration.test_evaluate import put_benchmarks, scoring

SCORING = scoring()
# Code that displays, tracks or estimates a training run and does not affect its result.
NOT_IN_TRAINING_KEY = {
    "tasks/sft/callbacks.py",
    "tasks/sft/memory.py",
    "tasks/sft/shape.py",
    "nightshift/tracking/spool.py",
    "tasks/sft/terminal.py",
    "nightshift/tracking/runs.py",
}
TRIPLE = '"""'
# Prints edit -> whether it changes the key; the edited code was loaded before.
PROGRAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
from tests.integration import test_keys as this
root, key = Path(sys.argv[1]), getattr(this, sys.argv[2])
found, before = {}, key()
for name, files in json.loads(Path(sys.argv[3]).read_text()).items():
    kept = {file: (root / file).read_text() for file in files}
    for file, text in files.items():
        (root / file).write_text(text)
    found[name] = key() != before
    for file, text in kept.items():
        (root / file).write_text(text)
print(json.dumps(found))
"""


def training_key() -> str:
    """Return the key of a training run in the current folder."""
    return sft.training_key(sft_params(eval_steps=1), BACKEND, Start())


def score_keys() -> str:
    """Return the keys of all models' scores in the current folder, as JSON."""
    found = evaluate.find_models(SCORING)
    return json.dumps({name: str(evaluate.memo_files(found[name], SCORING)) for name in sorted(found)})


@pytest.fixture
def folder(in_tmp: Path, tiny_base: Path) -> Path:
    """Create all inputs that determine a training run and its scores, with a champion."""
    make_folder(in_tmp, tiny_base)
    shutil.copy(ROOT / "params.yaml", in_tmp)
    write_json(MODEL / "adapter_config.json", {})
    write_json(evaluate.CHAMPION / "model" / "adapter_config.json", {})
    base = {**read_json(evaluate.BASE_RECORD), "dtype": "float32", "kept": None}
    champion = {"version": 1, "digest": "a" * 64, "base": base, "arrival": None, "best": {}}
    write_json(evaluate.CHAMPION / "champion.json", champion)
    write_rows(evaluate.TEST, [conversation(i) for i in range(3)], GROUPED)
    more = {"parent_id": None, "style": None, "ordinal": None}
    write_rows(evaluate.CLEAN_TRAIN, [{**conversation(i), **more} for i in range(3)], AUGMENTED)
    put_benchmarks(evaluate.BENCHMARKS)
    return in_tmp


def edited(folder: Path, key: str, files: list[str]) -> set[str]:
    """Return the edits that change the key: files, or `words`, an edit of all module docstrings."""
    for name in ("nightshift", "tasks", "tests", "infra", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    code = {name: (ROOT / name).read_text(encoding="utf-8") for name in files}
    edits = {name: {name: f"{text}\nMORE = 1\n"} for name, text in code.items()}
    edits["words"] = {
        name: f'"""Another docstring."""\n# And a comment.\n{text.split(TRIPLE, 2)[2]}'
        for name, text in code.items()
    }
    write_json(folder / "edits.json", edits)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), key, "edits.json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == edits.keys()
    return {name for name, differs in found.items() if differs}


def code_of(*places: str) -> list[str]:
    """Return the paths, relative to the root, of the code files in these places."""
    files = [
        file
        for place in places
        for file in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).glob("*.py")))
    ]
    return [file.relative_to(ROOT).as_posix() for file in files]


def test_a_training_keeps_its_checkpoints_unless_code_changes_that_decides_it(folder: Path) -> None:
    files = code_of(
        *("tasks/sft", "nightshift/data/encode.py", "nightshift/core/files.py", "nightshift/tracking"),
        "nightshift/data/text.py",
    )
    assert len(files) > 25
    # Code that a training run does not execute is not part of its key either.
    decides = set(files) - NOT_IN_TRAINING_KEY - {"nightshift/data/text.py"}
    assert edited(folder, "training_key", files) == decides


def test_cached_scores_are_reused_unless_code_that_affects_them_changes(folder: Path) -> None:
    files = code_of(
        *("tasks/evaluate", "nightshift/data/encode.py", "nightshift/data/benchmarks.py"),
        *("nightshift/data/text.py", "tasks/sft/trainer.py"),
    )
    assert edited(folder, "score_keys", files) == set(files) - {"tasks/sft/trainer.py"}


def upgrade(patch: pytest.MonkeyPatch, name: str) -> None:
    """Report another version of a library; a missing library then counts as installed."""
    known = importlib.metadata.version

    def version(asked: str) -> str:
        return "99.0" if asked == name else known(asked)

    patch.setattr(importlib.metadata, "version", version)


TRAINING = ("torch", "tokenizers", "trl", "datasets", "numpy", "deepspeed", "safetensors", "bitsandbytes")
OPTIONAL = ("flash-attn", "liger-kernel", "xformers")
SCORES = ("lm-eval", "transformers", "tokenizers", "torch", "peft", "bm25s", "rouge-score", "nltk")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("key", "deciding", "others"),
    [
        (training_key, (*TRAINING, *OPTIONAL), ("lm-eval", "mlflow", "rich", "dvc")),
        (score_keys, (*SCORES, *OPTIONAL), ("trl", "mlflow", "rich", "dvc")),
    ],
)
def test_another_version_of_a_library_that_decides_is_another_key(
    key: Callable[[], str], deciding: tuple[str, ...], others: tuple[str, ...]
) -> None:
    before, differs = key(), set()
    for name in (*deciding, *others):
        with pytest.MonkeyPatch.context() as patch:
            upgrade(patch, name)
            differs |= {name} if key() != before else set()
    assert differs == set(deciding)


@pytest.mark.usefixtures("folder")
def test_neither_the_words_for_a_choice_nor_the_gpu_orphan_a_training() -> None:
    params = sft_params()
    known = sft.training_key(params, BACKEND, Start())
    same = replace(BACKEND, devices=("3",), reason="1.0 GiB of 2.0 GiB")
    assert sft.training_key(params, same, Start(reason="there was no champion yet")) == known
    assert sft.training_key(params, replace(BACKEND, attention="eager"), Start()) != known
    assert sft.training_key(params, replace(BACKEND, num_processes=2), Start()) != known


@pytest.mark.usefixtures("folder")
def test_another_start_is_another_training() -> None:
    starts = (Start(), Start(1, "a" * 64), Start(2, "b" * 64))
    assert len({sft.training_key(sft_params(), BACKEND, start) for start in starts}) == 3
    # A version is the same start under another number.
    one, other = (sft.training_key(sft_params(), BACKEND, Start(number, "a" * 64)) for number in (1, 3))
    assert one == other


@pytest.mark.usefixtures("folder")
def test_an_upgrade_rescores_both_champion_and_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(score_keys())
    upgrade(monkeypatch, "lm-eval")
    after = json.loads(score_keys())
    assert sorted(before) == ["base", "candidate", "champion"]
    assert all(before[name] != after[name] for name in before)


def memo_method(memo: Memo) -> dict[str, Any]:
    """Return the manifest of a memo."""
    with memo:
        (text,) = memo._database.execute("SELECT text FROM manifest").fetchone()
    method: dict[str, Any] = json.loads(text)
    return method


@pytest.mark.parametrize("name", ["tokenizers", "transformers", "jinja2"])
def test_another_tokenizer_library_version_recomputes_token_ids(
    in_tmp: Path, tiny_base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(tiny_base)
    before = memo_method(open_memo(encoder))
    upgrade(monkeypatch, name)
    assert memo_method(open_memo(encoder)) != before
    assert "code" in before


@pytest.mark.usefixtures("in_tmp")
@pytest.mark.parametrize("name", ["daft", "numpy"])
def test_another_engine_version_recomputes_signatures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(DedupeParams, "dedupe", ROOT / "params.yaml")
    before = memo_method(signatures.open_memo(params))
    upgrade(monkeypatch, name)
    assert memo_method(signatures.open_memo(params)) != before
    assert "code" in before


def replies_asked(params: AugmentParams, base: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Return the model names under which replies are cached, as passed to `nightshift.replies.ask`."""
    asked: list[str] = []

    def ask(requests: Any, model: str, *_: Any) -> list[Failure]:
        asked.append(model)
        return []

    patch.setattr("tasks.augment.propose.ask", ask)
    by_model(params, base, None)([])  # type: ignore[arg-type]
    return asked


def test_replies_are_keyed_by_server_model_and_library(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = load_params(AugmentParams, "augment", ROOT / "params.yaml")
    asked = shipped.model_copy(update={"backend": "openai", "model": "m"})
    other = asked.endpoint.model_copy(update={"base_url": "http://127.0.0.1:9000/v1"})
    local = shipped.model_copy(update={"backend": "transformers"})
    first = replies_asked(asked, tiny_base, monkeypatch)
    assert replies_asked(asked, tiny_base, monkeypatch) == first
    assert replies_asked(asked.model_copy(update={"endpoint": other}), tiny_base, monkeypatch) != first
    first = replies_asked(local, tiny_base, monkeypatch)
    upgrade(monkeypatch, "transformers")
    assert replies_asked(local, tiny_base, monkeypatch) != first
