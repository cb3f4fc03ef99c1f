"""Axolotl keys that are mapped one by one: `key -> target`, `key -> reason`.

Names: the schemas of Axolotl 0.4 to 0.18 (src/axolotl/utils/schemas), including deprecated keys.
"""

from collections.abc import Callable
from typing import Any

from infra.importers.findings import parse_bool, parse_float, parse_int, parse_nonzero

Convert = Callable[[Any], Any]

OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw_apex_fused": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit",
    "ao_adamw_4bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_lion_32bit": "paged_lion_32bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "adafactor": "adafactor",
    "lion_32bit": "lion_32bit",
    "lion_8bit": "lion_8bit",
    "schedule_free_adamw": "schedule_free_adamw",
    "muon": "muon",
}
SCHEDULE_FREE = ("schedule_free_radam", "schedule_free_sgd")


def map_optimizer(value: Any) -> str:
    """Map the name of an optimizer.

    Raises:
        ValueError: The optimizer has no counterpart.

    Example:
        >>> map_optimizer("adamw_bnb_8bit")
        'adamw_8bit'
    """
    value = str(value)
    if value not in OPTIMIZERS:
        near = "schedule_free_adamw" if value in SCHEDULE_FREE else None
        near = near or ("adamw_8bit" if "8bit" in value or "4bit" in value else "adamw_torch_fused")
        raise ValueError(f"optimizer {value} is not supported; set sft.optim, such as {near}")
    return OPTIMIZERS[value]


def parse_compile(value: Any) -> bool:
    """Parse torch_compile; `auto` is on from PyTorch 2.6.

    Raises:
        ValueError: The value is not true, false or auto.
    """
    return True if value == "auto" else parse_bool(value)


DIRECT: dict[str, tuple[str, Convert]] = {
    "sequence_len": ("pack.max_length", parse_int),
    "sample_packing": ("pack.packing", parse_bool),
    "eval_sample_packing": ("sft.eval_packing", parse_bool),
    "micro_batch_size": ("sft.per_device_train_batch_size", parse_int),
    "eval_batch_size": ("sft.per_device_eval_batch_size", parse_int),
    "num_epochs": ("sft.num_train_epochs", parse_int),
    "max_steps": ("sft.max_steps", parse_int),
    "learning_rate": ("sft.learning_rate", parse_float),
    "optimizer": ("sft.optim", map_optimizer),
    "adam_beta1": ("sft.adam_beta1", parse_float),
    "adam_beta2": ("sft.adam_beta2", parse_float),
    "adam_epsilon": ("sft.adam_epsilon", parse_float),
    "weight_decay": ("sft.weight_decay", parse_float),
    "max_grad_norm": ("sft.max_grad_norm", parse_float),
    "label_smoothing_factor": ("sft.label_smoothing_factor", parse_float),
    "torch_compile": ("sft.torch_compile", parse_compile),
    "early_stopping_patience": ("sft.early_stopping_patience", parse_int),
    "load_best_model_at_end": ("sft.load_best_model_at_end", parse_bool),
    "save_total_limit": ("sft.save_total_limit", parse_int),
    "logging_steps": ("sft.logging_steps", parse_int),
    "loss_watchdog_threshold": ("sft.loss_watchdog_threshold", parse_nonzero),
    "loss_watchdog_patience": ("sft.loss_watchdog_patience", parse_int),
    "seed": ("sft.seed", parse_int),
}
# Keys that apply only with an adapter.
ADAPTER: dict[str, tuple[str, Convert]] = {
    "lora_r": ("sft.lora_r", parse_int),
    "lora_alpha": ("sft.lora_alpha", parse_int),
    "lora_dropout": ("sft.lora_dropout", parse_float),
    "peft_use_dora": ("sft.use_dora", parse_bool),
    "peft_use_rslora": ("sft.use_rslora", parse_bool),
    "loraplus_lr_ratio": ("sft.loraplus_lr_ratio", parse_nonzero),
}
# Axolotl's defaults for keys that change the training result.
DEFAULTS: dict[str, Any] = {
    "sequence_len": 512,
    "sample_packing": False,
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
    "loss_watchdog_threshold": None,
    "loss_watchdog_patience": 3,
    "lora_dropout": 0.0,
    "peft_use_dora": False,
    "peft_use_rslora": False,
    "loraplus_lr_ratio": None,
}
# Keys without a default.
REQUIRED = ("learning_rate",)
NOTES = {
    "adamw_torch_8bit": "bitsandbytes instead of torchao; both keep the state in 8 bits, in blocks of 256",
    "ao_adamw_8bit": "bitsandbytes instead of torchao; both keep the state in 8 bits, in blocks of 256",
    "adamw_torch_4bit": "another optimizer: the state has 8 bits instead of 4, so it needs twice the memory",
    "ao_adamw_4bit": "another optimizer: the state has 8 bits instead of 4, so it needs twice the memory",
    "adamw_hf": "same update; transformers removed adamw_hf",
    "adamw_apex_fused": "PyTorch's fused kernel",
    "muon": "torch's Muon; its updates are scaled to the size of AdamW's, so check sft.learning_rate",
    "auto": "on from PyTorch 2.6",
}

_LAUNCH = "set by the launcher; sft.num_processes is the number of ranks"
_MLFLOW = "runs, metrics and models are logged to MLflow automatically"
_LOADER = "the data loader is set automatically: one sequential pass over the plan"
_PACKER = "the packer sees the whole set at once and needs no tuning"
_TOKENIZER = "read from the base's files"
_SHARDING = "set automatically"
_SPEED = "affects speed and memory only; sft.use_liger_kernel enables fused kernels"

NOT_NEEDED: dict[str, str] = {
    "output_dir": "stages write to data/, checkpoints to .nightshift",
    "auto_resume_from_checkpoints": "a killed training run resumes from its last complete checkpoint",
    "dataset_prepared_path": "DVC caches the tokenized data by content",
    "dataset_processes": "set by the stages",
    "dataset_num_proc": "set by the stages",
    "dataset_keep_in_memory": "set by the stages",
    "dataset_exact_deduplication": "the stage dedupe removes duplicates and near-duplicates",
    "group_by_length": "rows are packed to equal length, and rows of similar cost are trained together",
    "pad_to_sequence_len": "padding is never labelled",
    "batch_flattening": "not needed for packed rows",
    "multipack_real_batches": _PACKER,
    "sample_packing_group_size": _PACKER,
    "sample_packing_bin_size": _PACKER,
    "sample_packing_eff_est": _PACKER,
    "sample_packing_mp_start_method": _PACKER,
    "sample_packing_sequentially": _PACKER,
    "total_num_tokens": "counted in the summary of the stage pack",
    "total_supervised_tokens": "counted in the summary of the stage pack",
    "model_type": _TOKENIZER,
    "type_of_model": _TOKENIZER,
    "tokenizer_type": _TOKENIZER,
    "tokenizer_use_fast": _TOKENIZER,
    "tokenizer_legacy": _TOKENIZER,
    "is_falcon_derived_model": _TOKENIZER,
    "is_llama_derived_model": _TOKENIZER,
    "is_mistral_derived_model": _TOKENIZER,
    "is_qwen_derived_model": _TOKENIZER,
    "lora_fan_in_fan_out": "PEFT detects it from the layer",
    "loraplus_lr_embedding": "adapters are on linear layers, not on embeddings",
    "lora_on_cpu": "weights are loaded on the training device",
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
    "resize_token_embeddings_to_32x": "pads the vocabulary for speed; the added tokens never occur",
    "peft_autocast_adapter_dtype": "the adapter is kept in float32, or has a float32 copy under ZeRO",
    "peft_ensure_weight_tying": "tied weights stay tied",
    "tokenizer_save_jinja_files": "the template is saved with the tokenizer",
    "min_sample_len": "a row without a trained token is dropped",
    "eval_sequence_len": "rows of the validation set are never cut",
    "eval_max_new_tokens": "no samples are generated during training; the stage evaluate scores the model",
    "eval_table_size": "no samples are generated during training; the stage evaluate scores the model",
    "generate_samples": "no samples are generated during training; the stage evaluate scores the model",
    "torch_empty_cache_steps": "memory is managed by PyTorch",
    "merge_method": "`nightshift export` merges",
    "save_strategy_*": "set by sft.save_steps",
    "use_trackio": _MLFLOW,
    "trackio_*": _MLFLOW,
    "use_swanlab": _MLFLOW,
    "swanlab_*": _MLFLOW,
    "is_multimodal": "read from the base's files",
    "nccl_timeout": _LAUNCH,
    "save_safetensors": "weights are always saved as safetensors",
    "save_only_model": "checkpoints contain everything that is needed to resume",
    "save_first_step": "set by sft.save_steps",
    "strict": "every section is validated as a whole",
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
    "gradio_*": "`nightshift` has no web UI for chats",
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

_RL = "only supervised fine-tuning is supported; remove the preference or reward data, or train with Axolotl"
_PREFERENCE = (
    "preference tuning follows supervised fine-tuning here: import the config of that, set "
    "`preference: compare` of the sources and prefer.method: dpo or kto (docs/training.md), or train with "
    "Axolotl"
)
_PARALLEL = (
    "sequence, tensor and expert parallelism are not supported; use strategy zero3 or fsdp2 and shorter rows"
)
_BASE = "the base is trained unchanged; make the change in a local copy and set base.model to its folder"
_RATES = "all trainable weights share one learning rate; remove it"
_SHARE_OF_DATA = "the whole dataset is used; prepare files with the subset and list them in snapshot.sources"
_PARTIAL = "write a regular expression of the modules into sft.lora_target_modules, or remove it"
_ADAPTER_KIND = "only lora and qlora with use_dora, use_rslora and loraplus_lr_ratio are supported; remove it"
_PRETRAIN = "streaming is not supported: list files of text rows in snapshot.sources; every token is labelled"
_OPTIMIZER = "only adam_beta1, adam_beta2, adam_epsilon and weight_decay are supported; remove the rest"

# Keys of another base, other data or another objective: without a counterpart, nothing is written.
_ESSENTIAL = """
    rl trl reward_model process_reward_model num_labels kto_* orpo_alpha dpo_* simpo_gamma cpo_alpha
    pretraining_dataset streaming pretraining_sample_concatenation diffusion kd_trainer processor_type
    qat quantization gptq lora_model_dir peft relora lisa_step_interval
    lisa_n_layers added_tokens_overrides model_config overrides_of_model_config model_kwargs
    overrides_of_model_kwargs model_quantization_config* rope_scaling cls_model_config
    resume_from_checkpoint shrink_embeddings peft_layer_replication peft_trainable_token_indices
    peft_layers_pattern skip_prepare_dataset llmcompressor use_mora hatchery
    nemo_gym_enabled chat_template_kwargs use_pose spectrum_top_fraction
"""
ESSENTIAL = frozenset(_ESSENTIAL.split())

UNMAPPED: dict[str, str] = {
    "resume_from_checkpoint": "another tool's checkpoint cannot be continued; to train its weights further, "
    "set base.model to their folder",
    "rl": _PREFERENCE,
    "trl": _RL,
    "vllm": _RL,
    "reward_model": _RL,
    "process_reward_model": _RL,
    "num_labels": _RL,
    "dpo_*": _PREFERENCE,
    "kto_*": _PREFERENCE,
    "orpo_alpha": _RL,
    "rpo_alpha": _RL,
    "cpo_alpha": _RL,
    "simpo_gamma": _RL,
    "rl_beta": _PREFERENCE,
    "max_prompt_len": _RL,
    "sequence_parallel_degree": _PARALLEL,
    "context_parallel_size": _PARALLEL,
    "tensor_parallel_size": _PARALLEL,
    "expert_parallel_size": _PARALLEL,
    "dp_shard_size": _PARALLEL,
    "dp_replicate_size": _PARALLEL,
    "heads_k_stride": _PARALLEL,
    "ring_attn_func": _PARALLEL,
    "gptq": "a GPTQ base is not supported; set base.model to the original model and sft.adapter: qlora",
    "bnb_config_kwargs": "qlora uses NF4 with double quantization; remove it",
    "peft": _ADAPTER_KIND,
    "lora_model_dir": "make the adapter the champion (`nightshift adopt`), and set sft.start_from: champion",
    "peft_layers_pattern": _PARTIAL,
    "peft_layer_replication": _ADAPTER_KIND,
    "peft_init_lora_weights": _ADAPTER_KIND,
    "peft_trainable_token_indices": _ADAPTER_KIND,
    "relora*": _ADAPTER_KIND,
    "lisa_*": _ADAPTER_KIND,
    "merge_lora": "register the adapter, then merge it with `nightshift export`",
    "added_tokens_overrides": _BASE,
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
    "processor_type": "only text models are supported; choose one",
    "image_size": "only text models are supported; choose one",
    "image_resize_algorithm": "only text models are supported; choose one",
    "tokenizer_use_mistral_common": "the tokenizer of transformers is used; choose a base with one",
    "trust_remote_code": "remote code is never run: if transformers supports the model, remove this key, "
    "else choose another base",
    "chat_template_kwargs": "the template gets only messages and tools; put constants into the template",
    "max_packed_sequence_len": "it did not isolate packed examples; set pack.packing and pack.max_length",
    "curriculum_sampling": "rows are shuffled with sft.seed; a fixed order is not supported",
    "shuffle_before_merging_datasets": "rows are shuffled with sft.seed; a fixed order is not supported",
    "dataset_shard_num": _SHARE_OF_DATA,
    "dataset_shard_idx": _SHARE_OF_DATA,
    "skip_prepare_dataset": "rows are always checked and tokenized; use messages, not tokens",
    "pretraining_dataset": _PRETRAIN,
    "pretraining_sample_concatenation": _PRETRAIN,
    "pretrain_multipack_*": _PRETRAIN,
    "streaming*": _PRETRAIN,
    "use_pose": "position ids are those of the examples; remove it",
    "pose_*": "position ids are those of the examples; remove it",
    "push_dataset_to_hub": "data stays in DVC; push the folder data/pack manually",
    "hf_use_auth_token": "set HF_TOKEN in the environment",
    "hub_model_id": "models go to the MLflow registry as registry.model_name; push to the Hub manually",
    "hub_strategy": "models go to the MLflow registry; push to the Hub manually",
    "hub_revision": "models go to the MLflow registry; push to the Hub manually",
    "mlflow_tracking_uri": "machine-specific: set MLFLOW_TRACKING_URI in the environment",
    "auto_find_batch_size": "after out of memory, the micro-batch is halved and accumulation is doubled; "
    "set sft.per_device_train_batch_size",
    "embedding_lr": _RATES,
    "embedding_lr_scale": _RATES,
    "lr_groups": _RATES,
    "lr_quadratic_warmup": "warmup is linear; approximate it with a longer sft.warmup_steps",
    "cosine_constant_lr_ratio": "use lr_scheduler_type warmup_stable_decay, or cosine with min_lr_rate",
    "jagged_restart_*": "use lr_scheduler_type cosine_with_restarts",
    "optim_args": _OPTIMIZER,
    "optim_target_modules": _OPTIMIZER,
    "adam_beta3": _OPTIMIZER,
    "adam_epsilon2": _OPTIMIZER,
    "dion_*": _OPTIMIZER,
    "torchdistx_path": _OPTIMIZER,
    "fp8*": "float8 training is not supported; set sft.precision: bf16 and, with LoRA, sft.fp8_base: true",
    "s2_attention": "shifted sparse attention is not supported; set sft.attn_implementation: auto",
    "sage_attention": "sage attention is not supported; set sft.attn_implementation: auto",
    "flash_optimum": "BetterTransformer was removed; set sft.attn_implementation: sdpa",
    "flex_attn_compile_kwargs": "flex_attention is compiled with its defaults; remove it",
    "activation_offloading": "activations stay on the device; set sft.activation_checkpointing",
    "selective_checkpointing": "all layers are checkpointed, or none; set sft.activation_checkpointing",
    "deepcompile": "set sft.torch_compile",
    "torch_compile_mode": "the default mode is used; remove it",
    "llama4_linearized_experts": _BASE,
    "ddp_timeout": "a step that takes too long ends the training run: set sft.step_timeout_seconds",
    "max_memory": "layers cannot be placed manually; set sft.strategy and the offload keys",
    "gpu_memory_limit": "layers cannot be placed manually; set sft.strategy and the offload keys",
    "profiler_steps": "profiling is not supported; run torch.profiler manually",
    "profiler_steps_start": "profiling is not supported; run torch.profiler manually",
    "use_ray": "Ray is used only for dedupe; use sft.hostfile to train on several machines",
    "ray_*": "Ray is used only for dedupe; use sft.hostfile to train on several machines",
    "resources_per_worker": "Ray is used only for dedupe; use sft.hostfile to train on several machines",
    "use_otel_metrics": "metrics go to MLflow; remove it",
    "otel_metrics_*": "metrics go to MLflow; remove it",
    "do_causal_lm_eval": "list lm-eval benchmarks in snapshot.benchmarks",
    "eval_causal_lm_metrics": "list lm-eval benchmarks in snapshot.benchmarks",
    "do_bench_eval": "list lm-eval benchmarks in snapshot.benchmarks",
    "bench_*": "list lm-eval benchmarks in snapshot.benchmarks",
    "lm_eval_*": "list lm-eval benchmarks in snapshot.benchmarks",
    "qat": "quantization during or after training is not supported; quantize the registered model",
    "quantization": "quantization during or after training is not supported; quantize the registered model",
    "cut_cross_entropy_*": "set sft.use_liger_kernel",
    "dynamic_checkpoint": "set sft.save_steps",
    "diffusion*": "only the loss of the next token is supported",
    "kd_*": "distillation is not supported: only the labels of the rows are trained",
    "moe_*": "experts are computed as transformers does; remove it",
    "use_scattermoe": "experts are computed as transformers does; remove it",
    "use_sonicmoe": "experts are computed as transformers does; remove it",
    "router_aux_loss_coef": "the loss of the router is that of the base's config; set it there",
    "qgalore_*": _OPTIMIZER,
    "grokfast_*": _OPTIMIZER,
    "spectrum_*": "all weights or an adapter are trained; set sft.adapter",
    "lora_rank_pattern": "all adapters have the rank sft.lora_r",
    "lora_alpha_pattern": "all adapters have sft.lora_alpha",
    "loftq_config": _ADAPTER_KIND,
    "scaling_softmax*": "attention is computed as in transformers; remove it",
    "large_head_attention": "attention is computed as in transformers; set sft.attn_implementation",
    "gemma4_hybrid_attn_impl": "attention is computed as in transformers; set sft.attn_implementation",
    "inference": "use `nightshift chat` with a registered version",
}
