"""The commands of docs/serving.md, run as they are printed, with a real registry and a small model.

Only ports are replaced. The blocks run from top to bottom, in one checkout; servers run until the end.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from nightshift.core.ports import free_port
from nightshift.registry.served_model import generate, load
from tasks import register
from tests.helpers.champion import enter
from tests.helpers.checkouts import BIN, ROOT

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
# Ports in the document; 5000 is that of MLflow in the stack.
PORTS = ("5000", "5001", "8000", "8001")
# First word -> why the command is not run here.
NOT_RUN = {
    "git": "needs the network",
    "pip": "needs the network",
    "PATH=$PATH:$PWD/llama.cpp": "needs llama.cpp, see test_serving.py",
    "vllm": "vLLM needs a GPU and an environment of its own",
}
ASKED = [{"role": "user", "content": "Who are you?"}]


class Shell:
    """The user's terminal: its variables, the servers that it started, and their ports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.servers = folder, list[subprocess.Popen[bytes]]()
        self.ports = {port: str(free_port()) for port in PORTS}
        self.environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def localize(self, text: str) -> str:
        """Replace the ports in a text by free ones."""
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda found: self.ports[found[0]], text)

    def type(self, command: str) -> str:
        """Run a command, and return what it prints; a server is started, and stays."""
        words = shlex.split(command)
        if words[0] == "export":
            self.environment |= dict([words[1].split("=", 1)])
        elif "serve" in words or "server" in words:
            self.start(command, words[words.index("--port") + 1])
        else:
            return self.run("bash", "-euo", "pipefail", "-c", command)
        return ""

    def run(self, *command: str) -> str:
        """Run a program to completion, and return its output."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def start(self, command: str, port: str) -> None:
        """Start a server, and wait until it is healthy."""
        log = self.folder / f"{port}.log"
        with log.open("w") as output:
            server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.servers.append(server)
        for _ in range(1200):
            assert server.poll() is None, log.read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                    return
            except httpx.TransportError:
                signal.sigtimedwait((), 0.1)
        pytest.fail(f"{command}: {log.read_text()}")

    def close(self) -> None:
        """End the servers with their child processes."""
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def shell(registered: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Open a terminal in a copy of the checkout, while its MLflow server runs."""
    folder = tmp_path_factory.mktemp("documented") / "checkout"
    shutil.copytree(registered, folder)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        opened = Shell(folder)
        try:
            opened.environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
            store = (
                f"--backend-store-uri sqlite:///{folder}/.nightshift/mlflow.db "
                f"--artifacts-destination {folder}/.nightshift/mlflow-artifacts"
            )
            opened.type(f"mlflow server --port {opened.ports['5000']} --workers 1 {store}")
            yield opened
        finally:
            opened.close()


@pytest.fixture(scope="module")
def answer(registered: Path) -> str:
    """Return the champion's answer, up to the end of its context."""
    model, tokenizer = load(registered / register.BASE, registered / "adapters/1/model")
    return str(tokenizer.decode(generate(model, tokenizer, ASKED, 64)[1], skip_special_tokens=True)).strip()


def commands(block: str) -> list[str]:
    """Return the commands of a block, each on one line."""
    return block.replace("\\\n", "").strip().splitlines()


@pytest.mark.parametrize(
    ("language", "block"), BLOCKS, ids=[f"{i}-{text.split()[0]}" for i, (_, text) in enumerate(BLOCKS)]
)
def test_a_documented_command_works_as_printed(language: str, block: str, shell: Shell, answer: str) -> None:
    text = shell.localize(block)
    if language == "python":
        output = shell.run(sys.executable, "-c", text)
    else:
        found = [(command, NOT_RUN.get(command.split()[0])) for command in commands(text)]
        if reasons := {reason for _, reason in found if reason}:
            assert all(reason for _, reason in found)
            pytest.skip("; ".join(sorted(reasons)))
        output = "".join(shell.type(command) for command, _ in found)
    if ASKED[0]["content"] in block:
        assert answer in output or json.dumps(answer)[1:-1] in output


def test_every_way_to_serve_is_documented() -> None:
    whole = "".join(text for _, text in BLOCKS)
    for name in ("nightshift serve", "transformers serve", "mlflow models serve", "vllm serve"):
        assert f"{name} " in whole
    for name in ("OpenAI(", "PeftModel.from_pretrained(", "mlflow.pyfunc.load_model("):
        assert name in whole


def test_every_command_of_the_text_exists(shell: Shell) -> None:
    named = set(re.findall(r"`nightshift ([a-z]+)", TEXT))
    assert named >= {"chat", "serve", "export"}
    for name in named:
        assert "Usage: nightshift" in shell.run("nightshift", name, "--help")
