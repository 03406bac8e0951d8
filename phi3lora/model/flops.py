"""How many floating-point operations one token of LoRA training takes, and what a GPU can do in a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .four_bit import weight_shape
from .injection import lora_layers

# Dense bf16 TFLOP/s of the vendors' datasheets, by a part of torch.cuda.get_device_name().
_PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "A800": 312, "L40S": 362,
    "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Dense 16-bit FLOP/s of the device, where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS.items() if part in name), None)


def mean_context_tokens(lengths: Any) -> float:
    """Keys that a query sees on average in documents of ``lengths`` (documents,): half of its document."""
    return float((lengths**2).sum() / (2 * lengths.sum()))


def flops_per_token(model: Any, mean_context_tokens: float) -> float:
    """Forward and backward of one token, recomputation not counted.

    A frozen weight costs 2 operations an entry in the forward and 2 in the backward (no weight gradient); an adapter's
    entry 6; attention 4 * context * heads * head_dim forward and twice that backward, with
    ``mean_context_tokens`` keys seen by a query on average.
    """
    adapters = sum(p.numel() for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))
    decoder = model.get_decoder()
    layers = [*(m for m in decoder.modules() if isinstance(m, nn.Linear)), model.get_output_embeddings()]
    frozen = sum(weight_shape(m.weight).numel() for m in layers)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * mean_context_tokens
    return 4.0 * frozen + 6.0 * adapters + float(attention)
