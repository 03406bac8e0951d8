"""LoRA layers: loralib's classes with the same keys, shapes and arithmetic, made fast and safe.

    y = x W' + b + scaling * dropout(x) A' B'                       https://arxiv.org/abs/2106.09685, section 4.1

What is different from loralib (https://github.com/microsoft/LoRA, loralib/layers.py):

* ``train()`` and ``eval()`` never write weights (loralib merges in ``eval()``, in the weight's own dtype).
* A layer can be built around an existing one: its ``weight`` Parameter is kept, nothing but A and B is allocated.
* A and B are float32 whatever the base is; the products run in the compute dtype (autocast's, else the base's).
* ``MergedLinear`` takes segments of unequal width and never forms the (out, in) delta:

      Phi-3-medium's qkv_proj: in 5120, segments q 5120 | k 1280 | v 1280, enable_lora (True, False, True), r 16
        lora_A (2*16, 5120)   rows  0..15 are q's A, rows 16..31 v's
        lora_B (5120+1280, 16)   rows 0..5119 are q's B, rows 5120..6399 v's
        z = x A'           (N, 32)           one product for all segments
        y[:,    0:5120] += scaling * z[:,  0:16] Bq'
        y[:, 6400:7680] += scaling * z[:, 16:32] Bv'     columns 5120..6399 (k) stay the base's

  loralib splits ``out`` equally: 7680 / 3 = 2560, so its "q" would be half of q and its "k" the other half.

Shapes: N tokens, ``in`` and ``out`` features, r rank, k enabled segments, x (..., in), y (..., out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import loralib as lora
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError
from .base_weight import (
    PLAIN_SETTINGS,
    Dense,
    base_linear,
    base_weight_of,
    compute_dtype,
    plain_class,
    quant_state_dict,
    take_quant_state,
)

# ----------------------------------------------------------------------------------------------------
# What every adapted layer is beside loralib's class: settings, float32 adapters, modes that leave weights alone.

ADAPTERS = ("lora_A", "lora_B")
"""The two parameters that are the adapter's; a layer's others are the base's."""


class Adapted:
    """What the four layers share: settings, float32 adapters, and modes that leave the weights alone."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _configure(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        if not (isinstance(r, int) and r >= 0):
            raise ModelError(f"{type(self).__name__}: r={r!r}; allowed: a whole number >= 0 (0: no adapter)")
        if not 0 <= lora_dropout < 1:
            raise ModelError(f"{type(self).__name__}: lora_dropout={lora_dropout!r}; allowed: 0 <= p < 1")
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout = nn.Dropout(lora_dropout)  # a module also at p = 0: loralib's lambda cannot be pickled
        self.lora_dropout.train(self.training)  # type: ignore[attr-defined]
        self.merged = self.merge_weights = False
        self.enabled = True  # False: the base layer alone, see adapters/active.py
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r > 0 else 0.0

    def _add_adapters(self, weight: Tensor, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> None:
        weight.requires_grad = False
        device = weight.device
        self.lora_A = nn.Parameter(torch.zeros(a_shape, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(b_shape, dtype=torch.float32, device=device))
        self._reset_adapters()

    def _reset_adapters(self) -> None:
        """A as ``nn.Linear`` initialises, B zero: the adapted layer starts as the base layer."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def train(self, mode: bool = True):
        """Sets the mode and returns self. Weights are never written (merging is explicit)."""
        return nn.Module.train(self, mode)  # type: ignore[type-var]

    def frozen_weight(self) -> Tensor:
        """The base layer's weight."""
        return self.weight  # type: ignore[attr-defined]

    def frozen_bias(self) -> Tensor | None:
        """The base layer's bias, which trains with ``bias != "none"``."""
        return getattr(self, "bias", None)

    def base_layer(self) -> nn.Module:
        """The plain layer, with the same parameters."""
        plain = nn.Embedding if isinstance(self, nn.Embedding) else plain_class(self.frozen_weight())
        return like_base(self, plain, skip=ADAPTERS)

    def take_off(self) -> nn.Module:
        """The plain layer, as :meth:`base_layer`; this one keeps its adapters alone, until it is put on again."""
        base = self.base_layer()
        for name in [name for name in self._parameters if name not in ADAPTERS]:  # type: ignore[attr-defined]
            delattr(self, name)
        self._buffers.clear()  # type: ignore[attr-defined]
        return base

    def put_on(self, base: Any) -> None:
        """Take a plain layer's parameters, mode and device; the other way round of :meth:`take_off`."""
        self.to(base.weight.device)  # type: ignore[attr-defined]
        adapters = {name: self._parameters.pop(name) for name in ADAPTERS}  # type: ignore[attr-defined]
        self._share(base)
        for name, parameter in adapters.items():  # behind the base's, where injection has them
            self.register_parameter(name, parameter)  # type: ignore[attr-defined]
        self.train(base.training)

    def _share(self, base: Any) -> None:
        share_base(base, self)

    def delta(self) -> Tensor:
        """What the adapters add to the base weight: float32, in the weight's own shape."""
        raise AssertionError("each layer has its own")


def like_base(base: Any, cls: type[nn.Module], skip: Sequence[str] = ()) -> Any:
    """An instance of ``cls`` that shares ``base``'s parameters, without running an initialiser."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.training = base.training
    share_base(base, layer, skip)
    return layer


def share_base(base: Any, layer: Any, skip: Sequence[str] = ()) -> None:
    """Give ``layer`` the parameters, buffers and settings of ``base``: the same objects, no copies."""
    for name in base._parameters.keys() - set(skip):
        layer.register_parameter(name, base._parameters[name])
    for name, buffer in base._buffers.items():
        layer.register_buffer(name, buffer)
    for name in (*base.__constants__, *PLAIN_SETTINGS):
        if hasattr(base, name):
            setattr(layer, name, getattr(base, name))


# ----------------------------------------------------------------------------------------------------
# The arithmetic of an adapted linear layer: a frozen product plus low-rank ones, as one operator.
#
#     y = x W' + b,   y[:, span_i] += scaling * z_i B_i'        z = dropout(x) A', made outside
#
# One operator, so that the sum needs no second (N, out) buffer (each low-rank product is accumulated into the frozen
# product's own output) and the backward no clone of dy; and registered with torch, so that ``torch.compile`` takes it
# as it is and fuses what lies around it.
#
# Shapes: x (..., in), z (..., k*r), W (out, in), b (out,), B (sum of span widths, r), y (..., out); spans is flat:
# [start_0, stop_0, start_1, stop_1, ...], ascending columns of y, one pair an adapted segment.


@torch.library.custom_op("phi3lora::linear_plus_low_rank", mutates_args=())
def linear_plus_low_rank(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor, spans: list[int], scaling: float
) -> Tensor:
    """``x W' + b`` with ``scaling * z_i B_i'`` added to the columns of span i; all tensors of one dtype."""
    y = F.linear(x, weight, bias)
    y2, z2 = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    for columns, rows, ranks in _segments(spans, lora_B.shape[1]):
        y2[:, columns].addmm_(z2[:, ranks], lora_B[rows].t(), alpha=scaling)
    return y


@linear_plus_low_rank.register_fake
def _(x, z, weight, bias, lora_B, spans, scaling):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("phi3lora::low_rank_backward", mutates_args=())
def low_rank_backward(dy: Tensor, z: Tensor, lora_B: Tensor, spans: list[int], scaling: float) -> tuple[Tensor, Tensor]:
    """The gradients of z and B."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])
    dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
    for columns, rows, ranks in _segments(spans, lora_B.shape[1]):
        dy_i = dy2[:, columns]
        torch.addmm(dz[:, ranks], dy_i, lora_B[rows], beta=0, alpha=scaling, out=dz[:, ranks])
        torch.addmm(dB[rows], dy_i.t(), z2[:, ranks], beta=0, alpha=scaling, out=dB[rows])
    return dz.view(z.shape), dB


@low_rank_backward.register_fake
def _(dy, z, lora_B, spans, scaling):
    return torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(lora_B)


def _segments(spans: list[int], r: int) -> list[tuple[slice, slice, slice]]:
    """Of each adapted segment: its columns of y, its rows of B, its columns of z.

    ``_segments([0, 4, 6, 8], r=1)`` is [(0:4, 0:4, 0:1), (6:8, 4:6, 1:2)].
    """
    parts, row = [], 0
    for i in range(len(spans) // 2):
        start, stop = spans[2 * i], spans[2 * i + 1]
        parts.append((slice(start, stop), slice(row, row + stop - start), slice(i * r, (i + 1) * r)))
        row += stop - start
    return parts


def _save_for_backward(ctx, inputs, output):
    x, z, weight, bias, lora_B, spans, scaling = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
    ctx.spans, ctx.scaling, ctx.has_bias = spans, scaling, bias is not None


def _backward(ctx, dy):
    x, z, weight, lora_B = ctx.saved_tensors
    dz, dB = low_rank_backward(dy, z, lora_B, ctx.spans, ctx.scaling)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dy2 = dy.reshape(-1, dy.shape[-1])
    dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
    db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return dx, dz, dW, db, dB, None, None


linear_plus_low_rank.register_autograd(_backward, setup_context=_save_for_backward)


class _AdaptedLinear(Adapted):
    """The forward of both linear classes: they differ in :attr:`spans` alone."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    fan_in_fan_out: bool

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Columns of the output that the adapters add to, in order."""
        return ((0, self.out_features),)

    def _finish(self, r: int, lora_alpha: float, lora_dropout: float, fan_in_fan_out: bool, use_rslora: bool) -> None:
        self.fan_in_fan_out = fan_in_fan_out
        self._configure(r if self.spans else 0, lora_alpha, lora_dropout, use_rslora)
        if self.r > 0:
            width = sum(stop - start for start, stop in self.spans)
            self._add_adapters(self.weight, (r * len(self.spans), self.in_features), (width, r))

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; the adapters start at the base's function."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        if "lora_A" in self._parameters:  # type: ignore[attr-defined]
            self._reset_adapters()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        frozen, plain = base_weight_of(self), self.r == 0 or not self.enabled
        dtype = compute_dtype(x, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not isinstance(frozen, Dense):
            y = base_linear(x.to(dtype), frozen)
            y = y if bias is None else y + bias
            return y if plain else y + self._low_rank(x.to(dtype), dtype)
        if plain:
            return F.linear(x, frozen.weight, self.bias)
        x = x.to(dtype)
        z = F.linear(self.lora_dropout(x), self.lora_A.to(dtype))  # (..., r) or (..., k*r)
        spans = [edge for span in self.spans for edge in span]
        return linear_plus_low_rank(x, z, frozen.weight.to(dtype), bias, self.lora_B.to(dtype), spans, self.scaling)

    def _low_rank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the adapters add, (..., out)."""
        z = F.linear(self.lora_dropout(x), self.lora_A.to(dtype)).split(self.r, -1)
        widths = [stop - start for start, stop in self.spans]
        total = x.new_zeros((*x.shape[:-1], self.out_features))
        for z_i, B_i, (start, stop) in zip(z, self.lora_B.to(dtype).split(widths), self.spans, strict=True):
            total[..., start:stop] = F.linear(z_i, B_i) * self.scaling
        return total

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination.update(quant_state_dict(self.weight, f"{prefix}weight."))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        take_quant_state(self.weight, state_dict, f"{prefix}weight.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def delta(self) -> Tensor:
        """``scaling * B_i A_i`` in each span's rows, zero elsewhere; float32, in the weight's own shape."""
        delta = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=self.lora_A.device)
        A, B, row = self.lora_A.float(), self.lora_B.float(), 0
        for i, (start, stop) in enumerate(self.spans):
            delta[start:stop] = B[row : row + stop - start] @ A[i * self.r : (i + 1) * self.r] * self.scaling
            row += stop - start
        return delta.t() if self.fan_in_fan_out else delta


class Linear(_AdaptedLinear, lora.Linear):
    """``loralib.Linear``: ``lora_A (r, in)``, ``lora_B (out, r)``, equal in output and gradient.

    Args:
        in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out: as in loralib.
        merge_weights: accepted and ignored: merging is explicit here.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        bias, device, dtype: of the base layer, as in ``nn.Linear``.

    Raises:
        ModelError: ``r < 0`` or a dropout outside [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()
        self._finish(r, lora_alpha, lora_dropout, fan_in_fan_out, use_rslora)

    @classmethod
    def adapt(
        cls, base: nn.Linear, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> Linear:
        """The same layer with adapters; ``base.weight`` and ``base.bias`` are shared, not copied."""
        layer = like_base(base, cls)
        layer._finish(r, lora_alpha, lora_dropout, False, use_rslora)
        return layer


class MergedLinear(_AdaptedLinear, lora.MergedLinear):
    """``loralib.MergedLinear``, one linear layer that stands for several, also of unequal width.

    ``lora_A (r*k, in)``, ``lora_B (sum of enabled widths, r)``, enabled segments in order (see the top of this file).

    Args:
        enable_lora: one bool a segment.
        segments: the segments' widths; None: equal ones, as loralib has it.
        others: as in :class:`Linear`.

    Raises:
        ModelError: segments that do not add up to ``out_features`` or do not match ``enable_lora``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = False,
        segments: Sequence[int] | None = None,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()
        self._set_segments(segments, enable_lora)
        self._finish(r, lora_alpha, lora_dropout, fan_in_fan_out, use_rslora)

    @classmethod
    def adapt(  # type: ignore[override]
        cls,
        base: nn.Linear,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        *,
        segments: Sequence[int] | None = None,
        enable_lora: Sequence[bool],
    ) -> MergedLinear:
        """The same layer with adapters on the enabled segments; ``base``'s parameters are shared, not copied."""
        layer = like_base(base, cls)
        layer._set_segments(segments, enable_lora)
        layer._finish(r, lora_alpha, lora_dropout, False, use_rslora)
        return layer

    def _set_segments(self, segments: Sequence[int] | None, enable_lora: Sequence[bool]) -> None:
        self.enable_lora = list(map(bool, enable_lora))
        count = len(self.enable_lora)
        if segments is None:
            if count == 0 or self.out_features % count:
                raise ModelError(
                    f"MergedLinear: {count} equal segments do not divide out_features={self.out_features}; "
                    f"give their widths: segments=(...)"
                )
            segments = [self.out_features // count] * count
        self.segments = tuple(int(width) for width in segments)
        if len(self.segments) != count:
            raise ModelError(
                f"MergedLinear: segments={self.segments} and enable_lora={self.enable_lora} differ in length"
            )
        if min(self.segments) < 1 or sum(self.segments) != self.out_features:
            raise ModelError(
                f"MergedLinear: segments={self.segments} add up to {sum(self.segments)}; "
                f"allowed: positive widths that add up to out_features={self.out_features}"
            )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Columns of the output that the enabled segments take, in order."""
        spans, start = [], 0
        for width, enabled in zip(self.segments, self.enable_lora, strict=True):
            if enabled:
                spans.append((start, start + width))
            start += width
        return tuple(spans)

    @property
    def lora_ind(self) -> Tensor:
        """loralib's mask of adapted output rows, bool (out,), made on demand."""
        mask = torch.zeros(self.out_features, dtype=torch.bool, device=self.weight.device)
        for start, stop in self.spans:
            mask[start:stop] = True
        return mask

    def merge_AB(self) -> Tensor:
        """loralib's dense delta, without the scaling, in the weight's own shape; float32."""
        return self.delta() / self.scaling

    def zero_pad(self, x: Tensor) -> Tensor:
        """loralib's helper: (sum of enabled widths, ...) -> (out, ...), zeros in the other rows."""
        result = x.new_zeros((self.out_features, *x.shape[1:]))
        result[self.lora_ind] = x
        return result


class Embedding(Adapted, lora.Embedding):
    """``loralib.Embedding``: ``lora_A (r, num_embeddings)``, ``lora_B (embedding_dim, r)``.

    As in loralib A starts at zero and B normal, and there is no dropout.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = False,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._finish(r, lora_alpha, use_rslora)

    @classmethod
    def adapt(cls, base: nn.Embedding, r: int, lora_alpha: float = 1, use_rslora: bool = False) -> Embedding:
        """The same layer with adapters; ``base.weight`` is shared, not copied."""
        layer = like_base(base, cls)
        layer._finish(r, lora_alpha, use_rslora)
        return layer

    def _finish(self, r: int, lora_alpha: float, use_rslora: bool) -> None:
        self._configure(r, lora_alpha, 0.0, use_rslora)
        if r > 0:
            self._add_adapters(self.weight, (r, self.num_embeddings), (self.embedding_dim, r))

    def _reset_adapters(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def reset_parameters(self) -> None:
        """As ``nn.Embedding``; the adapters start at the base's function."""
        nn.Embedding.reset_parameters(self)
        if "lora_A" in self._parameters:
            self._reset_adapters()

    def forward(self, x: Tensor) -> Tensor:
        """x (...) token ids -> (..., embedding_dim), in the base weight's dtype."""
        result = nn.Embedding.forward(self, x)
        if self.r == 0 or not self.enabled:
            return result
        after_A = F.embedding(x, self.lora_A.t(), self.padding_idx, None, 2.0, self.scale_grad_by_freq)  # (..., r)
        return result + ((after_A @ self.lora_B.t()) * self.scaling).to(result.dtype)

    def delta(self) -> Tensor:
        """``scaling * (B A)'``, float32, (num_embeddings, embedding_dim)."""
        return (self.lora_B.float() @ self.lora_A.float()).t() * self.scaling


class Conv2d(Adapted, lora.Conv2d):
    """``loralib.Conv2d``: the base is ``self.conv``; ``lora_A (r*k, in*k)``, ``lora_B (out//groups*k, r*k)``.

    As in loralib the kernel is square, and ``lora_dropout`` is kept but not applied. A pretrained state dict that
    says ``weight`` and ``bias`` (the name before the swap) loads too: loralib's rename would skip it under
    ``strict=False``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        use_rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        base = nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)
        self._finish(base, r, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def adapt(
        cls, base: nn.Conv2d, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0, use_rslora: bool = False
    ) -> Conv2d:
        """The same layer with adapters; ``base`` becomes ``.conv``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.training = base.training
        layer._finish(base, r, lora_alpha, lora_dropout, use_rslora)
        return layer

    def _finish(self, base: nn.Conv2d, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        height, width = base.kernel_size
        if height != width:
            raise ModelError(f"Conv2d: kernel_size={base.kernel_size}; allowed: square kernels (loralib's layout)")
        self.conv = base
        self._configure(r, lora_alpha, lora_dropout, use_rslora)
        if r > 0:
            a_shape = (r * height, base.in_channels * height)
            self._add_adapters(base.weight, a_shape, (base.out_channels // base.groups * height, r * height))

    def reset_parameters(self) -> None:
        """As ``nn.Conv2d``; the adapters start at the base's function."""
        self.conv.reset_parameters()
        if "lora_A" in self._parameters:
            self._reset_adapters()

    def frozen_weight(self) -> Tensor:
        """The base layer's weight."""
        return self.conv.weight

    def frozen_bias(self) -> Tensor | None:
        """The base layer's bias, which trains with ``bias != "none"``."""
        return self.conv.bias

    def base_layer(self) -> nn.Module:
        """The plain layer."""
        return self.conv

    def take_off(self) -> nn.Module:
        """The plain layer; this one keeps its adapters alone."""
        return self._modules.pop("conv")  # type: ignore[return-value]

    def _share(self, base: nn.Conv2d) -> None:
        self.conv = base

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, H, W) -> (B, out, H', W')."""
        if self.r == 0 or not self.enabled:
            return self.conv(x)
        weight = self.conv.weight
        return self.conv._conv_forward(x, weight + self.delta().to(weight.dtype), self.conv.bias)

    def delta(self) -> Tensor:
        """``scaling * B A`` viewed in the kernel's shape (out, in//groups, k, k), float32."""
        return (self.lora_B.float() @ self.lora_A.float()).view(self.conv.weight.shape) * self.scaling

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict.setdefault(f"{prefix}conv.{name}", state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


LORA_LAYERS = (Linear, MergedLinear, Embedding, Conv2d)
"""Every adapted layer is an instance of one of these."""
