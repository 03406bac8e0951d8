"""Kernel launches on the tensors' device, with the fastest block that the GPU's shared memory holds.

How much a block needs depends on the rank and on how far the compiler prefetches; an H100 has 227 KiB, an A100 163, a
4090 99. So every kernel lists its blocks from the fastest on an H100 down, and the first that fits is remembered.

Triton looks up a compiled kernel by a key that it makes of all arguments: 20 to 40 microseconds of Python, a thousand
times a step. Here the key is what its choice depends on: dtypes, alignment, and what it specialises integers on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..errors import ModelError

Block = dict[str, int]

_compiled: dict[tuple[Any, ...], tuple[Block, Any, tuple[Any, ...]]] = {}
"""By key, the block that fits, the compiled kernel and the values of its constants, in the kernel's order."""
_wanted: ContextVar[list[tuple[Any, Tensor]] | None] = ContextVar("wanted", default=None)
"""Kernels that a ``compiled_together`` block asked for so far, each with a tensor on its device; this thread's only."""


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


def _kind(argument: Any) -> Any:
    """Return what Triton's choice of a compiled kernel depends on in an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return type(argument)


@contextmanager
def compiled_together() -> Iterator[None]:
    """Launch nothing in the block, but compile side by side, in threads, what would have been launched.

    The compiler's passes, ptxas, and the C compiler that makes a kernel's launcher run without Python's lock. A kernel
    that fails here is compiled again where it is launched, and raises there.
    """
    wanted: list[tuple[Any, Tensor]] = []
    with ThreadPoolExecutor() as pool:
        token, mode = _wanted.set(wanted), triton.AsyncCompileMode(pool, ignore_errors=True)
        try:
            with mode:
                yield
        except BaseException:
            mode.raw_futures.clear()  # an interrupt of its wait would leave the mode on, for threads that end here
            mode.__exit__(None, None, None)
            raise
        finally:
            _wanted.reset(token)
        kernels = dict(wanted)
        list(pool.map(_load, kernels.keys(), kernels.values()))


def _load(kernel: Any, tensor: Tensor) -> None:
    """Make the launcher of a kernel that was compiled, and load the kernel, unless it is too big for the GPU."""
    compiled = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
    if compiled is not None:
        with on_device_of(tensor), suppress(OutOfResources):
            compiled.run  # noqa: B018  # Triton does both when this is first read


def launch(
    kernel: Any, blocks: Sequence[Block], grid: Callable[[Block], tuple[int, ...]], *arguments: Any, **constants: Any
) -> None:
    """Call ``kernel[grid(block)](*arguments, **constants, **block)`` with the first of ``blocks`` that fits.

    Args:
        kernel: a Triton kernel whose first argument is a tensor and whose constants come last.
        blocks: launch options, in order of preference.
        grid: the number of programs, given a block.

    Raises:
        ModelError: no block fits.
    """
    if torch.compiler.is_compiling():  # torch.compile records the kernel, and compiles it itself
        kernel[grid(blocks[0])](*arguments, **constants, **blocks[0])
        return
    device = arguments[0].device
    key = (kernel.fn, device, *constants.values(), *[_kind(argument) for argument in arguments])
    with on_device_of(arguments[0]):
        if (wanted := _wanted.get()) is not None:
            here = arguments[0].new_empty(0)  # tells the device, and keeps no memory
            wanted.append((kernel.warmup(*arguments, grid=(1,), **constants, **blocks[0]), here))
            return
        if key in _compiled:
            block, compiled, values = _compiled[key]
            compiled[(*grid(block), 1, 1)[:3]](*arguments, *values)
            return
        for block in blocks:
            try:
                compiled = kernel[grid(block)](*arguments, **constants, **block)
            except OutOfResources:
                continue
            if compiled is not None:  # None in Triton's interpreter
                given = {**constants, **block}
                _compiled[key] = block, compiled, tuple(given[name] for name in kernel.arg_names[len(arguments) :])
            return
    raise ModelError(
        f"{kernel.fn.__name__}: with this rank none of its blocks fits the shared memory of "
        f"{torch.cuda.get_device_name(device)}; train with compile=True or a smaller r"
    )
