"""Estimate the memory of a training run per device from config.json, before any weights load.

Every term is counted from what the code keeps: the buffers that PEFT and DeepSpeed allocate, and the
activations that autograd saves, read with `torch.autograd.graph.saved_tensors_hooks` on a Llama-like
model. Four moments compete for the peak, since activations shrink while gradients grow: the loss, the
first recomputed layer, the end of the backward pass, and the optimizer step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from tasks.sft import SftParams
from tasks.sft.shape import (
    Shape,
    count_linear,
    count_parameters,
    count_trained,
    linears,
    read_shape,
    targets,
)
from tasks.sft.strategy import (
    BUCKET,
    GIB,
    HALF,
    LOGITS,
    ZERO,
    choose_lora,
    choose_loss,
    keeps_half,
    uses_autocast,
)

STRATEGIES = ("single", "ddp", *ZERO, "fsdp2")
# Bytes of optimizer state per trained parameter. 8-bit states have a 4-byte scale per block of 256
# (Dettmers et al., arXiv 2110.02861). Adafactor's state is counted by rows and columns instead.
STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "schedule_free_adamw": 8.0,
    # The moment of matrices; that of a full model's embeddings and head has two, which are added.
    "muon": 4.0,
    "paged_adamw_32bit": 8.0,
    "lion_32bit": 4.0,
    "paged_lion_32bit": 4.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
    "paged_lion_8bit": 1 + 4 / 256,
}
# Bytes per NF4 weight with double quantization: 4 + 0.127 bits (Dettmers et al., arXiv 2305.14314).
NF4_BYTES = 4.127 / 8
# DeepSpeed 0.19: gathered parameters that ZeRO-3 does not release.
MAX_LIVE = 1_000_000_000
# Python, torch, transformers, TRL, DeepSpeed and MLflow after import, with their own buffers: measured
# by benchmarks/memory.py as peak minus counted bytes, torch 2.13 on x86-64.
CPU_OVERHEAD = 870 * 2**20
# Fragmentation: glibc's aligned blocks do not fit into freed holes, and lengths vary between rows, so
# after some steps this fraction of a forward pass is idle. Activation checkpointing repeats equal
# blocks, which fit more often. Measured by the same benchmark, glibc 2.36.
IDLE, IDLE_CHECKPOINTED = 0.9, 0.55
# DeepSpeed's shared memory buffer on a CPU: every rank maps the buffers of all ranks.
SHARED_BUFFER = 69_206_024
# CUDA context and cuBLAS workspaces. Assumed, not measured: 0.5 GiB is usual on recent devices.
CUDA_OVERHEAD = GIB // 2
# Kernels that neither materialize a mask nor repeat the key and value heads; torch_varlen repeats them
# before torch 2.13.
FLASH = (
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen"),
    *("flex_attention", "xformers", "avx512_per_example"),
)
VARLEN_SHARES_HEADS = (2, 13)
# The head of Llama-like models, which returns the logits unchanged.
HEAD = "lm_head"
# Strategies that shard the optimizer state, and the weights.
SHARDS_STATE = ("zero1", "zero2", "zero3", "fsdp2")
SHARDS_WEIGHTS = ("zero3", "fsdp2")


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-batch, flattened: its tokens and its labelled tokens."""

    tokens: int
    labelled: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak bytes on one device.

    Attributes:
        overhead: Process memory before a model is loaded, and idle memory of the allocator.
        weights: Frozen and trained weights, and those gathered by ZeRO-3 or FSDP2.
        gradients: Gradients, their communication buckets, and temporaries of the optimizer step.
        optimizer: Optimizer state, and full-precision copies of the weights.
        activations: Activations saved for the backward pass.
        logits: Logits at the labelled positions, and their gradients.
        moment: Moment of the peak: loss, recomputation, backward or step.
    """

    overhead: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    moment: str

    @property
    def total(self) -> int:
        """Return the sum, in bytes."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


def estimate(
    config: Mapping[str, Any],
    params: SftParams,
    strategy: str,
    precision: str,
    batch: Batch,
    device: str,
) -> Memory:
    """Estimate the peak of one device, or of one process on a CPU.

    Offloaded tensors count as zero on a GPU; on a CPU they use the same memory.

    Args:
        config: The model's config.json.
        params: `sft` section of params.yaml; `activation_checkpointing: auto` and `use_liger_kernel: auto`
            count as false, `attn_implementation: auto` as sdpa_per_example on a CPU, and else as sdpa,
            which keeps the most of the kernels that `auto` may choose.
        strategy: Distributed strategy, any but auto.
        precision: bf16, fp16, tf32 or fp32.
        batch: Largest micro-batch.
        device: cuda or cpu.

    Raises:
        ConfigError: The model is not Llama-like, or a target module is unknown.
    """
    shape = read_shape(config)
    trained = count_trained(shape, params)
    ranks = params.ranks
    weights = _weights(shape, params, strategy, precision, trained)
    state = _state(shape, params, strategy, precision, trained)
    if device == "cuda" and params.offload_optimizer != "none":
        state = 0.0
    if device == "cuda" and params.offload_param != "none":
        weights -= _sharded(shape, params, strategy, precision, trained)
    if device == "cpu" and params.attn_implementation == "auto":
        params = params.model_copy(update={"attn_implementation": "sdpa_per_example"})
    kept, layer = _activations(shape, params, strategy, precision, batch)
    logits = _logits(shape, params, strategy, precision, batch, device)
    held, full, at_step = _gradients(params, strategy, precision, trained, device)
    if device == "cuda" and params.optim == "adamw_torch" and params.offload_optimizer == "none":
        # The default implementation of AdamW computes the denominators of all weights at once.
        at_step += 4 * trained / (ranks if strategy in SHARDS_STATE else 1)
    overhead = float(CUDA_OVERHEAD)
    if device == "cpu":
        overhead = _process(shape, params, strategy, precision, batch.tokens, layer)
        # The default implementation of AdamW computes the denominators of one tensor at a time, in two
        # copies. Under ZeRO this tensor is a rank's whole shard; else the largest one is the embeddings.
        largest = 0 if params.adapter else shape.vocabulary * shape.hidden
        at_step += 8 * (trained / ranks if strategy in SHARDS_STATE else largest)
    if params.adapter is None and shape.is_tied:
        # The gradients of embeddings and head coexist until they are added.
        full += 4 * shape.vocabulary * shape.hidden
    again = kept + layer if params.activation_checkpointing is True else 0.0
    if again and device == "cuda":
        # Gradients within the MLP: of its activation and of up, and of its output. Their share of a CPU's
        # memory is idle memory, which is measured.
        again += batch.tokens * (2 if precision in HALF else 4) * (2 * shape.intermediate + shape.hidden)
    moments = {
        "loss": (held, kept, logits),
        "recomputation": (held, again, 0.0),
        "backward": (full, layer, 0.0),
        "step": (at_step, 0.0, 0.0),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, scores = moments[moment]
    return Memory(
        overhead=round(overhead),
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(state),
        activations=round(activations),
        logits=round(scores),
        moment=moment,
    )


def _process(
    shape: Shape, params: SftParams, strategy: str, precision: str, tokens: int, layer: float
) -> float:
    """Return the bytes of a process on a CPU: base overhead, shared buffers, and idle memory.

    `layer` is the number of bytes that one block saves for its backward pass.
    """
    passes = layer
    if params.adapter is not None:
        # Adapter outputs of each layer, which are freed during the pass.
        width = sum(width for _, width in targets(shape, params).values())
        passes += tokens * width * (2 if precision in HALF else 4)
    idle = IDLE_CHECKPOINTED if params.activation_checkpointing is True else IDLE
    shared = SHARED_BUFFER * params.ranks if strategy in ZERO and params.ranks > 1 else 0
    return CPU_OVERHEAD + shared + idle * shape.layers * passes


def _weight_bytes(params: SftParams, strategy: str, precision: str) -> int:
    """Return the bytes per stored weight."""
    return 2 if keeps_half(params, strategy, precision) else 4


def _sharded(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of this rank's shard of frozen and trained weights, without gathered ones."""
    size = _weight_bytes(params, strategy, precision)
    count = count_parameters(shape)
    total = float(size * count)
    if params.adapter == "qlora":
        # Embeddings, norms and head stay unquantized, in full precision (PEFT's
        # prepare_model_for_kbit_training).
        total = NF4_BYTES * count_linear(shape) + 4 * (count - count_linear(shape))
    if params.adapter:
        # PEFT creates adapters in full precision; DeepSpeed casts them to the precision of the job.
        total += trained * (size if strategy in ZERO else 4)
    return total / params.ranks if strategy in SHARDS_WEIGHTS else total


def _weights(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of the weights on a rank, with those that are temporarily gathered."""
    total = _sharded(shape, params, strategy, precision, trained)
    size = 2 if precision in HALF else 4
    if strategy == "zero3":
        total += size * min(count_parameters(shape), MAX_LIVE)
    if strategy == "fsdp2":
        # The embeddings stay gathered; so do the running block and the next one.
        blocks = count_linear(shape) / shape.layers * 2
        total += size * (shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2) + blocks)
    return total


def _state(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of the optimizer state and of full-precision copies of trained weights."""
    if params.optim == "adafactor":
        sizes = targets(shape, params) if params.adapter else linears(shape)
        # Rows and columns: for an adapter (r, in) and (out, r), else (in, out) and the embeddings.
        rank = 2 * params.lora_r if params.adapter else 0
        edges = shape.layers * sum(inputs + outputs + rank for inputs, outputs in sizes.values())
        total = 4.0 * (edges + (0 if params.adapter else shape.vocabulary + shape.hidden))
    else:
        total = STATE_BYTES[params.optim] * trained
        if params.optim == "muon" and params.adapter is None:
            total += 4.0 * max(0, trained - count_linear(shape))
    # ZeRO-1 to ZeRO-3 copy the weights in any precision, ZeRO-0 only in half precision.
    if strategy in ("zero1", "zero2", "zero3") or (strategy == "zero0" and precision in HALF):
        total += 4 * trained
    return total / params.ranks if strategy in SHARDS_STATE else total


def _gradients(
    params: SftParams, strategy: str, precision: str, trained: int, device: str
) -> tuple[float, float, float]:
    """Return the bytes of the gradients at the loss, the end of the backward pass, and the step."""
    accumulates = params.gradient_accumulation_steps > 1
    whole, share = 4.0 * trained, 4.0 * trained / params.ranks
    half = (2 if precision in HALF else 4) * trained
    # DeepSpeed allocates the full bucket at once; on a CPU the kernel provides only the pages in use.
    used = BUCKET if device == "cuda" else min(trained, BUCKET)
    bucket = used * (2 if precision in HALF else 4)
    match strategy:
        case "ddp":
            # DDP's communication buckets are a second copy, which exists for the whole training run.
            return (2 * whole if accumulates else whole), 2 * whole, 2 * whole
        case "zero0":
            return (whole if accumulates else 0.0), half + whole, whole
        case "zero1":
            return (whole if accumulates else 0.0), bucket + whole, whole + share
        case "zero2" | "zero3":
            on_device = 0.0 if params.offload_optimizer != "none" and device == "cuda" else share
            return (on_device if accumulates else 0.0), bucket + on_device, 2 * on_device
        case "fsdp2":
            return (share if accumulates else 0.0), share, share
    return (whole if accumulates else 0.0), whole, whole


def _activations(
    shape: Shape, params: SftParams, strategy: str, precision: str, batch: Batch
) -> tuple[float, float]:
    """Return the bytes that all layers save for the backward pass, and those of one layer."""
    residual = _weight_bytes(params, strategy, precision)
    layer = batch.tokens * _layer_bytes(shape, params, strategy, precision, batch.tokens)
    kept = shape.layers * layer
    if params.activation_checkpointing is True:
        # The input of each layer.
        kept = float(shape.layers * batch.tokens * shape.hidden * residual)
    casts = precision in HALF and residual == 4
    # Autocast caches a half-precision copy of every trained weight.
    return kept + (2 * count_linear(shape) + 2 * shape.vocabulary * shape.hidden if casts else 0), layer


def _layer_bytes(shape: Shape, params: SftParams, strategy: str, precision: str, tokens: int) -> float:
    """Return the bytes per token that one block saves for its backward pass."""
    size = 2 if precision in HALF else 4
    residual = _weight_bytes(params, strategy, precision)
    autocast = uses_autocast(strategy, precision)
    # Norms in full precision; gate, its activation and up; queries, keys, values and attention output.
    norms, gates = 8.0, 3
    is_native = (
        params.attn_implementation == "avx512_per_example" and choose_lora(params, strategy) == "fused"
    )
    if params.use_liger_kernel is True or is_native:
        # These norms keep their input as it is, and this SwiGLU recomputes the activation of the gate.
        norms, gates = 2.0 * residual, 2
    total = norms * shape.hidden + size * (gates * shape.intermediate + 4 * shape.query)
    if params.adapter is None:
        total += 2 * residual * shape.hidden
        # Autocast casts a shared input again for each linear layer that uses it.
        total += size * ((5 if autocast else 2) * shape.hidden + shape.intermediate)
    else:
        sizes = targets(shape, params).values()
        inputs = sum(width for width, _ in sizes)
        if params.lora_dropout:
            # The dropout output, and its mask at one byte per element.
            total += (size + 1) * inputs
        # Layers that share an input save it once. QLoRA's norms are in full precision, so autocast casts
        # their output for each layer.
        is_cast = autocast and params.adapter == "qlora"
        total += size * (inputs if is_cast else 2 * shape.hidden + shape.intermediate)
        total += size * params.lora_r * len(sizes)
    return total + _attention_bytes(shape, params.attn_implementation, size, tokens)


def _attention_bytes(shape: Shape, attention: str, size: int, tokens: int) -> float:
    """Return the bytes per token that attention saves, without queries, keys, values and output."""
    if attention == "eager":
        # The attention probabilities in full precision, and their cast copy.
        return float(shape.heads * tokens * (4 + (2 if size == 2 else 0)))
    if attention in FLASH:
        repeats = attention == "torch_varlen" and torch_version() < VARLEN_SHARES_HEADS
        # Otherwise, key and value heads are not repeated for the query heads that share them.
        return 4.0 * shape.heads - (0 if repeats else 2 * size * (shape.query - shape.key))
    if attention == "sdpa_per_example":
        # Not repeated either; the outputs of the examples are kept, and so is their concatenation.
        return 4.0 * shape.heads - 2 * size * (shape.query - shape.key) + size * shape.query
    # The mask that isolates packed examples, converted to numbers again in every block.
    return 4.0 * shape.heads + size * tokens


def torch_version() -> tuple[int, int]:
    """Return major and minor version of torch, without importing it."""
    major, minor = version("torch").split(".")[:2]
    return int(major), int(minor)


def _logits(
    shape: Shape, params: SftParams, strategy: str, precision: str, batch: Batch, device: str
) -> float:
    """Return the bytes at the start of the backward pass, which begins at the head.

    Chunked loss: the logits of one chunk, as multiplied and in full precision, with their exponentials;
    hidden states and their gradient. Otherwise: first the log-probabilities and two gradients, in full
    precision; then, if the head trains, one gradient of the logits and that of the head, each also in
    half precision if the matrix product uses it.
    """
    if choose_loss(params, precision, HEAD) == "chunked":
        size = 2 if precision in HALF else 4
        tokens = min(batch.labelled, LOGITS[device] // (4 * shape.vocabulary))
        chunk = shape.vocabulary * tokens * (8 + (size if size != 4 else 0))
        return float(chunk + 2 * size * batch.labelled * shape.hidden)
    first = 12.0 * shape.vocabulary * batch.labelled
    if params.adapter and not params.lora_modules_to_save:
        return first
    stored, size = _weight_bytes(params, strategy, precision), 2 if precision in HALF else 4
    head = stored + (size if size != stored else 0)
    scores = 4 + (size if size != 4 else 0)
    return max(first, float(shape.vocabulary * (scores * batch.labelled + head * shape.hidden)))


def estimate_all(
    config: Mapping[str, Any], params: SftParams, precision: str, batch: Batch, device: str
) -> dict[str, Memory]:
    """Estimate every strategy; `single` is one process, whatever the value of `num_processes`.

    Raises:
        ConfigError: See `estimate`.
    """
    alone = params.model_copy(update={"num_processes": 1})
    return {
        name: estimate(config, alone if name == "single" else params, name, precision, batch, device)
        for name in STRATEGIES
    }


def totals(sizes: Mapping[str, Memory]) -> dict[str, int]:
    """Return strategy -> peak bytes."""
    return {name: memory.total for name, memory in sizes.items()}


def largest_batch(
    order: Sequence[int],
    tokens: Sequence[int],
    labelled: Sequence[int],
    micro_batch_size: int,
    *,
    is_padded: bool = False,
) -> Batch:
    """Return the maximum tokens, and the maximum labelled tokens, of any forward pass of the plan.

    Args:
        order: Row indices in training order, -1 for a filler.
        tokens: Tokens of each row, shape (n_rows,).
        labelled: Labelled tokens of each row, shape (n_rows,).
        micro_batch_size: Rows per forward pass.
        is_padded: Whether the rows of a forward pass are padded to the longest one.

    Example:
        >>> rows = {"tokens": [5, 6, 9], "labelled": [4, 4, 1], "micro_batch_size": 2}
        >>> largest_batch([0, 1, 2, -1], **rows), largest_batch([0, 1, 2, -1], **rows, is_padded=True)
        (Batch(tokens=11, labelled=8), Batch(tokens=12, labelled=8))
    """
    batches = [
        [row for row in order[i : i + micro_batch_size] if row >= 0]
        for i in range(0, len(order), micro_batch_size)
    ]
    return Batch(
        max(
            len(rows) * max((tokens[row] for row in rows), default=0)
            if is_padded
            else sum(tokens[row] for row in rows)
            for rows in batches
        ),
        max(sum(labelled[row] for row in rows) for rows in batches),
    )
