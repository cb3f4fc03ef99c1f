"""Check a model that was trained elsewhere, and write its lineage, so that it can be registered."""

import json
import shutil
from pathlib import Path
from typing import Any

from nightshift.core.errors import DataError
from nightshift.core.files import file_digest, read_json, write_json, write_rows
from nightshift.core.paths import BASE_RECORD
from nightshift.registry.lineage import KEPT, ROWS, describe_environment
from nightshift.tracking.runs import git_commit

ADAPTER = "adapter_config.json"
# Files of a model besides its weights; tokenizer and chat template are those of the base.
SETTINGS = (ADAPTER, "config.json", "generation_config.json", "model.safetensors.index.json")


def copy_model(source: Path, target: Path) -> None:
    """Copy settings and weights of an adapter, or of full weights, and nothing else.

    Raises:
        DataError: The folder contains no model, weights in another format than safetensors, or code.
    """
    is_adapter = (source / ADAPTER).is_file()
    if not is_adapter and not (source / "config.json").is_file():
        raise DataError(
            f"{source}: contains neither {ADAPTER} nor config.json; give the folder of an adapter or of full "
            "weights in Hugging Face format"
        )
    weights = sorted(source.glob("adapter_model.safetensors" if is_adapter else "*.safetensors"))
    if not weights:
        raise DataError(
            f"{source}: contains no weights in safetensors format; save the model with safetensors"
        )
    kept = [path for name in SETTINGS if (path := source / name).is_file()]
    for path in kept:
        if "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            raise DataError(f"{path}: `auto_map` loads code from the model, which is never run; remove it")
    target.mkdir(parents=True)
    for path in (*kept, *weights):
        shutil.copyfile(path, target / path.name)


def require_fit(model: Path, base: Path) -> None:
    """Load a model on the base, and require that exactly its own weights are used.

    Libraries only warn about weights that are missing or not used, and the model would answer wrongly.

    Raises:
        DataError: The model does not load on the base, or weights are missing, unused or of other shapes.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    remedy = "set base.model to the base that it was trained from, and run `dvc repro base`"
    stored = dict[str, tuple[int, ...]]()
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    try:
        # Without memory: only names and shapes count.
        with torch.device("meta"):
            loaded: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
            if (model / ADAPTER).is_file():
                # Replaces weights, instead of copying into those without memory, with a warning for each.
                loaded = PeftModel.from_pretrained(loaded, model, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError) as err:
        reason = " ".join(str(err).split())[:300]
        raise DataError(f"{model}: does not load on the base: {reason}; {remedy}") from err
    is_adapter = isinstance(loaded, PeftModel)
    weights = get_peft_model_state_dict(loaded) if is_adapter else loaded.state_dict()
    expected = {name: tuple(weight.shape) for name, weight in weights.items()}
    if not is_adapter:
        for name in getattr(loaded, "_tied_weights_keys", None) or ():
            if name not in stored:
                expected.pop(name, None)
    faults = [
        f"{name} {stored.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]
    if faults:
        raise DataError(f"{model}: {len(faults)} weights do not fit the base, first: {faults[0]}; {remedy}")


def write_adopted_lineage(folder: Path, model: Path, source: Path, reason: str, run: str) -> None:
    """Write the lineage of an adopted model: where it came from, and no data, which is not known.

    Args:
        folder: Folder of the lineage.
        model: Folder with the model's files.
        source: Folder that it was adopted from.
        reason: Reason, as in the promotion record.
        run: MLflow run that stores the model.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder / "rows.parquet", [], ROWS)
    for path in KEPT:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    files = {path.name: file_digest(path) for path in sorted(model.iterdir())}
    write_json(
        folder / "lineage.json",
        {
            "adopted": {"from": str(source.absolute()), "files": files},
            "code": git_commit(),
            "changed": [],
            "shards": [],
            "summaries": {},
            "base": read_json(BASE_RECORD),
            "gate": {"verdict": "adopted", "reason": reason, "checks": []},
            "training": {"run_id": run},
            "effective": {},
            "environment": describe_environment(),
        },
    )
