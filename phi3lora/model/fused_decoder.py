"""The decoder of a Phi-3 on a GPU, in few passes: frozen products, attention, and three fused kernels a layer.

transformers' ``Phi3DecoderLayer`` says what is computed; this file computes the same with its modules' own parameters:

    h, x, z = add_norm(h, down product of the layer before)          passes/norm.py
    q, k, v = rotate(x W_qkv', z)                                    passes/rotary.py
    y, z    = attend(q, k, v) W_o', ... A_o'                         attention.py, passes/product.py
    h, x, z = add_norm(h, y, z)
    x, z    = swiglu(x W_gate_up', z)                                passes/swiglu.py
    y, z    = x W_down', z                                           added by the next layer's add_norm

Everything an adapter adds rides in those passes. What a layer keeps for the backward: h twice, q, k, v, attention's
output and y of gate/up; with ``"selective"`` checkpointing not the last, with ``"full"`` only h,
with ``"offload"`` h on the host.

:func:`reason_not_to_fuse` says why a model must go through transformers' own layers instead.

Shapes: B rows, S tokens a row, N = B*S, D hidden size, H heads, n rotary components.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm

from .activations import recompute_layer, recomputes_feed_forward
from .attention import NAME, packed_attention, packed_layout
from .frozen import frozen_of, frozen_product, plain_classes
from .layers import Linear, MergedLinear
from .low_rank import compute_dtype

_LARGEST_R = 128  # beyond it a tile of low-rank activations no longer fits in registers
_NOTHING: Any = (None, None, None)  # y, z and adapter of a projection whose output has still to be added to h
_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def reason_not_to_fuse(model: nn.Module) -> str | None:
    """Why the passes cannot compute this model's layers as they are; None: they can."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    config: Any = model.config
    if not weight.is_cuda:
        return "not on a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "a GPU older than Ampere"
    if compute_dtype(weight, weight) not in (torch.bfloat16, torch.float16):
        return "computed in float32"
    if config._attn_implementation != NAME:
        return f"attention {config._attn_implementation!r}"
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop"):
        if getattr(config, name, 0.0) and model.training:
            return f"{name}={getattr(config, name)}"
    for layer in model.get_decoder().layers:  # type: ignore[operator]
        reason = _layer_reason(layer)
        if reason:
            return reason
    return None


def _layer_reason(layer: Any) -> str | None:
    """The same of one layer: it must be transformers' own, with nothing hooked into it."""
    if type(layer) is not Phi3DecoderLayer or type(layer.input_layernorm) is not Phi3RMSNorm:
        return f"a {type(layer).__name__} that is not transformers' Phi-3 layer"
    if layer._compiled_call_impl is not None:
        return "compiled layers"
    for module in layer.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"a hook on a {type(module).__name__}"
        if "forward" in vars(module) and not (module is layer.mlp and recomputes_feed_forward(layer)):
            return f"a {type(module).__name__} whose forward was replaced"
    if layer.mlp.config.hidden_act != "silu":
        return f"hidden_act={layer.mlp.config.hidden_act!r}"
    attention = layer.self_attn
    if (
        attention.head_dim % 16
        or int(attention.head_dim * attention.config.rope_parameters["partial_rotary_factor"]) % 16
    ):
        return f"head_dim={attention.head_dim}, or the rotated part of it, is no multiple of 16"
    widths = [attention.config.num_attention_heads * attention.head_dim]
    widths += 2 * [attention.config.num_key_value_heads * attention.head_dim]
    edges = {"self_attn.qkv_proj": widths, "mlp.gate_up_proj": 2 * [layer.mlp.down_proj.in_features]}
    for path in _PROJECTIONS:
        projection = layer.get_submodule(path)
        if (
            type(projection) not in (Linear, MergedLinear, *plain_classes())
            or getattr(projection, "bias", None) is not None
        ):
            return f"{path} is a {type(projection).__name__} or has a bias"
        if getattr(projection, "fan_in_fan_out", False):
            return f"{path} is stored transposed"
        if getattr(projection, "r", 0) > _LARGEST_R:
            return f"r={projection.r} of {path} is over {_LARGEST_R}"
        if isinstance(projection, MergedLinear) and list(projection.segments) != edges.get(path):
            return f"{path} has segments of its own"
    return None


def fused_decoder(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The decoder's last hidden state, after its norm: (N, D).

    Args:
        model: a Phi-3 for which :func:`reason_not_to_fuse` is None. What its layers recompute in the backward is for
            their own switches to say (activations.py).
        batch: what ``phi3lora.batches`` yields, on the model's device.
    """
    from .passes.adapter import compute_copies
    from .passes.norm import add, add_norm

    decoder: Any = model.get_decoder()  # type: ignore[operator]
    dtype = compute_dtype(decoder.embed_tokens.weight, decoder.embed_tokens.weight)
    embedded = decoder.embed_tokens(batch["input_ids"]).to(dtype)  # (B, S, D)
    rope = decoder.rotary_emb(embedded, position_ids=batch["position_ids"])
    cos, sin = (t.expand(embedded.shape[0], -1, -1).flatten(0, 1).to(dtype).contiguous() for t in rope)  # (N, n)
    h, before = embedded.flatten(0, 1), _NOTHING
    # A dropout mask is made anew from its seed wherever it is needed; torch's own generator draws the seeds.
    seeds = torch.randint(2**31 - 1, (len(decoder.layers), len(_PROJECTIONS))).tolist()
    layout = packed_layout(model.config, batch)
    projections = [layer.get_submodule(path) for layer in decoder.layers for path in _PROJECTIONS]
    adapted = [p for p in projections if getattr(p, "r", 0)]
    copies = compute_copies([t for p in adapted for t in (p.lora_A, p.lora_B)], dtype) if adapted else {}
    for layer, layer_seeds in zip(decoder.layers, seeds, strict=True):
        run = partial(_layer, layer, layer_seeds, copies, embedded.shape[:2], layout)
        if torch.is_grad_enabled() and layer.training and layer.gradient_checkpointing:
            h, before = add(h, before), _NOTHING
            h = recompute_layer(layer, partial(_whole_layer, run, add, cos, sin), h)
        else:
            h, before = run(h, before, cos, sin)
    return add_norm(h, before, decoder.norm.weight, decoder.norm.variance_epsilon, None)[1]


def _whole_layer(run: Any, add: Any, cos: Tensor, sin: Tensor, h: Tensor) -> Tensor:
    """A layer from residual stream to residual stream: what is recomputed in the backward."""
    h, before = run(h, _NOTHING, cos, sin)
    return add(h, before)


def _layer(
    layer: Any, seeds: list[int], copies: Mapping[Tensor, Tensor], rows: tuple[int, int], layout: dict[str, Any],
    h: Tensor, before: Any, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Any]:  # fmt: skip
    """One layer: h (N, D) and what its predecessor has still to add -> the same of this layer."""
    from .passes.adapter import make_adapter
    from .passes.norm import add_norm
    from .passes.product import product_and_projection
    from .passes.rotary import rotate
    from .passes.swiglu import swiglu

    attention, mlp = layer.self_attn, layer.mlp
    projections = map(layer.get_submodule, _PROJECTIONS)
    qkv, o, gate_up, down = (make_adapter(p, copies, seed) for p, seed in zip(projections, seeds, strict=True))
    norm = layer.input_layernorm
    h, x, z = add_norm(h, before, norm.weight, norm.variance_epsilon, qkv)
    y = frozen_product(x, frozen_of(attention.qkv_proj))
    config = attention.config
    heads = rotate(y, z, qkv, cos, sin, config.num_attention_heads, config.num_key_value_heads)
    q, k, v = (t.unflatten(0, rows).transpose(1, 2) for t in heads)  # (B, H, S, head_dim)
    window = getattr(config, "sliding_window", None)
    attended, _ = packed_attention(attention, q, k, v, scaling=attention.scaling, sliding_window=window, **layout)
    y, z = product_and_projection(attended.flatten(0, 1).flatten(1), frozen_of(attention.o_proj), o)
    norm = layer.post_attention_layernorm
    h, x, z = add_norm(h, (y, z, o), norm.weight, norm.variance_epsilon, gate_up)

    def feed_forward(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return swiglu(frozen_product(x, frozen_of(mlp.gate_up_proj)), z, gate_up, down)

    if torch.is_grad_enabled() and layer.training and recomputes_feed_forward(layer):
        x, z = checkpoint(feed_forward, x, z, use_reentrant=False, preserve_rng_state=False)
    else:
        x, z = feed_forward(x, z)
    return h, (frozen_product(x, frozen_of(mlp.down_proj)), z, down)
