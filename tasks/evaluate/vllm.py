"""vLLM: how its server is started, and what it cannot do. Needs no torch, and runs in another environment."""

import contextlib
import json
import os
import secrets
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from nightshift.core.errors import StageError
from nightshift.core.files import read_json
from nightshift.core.ports import free_port
from tasks.evaluate import VllmParams
from tasks.evaluate.servers import ALLOW_ADAPTERS

# Time in which the server must have loaded its model, seconds.
START_SECONDS = 3600
# Tokens that the server processes at once; with 150,000 words, their logits take 1.2 GB.
BATCHED_TOKENS = 2048
# Environment variable: the interpreter of vLLM's environment.
VLLM_PYTHON = "NIGHTSHIFT_VLLM_PYTHON"
# Ranks for which vLLM has kernels.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Keys of adapter_config.json that vLLM rejects, or ignores without a word.
NOT_IN_VLLM = (
    *("alora_invocation_tokens", "alpha_pattern", "layer_replication", "lora_bias", "modules_to_save"),
    *("rank_pattern", "target_parameters", "trainable_token_indices", "use_dora"),
)
# An adapter on these changes logits, which vLLM computes for the last token of a prompt only.
LOGITS = ("embed_tokens", "lm_head")
# Keys of generation_config.json that change greedy generation and that servers do not have.
NOT_ON_SERVERS = {
    **{"min_length": 0, "min_new_tokens": None, "no_repeat_ngram_size": 0, "num_beams": 1},
    **{"bad_words_ids": None, "begin_suppress_tokens": None, "forced_bos_token_id": None},
    **{"forced_eos_token_id": None, "sequence_bias": None, "suppress_tokens": None},
}
# Prints the distribution that provides vLLM, and its version.
FIND_VLLM = """
from importlib.metadata import packages_distributions as packages, version
print(*(f"{name}={version(name)}" for name in packages()["vllm"][:1]))
"""


def vllm_python() -> str:
    """Return the interpreter that runs vLLM."""
    return os.environ.get(VLLM_PYTHON) or sys.executable


@cache
def find_vllm(python: str) -> str | None:
    """Return name and version of an interpreter's vLLM, as `vllm=0.32.0`; None if it has none."""
    try:
        done = subprocess.run([python, "-c", FIND_VLLM], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_unsupported(weights: Path, adapter: Path | None) -> Iterator[str]:
    """Yield what a model has that a server would reject or ignore.

    Args:
        weights: Folder of the base model or of full weights.
        adapter: Folder of a LoRA adapter, if any.
    """
    if (file := weights / "generation_config.json").is_file():
        config = read_json(file)
        yield from (
            f"{key}: {config[key]!r} in generation_config.json"
            for key, neutral in NOT_ON_SERVERS.items()
            if config.get(key, neutral) not in (neutral, None)
        )
    if adapter is None:
        return
    config = read_json(adapter / "adapter_config.json")
    yield from (f"{key} in adapter_config.json" for key in NOT_IN_VLLM if config.get(key))
    if config.get("bias", "none") != "none":
        yield f"bias: {config['bias']} in adapter_config.json"
    if config["r"] > RANKS[-1]:
        yield f"a rank of {config['r']}, above {RANKS[-1]}"
    yield from (f"an adapter on {name}" for name in LOGITS if name in adapted_modules(adapter))


def adapted_modules(adapter: Path) -> set[str]:
    """Return the last names of the modules that an adapter changes, such as `q_proj`."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(size))
    return {name.partition(".lora_A.")[0].rpartition(".")[2] for name in names if ".lora_A." in name}


def serve_arguments(weights: Path, name: str, adapters: Sequence[Path], tokenizer: Path) -> list[str]:
    """Return the arguments of `vllm serve` after the model that its results depend on.

    Args:
        weights: Folder of the base model or of full weights.
        name: Name of the weights on the server.
        adapters: Folders of the LoRA adapters that are loaded later.
        tokenizer: Folder of the tokenizer.
    """
    config = read_json(weights / "config.json")
    # For float32 weights, vLLM's own choice is another dtype.
    dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    found = ["--served-model-name", name, "--tokenizer", str(tokenizer), "--dtype", str(dtype)]
    # Each token of a prompt has logits over the whole vocabulary, which vLLM makes no room for.
    found += ["--max-num-batched-tokens", str(BATCHED_TOKENS)]
    if not adapters:
        return found
    rank = max(read_json(adapter / "adapter_config.json")["r"] for adapter in adapters)
    kernel = next((one for one in RANKS if one >= rank), RANKS[-1])
    # Candidate and champion.
    return [*found, "--enable-lora", "--max-lora-rank", str(kernel), "--max-cpu-loras", "2"]


def vllm_command(
    weights: Path, arguments: Sequence[str], adapters: Sequence[Path], params: VllmParams
) -> list[str]:
    """Return the command that starts vLLM, without host and port.

    Args:
        weights: Folder of the base model or of full weights.
        arguments: See `serve_arguments`.
        adapters: Folders of the LoRA adapters that are loaded later.
        params: Size of the server.
    """
    size = ["--tensor-parallel-size", str(params.tensor_parallel_size)]
    if params.max_model_len is not None:
        size += ["--max-model-len", str(params.max_model_len)]
    modules = sorted(set().union(*map(adapted_modules, adapters)))
    # Without the head: where it may get an adapter, vLLM for CPUs cannot score prompts. An adapter does not
    # change modules that are not named.
    targets = ["--lora-target-modules", *modules] if modules else []
    # Compiling takes longer than it saves on a few thousand short prompts.
    options = ["--enforce-eager", "--generation-config", "vllm", "--disable-uvicorn-access-log"]
    module = "vllm.entrypoints.openai.api_server"
    return [vllm_python(), "-m", module, "--model", str(weights), *arguments, *size, *targets, *options]


def serve_remedy(weights: Path, arguments: Sequence[str]) -> str:
    """Return the command line that starts a server for `evaluate.engine: endpoint`."""
    return f"{ALLOW_ADAPTERS}=True {shlex.join(['vllm', 'serve', str(weights), *arguments])}"


@contextlib.contextmanager
def start_vllm(command: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run a vLLM server on the loopback interface, closed by a random key; yield the endpoint's parameters.

    Args:
        command: Interpreter and arguments, without host and port.

    Raises:
        StageError: The server ended, or took too long to start.
    """
    port = str(free_port())
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    # The server and the client read it.
    os.environ["VLLM_API_KEY"] = secrets.token_urlsafe(32)
    silent = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    environment = {**os.environ, **silent, ALLOW_ADAPTERS: "True"}
    # It has libraries of its own.
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port], env=environment)
    try:
        wait_for(process, f"http://127.0.0.1:{port}/health")
        yield {
            "base_url": f"http://127.0.0.1:{port}/v1",
            "api_key_env": "VLLM_API_KEY",
            "max_concurrency": 256,
            "requests_per_minute": 10**9,
            "tokens_per_minute": 10**12,
            "timeout_seconds": float(START_SECONDS),
            "max_retries": 2,
            "max_total_tokens": 10**15,
        }
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[bytes], url: str) -> None:
    """Wait until a server answers.

    Raises:
        StageError: The server ended, or took too long to start.
    """
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if (code := process.poll()) is not None:
            raise StageError(f"evaluate.vllm: vLLM ended with code {code}; see its messages above")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=10).status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    raise StageError(
        f"evaluate.vllm: vLLM was not ready after {START_SECONDS} seconds; see its messages above"
    )
