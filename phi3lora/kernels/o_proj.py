"""The output projection: its frozen product and its adapter's low-rank activations.

No kernel of ours computes its input, attention's output, so here the first half of the adapter is a product of its own.

    y, z = x W', dropout(x) A'          dx = dy W + mask(dz A)

Shapes: N tokens, ``in`` and ``out`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lora.base_weight import base_linear
from ..lora.weight_formats import BaseWeight
from .adapter import Adapter
from .low_rank import lora_weight_gradient, project, project_backward_
from .reduce import PartialSums


class _LinearAndLoraA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, lora_A, base_weight, adapter):
        ctx.save_for_backward(x)
        ctx.base_weight, ctx.adapter = base_weight, adapter
        return base_weight.matmul(x), project(x, adapter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dz):
        (x,), adapter = ctx.saved_tensors, ctx.adapter
        dx = project_backward_(ctx.base_weight.matmul_backward(dy), dz, adapter)
        sums = PartialSums()
        dA = lora_weight_gradient(sums, dz, x, adapter)
        sums.reduce()
        return dx, adapter.gradient_of_A(dA), None, None


def linear_and_lora_a(x: Tensor, base_weight: BaseWeight, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
    """Return ``x W'`` (N, out) and ``dropout(x) A'`` (N, k*R), or None without an adapter."""
    if not adapter:
        return base_linear(x, base_weight), None
    return _LinearAndLoraA.apply(x, adapter.lora_A, base_weight, adapter)
