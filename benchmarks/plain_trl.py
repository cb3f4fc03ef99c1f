"""Train with plain TRL and its defaults, on tokens and labels in a given order.

Run `python plain_trl.py settings.json`. The script imports nothing from this project.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig, SFTTrainer


def main(settings_file: Path) -> None:
    """Train one epoch, and write losses, seconds and tokens to result.json."""
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    set_seed(0)
    trainer = SFTTrainer(
        model=settings["model"],
        args=SFTConfig(
            output_dir="out",
            num_train_epochs=1,
            max_length=settings["max_length"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            # Keep the given order, so that every step has the same chats as in the other program.
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(settings["rows"]),
        peft_config=LoraConfig(
            r=settings["lora_r"],
            lora_alpha=settings["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    result = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = next(
        entry["num_tokens"] for entry in reversed(trainer.state.log_history) if "num_tokens" in entry
    )
    output = {"train_seconds": result.metrics["train_runtime"], "losses": losses, "tokens": int(tokens)}
    Path("result.json").write_text(json.dumps(output), encoding="utf-8")


def read_arguments() -> Path:
    """Return the path of the settings file from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("settings_file", type=Path, help="JSON file with model, rows and hyperparameters")
    return Path(parser.parse_args().settings_file)


if __name__ == "__main__":
    main(read_arguments())
