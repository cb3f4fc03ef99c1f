"""Probe attention kernels on the model's own attention: each must run, and compute the right result.

A small model of the base's architecture, with its heads, layer types, sliding window and softcap,
computes two examples alone with transformers' eager attention. A kernel must give the same logits for them
padded, and, where the rows of a batch are flattened into one, for both in one row.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nightshift.core.errors import ConfigError
from tasks.sft import SftParams
from tasks.sft.attention import boundaries
from tasks.sft.strategy import HALF, ZERO

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LENGTHS = (24, 40)
WINDOW = 8
VOCABULARY = 64
# Maximum difference of logits, in standard deviations: kernels sum in different order. A kernel that
# lets examples attend to each other, or ignores a window or a softcap, is off by more than 1.
TOLERANCE = {"bf16": 0.2, "fp16": 0.05, "tf32": 0.05, "fp32": 0.005}
# Config entries with the size of a local attention, in tokens.
LOCAL_SIZES = ("sliding_window", "attention_chunk_size", "attention_window_size")


class Probe:
    """A small model of the base's architecture, and its logits with eager attention."""

    def __init__(
        self, params: SftParams, device: str, precision: str, config: Mapping[str, Any], longest: int
    ) -> None:
        """Build the model.

        Args:
            params: `sft` section of params.yaml.
            device: cuda or cpu.
            precision: Precision of training.
            config: The base model's config.json.
            longest: Length of the longest example in tokens; a window at least as long is disabled.

        Raises:
            ConfigError: transformers cannot build or run the model.
        """
        self.device, self.tolerance = device, TOLERANCE[precision]
        # Without DeepSpeed, full fine-tuning keeps its weights in full precision; queries and keys then
        # reach the kernel in full precision, and values do not.
        is_mixed = precision in HALF and params.adapter is None and params.strategy not in ZERO
        dtype = torch.float32 if is_mixed else DTYPES.get(precision, torch.float32)
        self.autocast = torch.autocast(device, DTYPES[precision]) if is_mixed else nullcontext()
        torch.manual_seed(0)
        try:
            self.model = AutoModelForCausalLM.from_config(
                shrink(config, longest), attn_implementation="eager", dtype=dtype, trust_remote_code=False
            )
            # Dropout would make any two results differ.
            self.model = self.model.to(device).eval()
            self.examples = [torch.randint(VOCABULARY, (1, n), device=device) for n in LENGTHS]
            self.reference = self.run_alone()
        except Exception as err:
            raise ConfigError(
                f"data/base/model/config.json: a small model of this architecture does not run: "
                f"{describe(err)}; use another base"
            ) from err

    def try_kernel(self, name: str) -> str | None:
        """Return why a kernel does not work on this machine, or None if it works.

        Args:
            name: Attention implementation of transformers.
        """
        try:
            # Some classes accept a kernel only once they are built.
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(deepcopy(self.model.config), attn_implementation=name)
            self.model.set_attn_implementation(name)
            if self.model.config._attn_implementation != name:
                return "this architecture has an attention of its own, which a kernel does not replace"
            alone = self.run_alone()
            with self.autocast:
                # A compiled kernel may fail at the second length of a row.
                torch.autograd.backward(self.model(self.examples[0], use_cache=False).logits.sum())
                padded = self.run_padded()
            torch.autograd.backward(padded.sum())
        # Kernels fail in various ways: a missing package, a missing symbol, a device that is too old.
        except Exception as err:  # noqa: BLE001
            return describe(err)
        for logits in (alone, padded):
            if (found := self.max_difference(logits, self.reference)) > self.tolerance:
                return f"its result differs from eager attention (logits by {found:.2g} standard deviations)"
        return None

    def find_leak(self, name: str) -> str | None:
        """Return why a kernel does not keep the examples of one flattened row apart, or None if it does.

        Args:
            name: Attention implementation of transformers.
        """
        packed, given = torch.cat(self.examples, 1), packed_arguments(self.device)
        # The self-test on the real model uses both forms too; see `tasks.sft.proof.without_boundaries`.
        forms = [given] if name == "flash_attention_4" else [given, {"position_ids": given["position_ids"]}]
        try:
            self.model.set_attn_implementation(name)
            with self.autocast:
                found = [self.model(packed, **form, use_cache=False).logits.float() for form in forms]
            found[0].sum().backward()
        # Some layers refuse boundaries, such as convolutions without their package.
        except Exception as err:  # noqa: BLE001
            return describe(err)
        if (difference := max(self.max_difference(one, self.reference) for one in found)) > self.tolerance:
            return (
                f"packed examples attend to each other: logits differ by {difference:.2g} standard deviations"
            )
        return None

    def find_unreached(self) -> tuple[str, ...]:
        """Return the modules that text does not reach, such as the encoder of images; they stay frozen."""
        self.model.zero_grad(set_to_none=True)
        with self.autocast:
            self.model(self.examples[0], use_cache=False).logits.sum().backward()
        found: list[str] = []
        for name, module in self.model.named_modules():
            # Parts of the model as a whole; an expert without tokens is deeper.
            is_part = name and name.count(".") < 2 and not name.startswith(tuple(f"{n}." for n in found))
            weights = list(module.parameters())
            if is_part and weights and all(weight.grad is None for weight in weights):
                found.append(name)
        return tuple(found)

    @torch.no_grad()
    def find_head(self) -> str | None:
        """Return the name of the module that outputs the logits, or None if the model changes them."""
        head = self.model.get_output_embeddings()
        seen: list[torch.Tensor] = []
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return None
        hook = head.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with self.autocast:
            logits = self.model(self.examples[0], use_cache=False).logits
        hook.remove()
        (name,) = (name for name, module in self.model.named_modules() if module is head)
        return name.rpartition(".")[2] if len(seen) == 1 and torch.equal(seen[0], logits) else None

    @torch.no_grad()
    def run_alone(self) -> torch.Tensor:
        """Compute the logits of each example alone, shape (1, sum(LENGTHS), VOCABULARY)."""
        with self.autocast:
            return torch.cat([self.model(ids, use_cache=False).logits.float() for ids in self.examples], 1)

    def run_padded(self) -> torch.Tensor:
        """Compute the logits of both examples in a padded batch, shape as in `run_alone`."""
        ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for row, (example, length) in enumerate(zip(self.examples, LENGTHS, strict=True)):
            ids[row, :length], mask[row, :length] = example[0], 1
        logits = self.model(ids, attention_mask=mask, use_cache=False).logits.float()
        return torch.cat([row[:length] for row, length in zip(logits, LENGTHS, strict=True)])[None]

    def max_difference(self, logits: torch.Tensor, others: torch.Tensor) -> float:
        """Return the largest difference, in standard deviations of the reference logits."""
        return ((logits - others).abs().max() / self.reference.std()).item()


def shrink(config: Mapping[str, Any], longest: int) -> Any:
    """Return the base's config with one layer per type, a small vocabulary, and large enough scores."""
    small = build_config(config)
    text = small.get_text_config()
    for key in small.sub_configs:
        if (tower := getattr(small, key)) is not text and hasattr(tower, "num_hidden_layers"):
            tower.num_hidden_layers = 1
    shrink_layers(text)
    text.vocab_size = VOCABULARY
    for key in text.to_dict():
        if key.endswith("intermediate_size"):
            setattr(text, key, 64)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    # Attention scores with a standard deviation of 3 at any width.
    text.initializer_range = (3 / text.hidden_size) ** 0.5
    for key in LOCAL_SIZES:
        if size := getattr(text, key, None):
            setattr(text, key, WINDOW if longest > size else sum(LENGTHS))
    if getattr(text, "attn_logit_softcapping", None):
        text.attn_logit_softcapping = 1.0
    return small


def build_config(config: Mapping[str, Any]) -> Any:
    """Build transformers' config from the content of config.json.

    Raises:
        ValueError: transformers does not know the model type.
    """
    if (name := config["model_type"]) not in CONFIG_MAPPING:
        raise ValueError(f"transformers does not know model_type {name!r}")
    kind: Any = CONFIG_MAPPING[name]
    return kind.from_dict(kind._decode_special_floats(dict(config)))


def shrink_layers(text: Any) -> None:
    """Keep one layer of each type, or the shortest start that has all types if the model derives them."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ["attention"]
    if "layer_types" in vars(text) and text.layer_types:
        text.layer_types = list(dict.fromkeys(kinds))
        text.num_hidden_layers = len(text.layer_types)
    else:
        text.num_hidden_layers = 1 + max(kinds.index(kind) for kind in kinds)


def describe(error: Exception) -> str:
    """Format an error as its type and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def packed_arguments(device: str) -> dict[str, torch.Tensor | int]:
    """Return what TRL's collator passes to a model for this row: positions, boundaries, example indices."""
    positions = torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]
    owners = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return {
        "position_ids": positions,
        "seq_idx": owners[None].to(device, torch.int32),
        **boundaries(LENGTHS, device),
    }
