"""What every adapted layer is beside loralib's class: settings, float32 adapters, modes that leave weights alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..errors import ModelError
from .four_bit import PLAIN_SETTINGS
from .frozen import plain_class

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
