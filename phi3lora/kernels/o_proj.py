"""The frozen product of attention's output, which no kernel of ours makes, and the adapter's low-rank activations.

    y, z = x W', dropout(x) A'          dx = dy W + mask(dz A)

Shapes: N tokens, ``in`` and ``out`` features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lora.base_weight import BaseWeight, base_linear
from .adapter import Adapter
from .low_rank import add_back_projection_, column_sums, project
from .reduce import Sums


class _LinearAndLoraA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, lora_A, frozen, adapter):  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.frozen, ctx.adapter = frozen, adapter
        return frozen.matmul(x), project(x, adapter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dz):  # type: ignore[override]
        (x,), adapter = ctx.saved_tensors, ctx.adapter
        dx = add_back_projection_(ctx.frozen.matmul_backward(dy), dz, adapter)
        sums = Sums()
        dA = column_sums(sums, dz, x, adapter)
        sums.finish()
        return dx, adapter.gradient_of_A(dA), None, None


def linear_and_lora_a(x: Tensor, frozen: BaseWeight, adapter: Adapter | None) -> tuple[Tensor, Tensor | None]:
    """Return ``x W'`` (N, out) and, where there is an adapter, ``dropout(x) A'`` (N, k*R)."""
    if adapter is None:
        return base_linear(x, frozen), None
    return _LinearAndLoraA.apply(x, adapter.lora_A, frozen, adapter)
