"""Launching a kernel: on its tensors' device, with the largest block that the GPU's shared memory holds.

How much a block needs depends on the rank and on how far the compiler prefetches; an H100 has 227 KiB, an A100 163, a
4090 99. So every pass lists its blocks from the fastest on an H100 down, and the first that fits is remembered.
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
    """A context in which kernels launch on ``tensor``'s GPU: Triton takes the current one, not its arguments'."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. (``triton.cdiv`` says the same in 10 microseconds, and a step asks a thousand times.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def blocks(*sizes: tuple[int, int, int]) -> list[Block]:
    """(rows, columns, stages of prefetching) -> launch options, 4 warps each."""
    return [{"BM": rows, "BN": columns, "STAGES": stages, "num_warps": 4} for rows, columns, stages in sizes]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A gradient as the kernels read it; None stays None."""
    return None if tensor is None else tensor.contiguous()


def launch(
    kernel: Any, blocks: Sequence[Block], grid: Callable[[Block], tuple[int, ...]], *arguments: Any, **constants: Any
) -> None:
    """``kernel[grid(block)](*arguments, **constants, **block)`` with the first of ``blocks`` that fits.

    Args:
        kernel: a Triton kernel whose first argument is a tensor.
        blocks: launch options, in order of preference.
        grid: programs of a block.

    Raises:
        ModelError: none fits.
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
        f"{kernel.fn.__name__}: with this rank no block of it fits the shared memory of "
        f"{torch.cuda.get_device_name(device)}; train with compile=True or a smaller r"
    )
