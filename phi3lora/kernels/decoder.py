"""The decoder of a Phi-3 on a GPU, in few passes: frozen products, attention, and three fused kernels a layer.

transformers' ``Phi3DecoderLayer`` says what is computed; this file computes the same with its modules' own parameters:

    h, x, z = add_norm(h, down product of the layer before)          passes/norm.py
    q, k, v = rotate(x W_qkv', z)                                    passes/rotary.py
    y, z    = attend(q, k, v) W_o', ... A_o'                         attention.py, passes/product.py
    h, x, z = add_norm(h, y, z)
    x, z    = swiglu(x W_gate_up', z)                                passes/swiglu.py
    y, z    = x W_down', z                                           added by the next layer's add_norm

Everything an adapter adds rides in those passes. What a layer keeps for the backward: h twice, q, k, v, attention's
output, the gate/up product and the low-rank activations; with ``"selective"`` checkpointing not the product, with
``"full"`` only h, with ``"offload"`` h on the host.

:func:`reason_not_to_fuse` says why a model must go through transformers' own layers instead.

Shapes: B rows, S tokens a row, N = B*S, D hidden size, H heads, n rotary components.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3Model, Phi3RMSNorm

from ..lora.base_weight import base_linear, base_weight_of, compute_dtype, plain_classes
from ..lora.layers import Linear, MergedLinear
from ..model.activations import recompute_layer, recomputes_feed_forward
from ..model.attention import NAME, packed_attention, packed_layout

_LARGEST_R = 128  # beyond it no block of the kernels fits in shared memory everywhere
_NOTHING: Any = (None, None, None)  # y, z and adapter of a projection whose output has still to be added to h
_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def reason_not_to_fuse(model: nn.Module, training: bool | None = None) -> str | None:
    """Why the passes cannot compute this model's layers as they are; None: they can.

    ``training``: whether dropout will act; None: as the model's mode says.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    config: Any = model.config
    dtype = compute_dtype(weight, weight)
    if not weight.is_cuda:
        return "not on a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "a GPU older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return "computed in float32"
    if weight.dtype != dtype:
        return f"{weight.dtype} weights, whose residual stream autocast would leave in {weight.dtype}"
    if config._attn_implementation != NAME:
        return f"attention {config._attn_implementation!r}"
    attention_dropout = getattr(config, "attention_dropout", 0.0)
    if attention_dropout and (model.training if training is None else training):
        return f"attention_dropout={attention_dropout}"
    return decoder_reason(decoder, training)


def decoder_reason(decoder: Any, training: bool | None = None) -> str | None:
    """The same of the modules: they must be transformers' own, frozen but for adapters, with nothing hooked in."""
    if type(decoder) is not Phi3Model or type(decoder.norm) is not Phi3RMSNorm:
        return f"a {type(decoder).__name__} that is not transformers' Phi-3"
    if decoder.config.hidden_size < 32:
        return f"hidden_size={decoder.config.hidden_size} is under 32"
    if len(decoder.layers) != decoder.config.num_hidden_layers:
        return f"num_hidden_layers={decoder.config.num_hidden_layers} with {len(decoder.layers)} layers"
    for module in (decoder, decoder.norm):
        if _is_changed(module):
            return f"a hook on a {type(module).__name__}, or its forward was replaced"
    if torch.is_grad_enabled() and decoder.norm.weight.requires_grad:
        return "base weights that train"
    return next(filter(None, (_layer_reason(layer, training) for layer in decoder.layers)), None)


def _is_changed(module: Any) -> bool:
    """Whether calling the module would do something beside its class's forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _layer_reason(layer: Any, training: bool | None) -> str | None:
    """The same of one layer."""
    norms = {type(getattr(layer, name, None)) for name in ("input_layernorm", "post_attention_layernorm")}
    if type(layer) is not Phi3DecoderLayer or norms != {Phi3RMSNorm}:
        return f"a {type(layer).__name__} that is not transformers' Phi-3 layer"
    if layer._compiled_call_impl is not None:
        return "compiled layers"
    learning = torch.is_grad_enabled()
    for module in layer.modules():
        if _is_changed(module) and not (module is layer.mlp and recomputes_feed_forward(layer)):
            return f"a hook on a {type(module).__name__}, or its forward was replaced"
        for name, parameter in module._parameters.items() if learning else ():
            if name not in ("lora_A", "lora_B") and parameter is not None and parameter.requires_grad:
                return "base weights that train"
    if not isinstance(layer.mlp.activation_fn, (nn.SiLU, SiLUActivation)):
        return f"activation {type(layer.mlp.activation_fn).__name__}"
    for dropout in (layer.resid_attn_dropout, layer.resid_mlp_dropout):
        if dropout.p and (dropout.training if training is None else training):
            return f"residual dropout {dropout.p}"
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
    from .adapter import compute_copies, make_adapter
    from .norm import add, add_norm

    decoder: Any = model.get_decoder()  # type: ignore[operator]
    dtype = compute_dtype(decoder.embed_tokens.weight, decoder.embed_tokens.weight)
    embedded = decoder.embed_tokens(batch["input_ids"]).to(dtype)  # (B, S, D)
    rope = decoder.rotary_emb(embedded, position_ids=batch["position_ids"])
    cos, sin = (t.expand(embedded.shape[0], -1, -1).flatten(0, 1).to(dtype).contiguous() for t in rope)  # (N, n)
    h, before = embedded.flatten(0, 1), _NOTHING
    layout = packed_layout(model.config, batch)
    projections = [layer.get_submodule(path) for layer in decoder.layers for path in _PROJECTIONS]
    adapted = [p for p in projections if getattr(p, "r", 0)]
    seeds = _dropout_seeds(projections)
    copies = compute_copies([t for p in adapted for t in (p.lora_A, p.lora_B)], dtype) if adapted else {}
    adapters = [make_adapter(p, copies, seed) for p, seed in zip(projections, seeds, strict=True)]
    for i, layer in enumerate(decoder.layers):
        own = adapters[i * len(_PROJECTIONS) : (i + 1) * len(_PROJECTIONS)]
        whole = torch.is_grad_enabled() and layer.training and layer.gradient_checkpointing
        run = partial(_layer, layer, own, embedded.shape[:2], layout, whole)
        if whole:
            h = recompute_layer(layer, _WholeLayer(layer, run, cos, sin), add(h, before))
            before = _NOTHING
        else:
            h, x, z, down = run(h, before, cos, sin)
            before = (base_linear(x, base_weight_of(layer.mlp.down_proj)), z, down)
    return add_norm(h, before, decoder.norm.weight, decoder.norm.variance_epsilon, None)[1]


def _dropout_seeds(projections: Sequence[Any]) -> list[int]:
    """A seed for each projection: its mask is made anew from it wherever it is needed.

    torch's own generator draws them, and only where a dropout acts: an evaluation must not move the training's masks.
    """
    if not any(getattr(p, "r", 0) and p.lora_dropout.p and p.lora_dropout.training for p in projections):
        return [0] * len(projections)
    return torch.randint(2**31 - 1, (len(projections),)).tolist()


class _WholeLayer:
    """A layer from residual stream to residual stream: what is recomputed in the backward.

    The second call, there, is made for the graph: nobody reads the layer's output any more, so its last product, a
    seventh of the layer's work, and the sum after it are left out.
    """

    def __init__(self, layer: Any, run: Any, cos: Tensor, sin: Tensor) -> None:
        self.layer, self.run, self.cos, self.sin = layer, run, cos, sin
        self.called = False

    def __call__(self, h: Tensor) -> Tensor:
        """h (N, D) -> h (N, D) of the layer after it."""
        from .norm import add

        h, x, z, down = self.run(h, _NOTHING, self.cos, self.sin)
        again, self.called = self.called, True
        y = base_linear(x, base_weight_of(self.layer.mlp.down_proj), h.shape[1] if again else 0)
        return add(h, (y, z, down), needed=not again)


def _layer(
    layer: Any, adapters: Sequence[Any], rows: tuple[int, int], layout: dict[str, Any], recomputed: bool, h: Tensor,
    before: Any, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Any]:  # fmt: skip
    """One layer but for its last product.

    h (N, D) and what its predecessor has still to add -> h, the down projection's input (N, I), its low-rank
    activations and its adapter.
    """
    from .norm import add_norm
    from .o_proj import product_and_projection
    from .rotary import rotate
    from .swiglu import swiglu

    attention, mlp = layer.self_attn, layer.mlp
    qkv, o, gate_up, down = adapters
    norm = layer.input_layernorm
    h, x, z = add_norm(h, before, norm.weight, norm.variance_epsilon, qkv)
    y = base_linear(x, base_weight_of(attention.qkv_proj))
    config = attention.config
    heads = rotate(y, z, qkv, cos, sin, config.num_attention_heads, config.num_key_value_heads)
    q, k, v = (t.unflatten(0, rows).transpose(1, 2) for t in heads)  # (B, H, S, head_dim)
    window = getattr(config, "sliding_window", None)
    attended, _ = packed_attention(attention, q, k, v, scaling=attention.scaling, sliding_window=window, **layout)
    y, z = product_and_projection(attended.flatten(0, 1).flatten(1), base_weight_of(attention.o_proj), o)
    norm = layer.post_attention_layernorm
    h, x, z = add_norm(h, (y, z, o), norm.weight, norm.variance_epsilon, gate_up)

    selective = torch.is_grad_enabled() and layer.training and recomputes_feed_forward(layer)

    def feed_forward(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = base_linear(x, base_weight_of(mlp.gate_up_proj))
        return swiglu(y, z, gate_up, down, y_is_free=recomputed or selective)

    if selective:
        x, z = checkpoint(feed_forward, x, z, use_reentrant=False, preserve_rng_state=False)
    else:
        x, z = feed_forward(x, z)
    return h, x, z, down
