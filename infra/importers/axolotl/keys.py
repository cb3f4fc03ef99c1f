"""Axolotl keys that are mapped one by one: `key -> target`, `key -> reason`.

Names: the schemas of Axolotl 0.4 to 0.18 (src/axolotl/utils/schemas), including deprecated keys.
"""

from collections.abc import Callable
from typing import Any

from infra.importers.axolotl.findings import AFTER_PACKING, above_zero, number, switch, whole

Convert = Callable[[Any], Any]

OVER_LENGTH = {"drop": "drop", "truncate": "truncate", "raise": "error"}
OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "lion_32bit": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "schedule_free_adamw": "schedule_free_adamw",
}
SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_sgd")


def optimizer(value: Any) -> str:
    """Map the name of an optimizer.

    Raises:
        ValueError: The optimizer has no counterpart.

    Example:
        >>> optimizer("adamw_bnb_8bit")
        'adamw_8bit'
    """
    value = str(value)
    if value not in OPTIMIZERS:
        near = {"paged_lion_8bit": "lion_8bit", "paged_lion_32bit": "lion_32bit"}.get(value)
        near = near or ("schedule_free_adamw" if value in SCHEDULE_FREE else None)
        near = near or ("adamw_8bit" if "8bit" in value or "4bit" in value else "adamw_torch_fused")
        raise ValueError(f"optimiser {value} is not here; {near} is the nearest, set sft.optim")
    return OPTIMIZERS[value]


def over_length(value: Any) -> str:
    """Map the handling of examples that are longer than a row.

    Raises:
        ValueError: The value is unknown.
    """
    value = str(value)
    if value not in OVER_LENGTH:
        raise ValueError(f"{value!r} is unknown; set pack.over_length to error, drop, truncate or split")
    return OVER_LENGTH[value]


def compiled(value: Any) -> bool:
    """Parse torch_compile; `auto` is on from PyTorch 2.6.

    Raises:
        ValueError: The value is not true, false or auto.
    """
    return True if value == "auto" else switch(value)


DIRECT: dict[str, tuple[str, Convert]] = {
    "sequence_len": ("pack.max_length", whole),
    "sample_packing": ("pack.packing", switch),
    "excess_length_strategy": ("pack.over_length", over_length),
    "eval_sample_packing": ("sft.eval_packing", switch),
    "micro_batch_size": ("sft.per_device_train_batch_size", whole),
    "eval_batch_size": ("sft.per_device_eval_batch_size", whole),
    "num_epochs": ("sft.num_train_epochs", whole),
    "max_steps": ("sft.max_steps", whole),
    "learning_rate": ("sft.learning_rate", number),
    "optimizer": ("sft.optim", optimizer),
    "adam_beta1": ("sft.adam_beta1", number),
    "adam_beta2": ("sft.adam_beta2", number),
    "adam_epsilon": ("sft.adam_epsilon", number),
    "weight_decay": ("sft.weight_decay", number),
    "max_grad_norm": ("sft.max_grad_norm", number),
    "label_smoothing_factor": ("sft.label_smoothing_factor", number),
    "torch_compile": ("sft.torch_compile", compiled),
    "early_stopping_patience": ("sft.early_stopping_patience", whole),
    "load_best_model_at_end": ("sft.load_best_model_at_end", switch),
    "save_total_limit": ("sft.save_total_limit", whole),
    "logging_steps": ("sft.logging_steps", whole),
    "seed": ("sft.seed", whole),
}
# Keys that apply only with an adapter.
ADAPTER: dict[str, tuple[str, Convert]] = {
    "lora_r": ("sft.lora_r", whole),
    "lora_alpha": ("sft.lora_alpha", whole),
    "lora_dropout": ("sft.lora_dropout", number),
    "peft_use_dora": ("sft.use_dora", switch),
    "peft_use_rslora": ("sft.use_rslora", switch),
    "loraplus_lr_ratio": ("sft.loraplus_lr_ratio", above_zero),
}
# Axolotl's defaults for keys that change the training result.
DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "sample_packing": False,
    "excess_length_strategy": "drop",
    "micro_batch_size": 1,
    "num_epochs": 1,
    "max_steps": None,
    "optimizer": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "torch_compile": False,
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
    "lora_dropout": 0.0,
    "peft_use_dora": False,
    "peft_use_rslora": False,
    "loraplus_lr_ratio": None,
}
NOTES = {
    "adamw_hf": "the same update; adamw_hf is gone from transformers",
    "adamw_apex_fused": "PyTorch's own fused kernel",
    "truncate": "at most pack.max_lost_token_share of the tokens may be lost",
    "drop": "at most pack.max_lost_token_share of the tokens may be lost",
    "auto": "on from PyTorch 2.6",
}

_LAUNCH = "the launcher sets it; ranks are sft.num_processes"
_MLFLOW = "runs, metrics and models go to MLflow by themselves"
_LOADER = "the loader is set by itself: one sequential pass over the plan"
_PACKER = "the packer decides over the whole set at once and needs no tuning"
_TOKENIZER = "the base's own files tell it"
_SHARDING = "set by itself"
_SPEED = "a kernel; it changes speed and memory, not the result. sft.use_liger_kernel has fused ones"

NOT_NEEDED: dict[str, str] = {
    "output_dir": "stages write to data/, checkpoints go to .nightshift",
    "resume_from_checkpoint": "a killed training goes on from its last complete checkpoint by itself",
    "auto_resume_from_checkpoints": "a killed training goes on from its last complete checkpoint by itself",
    "dataset_prepared_path": "DVC keeps the tokenised data, by content",
    "dataset_processes": "the stages choose it",
    "dataset_num_proc": "the stages choose it",
    "dataset_keep_in_memory": "the stages choose it",
    "dataset_exact_deduplication": "the stage dedupe removes equal and nearly equal rows",
    "group_by_length": "rows are packed to equal length, and rows of like cost train side by side",
    "pad_to_sequence_len": "rows hold no padding that is learned",
    "batch_flattening": "packed rows need none",
    "multipack_real_batches": _PACKER,
    "sample_packing_group_size": _PACKER,
    "sample_packing_bin_size": _PACKER,
    "sample_packing_eff_est": _PACKER,
    "sample_packing_mp_start_method": _PACKER,
    "sample_packing_sequentially": _PACKER,
    "total_num_tokens": "the summary of the stage pack counts them",
    "total_supervised_tokens": "the summary of the stage pack counts them",
    "model_type": _TOKENIZER,
    "type_of_model": _TOKENIZER,
    "tokenizer_type": _TOKENIZER,
    "tokenizer_use_fast": _TOKENIZER,
    "tokenizer_legacy": _TOKENIZER,
    "is_falcon_derived_model": _TOKENIZER,
    "is_llama_derived_model": _TOKENIZER,
    "is_mistral_derived_model": _TOKENIZER,
    "is_qwen_derived_model": _TOKENIZER,
    "lora_fan_in_fan_out": "PEFT sees it from the layer",
    "loraplus_lr_embedding": "adapters stand on linear layers, not on embeddings",
    "lora_on_cpu": "weights are loaded where they train",
    "qlora_sharded_model_loading": _SHARDING,
    "local_rank": _LAUNCH,
    "world_size": _LAUNCH,
    "ddp": _LAUNCH,
    "device": _LAUNCH,
    "device_map": _LAUNCH,
    "accelerator_config": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH,
    "ddp_bucket_cap_mb": _LAUNCH,
    "ddp_broadcast_buffers": _LAUNCH,
    "low_cpu_mem_usage": _LAUNCH,
    "dataloader_pin_memory": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_drop_last": _LOADER,
    "remove_unused_columns": _LOADER,
    "save_safetensors": "weights are always safetensors",
    "save_only_model": "checkpoints hold all that a resumed training needs",
    "save_first_step": "sft.save_steps says when",
    "strict": "every section is checked as a whole",
    "gc_steps": "not used",
    "debug": "not used",
    "include_tokens_per_second": "always measured",
    "include_tkps": "always measured",
    "use_mlflow": _MLFLOW,
    "mlflow_experiment_name": _MLFLOW,
    "mlflow_run_name": _MLFLOW,
    "hf_mlflow_log_artifacts": _MLFLOW,
    "use_tensorboard": _MLFLOW,
    "use_wandb": _MLFLOW,
    "wandb_*": _MLFLOW,
    "use_comet": _MLFLOW,
    "comet_*": _MLFLOW,
    "gradio_*": "`nightshift` serves no web page for chats",
    "flash_attn_cross_entropy": _SPEED,
    "flash_attn_rms_norm": _SPEED,
    "flash_attn_fuse_qkv": _SPEED,
    "flash_attn_fuse_mlp": _SPEED,
    "unsloth_*": _SPEED,
    "lora_mlp_kernel": _SPEED,
    "lora_qkv_kernel": _SPEED,
    "lora_o_kernel": _SPEED,
    "cut_cross_entropy": _SPEED,
    "chunked_cross_entropy": _SPEED,
    "chunked_cross_entropy_num_chunks": _SPEED,
    "tiled_mlp*": _SPEED,
    "use_kernels": _SPEED,
    "axolotl_config_path": "internal to Axolotl",
    "is_preprocess": "internal to Axolotl",
    "preprocess_iterable": "internal to Axolotl",
    "experimental_skip_move_to_device": "internal to Axolotl",
}

_RL = (
    "only supervised fine-tuning is here; take the preference or reward data out, or train this with Axolotl"
)
_PARALLEL = (
    "a sequence, a layer or an expert is not divided here; take strategy zero3 or fsdp2 and shorter rows"
)
_BASE = "the base is trained as it is; make a local folder with the change and name it as base.model"
_RATES = "all weights that train share one learning rate; take it out"
_SHARE_OF_DATA = "the whole set is used; prepare files that hold the part and name them in snapshot.sources"
_PARTIAL = "sft.lora_target_modules names modules by name only; list them there, or take it out"
_ADAPTER_KIND = "lora and qlora with use_dora, use_rslora and loraplus_lr_ratio are here; take it out"
_PRETRAIN = (
    "streams are not read: give text rows as files in snapshot.sources; every token of them is learned"
)
_OPTIMIZER = "the optimiser has adam_beta1, adam_beta2, adam_epsilon and weight_decay; take the rest out"

UNMAPPED: dict[str, str] = {
    "evals_per_epoch": f"set sft.eval_steps; {AFTER_PACKING}",
    "saves_per_epoch": f"set sft.save_steps; {AFTER_PACKING}",
    "rl": _RL,
    "trl": _RL,
    "vllm": _RL,
    "reward_model": _RL,
    "process_reward_model": _RL,
    "num_labels": _RL,
    "dpo_*": _RL,
    "kto_*": _RL,
    "orpo_alpha": _RL,
    "rpo_alpha": _RL,
    "cpo_alpha": _RL,
    "simpo_gamma": _RL,
    "rl_beta": _RL,
    "max_prompt_len": _RL,
    "sequence_parallel_degree": _PARALLEL,
    "context_parallel_size": _PARALLEL,
    "tensor_parallel_size": _PARALLEL,
    "expert_parallel_size": _PARALLEL,
    "dp_shard_size": _PARALLEL,
    "dp_replicate_size": _PARALLEL,
    "heads_k_stride": _PARALLEL,
    "ring_attn_func": _PARALLEL,
    "load_in_8bit": "a base of eight bits is not here; adapter qlora has four, lora keeps it in base.dtype",
    "gptq": "a base in GPTQ cannot be trained on; name its original as base.model and set sft.adapter: qlora",
    "bnb_config_kwargs": "qlora is NF4 with double quantisation; take it out",
    "peft": _ADAPTER_KIND,
    "lora_model_dir": "a training starts from base.model; merge the adapter into it and name that folder",
    "lora_modules_to_save": "adapters train on linear layers only; take it out, or set sft.adapter: null",
    "lora_target_parameters": _PARTIAL,
    "peft_layers_to_transform": _PARTIAL,
    "peft_layers_pattern": _PARTIAL,
    "peft_layer_replication": _ADAPTER_KIND,
    "peft_init_lora_weights": _ADAPTER_KIND,
    "peft_trainable_token_indices": _ADAPTER_KIND,
    "peft_ensure_weight_tying": _ADAPTER_KIND,
    "peft_autocast_adapter_dtype": _ADAPTER_KIND,
    "relora*": _ADAPTER_KIND,
    "lisa_*": _ADAPTER_KIND,
    "merge_lora": "register the adapter and merge it where it is served",
    "unfrozen_parameters": "all weights train, or an adapter; set sft.adapter",
    "tokens": _BASE,
    "added_tokens_overrides": _BASE,
    "resize_token_embeddings_to_32x": _BASE,
    "mean_resizing_embeddings": _BASE,
    "shrink_embeddings": _BASE,
    "embeddings_skip_upcast": _BASE,
    "fix_untrained_tokens": _BASE,
    "model_config": _BASE,
    "overrides_of_model_config": _BASE,
    "model_kwargs": _BASE,
    "overrides_of_model_kwargs": _BASE,
    "model_quantization_config*": _BASE,
    "rope_scaling": _BASE,
    "cls_model_config": _BASE,
    "processor_type": "only text is trained; choose a text model",
    "image_size": "only text is trained; choose a text model",
    "image_resize_algorithm": "only text is trained; choose a text model",
    "tokenizer_use_mistral_common": "the tokenizer of transformers is used; choose a base that has one",
    "tokenizer_save_jinja_files": "the template is saved with the tokenizer; take it out",
    "trust_remote_code": "no code of a repository is run; choose a model that transformers knows",
    "chat_template_jinja": "the base's own template counts; put it into a local folder of the base, as "
    "chat_template.jinja, and name the folder as base.model",
    "chat_template_kwargs": "the template gets messages and tools only; put constants into the template",
    "eot_tokens": "the base's template says where a turn ends; correct it there",
    "default_system_message": "put it into the rows, as a system message",
    "min_sample_len": "the stages drop no short rows; filter the files",
    "eval_sequence_len": "evaluation rows have pack.max_length too; take it out",
    "max_packed_sequence_len": "it joined examples that saw each other; set pack.packing and pack.max_length",
    "curriculum_sampling": "rows are shuffled with sft.seed; their order cannot be given",
    "shuffle_before_merging_datasets": "rows are shuffled with sft.seed; their order cannot be given",
    "dataset_shard_num": _SHARE_OF_DATA,
    "dataset_shard_idx": _SHARE_OF_DATA,
    "skip_prepare_dataset": "rows are always checked and tokenised; give messages, not tokens",
    "pretraining_dataset": _PRETRAIN,
    "pretraining_sample_concatenation": _PRETRAIN,
    "pretrain_multipack_*": _PRETRAIN,
    "streaming*": _PRETRAIN,
    "use_pose": "positions are those of the examples; take it out",
    "pose_*": "positions are those of the examples; take it out",
    "push_dataset_to_hub": "data stays in DVC; push the folder data/pack by hand",
    "hf_use_auth_token": "set HF_TOKEN in the environment",
    "hub_model_id": "models go to the MLflow registry as registry.model_name; push to the Hub by hand",
    "hub_strategy": "models go to the MLflow registry; push to the Hub by hand",
    "hub_revision": "models go to the MLflow registry; push to the Hub by hand",
    "mlflow_tracking_uri": "a fact of the machine: set MLFLOW_TRACKING_URI in the environment",
    "auto_find_batch_size": "out of memory, the batch is halved and accumulation doubled by itself; "
    "name a size in sft.per_device_train_batch_size",
    "embedding_lr": _RATES,
    "embedding_lr_scale": _RATES,
    "lr_groups": _RATES,
    "lr_quadratic_warmup": "the warm-up is linear; a longer sft.warmup_steps comes near",
    "cosine_constant_lr_ratio": "use lr_scheduler_type warmup_stable_decay, or cosine with min_lr_rate",
    "jagged_restart_*": "use lr_scheduler_type cosine_with_restarts",
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "adam_beta3": _OPTIMIZER,
    "adam_epsilon2": _OPTIMIZER,
    "dion_*": _OPTIMIZER,
    "torchdistx_path": _OPTIMIZER,
    "fp8*": "training in float8 is not here; set sft.precision: bf16 and, with LoRA, sft.fp8_base: true",
    "s2_attention": "shifted sparse attention is not here; set sft.attn_implementation: auto",
    "sage_attention": "sage is not here; set sft.attn_implementation: auto",
    "flash_optimum": "BetterTransformer is gone; set sft.attn_implementation: sdpa",
    "flex_attn_compile_kwargs": "flex_attention is compiled with its defaults; take it out",
    "activation_offloading": "activations stay on the device; set sft.activation_checkpointing",
    "selective_checkpointing": "all layers are checkpointed, or none; set sft.activation_checkpointing",
    "deepcompile": "set sft.torch_compile",
    "torch_compile_mode": "the default mode is used; take it out",
    "llama4_linearized_experts": _BASE,
    "ddp_timeout": "a step that takes too long ends the training: set sft.step_timeout_seconds",
    "loss_watchdog_threshold": "spikes are told from the last losses: set sft.max_loss_ratio, such as 2.0",
    "loss_watchdog_patience": "one step above sft.max_loss_ratio stops the training",
    "max_memory": "layers are not spread by hand; set sft.strategy and the offload keys",
    "gpu_memory_limit": "layers are not spread by hand; set sft.strategy and the offload keys",
    "profiler_steps": "no profiler is attached; run torch.profiler by hand",
    "profiler_steps_start": "no profiler is attached; run torch.profiler by hand",
    "use_ray": "Ray signs in dedupe only; several machines train with sft.hostfile",
    "ray_*": "Ray signs in dedupe only; several machines train with sft.hostfile",
    "resources_per_worker": "Ray signs in dedupe only; several machines train with sft.hostfile",
    "use_otel_metrics": "metrics go to MLflow; take it out",
    "otel_metrics_*": "metrics go to MLflow; take it out",
    "eval_table_size": "no samples are generated in training; the stage evaluate scores the model",
    "eval_max_new_tokens": "no samples are generated in training; the stage evaluate scores the model",
    "generate_samples": "no samples are generated in training; the stage evaluate scores the model",
    "do_causal_lm_eval": "name benchmarks in snapshot.benchmarks (lm-eval)",
    "eval_causal_lm_metrics": "name benchmarks in snapshot.benchmarks (lm-eval)",
    "do_bench_eval": "name benchmarks in snapshot.benchmarks (lm-eval)",
    "bench_*": "name benchmarks in snapshot.benchmarks (lm-eval)",
    "lm_eval_*": "name benchmarks in snapshot.benchmarks (lm-eval)",
    "qat": "quantisation after or in training is not here; quantise the registered model",
    "quantization": "quantisation after or in training is not here; quantise the registered model",
    "cut_cross_entropy_*": "set sft.use_liger_kernel",
    "dynamic_checkpoint": "set sft.save_steps",
    "inference": "`nightshift` does not chat; serve the registered model",
}
