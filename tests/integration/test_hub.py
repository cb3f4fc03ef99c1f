"""Which programs may access the Hugging Face Hub, and their errors: a real client and a local Hub."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from infra.local import settings
from nightshift.core.files import read_json, tree_digest
from tests.helpers.checkouts import ROOT, small_params
from tests.helpers.hub import COMMIT, serve_hub

MODEL = f"hub:owner/name@{COMMIT}"
REFUSALS = {
    "models/owner/private": (401, ""),
    "models/owner/gated": (403, "GatedRepo"),
    "models/owner/broken": (403, ""),
}
# Started with the offline variables set, since they load the Hub client before `run_main`.
STARTED_OFFLINE = {"tasks/sft/worker.py", "tasks/prefer/worker.py", "tasks/evaluate/score.py"}


def model_files(base: Path) -> dict[str, bytes]:
    """Return file name -> content for a model's folder."""
    return {path.name: path.read_bytes() for path in base.iterdir()}


def run_base(folder: Path, model: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the base stage as the worker of the local stack does."""
    folder.mkdir(exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(small_params(Path(model))))
    of_stack = settings.environment(settings.Stack(folder / "state", 1, 1))
    return subprocess.run(
        [sys.executable, "-m", "tasks.base"],
        cwd=folder,
        env={**environment, **of_stack, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def no_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset all variables that configure access to the Hub."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_a_hub_model_is_downloaded_with_the_stacks_settings_and_cached(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"pytorch_model.bin": b"x", "modeling.py": b"raise SystemExit('remote code ran')"}
    with serve_hub({"models/owner/name": model_files(tiny_base) | others}) as hub:
        environment = hub.environment(tmp_path / "cache")
        done = run_base(tmp_path / "online", MODEL, environment)
        assert done.returncode == 0, done.stderr
        assert any(path.endswith("/model.safetensors") for path in hub.requests)
        assert not any(path.endswith((".bin", ".py")) for path in hub.requests)
    assert read_json(tmp_path / "online/data/base/base.json")["model"] == MODEL
    # The commit is cached now, so the Hub is no longer needed.
    again = run_base(tmp_path / "gone", MODEL, environment)
    assert again.returncode == 0, again.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = run_base(tmp_path / "offline", MODEL, {**environment, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    made = {tree_digest(tmp_path / name / "data/base/model") for name in ("online", "gone", "offline")}
    assert len(made) == 1
    config = read_json(tmp_path / "online/data/base/model/tokenizer_config.json")
    assert "local_files_only" not in config


@pytest.mark.parametrize(
    ("name", "commit", "message"),
    [
        (
            "other",
            COMMIT,
            "RepositoryNotFoundError: .*the repository does not exist or is private; .*HF_TOKEN",
        ),
        (
            "private",
            COMMIT,
            "HfHubHTTPError: .*401 .*the repository does not exist or is private; .*HF_TOKEN",
        ),
        ("gated", COMMIT, "GatedRepoError: .*accept its terms on the Hub, and set HF_TOKEN"),
        ("name", "f" * 40, "RevisionNotFoundError: .*correct the commit"),
        ("broken", COMMIT, "HfHubHTTPError: .*403 Forbidden.*check the network, HF_ENDPOINT and HF_TOKEN"),
        ("bare", COMMIT, r"no safetensors in .*config\.json; .*other formats are not supported"),
        ("half", COMMIT, "cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_downloaded_is_an_error_with_a_remedy(
    name: str, commit: str, message: str, tiny_base: Path, tmp_path: Path
) -> None:
    whole = model_files(tiny_base)
    files = {
        "models/owner/name": whole,
        "models/owner/bare": {"config.json": whole["config.json"], "pytorch_model.bin": b"x"},
        "models/owner/half": {**whole, "model.safetensors": whole["model.safetensors"][:5000]},
    }
    reference = f"hub:owner/{name}@{commit}"
    with serve_hub(files, REFUSALS) as hub:
        done = run_base(tmp_path, reference, hub.environment(tmp_path / "cache"))
    require_one_error(done, rf"error: base\.model: {reference}: {message}")
    assert not (tmp_path / "data/base/base.json").exists()


def test_a_gated_model_is_downloaded_with_the_token_of_the_stacks_environment(
    tiny_base: Path, tmp_path: Path
) -> None:
    reference, files = f"hub:owner/gated@{COMMIT}", {"models/owner/gated": model_files(tiny_base)}
    with serve_hub(files, REFUSALS, token="hf_mine") as hub:
        environment = hub.environment(tmp_path / "cache")
        wrong = run_base(tmp_path / "wrong", reference, {**environment, "HF_TOKEN": "hf_other"})
        require_one_error(wrong, rf"error: base\.model: {reference}: GatedRepoError: .*set HF_TOKEN")
        done = run_base(tmp_path / "right", reference, {**environment, "HF_TOKEN": "hf_mine"})
    assert done.returncode == 0, done.stderr
    assert "hf_mine" not in done.stdout + done.stderr + (tmp_path / "right/data/base/base.json").read_text()


def test_an_unreachable_or_blocked_hub_is_an_error_with_a_remedy(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = rf"error: base\.model: {MODEL}: "
    with serve_hub({"models/owner/name": model_files(tiny_base)}) as hub:
        environment = hub.environment(tmp_path / "cache")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        done = run_base(tmp_path, MODEL, {**environment, "HF_HUB_OFFLINE": "1"})
        require_one_error(done, rf"{start}.*HF_HUB_OFFLINE=1 blocks the Hub; unset it")
        assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = run_base(tmp_path, MODEL, environment)
    require_one_error(done, rf"{start}ConnectError: .*check the network, HF_ENDPOINT")


def require_one_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Require exit code 2, a matching last line and no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert re.fullmatch(message + ".*", done.stderr.splitlines()[-1]), done.stderr.splitlines()[-1]


def programs() -> dict[str, bool]:
    """Return path -> whether it may be online, for all stage programs that end with `run_main`."""
    found = {}
    for path in sorted((ROOT / "tasks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_main":
                found[path.relative_to(ROOT).as_posix()] = [ast.unparse(one) for one in node.keywords] == [
                    "is_online=True"
                ]
    return found


def test_only_base_and_snapshot_may_be_online() -> None:
    found = programs()
    assert len(found) > 15
    assert [path for path, is_online in found.items() if is_online] == [
        "tasks/base.py",
        "tasks/snapshot/__main__.py",
    ]


@pytest.mark.parametrize("users", [{}, {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}])
def test_all_other_programs_are_offline(users: dict[str, str]) -> None:
    names = [path.removesuffix(".py").replace("/", ".") for path in programs() if path not in STARTED_OFFLINE]
    code = "\n".join(
        [
            *(f"import {name}" for name in names),
            "import json, os, subprocess, sys",
            "from nightshift.core.stage import run_main",
            "early = [name for name in ('huggingface_hub', 'datasets') if name in sys.modules]",
            "def main():",
            "    import datasets.config, huggingface_hub",
            "    print(json.dumps([early, huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE,",
            "        os.environ['HF_HUB_OFFLINE']]))",
            "run_main(main)",
        ]
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, **users},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[], True, True, "1"]


def test_a_served_model_never_calls_the_hub(tiny_base: Path, tmp_path: Path) -> None:
    """MLflow serves the model in a separate process with the user's environment."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "from pathlib import Path\n"
        "from nightshift.registry.served_model import generate, load\n"
        f"model, tokenizer = load(Path({str(tiny_base)!r}), Path({str(tmp_path / 'adapter')!r}))\n"
        "generate(model, tokenizer, [{'role': 'user', 'content': 'Who?'}], 2)\n"
    )
    with serve_hub({}) as hub:
        environment = hub.environment(tmp_path / "cache")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
        assert hub.requests == []


def test_ranks_scorers_and_served_models_are_always_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tasks.sft.launch import rank_environment

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert rank_environment("cpu", [])["HF_HUB_OFFLINE"] == "1"
    for path in ("tasks/evaluate/jobs.py", "nightshift/registry/versions.py", "infra/cli/export.py"):
        assert "**OFFLINE" in (ROOT / path).read_text(encoding="utf-8"), path
