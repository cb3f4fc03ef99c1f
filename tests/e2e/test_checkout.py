"""The whole pipeline in a separate checkout: real servers, worker, launcher and registry, small model.

The tests share one checkout and run in file order.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from nightshift.core.files import read_json, tree_digest
from nightshift.core.ports import free_port
from tests.helpers.checkouts import BIN, ROOT, Checkout, ServedCheckout, make_checkout

pytestmark = pytest.mark.timeout(900)
STAGES = [
    "base",
    "ingest",
    "dedupe",
    "split",
    "augment",
    "decontaminate",
    "pack",
    "sft",
    "prefer",
    "evaluate",
    "gate",
]
BAD_LINES = b'{"messages": [\n\xff\xfe\n'


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, clean_environment: dict[str, str]
) -> Iterator[ServedCheckout]:
    """Create a checkout with a user-defined source that has two malformed lines."""
    folder = make_checkout(tmp_path_factory.mktemp("e2e") / "checkout", tiny_base)
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["snapshot"]["sources"]["mine"] = "mine/*.jsonl"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (folder / "mine").mkdir()
    (folder / "mine" / "chats.jsonl").write_bytes(json.dumps(chat).encode() + b"\n" + BAD_LINES)
    ports = {f"NIGHTSHIFT_{name}_PORT": str(free_port()) for name in ("PREFECT", "MLFLOW")}
    made = ServedCheckout(folder, clean_environment | ports)
    try:
        yield made
    finally:
        made.type("nightshift", "down")


def test_make_run_registers_a_version(checkout: ServedCheckout) -> None:
    output = checkout.make_run()
    assert re.search(r"\ndedupe +started\ndedupe +completed +\d+\.\d s  [\d,]+ → [\d,]+ rows\n", output)
    assert re.search(r"\nsft +completed +\S+( s)?  6 steps, [\d,]+ tokens\n", output)
    assert re.search(r"\n(Held|Promoted|Rejected): version 1 is ", output)
    assert re.fullmatch(r"20\d\d-\d\d-\d\d finetune", checkout.last_run()["name"])
    assert "elements: chance" in output
    assert "25.0%" in output
    assert re.search(r"gate +(hold|promote|reject): ", output)
    assert re.search(r"registered version +1 *\n", output)
    assert re.search(r"Prefect +http://127\.0\.0\.1:\d+ *\n", output)
    assert list(checkout.task_states()) != []
    assert {checkout.task_states()[stage] for stage in ("snapshot", *STAGES)} == {"Completed"}
    shown = checkout.type("nightshift", "status")
    assert "error(s) in" not in shown
    assert re.search(r"next: \w+ [\d-]+ \d\d:\d\d nightly, .+ nightly, .+ nightly\n", shown)
    assert re.search(r"free disk space: [\d.]+ GiB\n", shown)


def test_mlflow_has_parameters_scores_and_source_of_the_run(checkout: ServedCheckout) -> None:
    record = json.loads((checkout.folder / "data/sft/mlflow_run.json").read_text())
    stack = json.loads((checkout.folder / ".nightshift/stack.json").read_text())
    client = MlflowClient(f"http://127.0.0.1:{stack['mlflow']['port']}")
    run = client.get_run(record["run_id"])
    assert (run.data.params["gate.alpha"], run.data.params["sft.max_steps"]) == ("0.05", "6")
    scores = read_json(checkout.folder / "data/evaluate/metrics.json")["candidate"]
    assert run.data.metrics["eval/elements/accuracy"] == scores["elements"]["accuracy"]
    assert run.data.metrics["eval/test/loss"] == scores["test"]["loss"]
    assert run.data.tags["mlflow.source.name"] == "flows/finetune.py"
    assert run.data.tags["mlflow.source.git.dirty"] == "true"
    note = run.data.tags["mlflow.note.content"]
    assert re.match(r"\*\*(Held|Promoted|Rejected)\*\*: version 1 ", note)
    assert "/runs/flow-run/" in note
    assert "system/cpu_utilization_percentage" in run.data.metrics
    model = client.search_logged_models([run.info.experiment_id])[0]
    logged = {metric.key: metric.value for metric in model.metrics}
    assert logged["eval/elements/accuracy"] == scores["elements"]["accuracy"]


def test_another_machine_fetches_the_version_with_the_servers_address_alone(
    checkout: ServedCheckout, tmp_path: Path
) -> None:
    stack = json.loads((checkout.folder / ".nightshift/stack.json").read_text())
    elsewhere = {
        "PATH": checkout.environment["PATH"],
        "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{stack['mlflow']['port']}",
    }
    model = "models:/nightshift@candidate/artifacts/model"
    command = [str(BIN / "mlflow"), "artifacts", "download", "--artifact-uri", model, "--dst-path", "here"]
    subprocess.run(command, cwd=tmp_path, env=elsewhere, check=True, capture_output=True)
    found = tmp_path / "here" / "artifacts" / "model"
    assert tree_digest(found) == tree_digest(checkout.folder / "data/sft/model")


def test_the_log_of_the_run_has_no_progress_bars_and_names_its_programs(checkout: ServedCheckout) -> None:
    body = {"logs": {"flow_run_id": {"any_": [checkout.last_run()["id"]]}}, "sort": "TIMESTAMP_ASC"}
    lines = [one["message"] for one in checkout.api("/logs/filter", body)]
    assert any("tasks.dedupe" in line for line in lines)
    assert [line for line in lines if "%|" in line or "__main__" in line] == []


def test_the_run_links_to_its_report(checkout: ServedCheckout) -> None:
    body = {"flow_runs": {"id": {"any_": [checkout.last_run()["id"]]}}}
    artifacts = {one["key"]: one["data"] for one in checkout.api("/artifacts/filter", body)}
    link = r"\[full report\]\((http://127\.0\.0\.1:\d+)/#/experiments/\d+/runs/(\w+)/artifacts/report\.html\)"
    found = re.fullmatch(link, artifacts["report-page"])
    assert found
    server, run = found.groups()
    page = httpx.get(f"{server}/get-artifact", params={"path": "report.html", "run_uuid": run}, timeout=30)
    assert page.content == (checkout.folder / "data/report/report.html").read_bytes()
    assert "| held-out loss | candidate |" in artifacts["report"]


def test_bad_lines_are_quarantined_with_their_origin(checkout: ServedCheckout) -> None:
    lines = (checkout.folder / "data/ingest/quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["origin"], row["reason"]) for row in rows] == [
        ("mine/000002.jsonl:2", "malformed_json"),
        ("mine/000002.jsonl:3", "not_utf8"),
    ]


def test_after_the_flow_dvc_repro_has_nothing_to_compute(checkout: ServedCheckout) -> None:
    output = checkout.type("dvc", "repro")
    assert "Running stage" not in output
    for stage in ("snapshot", *STAGES):
        assert f"Stage '{stage}' didn't change, skipping" in output


def test_after_dvc_repro_the_flow_has_nothing_to_compute(checkout: ServedCheckout) -> None:
    params = checkout.folder / "params.yaml"
    params.write_text(params.read_text().replace("n_resamples: 10000", "n_resamples: 9999"))
    assert "Running stage 'gate'" in checkout.type("dvc", "repro")
    runs = checkout.mlflow_runs()
    assert "\nNothingNew: no stage has new input; there is no champion yet\n" in checkout.make_run()
    assert checkout.mlflow_runs() == runs
    assert {checkout.task_states()[stage] for stage in STAGES} == {"Skipped"}
    # The snapshot stage still checked the sources.
    assert checkout.task_states()["snapshot"] == "Completed"


def test_an_invalid_override_fails_before_anything_runs(
    checkout: ServedCheckout,
) -> None:
    before = (checkout.folder / "params.yaml").read_bytes()
    wrong = 'overrides={"sft.max_step": 2}'
    prefect = ["prefect", "deployment", "run", "finetune/prod", "--watch"]
    checkout.type(*prefect, "--param", wrong, code=1)
    run = checkout.last_run()
    assert "sft.max_step: unknown key; did you mean max_steps?" in run["state"]["message"]
    assert checkout.task_states() == {}
    # The fields of the form are overrides, too.
    checkout.type(*prefect, "--param", "learning_rate=-1", code=1)
    assert "sft.learning_rate" in checkout.last_run()["state"]["message"]
    assert (checkout.folder / "params.yaml").read_bytes() == before


def test_kill_9_of_the_flow_leaves_no_process_and_the_next_run_completes(checkout: ServedCheckout) -> None:
    before = (checkout.folder / "params.yaml").read_bytes()
    lock = (checkout.folder / "dvc.lock").read_bytes()
    prefect = ["prefect", "deployment", "run", "finetune/prod", "--param"]
    checkout.type(*prefect, 'overrides={"sft.seed": 7}')
    engine = wait_for(lambda: flow_process(checkout.folder, "tasks.sft.worker"))
    os.kill(engine.pid, signal.SIGKILL)
    wait_for(lambda: not flow_processes(checkout.folder))
    wait_for(lambda: checkout.last_run()["state_type"] == "CRASHED")
    assert (checkout.folder / "dvc.lock").read_bytes() == lock
    checkout.make_run()
    assert checkout.task_states()["sft"] in ("Cached", "Skipped")
    assert (checkout.folder / "params.yaml").read_bytes() == before


def test_a_run_of_a_deployment_works_in_a_clone_and_publishes_a_branch(checkout: ServedCheckout) -> None:
    files = ("params.yaml", "dvc.lock", "data/gate/gate.json", ".git/index")

    def state() -> list[bytes]:
        return [(checkout.folder / name).read_bytes() for name in files]

    before = state()
    command = ["prefect", "deployment", "run", "finetune/prod", "--watch"]
    checkout.type(*command, "--param", 'overrides={"gate.seed": 5}')
    assert state() == before
    run = checkout.last_run()
    name = f"{run['name'][:10]}-{run['id'][:8]}"
    assert not (checkout.folder / ".nightshift/workspaces" / name).exists()
    branch = checkout.type("git", "for-each-ref", "--format=%(refname:short)", "refs/heads/runs").split()[-1]
    assert branch == f"runs/{name}"
    # The edit of an earlier test was never committed, and was part of the run.
    assert "n_resamples: 9999" in checkout.type("git", "show", f"{branch}^:params.yaml")
    assert "seed: 5" in checkout.type("git", "show", f"{branch}:params.yaml")
    commit = checkout.type("git", "rev-parse", f"{branch}^").strip()
    client = MlflowClient(f"sqlite:///{checkout.folder / '.nightshift' / 'mlflow.db'}")
    (tracked,) = client.search_runs(["1"], f"tags.`nightshift.flow_run` = '{run['id']}'")
    assert tracked.data.tags["nightshift.git_commit"] == commit
    assert checkout.task_states()["sft"] == "Skipped"
    page = (checkout.folder / ".nightshift/report.html").read_text()
    assert page != (checkout.folder / "data/report/report.html").read_text()


def test_mlflow_stores_the_version_and_its_origin(checkout: ServedCheckout) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{checkout.folder / '.nightshift' / 'mlflow.db'}")
    version = client.get_model_version_by_alias("nightshift", "candidate")
    assert version.tags["nightshift.verdict"] in ("hold", "promote", "reject")
    assert len(version.tags["nightshift.adapter_digest"]) == 64
    assert version.run_id == read_json(checkout.folder / "data/sft/mlflow_run.json")["run_id"]
    # The MLflow run of the killed flow run is closed as well.
    experiment = client.get_experiment_by_name("nightshift")
    assert experiment
    states = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert states.count("KILLED") == 1
    assert "RUNNING" not in states


def test_a_second_machine_reproduces_promotes_and_uses_the_model(
    checkout: ServedCheckout, tmp_path: Path
) -> None:
    """Another user, with nothing but the repository, the DVC remote and the address of MLflow."""
    remote = ["dvc", "remote", "modify", "--local", "storage", "url", str(tmp_path / "remote")]
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    checkout.type(*remote)
    checkout.type(*git, "add", "dvc.lock", "params.yaml")
    checkout.type(*git, "commit", "-qm", "a night")
    checkout.type("dvc", "push")
    stack = json.loads((checkout.folder / ".nightshift/stack.json").read_text())
    checkout.type("git", "clone", "-q", str(checkout.folder), str(tmp_path / "clone"))
    (tmp_path / "home").mkdir()
    second = Checkout(
        tmp_path / "clone",
        {
            "PATH": checkout.environment["PATH"],
            "HOME": str(tmp_path / "home"),
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{stack['mlflow']['port']}",
        },
    )
    second.type(*remote)
    second.type("dvc", "pull")
    assert "Running stage" not in second.type("dvc", "repro")
    second.type("nightshift", "promote", "1", "--reason", "approved elsewhere")
    assert "approved elsewhere" in checkout.type("nightshift", "history")
    port = str(free_port())
    server = subprocess.Popen(
        [str(BIN / "nightshift"), "serve", "--port", port],
        cwd=second.folder,
        env=second.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: is_healthy(url))
        body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 4}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["model"]) == (200, "nightshift@1")
    finally:
        server.terminate()
        server.wait(30)


def is_healthy(url: str) -> bool:
    """Return whether a server responds that it is healthy."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def documented_operations() -> set[str]:
    """Return every command of docs/operations.md; a name alone counts if no command begins with it."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}
    programs = r"(?:NIGHTSHIFT_BASE=FOLDER )?(nightshift|make|dvc|git|prefect|python|ssh|mlflow|pip)( |$)"
    found = {span for span in spans if re.match(programs, span)}
    return {one for one in found if not any(other.startswith(f"{one} ") for other in found)}


def test_every_command_of_the_operations_page_works_as_printed(
    checkout: ServedCheckout, tiny_base: Path, tmp_path: Path
) -> None:
    """Only placeholders of the page, such as FOLDER or 7, are replaced."""
    adopted, shared, repository = tmp_path / "adopted", tmp_path / "shared", tmp_path / "origin.git"
    shutil.copytree(checkout.folder / "data/sft/model", adopted)
    config = adopted / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    checkout.environment |= {
        **{
            f"GIT_{who}_{what}": "t@example.invalid"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        },
        "GIT_EDITOR": "sh -c 'echo a night > $0'",
        "COLUMNS": "200",
    }
    checkout.type("git", "init", "-q", "--bare", str(repository))
    checkout.type("git", "remote", "add", "origin", str(repository))
    checkout.type("git", "push", "-qu", "origin", "HEAD")
    (checkout.folder / ".venv").symlink_to(BIN.parent)
    typed = set()

    def run(command: str, code: int = 0, on: Checkout = checkout, answer: str = "", **replaced: Any) -> str:
        typed.add(command)
        for word, value in replaced.items():
            command = re.sub(rf"\b{word}\b", str(value), command)
        # The environment is installed already.
        command = command.replace("make ", "make -o .venv/ready ")
        return on.type("bash", "-euo", "pipefail", "-c", command, code=code, answer=answer)

    # The stack, the stages, the gate.
    assert "healthy" in run("nightshift up") + run("nightshift status")
    assert "nightshift" in run("prefect work-pool inspect nightshift")
    run("python -m tasks.check")
    run("nightshift snapshot")
    run("NIGHTSHIFT_BASE=FOLDER nightshift snapshot", FOLDER=tiny_base)
    run("dvc repro base")
    listed = checkout.type("git", "for-each-ref", "--format=%(refname:lstrip=3)", "refs/heads/runs")
    run("git checkout runs/NAME dvc.lock", NAME=listed.split()[-1])
    run("dvc checkout --force")
    run("dvc repro")
    run("python -m tasks.sft")
    run("python -m tasks.report")
    assert "nothing is wrong" in run("nightshift doctor")
    past = run("nightshift backfill --from 2026-01-05 --to 2026-01-06")
    assert re.findall(r"\n(2026-01-0\d): \w+: ", past) == ["2026-01-05", "2026-01-06"]
    verdicts = {"promote": 0, "hold": 3, "reject": 4}
    run("nightshift gate", code=verdicts[read_json(checkout.folder / "data/gate/gate.json")["verdict"]])

    # The registry.
    run('nightshift adopt FOLDER --reason "..."', FOLDER=adopted)
    run('nightshift promote 7 --reason "..."', **{"7": 1})
    run('nightshift rollback --reason "..."')
    run('nightshift acknowledge --reason "..."')
    assert "rollback" in run("nightshift history")
    assert "elements/000001.jsonl" in run("nightshift trace 7", **{"7": 1})
    assert "elements/000001.jsonl:3" in run("nightshift trace --row elements/000001.jsonl:3")
    rebuilt = run("nightshift reproduce 7", **{"7": 1})
    assert "bit-identical" in rebuilt
    for stage in STAGES[: STAGES.index("sft") + 1]:
        assert f"Running stage '{stage}'" in rebuilt
    assert re.search(r"outputs that differ +none of \d\d", rebuilt)

    # Git and one remote; the test before has set another one for this machine only.
    checkout.type("dvc", "remote", "modify", "--local", "--unset", "storage", "url")
    run("dvc remote modify storage url s3://bucket/nightshift", **{"s3://bucket/nightshift": shared})
    run("dvc remote modify NAME verify true", NAME="storage")
    checkout.type("git", "add", ".dvc/config")
    run("git add dvc.lock params.yaml")
    run("git commit")
    run("dvc push --run-cache")
    run("dvc remote modify --local storage url FOLDER", FOLDER=shared)
    outside = set(Path("/.dvc").rglob("*"))
    run("dvc push --all-branches")
    assert set(Path("/.dvc").rglob("*")) == outside
    run("git push")
    run("nightshift backup --to FOLDER", FOLDER=tmp_path / "backup")
    checkout.type("git", "clone", "-q", str(repository), str(tmp_path / "clone"))
    second = Checkout(tmp_path / "clone", checkout.environment)
    run("dvc cache dir --local FOLDER", on=second, FOLDER=tmp_path / "cache")
    run("dvc remote modify --local storage url FOLDER", on=second, FOLDER=shared)
    run("git pull", on=second)
    run("dvc pull --run-cache", on=second)
    assert "everything is up to date" in run("dvc pull -v", on=second).lower()
    assert "Running stage" not in run("dvc repro", on=second)
    run("nightshift restore --from FOLDER", on=second, FOLDER=tmp_path / "backup")
    assert "rollback" in run("nightshift history", on=second)
    run("git checkout dvc.lock", on=second)
    run("dvc checkout --force data/champion", on=second)

    # A row is erased, the next night runs without it, and everything ends.
    run("nightshift forget elements/000001.jsonl:3", answer="y\n")
    assert "\nsft " in run("nightshift run")
    assert re.search(r"\n(Held|NothingNew): ", run("make run"))
    run("make down")
    run("nightshift down")
    run("make clean")
    assert (checkout.folder / ".nightshift/mlflow.db").exists()
    run("make purge", answer="y\n")
    assert not (checkout.folder / "data").exists()

    elsewhere = {
        "nightshift serve": "test_a_second_machine_reproduces_promotes_and_uses_the_model",
        "ssh -L 5000:127.0.0.1:5000 HOST": "needs a second host",
        **dict.fromkeys(("make chaos", "make chaos FAULTS=20", "make soak"), "takes minutes to hours"),
    }
    assert documented_operations() <= typed | set(elsewhere)
    assert len(typed) > 35


def flow_processes(folder: Path) -> list[psutil.Process]:
    """Return all processes of flow runs in this checkout, at any depth."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            inherited = process.environ()
            if "PREFECT__FLOW_RUN_ID" in inherited and str(folder) in inherited["NIGHTSHIFT_HOME"]:
                found.append(process)
    return found


def flow_process(folder: Path, word: str) -> psutil.Process | None:
    """Return the flow's own process once a process below it has `word` in its command line."""
    found = flow_processes(folder)
    with contextlib.suppress(psutil.Error):
        if any(word in " ".join(process.cmdline()) for process in found):
            return min(found, key=lambda process: process.create_time())
    return None


def wait_for(condition: Any, seconds: float = 90) -> Any:
    """Return the first truthy result of the condition."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result
