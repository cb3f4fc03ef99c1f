"""Modules that are trained whole: through the self-test, saving, loading and merging; tied ones stay tied."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.core.errors import ConfigError
from nightshift.core.files import read_json
from nightshift.core.paths import BASE
from nightshift.registry.served_model import load
from tasks.sft.model import has_matrix
from tasks.sft.worker import remove_extra_files


def save_and_load(trainer: Any, base: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Save an adapter; return it loaded on its base, some token ids, and the trained model's logits."""
    trainer.save_model("saved")
    remove_extra_files(Path("saved"))
    model, _ = load(base, Path("saved"), "float32")
    ids = torch.arange(100, 120)[None]
    trainer.model.eval()
    with torch.no_grad():
        return model, ids, trainer.model(input_ids=ids).logits


@pytest.mark.parametrize("modules", [["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_tied_embeddings_are_trained_saved_and_merged_as_one(
    build: Callable[..., Any], tiny_base: Path, modules: list[str]
) -> None:
    assert read_json(tiny_base / "config.json")["tie_word_embeddings"]
    trainer = build(lora_modules_to_save=[*modules])
    # PEFT adds the name of the tied weight to its own list.
    assert trainer.params.lora_modules_to_save == modules
    before = trainer.model.get_input_embeddings().weight.detach().clone()
    # Runs the self-test, which saves and loads the model.
    trainer.train()
    after = trainer.model.get_input_embeddings().weight
    assert not torch.equal(after, before)
    assert trainer.model.get_output_embeddings().weight is after
    model, ids, expected = save_and_load(trainer, tiny_base)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-3)
        merged.save_pretrained("merged")
        whole, _ = load(tiny_base, Path("merged"), "float32")
        assert torch.allclose(whole(input_ids=ids).logits, expected, atol=1e-3)


def test_a_resumed_run_continues_with_the_same_whole_modules(build: Callable[..., Any]) -> None:
    changes = {"lora_modules_to_save": ["embed_tokens", "lm_head"], "save_steps": 1, "save_total_limit": 9}
    trainer = build(**changes)
    trainer.train()
    expected = trainer.model.get_input_embeddings().weight
    again = build(**changes)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-2"))
    assert torch.equal(again.model.get_input_embeddings().weight, expected)
    assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


def test_the_matrices_of_a_model_sharded_by_zero3_are_found() -> None:
    module = torch.nn.Linear(2, 3, bias=False)
    module.weight.ds_shape = module.weight.shape
    module.weight.data = torch.empty(0)
    assert has_matrix(module)
    assert not has_matrix(torch.nn.LayerNorm(2))


def test_an_unknown_module_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="lora_modules_to_save: head: no such module in the base; did you"):
        build(lora_modules_to_save=["head"])
    with pytest.raises(ConfigError, match=r"matches no module of the base; whole names are .* model.layers"):
        build(lora_target_modules="q_proj")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Create a small mixture of experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("experts")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_weights_of_experts_get_an_adapter(build: Callable[..., Any], experts: Path) -> None:
    shutil.rmtree(BASE)
    shutil.copytree(experts, BASE)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trainer = build(lora_target_parameters=names, lora_target_modules=["q_proj"], max_steps=2)
    trainer.train()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum("experts" in name for name in trained) == 8
    assert all(p.any() for name, p in trained.items() if "lora_B" in name)
    model, ids, expected = save_and_load(trainer, experts)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
        assert torch.allclose(model.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-3)
    with pytest.raises(ConfigError, match="lora_target_parameters: gate_proj: no parameter of the base"):
        build(lora_target_parameters=["gate_proj"])


def test_an_adapter_on_some_layers_trains_those_and_is_loaded_so(
    build: Callable[..., Any], tiny_base: Path
) -> None:
    trainer = build(lora_layers_to_transform=[1], max_steps=2)
    trainer.train()
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(names) == 14
    assert all(".layers.1." in name for name in names)
    model, ids, expected = save_and_load(trainer, tiny_base)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    with pytest.raises(
        ConfigError, match="lora_layers_to_transform: 2: no such layer; the base has layers 0 to 1"
    ):
        build(lora_layers_to_transform=[1, 2])


def test_full_fine_tuning_of_some_parameters_leaves_the_others_as_they_are(
    build: Callable[..., Any], tiny_base: Path
) -> None:
    patterns = [r"model\.layers\.1\.mlp", "model.norm"]
    trainer = build(adapter=None, unfrozen_parameters=patterns, max_steps=2)
    trainer.train()
    trainer.save_model("saved")
    before, after = (load(tiny_base, path, "float32")[0].state_dict() for path in (tiny_base, Path("saved")))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert changed == {*mlp, "model.norm.weight"}
    with pytest.raises(ConfigError, match=r"unfrozen_parameters: 'lm_head' matches no parameter of the base"):
        build(adapter=None, unfrozen_parameters=["lm_head"])


@pytest.mark.parametrize("changes", [{"adapter": None}, {"lora_modules_to_save": ["norm"]}])
def test_muon_trains_and_resumes_exactly(build: Callable[..., Any], changes: dict[str, Any]) -> None:
    changes |= {"optim": "muon", "save_steps": 1, "save_total_limit": 9}
    trainer = build(**changes)
    trainer.train()
    kinds = [type(part).__name__ for part in trainer.optimizer.optimizer.parts]
    assert kinds == ["Muon", "AdamW"]
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert last < first
    again = build(**changes)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-2"))
    for one, two in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_pattern_selects_the_modules_and_is_saved_as_it_is(build: Callable[..., Any]) -> None:
    pattern = r"model\.layers\.0\.self_attn\.(q|v)_proj"
    trainer = build(lora_target_modules=pattern)
    trainer.train()
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(names) == 4
    trainer.save_model("saved")
    remove_extra_files(Path("saved"))
    assert read_json(Path("saved/adapter_config.json"))["target_modules"] == pattern
