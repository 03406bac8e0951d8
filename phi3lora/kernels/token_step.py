"""Generation's way through the decoder: prompts into a cache of keys and values, and from it one token for each row.

decoder.py computes many tokens at once and waits for arithmetic; a step of generation waits for the weights. The
formulas are the same, cut into kernels of many small programs, and nothing is kept for a backward:

    h, x    = add_norm(h, y, z)                          h + y + scaling z B', and its norm; a program a row
    y, z    = x W_qkv', x A_qkv'                         few_rows.py
    q, k, v = rotate(y, z)                               k and v go to the cache too, at the row's position
    y, z    = attend(q, cache) W_o', ... A_o'            a program a row, key/value head and part of the keys
    h, x    = add_norm(h, y, z)
    y, z    = x W_gate_up', ...
    y, z    = swiglu(y, z) W_down', ...                  the next layer's add_norm adds them

A step has one shape for a number of rows and makes no decision on the host, so it can be recorded in a CUDA graph. A
prompt's tokens are rows too; they attend to each other, packed as in training.

Shapes: M rows, D hidden size, H heads, H_kv key/value heads, C head_dim, n rotary components, I intermediate size, L
positions in the cache. y and z come in parts, (parts, M, ...), which are added up where they are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..lora.base_weight import base_weight_of
from ..lora.weight_formats import BaseWeight, Dense
from ..model.attention import packed_attention, packed_layout
from .adapter import NO_ADAPTER, Adapter, compute_copies, dot, make_adapter
from .decoder import decoder_projections
from .few_rows import product, with_plain_scales
from .launch import Block, cdiv, compiled_together, launch, next_power_of_2

_ROWS = 16
"""Rows that a program of rotary or SwiGLU takes, through tensor cores, unless the step has one row."""
_PROMPT = 128
"""Tokens of a prompt whose kernels are compiled ahead; those for fewer than 17 tokens differ."""
_PROGRAMS = 264
"""Programs of attention that keep an H100 busy: two for each of its multiprocessors."""

_COMPILED: set[object] = set()
"""Steps, as :meth:`TokenStep.kernels` tells them apart, whose kernels were compiled."""


@triton.jit
def _parts_sum(ptr, at, stride, mask, PARTS: tl.constexpr):
    """Add up the parts of a product, float32."""
    total = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(ptr + part * stride + at, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _row_low_rank(z_ptr, z_at, z_stride, B_ptr, column, live, R: tl.constexpr, STEP: tl.constexpr,
                  PARTS: tl.constexpr):  # fmt: skip
    """Return z B' of one row, float32; z is rounded to B's dtype first, as a product's output is."""
    dtype = B_ptr.dtype.element_ty
    total = tl.zeros_like(column).to(tl.float32)
    for first in tl.static_range(0, R, STEP):
        r = first + tl.arange(0, STEP)
        z = _parts_sum(z_ptr, z_at + r, z_stride, r < R, PARTS).to(dtype).to(tl.float32)
        B = tl.load(B_ptr + column[:, None] * R + r[None, :], mask=live[:, None], other=0.0)
        total += tl.sum(B.to(tl.float32) * z[None, :], 1)
    return total


@triton.jit
def _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, z_offset, column, live_column, scaling, COLUMNS: tl.constexpr,
                  R: tl.constexpr, Z: tl.constexpr, Y_PARTS: tl.constexpr, Z_PARTS: tl.constexpr,
                  LOW_RANK: tl.constexpr):  # fmt: skip
    """Return y + scaling z B' in some columns of some rows, float32."""
    live = (row < n_rows)[:, None]
    y = _parts_sum(
        y_ptr, row[:, None] * COLUMNS + column[None, :], n_rows * COLUMNS, live & live_column[None, :], Y_PARTS
    )
    if LOW_RANK and row.shape[0] == 1:  # a tile of one row would leave 15 of 16 rows of the tensor cores empty
        low_rank = _row_low_rank(z_ptr, row * Z + z_offset, n_rows * Z, B_ptr, column, live_column, R, R, Z_PARTS)
        y += scaling * low_rank[None, :]
    elif LOW_RANK:
        r = tl.arange(0, R)
        z = _parts_sum(z_ptr, row[:, None] * Z + z_offset + r[None, :], n_rows * Z, live, Z_PARTS)
        B = tl.load(B_ptr + column[None, :] * R + r[:, None], mask=live_column[None, :], other=0.0)  # (R, BN)
        y += scaling * dot(z.to(B.dtype), B)
    return y


@triton.jit(do_not_specialize=["n_rows"])
def _add_norm(
    h_ptr, y_ptr, z_ptr, B_ptr, weight_ptr, x_ptr, n_rows, scaling, eps, D: tl.constexpr, D_PADDED: tl.constexpr,
    R: tl.constexpr, STEP: tl.constexpr, Y_PARTS: tl.constexpr, Z_PARTS: tl.constexpr, ADD: tl.constexpr,
    LOW_RANK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, D_PADDED)
    live = c < D
    dtype = h_ptr.dtype.element_ty
    h = tl.load(h_ptr + row * D + c, mask=live, other=0.0).to(tl.float32)
    if ADD:
        y = _parts_sum(y_ptr, row * D + c, n_rows * D, live, Y_PARTS)
        if LOW_RANK:
            y += scaling * _row_low_rank(z_ptr, row * R, n_rows * R, B_ptr, c, live, R, STEP, Z_PARTS)
        summed = (h + y.to(dtype).to(tl.float32)).to(dtype)
        tl.store(h_ptr + row * D + c, summed, mask=live)
        h = summed.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, 0) / D + eps)
    weight = tl.load(weight_ptr + c, mask=live, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * D + c, ((h * rstd).to(dtype).to(tl.float32) * weight).to(dtype), mask=live)


@triton.jit(do_not_specialize=["n_rows"])
def _rotate(
    y_ptr, z_ptr, B_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, out_ptr, k_ptr, v_ptr, n_rows, L, scaling,
    H: tl.constexpr, H_KV: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr, R: tl.constexpr, Z: tl.constexpr, Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr, Y_PARTS: tl.constexpr, Z_PARTS: tl.constexpr, LOW_RANK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64), tl.program_id(1)
    COLUMNS: tl.constexpr = (H + 2 * H_KV) * C
    REST: tl.constexpr = C - 2 * HALF
    dtype = out_ptr.dtype.element_ty
    live = row < n_rows
    position = tl.load(position_ptr + row, mask=live, other=0)
    slot = tl.load(slot_ptr + row, mask=live, other=0)
    is_q, is_k = head < H, (head >= H) & (head < H + H_KV)
    z_offset = tl.where(is_q, Q_OFFSET, tl.where(is_k, K_OFFSET, V_OFFSET))
    c = tl.arange(0, HALF_PADDED)
    lo = _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, z_offset, head * C + c, c < HALF, scaling, COLUMNS, R, Z,
                       Y_PARTS, Z_PARTS, LOW_RANK)  # fmt: skip
    hi = _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, z_offset, head * C + HALF + c, c < HALF, scaling, COLUMNS, R,
                       Z, Y_PARTS, Z_PARTS, LOW_RANK)  # fmt: skip
    lo, hi = lo.to(dtype).to(tl.float32), hi.to(dtype).to(tl.float32)
    inside = live[:, None] & (c < HALF)[None, :]
    rotates = inside & (is_q | is_k)
    angle = position[:, None] * (2 * HALF) + c[None, :]
    cos = tl.load(cos_ptr + angle, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=rotates, other=0.0).to(tl.float32)
    lo, hi = (lo * cos - hi * sin).to(dtype), (hi * cos + lo * sin).to(dtype)
    out = out_ptr + row[:, None] * COLUMNS + head * C + c[None, :]
    tl.store(out, lo, mask=inside)
    tl.store(out + HALF, hi, mask=inside)
    if is_k:  # noqa: SIM108  # a Triton kernel
        cache_ptr = k_ptr
    else:
        cache_ptr = v_ptr
    kv_head = tl.where(is_k, head - H, head - H - H_KV)
    cached = cache_ptr + ((slot[:, None] * H_KV + kv_head) * L + position[:, None]) * C
    tl.store(cached + c[None, :], lo, mask=inside & (head >= H))
    tl.store(cached + HALF + c[None, :], hi, mask=inside & (head >= H))
    if REST > 0:
        c2 = tl.arange(0, REST_PADDED)
        rest = _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, z_offset, head * C + 2 * HALF + c2, c2 < REST, scaling,
                             COLUMNS, R, Z, Y_PARTS, Z_PARTS, LOW_RANK).to(dtype)  # fmt: skip
        inside_2 = live[:, None] & (c2 < REST)[None, :]
        shift = 2 * HALF + c2[None, :]
        tl.store(out_ptr + row[:, None] * COLUMNS + head * C + shift, rest, mask=inside_2)
        tl.store(cached + shift, rest, mask=inside_2 & (head >= H))


@triton.jit
def _attend(
    qkv_ptr, k_ptr, v_ptr, position_ptr, out_ptr, weight_ptr, L, scale, H: tl.constexpr, H_KV: tl.constexpr,
    C: tl.constexpr, C_PADDED: tl.constexpr, G: tl.constexpr, G_PADDED: tl.constexpr, WINDOW: tl.constexpr,
    SPLITS: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position_ptr + row).to(tl.int32) + 1
    begin = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else 0
    chunk = tl.cdiv(tl.cdiv(length - begin, SPLITS), BN) * BN
    first = begin + part * chunk
    last = tl.minimum(first + chunk, length)
    g, c = tl.arange(0, G_PADDED), tl.arange(0, C_PADDED)
    inside = (g < G)[:, None] & (c < C)[None, :]
    head = row * H + kv * G + g
    q_at = (row * (H + 2 * H_KV) + kv * G + g)[:, None] * C + c[None, :]
    q = tl.load(qkv_ptr + q_at, mask=inside, other=0.0)
    top = tl.full([G_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([G_PADDED], tl.float32)
    out = tl.zeros([G_PADDED, C_PADDED], tl.float32)
    cached = (row.to(tl.int64) * H_KV + kv) * L * C
    for start in tl.range(first, last, BN, num_stages=STAGES):
        j = start + tl.arange(0, BN)
        live = (j < last)[:, None] & (c < C)[None, :]
        at = cached + j[:, None] * C + c[None, :]
        score = dot(q, tl.trans(tl.load(k_ptr + at, mask=live, other=0.0))) * scale
        score = tl.where((j < last)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + at, mask=live, other=0.0)
        out = out * shrink[:, None] + dot(p.to(v.dtype), v)
        top = new_top
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    at = head * SPLITS + part
    tl.store(out_ptr + at[:, None] * C + c[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(weight_ptr + at, tl.where(total > 0, top + tl.log(total), float("-inf")), mask=g < G)


@triton.jit
def _join(out_ptr, weight_ptr, joined_ptr, C: tl.constexpr, C_PADDED: tl.constexpr, SPLITS: tl.constexpr):
    """Add up the parts of one head's output, weighted by their shares of the softmax's denominator."""
    head, s, c = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, C_PADDED)
    weight = tl.load(weight_ptr + head * SPLITS + s)
    weight = tl.exp(weight - tl.max(weight, 0))
    out = tl.load(out_ptr + (head * SPLITS + s)[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
    joined = tl.sum(out * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(joined_ptr + head * C + c, joined.to(joined_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["n_rows"])
def _swiglu(
    y_ptr, z_ptr, B_ptr, x_ptr, n_rows, scaling, INNER: tl.constexpr, R: tl.constexpr, Z: tl.constexpr,
    UP_OFFSET: tl.constexpr, Y_PARTS: tl.constexpr, Z_PARTS: tl.constexpr, LOW_RANK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    dtype = x_ptr.dtype.element_ty
    g = _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, 0, c, c < INNER, scaling, 2 * INNER, R, Z, Y_PARTS, Z_PARTS,
                      LOW_RANK)  # fmt: skip
    u = _adapted_tile(y_ptr, z_ptr, B_ptr, row, n_rows, UP_OFFSET, INNER + c, c < INNER, scaling, 2 * INNER, R, Z,
                      Y_PARTS, Z_PARTS, LOW_RANK)  # fmt: skip
    g, u = g.to(dtype).to(tl.float32), u.to(dtype).to(tl.float32)
    x = ((g * tl.sigmoid(g)).to(dtype).to(tl.float32) * u).to(dtype)
    tl.store(x_ptr + row[:, None] * INNER + c[None, :], x, mask=(row < n_rows)[:, None] & (c < INNER)[None, :])


# --- The kernels' launches

_Product = tuple[Tensor, Tensor | None, Adapter]
"""A projection's frozen product y (parts, M, out), its low-rank activations z (parts, M, Z), and its adapter."""


def _row_tile(rows: int, one: Block, several: Block) -> Block:
    """Return the block for a step of one row, or that for more."""
    return {"BM": 1, **one} if rows == 1 else {"BM": _ROWS, **several}


def _parts(y: Tensor | None, z: Tensor | None) -> dict[str, int]:
    return {"Y_PARTS": 1 if y is None else len(y), "Z_PARTS": 1 if z is None else len(z)}


def add_norm(h: Tensor, before: _Product | None, norm: Any) -> Tensor:
    """Add a product to h (M, D) in place, and return the norm of the sum, (M, D)."""
    (M, D), x = h.shape, torch.empty_like(h)
    y, z, adapter = before or (None, None, NO_ADAPTER)
    padded = next_power_of_2(D)
    launch(
        _add_norm, [{"num_warps": 16 if padded >= 4096 else 4}], lambda block: (M,),
        h, y, z, adapter.B, norm.weight, x, M, adapter.scaling, norm.variance_epsilon,
        D=D, D_PADDED=padded, R=adapter.R, STEP=max(2, min(adapter.R, 65536 // padded)),
        **_parts(y, z), ADD=y is not None, LOW_RANK=bool(adapter),
    )  # fmt: skip
    return x


def rotate(
    product: _Product, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Return the rotated queries and keys and the values, (M, H + 2 H_kv, C); keys and values go to the cache too.

    Args:
        product: the adapted qkv product.
        cos, sin: (L, n).
        positions, slots: (M,), each row's.
        keys, values: (slots, H_kv, L, C).
    """
    y, z, adapter = product
    (_, M, width), (_, kv_heads, L, C), half = y.shape, keys.shape, cos.shape[1] // 2
    all_heads, out = width // C, keys.new_empty(M, width // C, C)
    heads = all_heads - 2 * kv_heads
    edges = (0, heads * C, (heads + kv_heads) * C)  # the first column of q, of k, of v
    offsets = dict(zip(("Q_OFFSET", "K_OFFSET", "V_OFFSET"), map(adapter.offset, edges), strict=True))
    launch(
        _rotate, [_row_tile(M, {"num_warps": 2}, {"num_warps": 4})],
        lambda block: (cdiv(M, block["BM"]), all_heads),
        y, z, adapter.B, cos, sin, positions, slots, out, keys, values, M, L, adapter.scaling,
        H=heads, H_KV=kv_heads, C=C, HALF=half, HALF_PADDED=next_power_of_2(max(16, half)),
        REST_PADDED=next_power_of_2(max(16, C - 2 * half)), R=adapter.R, Z=adapter.width, **offsets,
        **_parts(y, z), LOW_RANK=bool(adapter),
    )  # fmt: skip
    return out


def _splits(rows: int, kv_heads: int, length: int) -> int:
    """Return the number of programs that share the keys of a row's head."""
    return min(8, next_power_of_2(cdiv(_PROGRAMS, rows * kv_heads)), next_power_of_2(cdiv(length, 64)))


def attend(qkv: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
    """Return the attention of each row's query over its keys up to its position: (M, H * C).

    Args:
        qkv: (M, H + 2 H_kv, C), of which the queries are read.
        keys, values: (slots, H_kv, L, C); row i attends to slot i.
        positions: (M,).
        window: keys that a query sees, its own included; None: all.
    """
    (M, all_heads, C), (_, kv_heads, L, _) = qkv.shape, keys.shape
    H = all_heads - 2 * kv_heads
    splits = _splits(M, kv_heads, L)
    out = qkv.new_empty(M, H, C)
    parts, weight = out, None
    if splits > 1:
        parts = qkv.new_empty(M, H, splits, C, dtype=torch.float32)
        weight = qkv.new_empty(M, H, splits, dtype=torch.float32)
    groups, padded = H // kv_heads, next_power_of_2(max(16, C))
    launch(
        _attend, [{"BN": 64, "STAGES": 3, "num_warps": 4}, {"BN": 32, "STAGES": 1, "num_warps": 4}],
        lambda block: (M, kv_heads, splits),
        qkv, keys, values, positions, parts, weight, L, scale, H=H, H_KV=kv_heads, C=C, C_PADDED=padded, G=groups,
        G_PADDED=next_power_of_2(max(16, groups)), WINDOW=window or 0, SPLITS=splits,
    )  # fmt: skip
    if splits > 1:
        sizes = {"C": C, "C_PADDED": padded, "SPLITS": splits}
        launch(_join, [{"num_warps": 1}], lambda block: (M * H,), parts, weight, out, **sizes)
    return out.view(M, H * C)


def swiglu(product: _Product, dtype: torch.dtype) -> Tensor:
    """Return silu(gate) * up, (M, I), of an adapted gate/up product."""
    y, z, adapter = product
    (_, M, _), inner = y.shape, y.shape[2] // 2
    x = y.new_empty(M, inner, dtype=dtype)
    launch(
        _swiglu, [_row_tile(M, {"BN": 256, "num_warps": 4}, {"BN": 128, "num_warps": 4})],
        lambda block: (cdiv(M, block["BM"]), cdiv(inner, block["BN"])),
        y, z, adapter.B, x, M, adapter.scaling, INNER=inner, R=adapter.R, Z=adapter.width,
        UP_OFFSET=adapter.offset(inner), **_parts(y, z), LOW_RANK=bool(adapter),
    )  # fmt: skip
    return x


# --- The step


@dataclass(frozen=True)
class _Layer:
    """A decoder layer's modules, frozen weights and adapters, in the order of the projections."""

    module: Any
    weights: Sequence[BaseWeight]
    adapters: Sequence[Adapter]

    def multiply(self, x: Tensor, i: int) -> _Product:
        """Return projection i of x (M, in)."""
        return *product(x, self.weights[i], self.adapters[i]), self.adapters[i]


class TokenStep:
    """A model's decoder and output head, ready to compute prompts and then one token for each row.

    The adapters are copied to the compute dtype here, so make a new one when they have changed.

    Args:
        model: a Phi-3 that the kernels support.
        keys, values: the cache: (slots, H_kv, L, C) for each layer.
        cos, sin: (L, n), the rotary factors of each position, in the compute dtype.
    """

    def __init__(self, model: Any, keys: Sequence[Tensor], values: Sequence[Tensor], cos: Tensor, sin: Tensor) -> None:
        self.decoder, self.head, self.config = model.get_decoder(), model.get_output_embeddings(), model.config
        self.keys, self.values, self.cos, self.sin = keys, values, cos, sin
        self.slots = torch.arange(len(keys[0]), device=cos.device)
        projections = decoder_projections(self.decoder)
        adapted = [p for p in projections if getattr(p, "r", 0)]
        copies = compute_copies([t for p in adapted for t in (p.lora_A, p.lora_B)], cos.dtype) if adapted else {}
        weights, adapters = [base_weight_of(p) for p in projections], [make_adapter(p, copies, 0) for p in projections]
        if len(self.slots) == 1:
            weights = [with_plain_scales(weight) for weight in weights]
        self.layers = [
            _Layer(layer, weights[4 * i : 4 * i + 4], adapters[4 * i : 4 * i + 4])
            for i, layer in enumerate(self.decoder.layers)
        ]

    def kernels(self, rows: int) -> tuple[Any, ...]:
        """Return a value that is equal for two steps of ``rows`` rows if they need the same kernels."""
        projections = {
            (type(weight), adapter.width, adapter.R, str(adapter.segments))
            for layer in self.layers for weight, adapter in zip(layer.weights, layer.adapters, strict=True)
        }  # fmt: skip
        splits = _splits(rows, *self.keys[0].shape[1:3])
        return self.cos.dtype, self.cos.device, rows, splits, self.config.to_json_string(), frozenset(projections)

    def compile(self, rows: int) -> None:
        """Compile at once what the first layer needs for a prompt and a step of ``rows`` rows; others rarely differ."""
        if self.kernels(rows) in _COMPILED:
            return
        _COMPILED.add(self.kernels(rows))
        step = copy.copy(self)
        step.layers, step.keys, step.values = self.layers[:1], self.keys[:1], self.values[:1]
        heads = self.config.num_attention_heads
        zeros = torch.zeros(max(rows, _PROMPT), dtype=torch.long, device=self.cos.device)
        with compiled_together():
            step._decoder(zeros, zeros, zeros, lambda module, qkv, keys, values: qkv[:, :heads].flatten(1))
            step(zeros[:rows], zeros[:rows])

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (M, V) after tokens (M,) at positions (M,); row i has slot i of the cache."""

        def attention(module: Any, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return attend(qkv, keys, values, positions, module.scaling, getattr(self.config, "sliding_window", None))

        return self._logits(self._decoder(tokens, positions, self.slots[: len(tokens)], attention))

    def prefill(self, batch: dict[str, Any], slots: Tensor, last: Tensor) -> Tensor:
        """Return the logits (n, V) after each prompt; its keys and values go to a slot.

        Args:
            batch: prompts packed into one row, as ``phi3lora.batches`` packs documents.
            slots: (N,), each token's slot.
            last: (n,), the last token of each prompt.
        """
        kv_heads = self.keys[0].shape[1]
        # One more than the longest: in training a document one token longer than the window needs no window.
        layout = packed_layout(self.config, {**batch, "max_seqlen": batch["max_seqlen"] + 1})
        layout = {"sliding_window": getattr(self.config, "sliding_window", None), **layout}

        def attention(module: Any, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            heads = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
            q, k, v = (t[None].transpose(1, 2) for t in heads)  # (1, H, N, C)
            return packed_attention(module, q, k, v, scaling=module.scaling, **layout)[0].flatten(0, 1).flatten(1)

        return self._logits(self._decoder(batch["input_ids"][0], batch["position_ids"][0], slots, attention)[last])

    def _decoder(self, tokens: Tensor, positions: Tensor, slots: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        """Return the decoder's output (M, D)."""
        h = self.decoder.embed_tokens(tokens).to(self.cos.dtype)  # (M, D)
        before: _Product | None = None
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            x = add_norm(h, before, layer.module.input_layernorm)
            qkv = rotate(layer.multiply(x, 0), self.cos, self.sin, positions, slots, keys, values)
            attended = attention(layer.module.self_attn, qkv, keys, values)
            x = add_norm(h, layer.multiply(attended, 1), layer.module.post_attention_layernorm)
            before = layer.multiply(swiglu(layer.multiply(x, 2), h.dtype), 3)
        return add_norm(h, before, self.decoder.norm)

    def _logits(self, x: Tensor) -> Tensor:
        head = self.head
        if type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks:
            parts, _ = product(x.contiguous(), Dense(head.weight))
            return parts[0] if len(parts) == 1 else parts.sum(0).to(x.dtype)
        logits: Tensor = head(x)
        return logits
