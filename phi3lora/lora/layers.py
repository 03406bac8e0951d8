"""LoRA layers: loralib's classes with its keys, shapes and formula, made fast and safe.

    y = x W' + b + scaling * dropout(x) A' B'                       https://arxiv.org/abs/2106.09685, section 4.1

Differences from loralib (https://github.com/microsoft/LoRA, loralib/layers.py):

* ``train()`` and ``eval()`` never write weights (loralib merges in ``eval()``, in the weight's own dtype).
* A layer can be built around an existing one: its ``weight`` Parameter is kept, nothing but A and B is allocated.
* A and B are float32 whatever the base is; the products run in the compute dtype (autocast's, else the base's).
* ``MergedLinear`` takes segments of unequal width, and its forward never forms the (out, in) delta:

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
from typing import TYPE_CHECKING, Any, NamedTuple

import loralib as lora
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..config import lora_scaling
from ..errors import ModelError
from .base_weight import (
    LINEAR4BIT_SETTINGS,
    Dense,
    add_quant_state,
    base_linear,
    base_weight_of,
    compute_dtype,
    plain_linear_class,
    pop_quant_state,
)

if TYPE_CHECKING:
    from typing_extensions import Self

ADAPTER_PARAMETERS = ("lora_A", "lora_B")
"""Names of an adapter's own parameters; a layer's other parameters are the base layer's."""


class Segment(NamedTuple):
    """One adapted segment of a linear layer. In the example above, v is ``(2, 16:32, 5120:6400, 6400:7680)``."""

    position: int  # in the layer, counting the segments without an adapter too
    rows_of_A: slice  # of lora_A (k*r, in); also the columns of z = x A' (N, k*r)
    rows_of_B: slice  # of lora_B (sum of enabled widths, r)
    columns: slice  # of y (N, out); also the rows of W (out, in)


def adapted_segments(widths: Sequence[int], enable_lora: Sequence[bool], r: int) -> tuple[Segment, ...]:
    """Return the segments that have an adapter of rank ``r``, in order, given every segment's width and switch."""
    segments = []
    a = b = column = 0
    for position, (width, enabled) in enumerate(zip(widths, enable_lora, strict=True)):
        if enabled:
            segments.append(Segment(position, slice(a, a + r), slice(b, b + width), slice(column, column + width)))
            a, b = a + r, b + width
        column += width
    return tuple(segments)


# ----------------------------------------------------------------------------------------------------
# The arithmetic on a dense base weight, given z = dropout(x) A':  y = x W' + b,  y[:, columns_i] += scaling * z_i B_i'
# It is one operator: each low-rank product is accumulated into the base product's output, which saves a second (N, out)
# buffer, and the backward makes no copy of dy. Registering it with torch lets ``torch.compile`` treat it as one node
# and fuse the operations around it. ``widths`` and ``enable_lora`` describe all segments of the output.


@torch.library.custom_op("phi3lora::linear_plus_low_rank", mutates_args=())
def linear_plus_low_rank(
    x: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, lora_B: Tensor,
    widths: list[int], enable_lora: list[bool], scaling: float,
) -> Tensor:  # fmt: skip
    """Return ``x W' + b`` with ``scaling * z_i B_i'`` added to segment i's columns; all tensors have one dtype.

    x (..., in), z (..., k*r), weight (out, in), bias (out,), lora_B (sum of enabled widths, r) -> (..., out).
    """
    y = F.linear(x, weight, bias)
    y2, z2 = y.view(-1, y.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        y2[:, segment.columns].addmm_(z2[:, segment.rows_of_A], lora_B[segment.rows_of_B].t(), alpha=scaling)
    return y


linear_plus_low_rank.register_fake(lambda x, z, weight, *others: x.new_empty(*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("phi3lora::low_rank_backward", mutates_args=())
def low_rank_backward(
    dy: Tensor, z: Tensor, lora_B: Tensor, widths: list[int], enable_lora: list[bool], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and B: (..., k*r) and (sum of enabled widths, r)."""
    dy2, z2 = dy.reshape(-1, dy.shape[-1]), z.reshape(-1, z.shape[-1])  # (N, out), (N, k*r)
    dz, dB = torch.empty_like(z2), torch.empty_like(lora_B)
    for segment in adapted_segments(widths, enable_lora, lora_B.shape[1]):
        dy_i, z_i, B_i = dy2[:, segment.columns], z2[:, segment.rows_of_A], lora_B[segment.rows_of_B]
        dz_i, dB_i = dz[:, segment.rows_of_A], dB[segment.rows_of_B]
        torch.addmm(dz_i, dy_i, B_i, beta=0, alpha=scaling, out=dz_i)
        torch.addmm(dB_i, dy_i.t(), z_i, beta=0, alpha=scaling, out=dB_i)
    return dz.view(z.shape), dB


low_rank_backward.register_fake(
    lambda dy, z, lora_B, *others: (z.new_empty(z.shape), torch.empty_like(lora_B))  # both contiguous
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, z, weight, bias, lora_B, *ctx.segments_and_scaling = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, z, weight, lora_B)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, z, weight, lora_B = ctx.saved_tensors
    dz, dB = low_rank_backward(dy, z, lora_B, *ctx.segments_and_scaling)
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dy2 = dy.reshape(-1, dy.shape[-1])  # (N, out)
    dW = dy2.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[2] else None
    db = dy2.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return dx, dz, dW, db, dB, None, None, None


linear_plus_low_rank.register_autograd(_backward, setup_context=_save_for_backward)


# ----------------------------------------------------------------------------------------------------
# The layers.


class AdaptedLayer(nn.Module):
    """Base class of the four layers: settings, float32 adapters, and modes that leave the weights alone."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    weight: nn.Parameter

    @classmethod
    def adapt(
        cls, base: Any, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0, use_rslora: bool = False, **more: Any
    ) -> Self:
        """Return a layer with an adapter around the plain layer ``base``, whose parameters are shared, not copied.

        ``more``: ``segments`` and ``enable_lora`` of a :class:`MergedLinear`.
        """
        layer: Self = _without_parameters(cls, base.training)
        layer._share(base)
        layer._set_up(r, lora_alpha, lora_dropout, use_rslora, **more)
        return layer

    def _set_up(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        """Store the settings and, with ``r > 0``, freeze the base weight and add A and B."""
        if not (isinstance(r, int) and r >= 0):
            raise ModelError(f"{type(self).__name__}: r={r!r}; allowed: a whole number >= 0 (0: no adapter)")
        if not 0 <= lora_dropout < 1:
            raise ModelError(f"{type(self).__name__}: lora_dropout={lora_dropout!r}; allowed: 0 <= p < 1")
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        # A module at p = 0 too: loralib's lambda cannot be pickled.
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training)
        self.merged = self.merge_weights = False
        self.enabled = True  # False: the layer computes as the base layer alone, see adapters/named.py
        self.scaling = lora_scaling(r, lora_alpha, use_rslora) if r > 0 else 0.0
        if r > 0:
            weight = self.base_layer().weight
            weight.requires_grad = False
            for name, shape in zip(ADAPTER_PARAMETERS, self._adapter_shapes(), strict=True):
                setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=weight.device)))
            self._reset_adapter()

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        raise NotImplementedError

    def _reset_adapter(self) -> None:
        """Initialise A as ``nn.Linear`` does and B to zero, so that the adapted layer starts as the base layer."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def train(self, mode: bool = True) -> Self:
        """Set the mode and return the layer. Weights are never written: merging is explicit."""
        return nn.Module.train(self, mode)

    def delta(self) -> Tensor:
        """Return what the adapter adds to the base weight: float32, in the weight's own shape."""
        raise NotImplementedError

    def base_layer(self) -> Any:
        """Return the plain layer, which shares the base's parameters with this one."""
        cls = nn.Embedding if isinstance(self, nn.Embedding) else plain_linear_class(self.weight)
        base = _without_parameters(cls, self.training)
        _share_parameters(self, base)
        return base

    def release_base(self) -> Any:
        """Return the plain layer and keep only the adapter here, until :meth:`attach_base`."""
        base = self.base_layer()
        for name in {*self._parameters, *self._buffers, *self._modules} - {*ADAPTER_PARAMETERS, "lora_dropout"}:
            delattr(self, name)
        return base

    def attach_base(self, base: Any) -> None:
        """Take over a plain layer's parameters, mode and device: the inverse of :meth:`release_base`."""
        self.to(base.weight.device)
        adapter = {name: self._parameters.pop(name) for name in ADAPTER_PARAMETERS}
        self._share(base)
        for name, parameter in adapter.items():  # after the base's parameters, which is the order after injection
            self.register_parameter(name, parameter)
        self.train(base.training)

    def _share(self, base: Any) -> None:
        _share_parameters(base, self)


def _without_parameters(cls: type[nn.Module], training: bool) -> Any:
    """Return an instance of ``cls`` on which no initialiser has run."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.training = training
    return layer


def _share_parameters(source: Any, layer: Any) -> None:
    """Give ``layer`` the base parameters, buffers and settings of ``source``: the same objects, no copies."""
    for name, parameter in source._parameters.items():
        if name not in ADAPTER_PARAMETERS:
            layer.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        layer.register_buffer(name, buffer)
    for name in (*source.__constants__, *LINEAR4BIT_SETTINGS):
        if hasattr(source, name):
            setattr(layer, name, getattr(source, name))


class _AdaptedLinear(AdaptedLayer):
    """A linear layer of one or several segments: set-up, forward and storage of both linear classes."""

    bias: nn.Parameter | None
    in_features: int
    out_features: int
    fan_in_fan_out: bool
    segments: tuple[int, ...]  # widths, which add up to out_features
    enable_lora: list[bool]  # one per segment: True where it has an adapter

    def _set_up(
        self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, fan_in_fan_out: bool = False,
        segments: Sequence[int] | None = None, enable_lora: Sequence[bool] = (True,),
    ) -> None:  # fmt: skip
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t()
        self.enable_lora = list(map(bool, enable_lora))
        count = len(self.enable_lora)
        equal_widths = (self.out_features // max(count, 1),) * count
        self.segments = equal_widths if segments is None else tuple(map(int, segments))
        if len(self.segments) != count or sum(self.segments) != self.out_features or min(self.segments) < 1:
            default = " (equal by default)" if segments is None else ""
            raise ModelError(
                f"MergedLinear: segments={self.segments}{default} add up to {sum(self.segments)}; allowed: one "
                f"positive width for each of enable_lora={self.enable_lora}, {self.out_features} (out_features) in all"
            )
        super()._set_up(r if any(self.enable_lora) else 0, lora_alpha, lora_dropout, use_rslora)

    @property
    def adapted_segments(self) -> tuple[Segment, ...]:
        """Segments that have an adapter, in order, with their places in A, B and the output."""
        return adapted_segments(self.segments, self.enable_lora, self.r)

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        last = self.adapted_segments[-1]
        return (last.rows_of_A.stop, self.in_features), (last.rows_of_B.stop, self.r)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x (..., in) -> (..., out)."""
        base, adapted = base_weight_of(self), self.r > 0 and self.enabled
        if isinstance(base, Dense) and not adapted:
            return F.linear(x, base.weight, self.bias)
        dtype = compute_dtype(x, self.weight)
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if adapted:
            z, B = F.linear(self.lora_dropout(x), self.lora_A.to(dtype)), self.lora_B.to(dtype)  # z (..., k*r)
            if isinstance(base, Dense):
                W = base.weight.to(dtype)
                y: Tensor = linear_plus_low_rank(x, z, W, bias, B, self.segments, self.enable_lora, self.scaling)
                return y
        y = base_linear(x, base)  # a quantised weight
        y = y if bias is None else y + bias
        if adapted:
            update = torch.zeros_like(y)
            for segment in self.adapted_segments:
                update[..., segment.columns] = F.linear(z[..., segment.rows_of_A], B[segment.rows_of_B]) * self.scaling
            y = y + update
        return y

    def delta(self) -> Tensor:
        """Return ``scaling * B_i A_i`` in segment i's rows, zero elsewhere; float32, in the weight's own shape."""
        delta = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=self.lora_A.device)
        A, B = self.lora_A.float(), self.lora_B.float()
        for segment in self.adapted_segments:
            delta[segment.columns] = B[segment.rows_of_B] @ A[segment.rows_of_A] * self.scaling
        return delta.t() if self.fan_in_fan_out else delta

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        add_quant_state(self.weight, destination, f"{prefix}weight.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        pop_quant_state(self.weight, state_dict, f"{prefix}weight.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(_AdaptedLinear, lora.Linear):  # type: ignore[misc]
    """``loralib.Linear``: ``lora_A (r, in)``, ``lora_B (out, r)``, equal in output and gradient.

    Args:
        in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out: as in loralib.
        merge_weights: accepted and ignored: merging is explicit here.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        bias, device, dtype: settings of the base layer, as in ``nn.Linear``.

    Raises:
        ModelError: ``r < 0`` or a dropout outside [0, 1).
    """

    def __init__(
        self, in_features: int, out_features: int, r: int = 0, lora_alpha: float = 1, lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False, merge_weights: bool = False, use_rslora: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, use_rslora, fan_in_fan_out)


class MergedLinear(_AdaptedLinear, lora.MergedLinear):  # type: ignore[misc]
    """``loralib.MergedLinear``: one linear layer that stands for several, also of unequal width.

    ``lora_A (r*k, in)``, ``lora_B (sum of enabled widths, r)``, enabled segments in order (see the top of this file).

    Args:
        enable_lora: one bool per segment: whether it has an adapter.
        segments: the segments' widths; None: equal widths, as in loralib.
        others: as in :class:`Linear`.

    Raises:
        ModelError: segments that do not add up to ``out_features`` or do not match ``enable_lora``.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int = 0, lora_alpha: float = 1, lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,), fan_in_fan_out: bool = False, merge_weights: bool = False,
        segments: Sequence[int] | None = None, use_rslora: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._set_up(r, lora_alpha, lora_dropout, use_rslora, fan_in_fan_out, segments, enable_lora)

    @property
    def lora_ind(self) -> Tensor:
        """loralib's mask of adapted output rows, bool (out,), made on demand."""
        mask = torch.zeros(self.out_features, dtype=torch.bool, device=self.weight.device)
        for segment in self.adapted_segments:
            mask[segment.columns] = True
        return mask

    def merge_AB(self) -> Tensor:
        """Return loralib's dense delta, without the scaling, in the weight's own shape; float32."""
        return self.delta() / self.scaling


class Embedding(AdaptedLayer, lora.Embedding):  # type: ignore[misc]
    """``loralib.Embedding``: ``lora_A (r, num_embeddings)``, ``lora_B (embedding_dim, r)``.

    As in loralib, A starts at zero and B normal, and there is no dropout: ``lora_dropout`` is stored, not applied.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool

    def __init__(
        self, num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: float = 1, merge_weights: bool = False,
        use_rslora: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._set_up(r, lora_alpha, 0.0, use_rslora)

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.r, self.num_embeddings), (self.embedding_dim, self.r)

    def _reset_adapter(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Look up x (...) token ids -> (..., embedding_dim), in the base weight's dtype."""
        y = nn.Embedding.forward(self, x)
        if self.r == 0 or not self.enabled:
            return y
        z = F.embedding(x, self.lora_A.t(), self.padding_idx, None, 2.0, self.scale_grad_by_freq)  # (..., r)
        return y + ((z @ self.lora_B.t()) * self.scaling).to(y.dtype)

    def delta(self) -> Tensor:
        """Return ``scaling * (B A)'``, float32, (num_embeddings, embedding_dim)."""
        return (self.lora_B.float() @ self.lora_A.float()).t() * self.scaling


class Conv2d(AdaptedLayer, lora.Conv2d):  # type: ignore[misc]
    """``loralib.Conv2d``: the base is ``self.conv``; ``lora_A (r*k, in*k)``, ``lora_B (out//groups*k, r*k)``.

    As in loralib, the kernel is square, k x k, and ``lora_dropout`` is stored, not applied. A pretrained state dict
    with ``weight`` and ``bias`` (the names before the swap) loads too; in loralib ``strict=False`` would skip those.
    """

    conv: nn.Conv2d

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, r: int = 0, lora_alpha: float = 1,
        lora_dropout: float = 0.0, merge_weights: bool = False, use_rslora: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self._share(nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs))
        self._set_up(r, lora_alpha, lora_dropout, use_rslora)

    def _share(self, base: nn.Conv2d) -> None:
        if base.kernel_size[0] != base.kernel_size[1]:
            raise ModelError(f"Conv2d: kernel_size={base.kernel_size}; allowed: square kernels (loralib's layout)")
        self.conv = base

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        r, k, base = self.r, self.conv.kernel_size[0], self.conv
        return (r * k, base.in_channels * k), (base.out_channels // base.groups * k, r * k)

    def base_layer(self) -> nn.Conv2d:
        """Return the plain layer."""
        return self.conv

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x (B, in, H, W) -> (B, out, H', W')."""
        weight: Tensor = self.conv.weight
        if self.r > 0 and self.enabled:
            weight = weight + self.delta().to(weight.dtype)
        y: Tensor = self.conv._conv_forward(x, weight, self.conv.bias)
        return y

    def delta(self) -> Tensor:
        """Return ``scaling * B A`` viewed in the kernel's shape (out, in//groups, k, k), float32."""
        return (self.lora_B.float() @ self.lora_A.float()).view(self.conv.weight.shape) * self.scaling

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict.setdefault(f"{prefix}conv.{name}", state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args)
