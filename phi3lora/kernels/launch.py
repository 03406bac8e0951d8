"""Kernel launches on the tensors' device, with the fastest block that the GPU's shared memory holds.

How much a block needs depends on the rank and on how far the compiler prefetches; an H100 has 227 KiB, an A100 163, a
4090 99. So every kernel lists its blocks from the fastest on an H100 down, and the first that fits is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..errors import ModelError

Block = dict[str, int]

_fitting: dict[tuple[Any, ...], int] = {}


def on_device_of(tensor: Tensor) -> Any:
    """Return a context in which Triton launches on ``tensor``'s GPU instead of the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. (``triton.cdiv`` takes 10 microseconds, and a step needs it a thousand times.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def blocks(*sizes: tuple[int, int, int]) -> list[Block]:
    """Turn each (rows, columns, stages of prefetching) into launch options with 4 warps."""
    return [{"BM": rows, "BN": columns, "STAGES": stages, "num_warps": 4} for rows, columns, stages in sizes]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return a gradient in the layout that the kernels read; None stays None."""
    return None if tensor is None else tensor.contiguous()


def launch(
    kernel: Any, blocks: Sequence[Block], grid: Callable[[Block], tuple[int, ...]], *arguments: Any, **constants: Any
) -> None:
    """Call ``kernel[grid(block)](*arguments, **constants, **block)`` with the first of ``blocks`` that fits.

    Args:
        kernel: a Triton kernel whose first argument is a tensor.
        blocks: launch options, in order of preference.
        grid: the number of programs, given a block.

    Raises:
        ModelError: no block fits.
    """
    device = arguments[0].device
    key = (kernel.fn, device, arguments[0].dtype, *constants.values())
    with on_device_of(arguments[0]):
        for i in range(_fitting.get(key, 0), len(blocks)):
            try:
                kernel[grid(blocks[i])](*arguments, **constants, **blocks[i])
            except OutOfResources:
                continue
            _fitting[key] = i
            return
    raise ModelError(
        f"{kernel.fn.__name__}: with this rank none of its blocks fits the shared memory of "
        f"{torch.cuda.get_device_name(device)}; train with compile=True or a smaller r"
    )
