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
from typing import TYPE_CHECKING, Any

import loralib as lora
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..config import lora_scaling
from ..errors import ModelError
from .base_weight import (
    add_quant_state,
    base_linear,
    base_weight_of,
    compute_dtype,
    needs_plain_operations,
    parameter_of,
    plain_linear_class,
    pop_quant_state,
)
from .layer_state import ADAPTER_PARAMETERS, INNER_STATE, reason_against_state, share_state, strip_state
from .product import (
    Segment,
    adapted_segments,
    factors,
    linear_plus_low_rank,
    low_rank_plainly,
    with_low_rank,
)
from .weight_formats import Dense

if TYPE_CHECKING:
    from typing_extensions import Self


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

        Raises:
            ModelError: settings that do not fit, or something on ``base`` that cannot move to another layer.
        """
        if reason := reason_against_state(base, cls):
            raise ModelError(reason)
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
        """Return the plain layer, which shares the base's parameters, hooks and attributes with this one."""
        base = _without_parameters(self._base_class(), self.training)
        share_state(self, base)
        return base

    def _base_class(self) -> type[nn.Module]:
        raise NotImplementedError

    def release_base(self) -> Any:
        """Return the plain layer and keep only the adapter here, until :meth:`attach_base`."""
        base = self.base_layer()
        strip_state(self)
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
        share_state(base, self)


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # torch's own test takes three times as long


def _without_parameters(cls: type[nn.Module], training: bool) -> Any:
    """Return an instance of ``cls`` on which no initialiser has run."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.training = training
    return layer


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

    def base_layer(self) -> Any:
        """Return the plain layer; torch has none for a weight stored (in, out): there, a ``Linear`` without adapter."""
        base = super().base_layer()
        if self.fan_in_fan_out:
            base._set_up(0, self.lora_alpha, 0.0, self.use_rslora)
            base.fan_in_fan_out = True
        return base

    def _base_class(self) -> type[nn.Module]:
        return Linear if self.fan_in_fan_out else plain_linear_class(self.weight)

    @property
    def adapted_segments(self) -> tuple[Segment, ...]:
        """Segments that have an adapter, in order, with their places in A, B and the output."""
        return adapted_segments(self.segments, self.enable_lora, self.r)

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        last = self.adapted_segments[-1]
        return (last.rows_of_A.stop, self.in_features), (last.rows_of_B.stop, self.r)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer: x (..., in) -> (..., out)."""
        adapted = self.r > 0 and self.enabled
        if adapted and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or needs_plain_operations()):
            return self._forward_without_gradients(x)
        base = base_weight_of(self)
        if isinstance(base, Dense) and not adapted:
            return F.linear(x, base.weight, self.bias)
        dtype = compute_dtype(x, self.weight)
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if adapted:
            z, B = F.linear(self.lora_dropout(x), self.lora_A.to(dtype)), self.lora_B.to(dtype)  # z (..., k*r)
            if isinstance(base, Dense) and not needs_plain_operations():
                W = base.weight.to(dtype)
                y: Tensor = linear_plus_low_rank(x, z, W, bias, B, self.segments, self.enable_lora, self.scaling)
                return y
        y = F.linear(x, base.weight.to(dtype)) if isinstance(base, Dense) else base_linear(x, base)
        y = y if bias is None else y + bias
        return y + low_rank_plainly(z, B, self.segments, self.enable_lora, self.scaling) if adapted else y

    def _forward_without_gradients(self, x: Tensor) -> Tensor:
        base, bias = base_weight_of(self), parameter_of(self, "bias")
        dropout: Any = self._modules["lora_dropout"]
        dtype = compute_dtype(x, base.weight if isinstance(base, Dense) else self.weight)
        x, bias = _to(x, dtype), bias if bias is None else _to(bias, dtype)
        if isinstance(base, Dense):
            y = F.linear(x, _to(base.weight, dtype), bias)  # (..., out)
        else:
            y = base.matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
            y = y if bias is None else y.add_(bias)
        A, B = factors(self, x)
        z = F.linear(_to(dropout(x) if dropout.training else x, A.dtype), A)  # (..., k*r)
        return with_low_rank(y, z, B, self.segments, self.enable_lora, self.scaling)

    def delta(self) -> Tensor:
        """Return ``scaling * B_i A_i`` in segment i's rows, zero elsewhere; float32, in the weight's own shape."""
        return self._scaled_product(self.scaling)

    def _scaled_product(self, scaling: float) -> Tensor:
        delta = torch.zeros(self.out_features, self.in_features, dtype=torch.float32, device=self.lora_A.device)
        A, B = self.lora_A.float(), self.lora_B.float()
        for segment in self.adapted_segments:
            delta[segment.columns] = B[segment.rows_of_B] @ A[segment.rows_of_A] * scaling
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
    """``loralib.MergedLinear``: one linear layer that stands for several, which may differ in width.

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
        return self._scaled_product(1.0)


class Embedding(AdaptedLayer, lora.Embedding):  # type: ignore[misc]
    """``loralib.Embedding``: ``lora_A (r, num_embeddings)``, ``lora_B (embedding_dim, r)``.

    As in loralib, A starts at zero and B normal, and there is no dropout: ``lora_dropout`` is stored, not applied.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool
    max_norm: float | None
    norm_type: float

    def __init__(
        self, num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: float = 1, merge_weights: bool = False,
        use_rslora: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._set_up(r, lora_alpha, 0.0, use_rslora)

    def _base_class(self) -> type[nn.Module]:
        return nn.Embedding

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
        A = self.lora_A.t()
        z = F.embedding(x, A, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq)  # (..., r)
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
        share_state(base, self, skip=INNER_STATE)  # its hooks run on this layer's call, since its own never comes
        self.conv = base

    def _adapter_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        r, k, base = self.r, self.conv.kernel_size[0], self.conv
        return (r * k, base.in_channels * k), (base.out_channels // base.groups * k, r * k)

    def base_layer(self) -> nn.Conv2d:
        """Return the plain layer."""
        return self.conv

    def release_base(self) -> nn.Conv2d:
        """Return the plain layer and keep only the adapter here, until :meth:`attach_base`."""
        base = self.conv
        share_state(self, base, skip=INNER_STATE)
        super().release_base()
        del self.conv
        return base

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
