"""A training step's GPU memory and floating-point operations, predicted from the model's shape.

    peak = weights and adapters
         + gradients and optimizer state of the trainable parameters
         + what the layers keep for the backward (the table below, times layers and tokens)
         + the largest temporary memory of the backward

Numbers of the compute dtype that a layer keeps for each token (D hidden size, Q width of all query heads, KV width of
all key or value heads, I intermediate size):

    none         2 D + (Q + 2 KV) + Q + 2 I       h twice, q k v, attention's output, the gate/up product
    selective    3 D + (Q + 2 KV) + Q             the feed-forward part's input in place of that product
    full         D                                h; and one layer's "none" while it is recomputed
    offload      0                                h of three layers at a time

"none" and "selective" also keep the adapters' low-rank activations, a float32 for each head (attention's log-sum-exp)
and one for each of the two norms. transformers' own layers keep more; FACTORS says how much, as measured
(docs/performance.md).

An evaluation that lets the model answer has a cache of keys and values in place of the layers' and the backward's part:

    cache = 2 layers KV numbers of the compute dtype for each token of each row, prompt and answer

Layers that are recorded in CUDA graphs (kernels/recording.py) have gradients of their own, and keep the layers' memory
during an evaluation.

If a base is split over processes (sharding.py), a GPU has its part of each layer and two whole layers.

The count of operations covers the forward and backward of LoRA training, without recomputation.

Shapes: N tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.recording import MOST_TOKENS
from ..lora.base_weight import base_format, base_weight_of, base_weights, compute_dtype, count_trainable, weight_shape
from ..lora.inject import adapter_matrices, lora_layers
from .loss import CHUNK_TOKENS
from .sharding import sharded_base

GIB = 2**30
FACTORS = {"fused": 1.0, "compiled": 1.6, "plain": 2.0}
"""Memory of the layers relative to the fused kernels, by the kind of a :class:`Backend`."""
_STORED_BYTES: dict[str, Callable[[int, int], float]] = {
    "fp8": lambda out, inner: out * inner + 4 * out,  # entries, scales
    "nf4": lambda out, inner: out * inner * (4 + 8 / 64 + 32 / (64 * 256)) / 8,  # entries, scales, scales of scales
    "nf4-fp8": lambda out, inner: out * inner * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 4 * out,
}
"""Bytes of a weight (out, in) in a format of lora/base_weight.py."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of a training step."""

    peak_gib: dict[str, float]
    """Peak by activation checkpointing mode, from the fastest mode to the smallest."""
    available_gib: float | None
    """Memory of the GPU that this process can use; None: not on a GPU."""

    def fastest_that_fits(self) -> str:
        """Return the first mode that fits, else ``"offload"``; without a GPU ``"none"``."""
        if self.available_gib is None:
            return "none"
        return next((mode for mode in self.peak_gib if self.fits(mode)), "offload")

    def fits(self, mode: str) -> bool:
        """Return whether a mode's peak is within 92 % of the available memory (the allocator leaves gaps)."""
        return self.available_gib is None or self.peak_gib[mode] <= 0.92 * self.available_gib

    def __str__(self) -> str:
        """Return the peaks: ``none 25.1, selective 16.8, full 9.6, offload 8.6 of 78.9 GiB``."""
        modes = ", ".join(f"{mode} {gib:.1f}" for mode, gib in self.peak_gib.items())
        return modes + (f" of {self.available_gib:.1f} GiB" if self.available_gib is not None else " GiB")


def plan_memory(
    model: nn.Module,
    tokens: int,
    kind: str = "fused",
    optimizer_bytes: float = 8.0,
    base_precision: str | None = None,
    parts: int = 1,
    cache_tokens: int = 0,
) -> MemoryPlan:
    """Predict the peak for micro-batches of ``tokens`` (N).

    Args:
        model: the model with its adapters, on the device where it will train.
        tokens: tokens of a micro-batch, padding included.
        kind: the kind of the backend that computes the layers, a key of :data:`FACTORS`.
        optimizer_bytes: bytes of optimizer state for each trainable number (AdamW in float32: 8).
        base_precision: a format of a quantised base: predict for the model loaded in it; None: for the model as is.
        parts: number of processes over which the decoder layers are split; a split model knows its own.
        cache_tokens: tokens of all rows together that an evaluation keeps the keys and values of; 0: none.
    """
    config: Any = model.config
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    size = compute_dtype(weight, weight).itemsize
    D, I, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers  # noqa: E741
    Q, KV = config.num_attention_heads * _head_dim(config), config.num_key_value_heads * _head_dim(config)
    adapted = lora_layers(model)
    ranks = sum(2 * layer.lora_A.shape[0] for layer in adapted.values()) // layers  # columns of z, both ways
    gate_up_r = max((layer.r for path, layer in adapted.items() if path.endswith("gate_up_proj")), default=0)
    attention = (2 * Q + 2 * KV + ranks) * size + 4 * config.num_attention_heads + 8
    kept = {  # bytes of a token in a layer
        "none": (2 * D + 2 * I) * size + attention,
        "selective": 3 * D * size + attention,
        "full": D * size,
        "offload": 0,
    }
    fixed = _weight_bytes(model, size, base_precision, parts)
    fixed += count_trainable(model) * (4 + optimizer_bytes + size)
    # Temporary memory is largest for the feed-forward part's gradients or for the loss's chunk of logits.
    # SwiGLU's backward writes a partial gradient of z for each 64 columns, at a rank padded for tensor cores.
    partial_sums = size * tokens * I // 64 * 2 * max(16, 1 << (gate_up_r - 1).bit_length()) if gate_up_r else 0
    gradients = tokens * (3 * I + 2 * D) * size + partial_sums
    logits = min(CHUNK_TOKENS, tokens) * config.vocab_size * size + tokens * 2 * D * size
    # A recomputed gate/up product takes no extra memory: its gradient overwrites it.
    recomputed = {"none": 0, "selective": 0, "full": tokens * (kept["none"] - 2 * I * size)}
    recomputed["offload"] = recomputed["full"]
    widest = {mode: max(gradients + extra, logits) for mode, extra in recomputed.items()}
    widest["offload"] += tokens * 3 * D * size  # one input on its way to the host, one on its way back, one in use
    factor = FACTORS[kind]
    step = {mode: factor * (tokens * layers * kept[mode] + widest[mode]) for mode in kept}
    cache = cache_tokens * cache_bytes_per_token(model)
    if kind == "fused" and 0 < tokens <= MOST_TOKENS:
        fixed += 4 * count_trainable(model)
        peak = {mode: (fixed + step[mode] + cache) / GIB for mode in kept}
    else:
        peak = {mode: (fixed + max(step[mode], cache)) / GIB for mode in kept}
    return MemoryPlan(peak, _available_gib(model, weight.device))


def _weight_bytes(model: Any, size: int, base_precision: str | None, parts: int) -> float:
    """Return the bytes of all weights on this process's device, and of the one that a product writes out at a time.

    ``size`` is that of a number of the compute dtype; ``base_precision`` and ``parts`` are as in :func:`plan_memory`.
    """
    head = model.get_output_embeddings()
    linear: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]

    def stored_bytes(layer: Any) -> float:
        if base_precision is None:
            return base_weight_of(layer).nbytes
        return _STORED_BYTES[base_precision](*weight_shape(layer.weight))

    total = _bytes(model) + sum(stored_bytes(layer) - base_weight_of(layer).nbytes for layer in linear)
    split = sharded_base(model)
    parts = parts if split is None else split.size
    if parts > 1:  # this process's part of every layer, and two whole layers
        layers = model.get_decoder().layers
        each = [sum(stored_bytes(m) for m in layer.modules() if isinstance(m, nn.Linear)) for layer in layers]
        total += sum(each) / parts + 2 * max(each) - sum(each)
    # A product writes its nf4 weight out, or its fp8 weight's transpose.
    written = {"": 0, "nf4": size, "fp8": 1, "nf4-fp8": 1}[base_precision or base_format(model)]
    return total + written * max(weight_shape(layer.weight).numel() for layer in linear)


def cache_bytes_per_token(model: nn.Module) -> int:
    """Return the bytes of a token's keys and values in all layers: Phi-3-mini in bf16 takes 384 KiB."""
    config: Any = model.config
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config)
    return int(numbers * compute_dtype(weight, weight).itemsize)


def _head_dim(config: Any) -> int:
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def _bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters, buffers and quantised weights' scales; tied ones count once.

    Those of a model that is split over processes count whole.
    """
    stored = [t for weight in base_weights(model) for t in weight.tensors()]
    tensors = {
        (t.untyped_storage()._cdata, t.storage_offset()): t
        for t in [*model.parameters(), *model.buffers(), *stored]
        if t.device.type != "meta"
    }
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _available_gib(model: nn.Module, device: torch.device) -> float | None:
    """Return the GPU's free memory plus the model's own and what this process has reserved but does not use."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    split = sharded_base(model)
    absent = 0 if split is None else split.absent_bytes
    return (free + unused + _bytes(model) - absent) / GIB


# --- Operations

# Dense bf16 TFLOP/s of the vendors' datasheets, by a part of torch.cuda.get_device_name().
_PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Return the dense 16-bit FLOP/s of the device; None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def mean_context_tokens(lengths: Any) -> float:
    """Return the number of keys that a query sees on average in documents of ``lengths``: half of its document."""
    return float((lengths**2).sum() / (2 * lengths.sum()))


def flops_per_token(model: Any, mean_context_tokens: float) -> float:
    """Return the operations of one token's forward and backward, without recomputation.

    An entry of a frozen weight costs 2 operations in the forward and 2 in the backward (no weight gradient), an
    adapter's entry 6. Attention costs 4 * mean_context_tokens * heads * head_dim in the forward, twice that in the
    backward.
    """
    adapters = sum(matrix.numel() for matrix in adapter_matrices(model))
    decoder = model.get_decoder()
    layers = [*(m for m in decoder.modules() if isinstance(m, nn.Linear)), model.get_output_embeddings()]
    frozen = sum(weight_shape(m.weight).numel() for m in layers)
    config = model.config
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * _head_dim(config) * mean_context_tokens
    return float(4 * frozen + 6 * adapters + attention)
