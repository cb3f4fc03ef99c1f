"""Probe attention kernels on the model's own attention: each must run, and compute the right result.

A small model of the base's architecture, with its heads, layer types, sliding window and softcap,
computes two examples alone with transformers' eager attention, alone with the tested kernel, and packed.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
            ).to(device)
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
        packed = torch.cat(self.examples, 1)
        try:
            self.model.set_attn_implementation(name)
            alone = self.run_alone()
            with self.autocast:
                # A compiled kernel may fail at the second length of a row.
                self.model(self.examples[0], use_cache=False).logits.sum().backward()
                logits = self.model(packed, **packed_arguments(self.device), use_cache=False).logits.float()
            logits.sum().backward()
        # Kernels fail in various ways: a missing package, a missing symbol, a device that is too old.
        except Exception as err:  # noqa: BLE001
            return describe(err)
        if (found := self.max_difference(alone, self.reference)) > self.tolerance:
            return f"its result differs from eager attention (logits by {found:.2g} standard deviations)"
        if (found := self.max_difference(logits, alone)) > self.tolerance:
            return f"packed examples attend to each other (logits differ by {found:.2g} standard deviations)"
        return None

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

    def max_difference(self, logits: torch.Tensor, others: torch.Tensor) -> float:
        """Return the largest difference, in standard deviations of the reference logits."""
        return ((logits - others).abs().max() / self.reference.std()).item()


def shrink(config: Mapping[str, Any], longest: int) -> Any:
    """Return the base's config with one layer per type, a small vocabulary, and large enough scores."""
    values = dict(config)
    small = AutoConfig.for_model(values.pop("model_type"), **values)
    kinds = list(dict.fromkeys(getattr(small, "layer_types", None) or ["full_attention"]))
    small.num_hidden_layers = len(kinds)
    if getattr(small, "layer_types", None):
        small.layer_types = kinds
    small.vocab_size, small.intermediate_size = VOCABULARY, 64
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    # Attention scores with a standard deviation of 3 at any width.
    small.initializer_range = (3 / small.hidden_size) ** 0.5
    if window := getattr(small, "sliding_window", None):
        small.sliding_window = WINDOW if longest > window else sum(LENGTHS)
    if getattr(small, "attn_logit_softcapping", None):
        small.attn_logit_softcapping = 1.0
    return small


def describe(error: Exception) -> str:
    """Format an error as its type and first line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def packed_arguments(device: str) -> dict[str, torch.Tensor | int]:
    """Return what TRL's collator passes to a kernel for this row: position_ids and boundaries."""
    positions = torch.cat([torch.arange(n, device=device) for n in LENGTHS])[None]
    return {"position_ids": positions, **boundaries(LENGTHS, device)}
