"""The decoder of a Phi-3 on a GPU, with few passes over memory: frozen products, attention, and three kernels a layer.

transformers' ``Phi3DecoderLayer`` says what is computed; this file computes the same from its modules' parameters:

    h, x, z = add_norm(h, pending)                                   norm.py
    q, k, v = rotate(x W_qkv', z)                                    rotary.py
    y, z    = attend(q, k, v) W_o', ... A_o'                         model/attention.py, o_proj.py
    h, x, z = add_norm(h, (y, z))
    x, z    = swiglu(x W_gate_up', z)                                swiglu.py
    pending = x W_down', z                                           the next layer's add_norm adds it to h

The kernels compute the adapters' part along the way. For the backward a layer keeps h twice, q, k, v, attention's
output, the gate/up product and the low-rank activations. Under ``"selective"`` checkpointing it does not keep the
product; under ``"full"`` it keeps only h, and under ``"offload"`` it keeps h on the host.

Plugging in. Inside :func:`fused_layers` each decoder layer's ``forward`` is :func:`_layer_forward`, and
:func:`fused_decoder` calls the layers one after the other. They are still called as modules, so hooks, recomputation
and FSDP2's gathering of parameters work. One layer hands the next either

    h (N, D), pending       the next layer's first kernel adds the last product to h
    h (B, S, D)             as in transformers, where a hook sees it or the backward recomputes the layer

:func:`unsupported_reason` says why a model must use transformers' own layers instead.

Shapes: B rows, S tokens a row, N = B*S, D hidden size, I intermediate size, H heads, n rotary components.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3DecoderLayer, Phi3MLP, Phi3Model, Phi3RMSNorm

from ..lora.base_weight import base_linear, base_weight_of, compute_dtype, plain_linear_classes
from ..lora.layers import Linear, MergedLinear
from ..lora.weight_formats import has_triton
from ..model.activations import recompute, recomputes_feed_forward, recomputes_layer, settle_copies
from ..model.attention import NAME, packed_attention, packed_layout
from .recording import MOST_TOKENS, Recordings

_LARGEST_R = 128  # above it, some GPU's shared memory holds no block of the kernels
_MOST_WANTED = 0.9  # of the tokens; with more of them wanted, selecting costs as much as it saves
_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


# --- Plugging in


_RECORDINGS: WeakKeyDictionary[nn.Module, Recordings] = WeakKeyDictionary()
"""By decoder, the CUDA graphs that were recorded in the present block of :func:`fused_layers`."""
_COMPILED: WeakSet[nn.Module] = WeakSet()
"""Decoders whose training kernels were compiled together."""
_MOST_TOKENS_COMPILED = 8192
"""Longest micro-batch, in tokens, for which that is done: it holds two hidden states more than a step with offload."""


@contextmanager
def fused_layers(model: nn.Module) -> Iterator[None]:
    """Replace each decoder layer's ``forward`` by the kernels for the block, for :func:`fused_decoder`.

    Any other call of the model (``generate``, a call of your own) still runs transformers' code.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    layers = list(decoder.layers)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_layer_forward, layer)
    _RECORDINGS[decoder] = Recordings()
    try:
        yield
    finally:
        _RECORDINGS.pop(decoder, None)
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def fused_decoder(model: nn.Module, batch: Mapping[str, Any], wanted: Tensor | None = None) -> Tensor:
    """Return the decoder's last hidden states, after its norm: (N, D), or (n, D) of the tokens that are wanted.

    Args:
        model: a Phi-3 for which :func:`unsupported_reason` is None, inside :func:`fused_layers`.
        batch: what ``phi3lora.batches`` yields, on the model's device.
        wanted: (n,), the numbers of the tokens, counted through the rows; None: all.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    dtype = compute_dtype(decoder.embed_tokens.weight, decoder.embed_tokens.weight)
    h = decoder.embed_tokens(batch["input_ids"]).to(dtype)  # (B, S, D)
    rope = decoder.rotary_emb(h, position_ids=batch["position_ids"])
    cos, sin = (t.expand(h.shape[0], -1, -1).flatten(0, 1).to(dtype).contiguous() for t in rope)  # (N, n)
    adapted = _adapted(decoder)
    parameters = _matrices(adapted)
    recordings = _RECORDINGS.get(decoder) if _may_be_recorded(decoder, h, adapted) else None
    layout = packed_layout(model.config, batch, few_sizes=recordings is not None)
    if _begins_to_learn(decoder, h, parameters):
        _COMPILED.add(decoder)
        _compile_kernels(decoder, h, cos, sin, wanted if recordings is None else None, layout)
    if recordings is None:
        return _decode(decoder, parameters, h, cos, sin, wanted, **layout)

    def decode(parameters: Sequence[Tensor], **inputs: Any) -> Tensor:
        hidden = _decode(decoder, parameters, **inputs)
        settle_copies(decoder.layers)
        return hidden

    inputs = {"h": h, "cos": cos, "sin": sin, **layout}
    hidden = recordings(decode, parameters, inputs, _state(decoder, adapted))
    return hidden if wanted is None else hidden.index_select(0, wanted)


def _begins_to_learn(decoder: Any, h: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether the kernels of training can be compiled now, and were not before."""
    learns = torch.is_grad_enabled() and decoder.training and any(p.requires_grad for p in parameters)
    is_first = decoder not in _COMPILED and h.shape[:2].numel() <= _MOST_TOKENS_COMPILED
    return h.is_cuda and learns and is_first and not any(map(_has_hooks, decoder.layers))


def _compile_kernels(
    decoder: Any, h: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None, layout: dict[str, Any]
) -> None:
    """Compile side by side what two layers launch in forward and backward; others rarely launch more.

    They are the first that learns and the next, and the one before them. Both directions run without their kernels, on
    whatever numbers are in memory, and leave no gradient and no random state behind.
    """
    from .launch import compiled_together

    each = (_matrices(_adapted(SimpleNamespace(layers=[layer]))) for layer in decoder.layers)
    first = next(i for i, matrices in enumerate(each) if any(p.requires_grad for p in matrices))
    layers = SimpleNamespace(layers=decoder.layers[max(first - 1, 0) : first + 2], norm=decoder.norm)
    leaves = [p.detach().requires_grad_(p.requires_grad) for p in _matrices(_adapted(layers))]
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.set_multithreading_enabled(False),  # a backward in a thread of its own would launch the kernels
        torch.autograd.set_detect_anomaly(False),  # the numbers may be NaN
        compiled_together(),
    ):
        output = _decode(layers, leaves, h.detach(), cos, sin, wanted, **layout)
        with torch.autocast(h.device.type, enabled=False):  # as after a forward
            output.backward(torch.zeros_like(output))  # type: ignore[no-untyped-call]
    settle_copies(layers.layers)


def _may_be_recorded(decoder: Any, h: Tensor, adapted: Sequence[Any]) -> bool:
    """Return whether :func:`_decode` always launches the same kernels for these shapes, and is short of launches."""
    draws = any(p.lora_dropout.p and p.lora_dropout.training for p in adapted)
    learns = torch.is_grad_enabled() and decoder.training and any(p.lora_A.requires_grad for p in adapted)
    calls_others = any(map(_has_hooks, decoder.layers)) or h.requires_grad
    return h.is_cuda and h.shape[:2].numel() <= MOST_TOKENS and learns and not draws and not calls_others


def _state(decoder: Any, adapted: Sequence[Any]) -> object:
    """Return a value that changes when an adapter is switched or scaled, or any weight gets another shape or memory."""
    switches = [(p.enabled, p.scaling, p.lora_A.requires_grad, p.lora_B.requires_grad) for p in adapted]
    weights = [t for p in decoder_projections(decoder) for t in base_weight_of(p).tensors()]
    norms = [m.weight for layer in decoder.layers for m in (layer.input_layernorm, layer.post_attention_layernorm)]
    tensors = (*weights, *norms, decoder.norm.weight, *_matrices(adapted))
    return switches, [(t.data_ptr(), t.shape) for t in tensors]  # a smaller tensor may take a freed one's place


def _decode(
    decoder: Any,
    parameters: Sequence[Tensor],
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    wanted: Tensor | None = None,
    **layout: Any,
) -> Tensor:
    """Compute the layers and the last norm, as :func:`fused_decoder` does.

    Nothing mixes tokens after the last attention. So where few enough are wanted, the rest of the last layer computes
    these alone.

    Args:
        decoder: the ``Phi3Model``.
        parameters: ``lora_A`` and ``lora_B`` of each adapted projection in order, or aliases that get the gradients.
        h: (B, S, D), the embeddings.
        cos, sin: (N, n), at each token's position, in the compute dtype.
        wanted: as in :func:`fused_decoder`.
        layout: what ``packed_layout`` returned.
    """
    from .adapter import NO_ADAPTER, NOTHING_PENDING, compute_copies, make_adapter
    from .norm import add, add_norm

    rows = (h.shape[0], h.shape[1])
    tokens = _Tokens(rows, cos, sin, layout)
    projections, adapted = decoder_projections(decoder), _adapted(decoder)
    seeds = [0] * len(projections)
    if any(p.lora_dropout.p and p.lora_dropout.training for p in adapted):  # an evaluation must not draw any
        seeds = torch.randint(2**31 - 1, (len(projections),)).tolist()
    given = dict(zip(_matrices(adapted), parameters, strict=True))
    copies = compute_copies(list(given), h.dtype) if given else {}
    adapters = [make_adapter(p, copies, seed) for p, seed in zip(projections, seeds, strict=True)]
    adapters = [replace(a, lora_A=given[a.lora_A], lora_B=given[a.lora_B]) if a else a for a in adapters]
    h, pending = h.flatten(0, 1), NOTHING_PENDING  # (N, D)
    for i, layer in enumerate(decoder.layers):
        is_last = layer is decoder.layers[-1]
        if is_last and wanted is not None and 0 < len(wanted) < _MOST_WANTED * len(h) and not _has_hooks(layer):
            tokens, wanted = replace(tokens, wanted=wanted), None
        inputs = (tokens, adapters[i * len(_PROJECTIONS) : (i + 1) * len(_PROJECTIONS)])
        # nn.Module's own call: GradientCheckpointingLayer's would recompute hooks too in older transformers.
        if recomputes_layer(layer) or _has_hooks(layer):
            h = nn.Module.__call__(layer, add(h, pending).view(*rows, -1), fused_inputs=inputs).flatten(0, -2)
            pending = NOTHING_PENDING
        else:
            h, pending = nn.Module.__call__(layer, h, pending=pending, fused_inputs=inputs)
    x = add_norm(h, pending, decoder.norm.weight, decoder.norm.variance_epsilon, NO_ADAPTER)[1]
    return x if wanted is None else x.index_select(0, wanted)


def _adapted(decoder: Any) -> list[Any]:
    """Return the projections whose adapters are switched on."""
    return [p for p in decoder_projections(decoder) if getattr(p, "r", 0) and p.enabled]


def _matrices(adapted: Sequence[Any]) -> list[Tensor]:
    """Return ``lora_A`` and ``lora_B`` of each projection."""
    return [t for p in adapted for t in (p.lora_A, p.lora_B)]


def decoder_projections(decoder: Any) -> list[Any]:
    """Return the four projections of each layer, in order."""
    return [
        projection
        for layer in decoder.layers
        for projection in (
            layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
        )
    ]  # fmt: skip


# --- One layer


@dataclass(frozen=True)
class _Tokens:
    """Layout and positions of a micro-batch's tokens."""

    rows: tuple[int, int]  # (B, S)
    cos: Tensor  # (N, n), at each token's position, in the compute dtype
    sin: Tensor  # (N, n)
    layout: dict[str, Any]  # what packed_layout returned
    wanted: Tensor | None = None  # (n,), those of the last layer's output; None: all


def _layer_forward(
    layer: Any,
    hidden_states: Tensor,
    *args: Any,
    pending: Any = None,
    fused_inputs: tuple[_Tokens, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """Compute a decoder layer: h (N, D), pending -> h (N, D), pending; without pending h (B, S, D) -> h (B, S, D).

    Where only some tokens of the last layer are wanted, its output is (n, D) in both cases.

    This is the layer's ``forward`` inside :func:`fused_layers`. ``fused_inputs`` are the micro-batch and the adapters
    of the four projections. A caller that does not pass them, any but :func:`fused_decoder`, gets transformers' code.
    """
    if fused_inputs is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    from .adapter import NOTHING_PENDING
    from .norm import add

    down, adapter = base_weight_of(layer.mlp.down_proj), fused_inputs[1][-1]
    if pending is not None:
        h, x, z = _up_to_down_proj(layer, *fused_inputs, hidden_states, pending, False)
        return h, (base_linear(x, down), z, adapter)
    recomputed, called = recomputes_layer(layer), False

    def whole_layer(hidden_states: Tensor) -> Tensor:
        # A second call is the backward's recomputation. It needs the graph, but nothing reads the layer's output, so
        # it skips the last product, a seventh of the layer's work, and the sum after it.
        nonlocal called
        again, called = called, True
        h, x, z = _up_to_down_proj(layer, *fused_inputs, hidden_states.flatten(0, 1), NOTHING_PENDING, recomputed)
        y = base_linear(x, down, h.shape[1] if again else 0)
        h = h.view(hidden_states.shape) if fused_inputs[0].wanted is None else h
        return add(h, (y, z, adapter), needed=not again)

    return recompute(layer, whole_layer, hidden_states) if recomputed else whole_layer(hidden_states)


def _up_to_down_proj(
    layer: Any, tokens: _Tokens, adapters: Sequence[Any], h: Tensor, pending: Any, recomputed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute a layer up to its last product: h (N, D), pending -> h (N, D), the product's input x (N, I), z (N, R)."""
    from .norm import add_norm
    from .o_proj import linear_and_lora_a
    from .rotary import rotate
    from .swiglu import swiglu

    attention, mlp = layer.self_attn, layer.mlp
    qkv, o, gate_up, down = adapters
    norm = layer.input_layernorm
    h, x, z = add_norm(h, pending, norm.weight, norm.variance_epsilon, qkv)
    y = base_linear(x, base_weight_of(attention.qkv_proj))
    config = attention.config
    heads = rotate(y, z, qkv, tokens.cos, tokens.sin, config.num_attention_heads, config.num_key_value_heads)
    q, k, v = (t.view(*tokens.rows, *t.shape[1:]).transpose(1, 2) for t in heads)  # (B, H, S, head_dim)
    layout = {"sliding_window": getattr(config, "sliding_window", None), **tokens.layout}
    attended, _ = packed_attention(attention, q, k, v, scaling=attention.scaling, **layout)
    attended = attended.flatten(0, 1).flatten(1)  # (N, H * head_dim)
    if tokens.wanted is not None:
        attended, h = (t.index_select(0, tokens.wanted) for t in (attended, h))
    y, z = linear_and_lora_a(attended, base_weight_of(attention.o_proj), o)
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
    return h, x, z


# --- Which models


def unsupported_reason(model: nn.Module, training: bool | None = None) -> str | None:
    """Return why the kernels cannot compute this model's layers as they are; None: they can.

    Args:
        model: a causal LM of transformers.
        training: whether dropout will be on; None: as the modules' modes say.
    """
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    config: Any = model.config
    dtype = compute_dtype(weight, weight)
    if not weight.is_cuda:
        return "not on a CUDA device"
    if not has_triton():
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
    return decoder_unsupported_reason(decoder, training)


def decoder_unsupported_reason(decoder: Any, training: bool | None = None) -> str | None:
    """Return what makes the decoder's modules unsupported; None: nothing.

    They must be transformers' own, frozen except for adapters, with no hook below the layers.
    """
    if not _runs_forward_of(Phi3Model, decoder) or not _runs_forward_of(Phi3RMSNorm, decoder.norm):
        return f"a {type(decoder).__name__} that is not transformers' Phi-3"
    if decoder.config.hidden_size < 32:
        return f"hidden_size={decoder.config.hidden_size} is under 32"
    if len(decoder.layers) != decoder.config.num_hidden_layers:
        return f"num_hidden_layers={decoder.config.num_hidden_layers} with {len(decoder.layers)} layers"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on all modules"
    for module in (decoder, decoder.norm):
        if _has_hooks(module) or "forward" in vars(module):
            return f"a hook on a {type(module).__name__}, or its forward was replaced"
    if torch.is_grad_enabled() and decoder.norm.weight.requires_grad:
        return "base weights that train"
    reasons = (_layer_reason(layer, training) for layer in decoder.layers)
    return next((reason for reason in reasons if reason), None)


def _runs_forward_of(cls: type[nn.Module], module: Any) -> bool:
    """Return whether a module is a ``cls``, or of a subclass with the same forward such as FSDP2's ``FSDPPhi3...``.

    transformers wraps the forward of each subclass of a decoder layer again, always in the same code.
    """
    kind = type(module)
    wrapper = cls.forward.__code__

    def unwrapped(forward: Any) -> Any:
        return inspect.unwrap(forward, stop=lambda f: getattr(f, "__code__", None) is not wrapper)

    same_call = isinstance(module, cls) and kind.__call__ is cls.__call__
    return same_call and unwrapped(kind.forward) is unwrapped(cls.forward)


def _has_hooks(module: Any) -> bool:
    """Return whether something besides the forward runs when the module is called, or in its backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _layer_reason(layer: Any, training: bool | None) -> str | None:
    """Return what in one layer is not as the kernels need it; None: nothing."""
    parts = {
        "input_layernorm": Phi3RMSNorm, "post_attention_layernorm": Phi3RMSNorm, "self_attn": Phi3Attention,
        "mlp": Phi3MLP,
    }  # fmt: skip
    if not _runs_forward_of(Phi3DecoderLayer, layer) or not all(
        _runs_forward_of(cls, getattr(layer, name, None)) for name, cls in parts.items()
    ):
        return f"a {type(layer).__name__} that is not transformers' Phi-3 layer"
    if layer._compiled_call_impl is not None:
        return "compiled layers"
    own = vars(layer).get("forward")
    if own is not None and getattr(own, "func", None) is not _layer_forward:
        return f"the forward of a {type(layer).__name__} was replaced"
    learning = torch.is_grad_enabled()
    for module in layer.modules():
        replaced = "forward" in vars(module) and not (module is layer.mlp and recomputes_feed_forward(layer))
        if module is not layer and (replaced or _has_hooks(module)):
            return f"a hook on a {type(module).__name__}, or its forward was replaced"
        for name, parameter in module._parameters.items() if learning else ():
            if name not in ("lora_A", "lora_B") and parameter is not None and parameter.requires_grad:
                return "base weights that train"
    if not isinstance(layer.mlp.activation_fn, (nn.SiLU, SiLUActivation)):
        return f"activation {type(layer.mlp.activation_fn).__name__}"
    for dropout in (layer.resid_attn_dropout, layer.resid_mlp_dropout):
        if dropout.p and (dropout.training if training is None else training):
            return f"residual dropout {dropout.p}"
    config, head_dim = layer.self_attn.config, layer.self_attn.head_dim
    if head_dim % 16 or int(head_dim * config.rope_parameters["partial_rotary_factor"]) % 16:
        return f"head_dim={head_dim}, or the rotated part of it, is not a multiple of 16"
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    segments = {"self_attn.qkv_proj": [q, kv, kv], "mlp.gate_up_proj": 2 * [layer.mlp.down_proj.in_features]}
    known_classes = (Linear, MergedLinear, *plain_linear_classes())
    for path in _PROJECTIONS:
        projection = layer.get_submodule(path)
        if type(projection) not in known_classes or getattr(projection, "bias", None) is not None:
            return f"{path} is a {type(projection).__name__} or has a bias"
        if getattr(projection, "fan_in_fan_out", False):
            return f"{path} is stored transposed"
        if getattr(projection, "r", 0) > _LARGEST_R:
            return f"r={projection.r} of {path} is over {_LARGEST_R}"
        if isinstance(projection, MergedLinear) and list(projection.segments) != segments.get(path):
            return f"{path} has segments of its own"
    return None
