"""How much memory a training takes on each device: known from config.json alone, before any weight loads.

Every term is counted from what the code keeps: PEFT's and DeepSpeed's buffers as they allocate them, and
activations as autograd saves them, read with `torch.autograd.graph.saved_tensors_hooks` on such a model.
Four moments compete for the peak, since activations fall while gradients rise: the loss, the first layer to
be computed again, the end of the backward pass, and the step of the optimiser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tasks.sft import SftParams
from tasks.sft.shape import Shape, count_adapter, count_linear, count_parameters, linears, read_shape, targets
from tasks.sft.strategy import BUCKET, GIB, HALF, LOGITS, ZERO, choose_loss, keeps_half, uses_autocast

STRATEGIES = ("single", "ddp", *ZERO, "fsdp2")
# Bytes of the optimiser's state for each trained parameter. 8-bit states have a scale of four bytes for every
# block of 256 (Dettmers et al., arXiv 2110.02861). Adafactor's is counted by rows and columns instead.
STATE_BYTES = {
    "adamw_torch": 8.0,
    "adamw_torch_fused": 8.0,
    "schedule_free_adamw": 8.0,
    "lion_32bit": 4.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 2 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
}
# Bytes of a weight in NF4 with doubly quantised scales: 4 + 0.127 bits (Dettmers et al., arXiv 2305.14314).
NF4_BYTES = 4.127 / 8
# DeepSpeed 0.19: gathered parameters that ZeRO-3 does not let go.
MAX_LIVE = 1_000_000_000
# Python, torch, transformers, TRL, DeepSpeed and MLflow once imported, and what they keep for themselves:
# measured by benchmarks/memory.py as peak minus counted bytes, torch 2.13 on x86-64.
CPU_OVERHEAD = 870 * 2**20
# glibc's aligned blocks do not fit into the holes that such blocks leave, and lengths differ from row to row:
# after some steps this share of what a forward pass allocates lies idle. With activation checkpointing equal
# blocks follow each other, and fit more often. Measured there, glibc 2.36.
IDLE, IDLE_CHECKPOINTED = 0.9, 0.55
# DeepSpeed's buffers in shared memory on the processor: every rank maps one of each rank.
SHARED_BUFFER = 69_206_024
# CUDA's context and cuBLAS's workspaces. Assumed, not measured: half a gibibyte is usual on recent devices.
CUDA_OVERHEAD = GIB // 2
# Kernels that neither write a mask out nor repeat the heads of keys and values.
FLASH = (
    *("flash_attention_2", "flash_attention_3", "flash_attention_4", "torch_varlen"),
    *("flex_attention", "xformers"),
)
# The head of models of Llama's kind, which returns the logits as they are.
HEAD = "lm_head"
# Strategies that give each rank a share only.
DIVIDES_STATE = ("zero1", "zero2", "zero3", "fsdp2")
DIVIDES_WEIGHTS = ("zero3", "fsdp2")


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-batch, flattened: its tokens, and those of them that have labels."""

    tokens: int
    labelled: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the peak.

    Attributes:
        overhead: What a process takes before it holds a model, and what its allocator lets lie idle.
        weights: Frozen and trained weights, and those that ZeRO-3 or FSDP2 gathers.
        gradients: Gradients and the buckets in which they travel.
        optimizer: State of the optimiser, full-precision copies of the weights, and temporaries of its step.
        activations: What the backward pass needs of the forward pass.
        logits: Logits at the labelled positions, and their gradients.
        moment: When the peak is: loss, recomputation, backward or step.
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
        """All of it, in bytes."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


def estimate(
    config: Mapping[str, Any],
    params: SftParams,
    strategy: str,
    precision: str,
    batch: Batch,
    device: str,
) -> Memory:
    """Estimate the peak of one device, or of one process on the processor.

    What is offloaded counts as nothing on a GPU; on the processor it lies in the same memory.

    Args:
        config: The model's config.json.
        params: The section sft; `activation_checkpointing: auto` counts as false, `attn_implementation: auto`
            as sdpa_per_example on a processor, and else as sdpa, which keeps the most of those it may choose.
        strategy: Any but auto.
        precision: bf16, fp16, tf32 or fp32.
        batch: The largest micro-batch.
        device: cuda or cpu.

    Raises:
        ConfigError: The model is not of Llama's kind, or a target of the adapter is unknown.
    """
    shape = read_shape(config)
    trained = count_adapter(shape, params) if params.adapter else count_parameters(shape)
    ranks = params.ranks
    weights = _weights(shape, params, strategy, precision, trained)
    state = _state(shape, params, strategy, precision, trained)
    if device == "cuda" and params.offload_optimizer != "none":
        state = 0.0
    if device == "cuda" and params.offload_param != "none":
        weights -= _divided(shape, params, strategy, precision, trained)
    if device == "cpu" and params.attn_implementation == "auto":
        params = params.model_copy(update={"attn_implementation": "sdpa_per_example"})
    kept, layer = _activations(shape, params, strategy, precision, batch)
    logits = _logits(shape, params, strategy, precision, batch, device)
    held, full, at_step = _gradients(params, strategy, precision, trained, device)
    if device == "cuda" and params.optim == "adamw_torch" and params.offload_optimizer == "none":
        # The default implementation computes the denominators of all weights at once.
        at_step += 4 * trained / (ranks if strategy in DIVIDES_STATE else 1)
    overhead = float(CUDA_OVERHEAD)
    if device == "cpu":
        overhead = _process(shape, params, strategy, precision, batch.tokens, layer)
        # The default implementation computes the denominators of one tensor at a time, in two copies. ZeRO's
        # is all of a rank's share; else the largest is that of the embeddings.
        largest = 0 if params.adapter else shape.vocabulary * shape.hidden
        at_step += 8 * (trained / ranks if strategy in DIVIDES_STATE else largest)
    if params.adapter is None and shape.is_tied:
        # The gradients of embeddings and head exist side by side until they are added.
        full += 4 * shape.vocabulary * shape.hidden
    moments = {
        "loss": (held, kept, logits),
        "recomputation": (held, kept + layer if params.activation_checkpointing is True else 0.0, 0.0),
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
    """Return the bytes of a process on the processor: before it holds a model, shared, and idle.

    `layer` is what one block keeps of the batch for its backward pass.
    """
    passes = layer
    if params.adapter is not None:
        # What the adapter adds to each layer's result, and is freed on the way.
        width = sum(width for _, width in targets(shape, params).values())
        passes += tokens * width * (2 if precision in HALF else 4)
    idle = IDLE_CHECKPOINTED if params.activation_checkpointing is True else IDLE
    shared = SHARED_BUFFER * params.ranks if strategy in ZERO and params.ranks > 1 else 0
    return CPU_OVERHEAD + shared + idle * shape.layers * passes


def _weight_bytes(params: SftParams, strategy: str, precision: str) -> int:
    """Return the bytes of a stored weight."""
    return 2 if keeps_half(params, strategy, precision) else 4


def _divided(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of this rank's share of the weights, frozen and trained, gathered ones aside."""
    size = _weight_bytes(params, strategy, precision)
    count = count_parameters(shape)
    total = float(size * count)
    if params.adapter == "qlora":
        # Embeddings, norms and head stay, in full precision (PEFT's prepare_model_for_kbit_training).
        total = NF4_BYTES * count_linear(shape) + 4 * (count - count_linear(shape))
    if params.adapter:
        # PEFT makes adapters in full precision; DeepSpeed casts them to that of the job.
        total += trained * (size if strategy in ZERO else 4)
    return total / params.ranks if strategy in DIVIDES_WEIGHTS else total


def _weights(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of the weights on a rank, with those that are gathered for a while."""
    total = _divided(shape, params, strategy, precision, trained)
    size = 2 if precision in HALF else 4
    if strategy == "zero3":
        total += size * min(count_parameters(shape), MAX_LIVE)
    if strategy == "fsdp2":
        # The embeddings stay gathered; of the blocks, the one that runs and the next.
        blocks = count_linear(shape) / shape.layers * 2
        total += size * (shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2) + blocks)
    return total


def _state(shape: Shape, params: SftParams, strategy: str, precision: str, trained: int) -> float:
    """Return the bytes of the optimiser's state and of full-precision copies of what trains."""
    if params.optim == "adafactor":
        sizes = targets(shape, params) if params.adapter else linears(shape)
        # Rows and columns: for an adapter (r, in) and (out, r), else (in, out) and the embeddings.
        rank = 2 * params.lora_r if params.adapter else 0
        edges = shape.layers * sum(inputs + outputs + rank for inputs, outputs in sizes.values())
        total = 4.0 * (edges + (0 if params.adapter else shape.vocabulary + shape.hidden))
    else:
        total = STATE_BYTES[params.optim] * trained
    # ZeRO-1 to 3 copy the weights whatever their precision, ZeRO-0 those of half precision.
    if strategy in ("zero1", "zero2", "zero3") or (strategy == "zero0" and precision in HALF):
        total += 4 * trained
    return total / params.ranks if strategy in DIVIDES_STATE else total


def _gradients(
    params: SftParams, strategy: str, precision: str, trained: int, device: str
) -> tuple[float, float, float]:
    """Return the bytes of the gradients at the loss, at the end of the backward pass, and at the step."""
    accumulates = params.gradient_accumulation_steps > 1
    whole, share = 4.0 * trained, 4.0 * trained / params.ranks
    half = (2 if precision in HALF else 4) * trained
    # DeepSpeed's bucket has its full size at once; the processor's kernel gives only the pages that are used.
    used = BUCKET if device == "cuda" else min(trained, BUCKET)
    bucket = used * (2 if precision in HALF else 4)
    match strategy:
        case "ddp":
            # A second copy: the buckets in which gradients travel live as long as the training.
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
    """Return the bytes that all layers keep for the backward pass, and those of one layer."""
    residual = _weight_bytes(params, strategy, precision)
    layer = batch.tokens * _layer_bytes(shape, params, strategy, precision, batch.tokens)
    kept = shape.layers * layer
    if params.activation_checkpointing is True:
        # The input of each layer.
        kept = float(shape.layers * batch.tokens * shape.hidden * residual)
    casts = precision in HALF and residual == 4
    # Autocast keeps a copy in half precision of every weight that trains.
    return kept + (2 * count_linear(shape) + 2 * shape.vocabulary * shape.hidden if casts else 0), layer


def _layer_bytes(shape: Shape, params: SftParams, strategy: str, precision: str, tokens: int) -> float:
    """Return the bytes for each token that one block keeps for its backward pass."""
    size = 2 if precision in HALF else 4
    residual = _weight_bytes(params, strategy, precision)
    autocast = uses_autocast(strategy, precision)
    # Norms compute in full precision; gate, its activation and up; queries, keys, values and their result.
    total = 8.0 * shape.hidden + size * (3 * shape.intermediate + 4 * shape.query)
    if params.adapter is None:
        total += 2 * residual * shape.hidden
        # Autocast casts the inputs of a linear layer again for each of the layers that share them.
        total += size * ((5 if autocast else 2) * shape.hidden + shape.intermediate)
    else:
        sizes = targets(shape, params).values()
        inputs = sum(width for width, _ in sizes)
        if params.lora_dropout:
            # What is left, and where: a byte each.
            total += (size + 1) * inputs
        # Layers that share an input share what is kept of it. QLoRA's norms are in full precision, so that
        # autocast casts it for each.
        is_cast = autocast and params.adapter == "qlora"
        total += size * (inputs if is_cast else 2 * shape.hidden + shape.intermediate)
        total += size * params.lora_r * len(sizes)
    return total + _attention_bytes(shape, params.attn_implementation, size, tokens)


def _attention_bytes(shape: Shape, attention: str, size: int, tokens: int) -> float:
    """Return what a block keeps for each token of its attention, beside queries, keys, values and result."""
    if attention == "eager":
        # The probabilities of every pair, in full precision, and cast.
        return float(shape.heads * tokens * (4 + (2 if size == 2 else 0)))
    if attention in FLASH:
        # Keys and values are not repeated for the queries that share them.
        return 4.0 * shape.heads - 2 * size * (shape.query - shape.key)
    if attention == "sdpa_per_example":
        # Nor here; the results of the examples are kept, and what they are joined to.
        return 4.0 * shape.heads - 2 * size * (shape.query - shape.key) + size * shape.query
    # The mask that keeps packed examples apart, made into numbers anew in every block.
    return 4.0 * shape.heads + size * tokens


def _logits(
    shape: Shape, params: SftParams, strategy: str, precision: str, batch: Batch, device: str
) -> float:
    """Return the bytes at the start of the backward pass, which begins at the head.

    In chunks: the logits of one, as multiplied and in full precision, and the exponentials beside them;
    hidden states and their gradient. Else first log-probabilities and two gradients, in full precision; then,
    if the head trains, one gradient of the logits and that of the head, each also in half precision where
    that is what multiplies.
    """
    if choose_loss(params, precision, HEAD) == "chunked":
        size = 2 if precision in HALF else 4
        tokens = min(batch.labelled, LOGITS[device] // (4 * shape.vocabulary))
        chunk = shape.vocabulary * tokens * (8 + (size if size != 4 else 0))
        return float(chunk + 2 * size * batch.labelled * shape.hidden)
    first = 12.0 * shape.vocabulary * batch.labelled
    if params.adapter:
        return first
    stored, size = _weight_bytes(params, strategy, precision), 2 if precision in HALF else 4
    head = stored + (size if size != stored else 0)
    scores = 4 + (size if size != 4 else 0)
    return max(first, float(shape.vocabulary * (scores * batch.labelled + head * shape.hidden)))


def estimate_all(
    config: Mapping[str, Any], params: SftParams, precision: str, batch: Batch, device: str
) -> dict[str, Memory]:
    """Estimate every strategy; `single` is one process, whatever `num_processes` says.

    Raises:
        ConfigError: As `estimate`.
    """
    alone = params.model_copy(update={"num_processes": 1})
    return {
        name: estimate(config, alone if name == "single" else params, name, precision, batch, device)
        for name in STRATEGIES
    }


def totals(sizes: Mapping[str, Memory]) -> dict[str, int]:
    """Return strategy -> bytes at the peak."""
    return {name: memory.total for name, memory in sizes.items()}


def largest_batch(
    order: Sequence[int], tokens: Sequence[int], labelled: Sequence[int], micro_batch_size: int
) -> Batch:
    """Return the most tokens, and the most labelled ones, that one forward pass of the plan sees.

    Args:
        order: Row numbers in the order of training, -1 for a filler.
        tokens: Tokens of each row, shape (n_rows,).
        labelled: Labelled tokens of each row, shape (n_rows,).
        micro_batch_size: Rows in one forward pass.

    Example:
        >>> largest_batch([0, 1, 2, -1], tokens=[5, 6, 9], labelled=[4, 4, 1], micro_batch_size=2)
        Batch(tokens=11, labelled=8)
    """
    batches = [
        [row for row in order[i : i + micro_batch_size] if row >= 0]
        for i in range(0, len(order), micro_batch_size)
    ]
    return Batch(
        max(sum(tokens[row] for row in rows) for rows in batches),
        max(sum(labelled[row] for row in rows) for rows in batches),
    )
