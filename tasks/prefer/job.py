"""The job of the ranks of preference tuning, and what it takes from the parameters of `sft`."""

from collections.abc import Iterator
from pathlib import Path

from nightshift.core.errors import ConfigError
from nightshift.core.paths import PREFERENCES
from tasks.prefer import PreferParams
from tasks.sft import SftParams
from tasks.sft.job import Job

# In the folder of a training run: log-probabilities of the reference, by side, shape (n_rows + 1, 2).
REFERENCE = "reference.safetensors"
# In its output: what changed on the held-out pairs.
RESULT = "preference.json"
# Attention kernels that read padded rows with a mask. The others keep packed rows apart by their boundaries.
PADDED = ("flash_attention_2", "flash_attention_3", "sdpa", "eager")
# Strategies whose ranks have whole weights, as the fused head of TRL and the proofs need them.
STRATEGIES = ("single", "ddp", "zero0", "zero1", "zero2")
# What only supervised training has; the policy starts from the model of `sft`.
NONE_OF_SFT = {
    "start_from": "base",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    # The policy equals its reference before step 1, so nothing may be dropped at random.
    "lora_dropout": 0.0,
    "eval_packing": False,
    "early_stopping_patience": None,
    "load_best_model_at_end": False,
    "max_loss_ratio": None,
    "loss_watchdog_threshold": None,
}


class PreferJob(Job):
    """One run of preference tuning; the rows are those of `tasks.prefer.rows`.

    Attributes:
        prefer: `prefer` section of params.yaml.
        model: Folder of the model of `sft`.
    """

    prefer: PreferParams
    model: Path
    stage: str = "prefer"
    worker: str = "tasks.prefer.worker"
    data: Path = PREFERENCES


def read_job(file: Path) -> PreferJob:
    """Read a job."""
    return PreferJob.model_validate_json(file.read_bytes())


def training_params(sft: SftParams, prefer: PreferParams) -> SftParams:
    """Return the parameters of `sft` with those of preference tuning in their place.

    Raises:
        ConfigError: A parameter of `sft` is not supported here.
    """
    if faults := list(find_unsupported(sft)):
        raise ConfigError("\n  ".join([f"params.yaml: prefer.method={prefer.method}:", *faults]))
    own = prefer.model_dump(include=set(SftParams.model_fields))
    kernel = sft.attn_implementation if sft.attn_implementation in PADDED else "auto"
    liger = {"use_liger_kernel": False}
    return SftParams(**{**sft.model_dump(), **NONE_OF_SFT, **own, **liger, "attn_implementation": kernel})


def find_unsupported(sft: SftParams) -> Iterator[str]:
    """Yield the parameters of `sft` with which preference tuning is not proven."""
    if sft.adapter == "qlora":
        yield "sft.adapter=qlora is not supported; set lora"
    if sft.strategy not in (*STRATEGIES, "auto"):
        yield f"sft.strategy={sft.strategy} is not supported; set zero2 or ddp"
    if sft.use_liger_kernel is True:
        yield "sft.use_liger_kernel=true replaces what TRL replaces; set auto"
    for name in ("hostfile", "fp8_base", "torch_compile", "lora_modules_to_save", "lora_target_parameters"):
        if value := getattr(sft, name):
            nothing = "false" if value is True else "[]" if isinstance(value, list) else "null"
            yield f"sft.{name}={value} is not supported; set it to {nothing}"
