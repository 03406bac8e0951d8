"""CUDA graphs: of one block of launches, and of the decoder's forward and backward for small micro-batches.

A training step launches a thousand kernels, and Python needs a tenth of a second or two for that, however small they
are. A CUDA graph holds the launches of a whole forward, a second one those of its backward.

    the first micro-batch of a shape     computed as usual, which compiles and loads the kernels
    the second                           recorded, then replayed
    every other                          replayed

The same kernels compute the same numbers. A recording reads and writes the same memory each time, so the inputs are
copied to it and the gradients from it. Embedding, loss and optimizer are not recorded, because the number of supervised
tokens changes from batch to batch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelError, error_line

MOST_TOKENS = 4096
"""Tokens of a micro-batch up to which its layers are recorded; above it the kernels take longer than their launches."""
_MOST_SHAPES = 4  # that are recorded; micro-batches of other shapes are computed as usual
_STREAMS: dict[torch.device, Any] = {}
"""Each device's stream for recording; cuBLAS keeps a workspace for every stream that it has seen."""

logger = logging.getLogger("phi3lora")


@contextmanager
def recorded(device: torch.device, pool: Any = None) -> Iterator[Any]:
    """Record what the block launches, without running it, in the CUDA graph that is yielded.

    ``torch.cuda.graph`` would also empty the allocator's cache, which a training run needs again.

    Args:
        device: the GPU.
        pool: the memory that the graph takes its tensors from; None: its own.
    """
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph, stream, options = torch.cuda.CUDAGraph(), _STREAMS[device], {} if pool is None else {"pool": pool}
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local", **options)  # other threads may copy batches meanwhile
        try:
            yield graph
        except BaseException:
            with suppress(RuntimeError):  # it would hide the first error, even a KeyboardInterrupt
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)


@dataclass
class _Recording:
    """The graphs for one shape, and the tensors through which numbers go in and out."""

    inputs: dict[str, Any]
    output: Tensor  # (N, D)
    d_output: Tensor  # (N, D)
    gradients: list[Tensor]
    forward: Any
    backward: Any


class Recordings:
    """A run's recordings of the decoder, one for each shape of a micro-batch.

    They share one pool of memory, so only one forward at a time can wait for its backward.
    """

    def __init__(self) -> None:
        self.turn = 0  # counts forwards and backwards
        self._failed = False
        self._forget(None)

    def _forget(self, state: object) -> None:
        self._state = state
        self._seen: set[object] = set()
        self._by_shape: dict[object, _Recording] = {}
        self._gradients: list[Tensor] = []  # of all shapes
        self._pool: Any = None
        self._pool_bytes = 0

    def __call__(
        self, decode: Callable[..., Tensor], parameters: Sequence[Tensor], inputs: Mapping[str, Any], state: object
    ) -> Tensor:
        """Return ``decode(parameters, **inputs)`` (N, D), from a recording if it is not the first of its shape.

        Args:
            decode: computes the decoder on the current stream, without random numbers.
            parameters: the adapters' matrices, float32; those that require a gradient get it.
            inputs: tensors that need no gradient, and other values.
            state: changes when anything changes that ``decode`` reads besides ``inputs`` and the parameters' numbers.
        """
        if state != self._state:
            self._forget(state)
        shape = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in inputs.values())
        is_new = shape in self._seen and shape not in self._by_shape
        if is_new and not self._failed and len(self._by_shape) < _MOST_SHAPES:
            try:
                self._by_shape[shape] = self._record(decode, parameters, inputs)
            except RuntimeError as error:  # too little memory, say
                self._failed = True
                logger.warning("micro-batches are not replayed from CUDA graphs: %s", error_line(error))
        self._seen.add(shape)
        recording = self._by_shape.get(shape)
        if recording is None:  # outside the handler, where the error would keep the failed recording's memory
            return decode(parameters, **inputs)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                recording.inputs[name].copy_(value)
        output: Tensor = _Replay.apply(self, recording, *(p for p in parameters if p.requires_grad))  # type: ignore[no-untyped-call]
        return output

    def _record(
        self, decode: Callable[..., Tensor], parameters: Sequence[Tensor], inputs: Mapping[str, Any]
    ) -> _Recording:
        device = parameters[0].device
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._gradients = [torch.empty_like(p) for p in parameters if p.requires_grad]
        kept = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        # Aliases of the parameters, so that no hook on one runs here and no .grad changes.
        leaves = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        for leaf, gradient in zip((leaf for leaf in leaves if leaf.requires_grad), self._gradients, strict=True):
            leaf.grad = gradient  # autograd adds to it in place
        torch.cuda.synchronize(device)
        gc.collect()  # a graph that is freed while another is recorded would spoil it
        torch.cuda.empty_cache()  # a graph cannot use what the allocator keeps for others
        reserved = torch.cuda.memory_reserved(device)
        with recorded(device, self._pool) as forward:
            output = decode(leaves, **kept)
        d_output = torch.empty_like(output)
        with torch.autocast(device.type, enabled=False), recorded(device, self._pool) as backward:  # as after a forward
            torch._foreach_zero_(self._gradients)
            output.backward(d_output)  # type: ignore[no-untyped-call]
        self._pool_bytes += torch.cuda.memory_reserved(device) - reserved
        if torch.cuda.mem_get_info(device)[0] < self._pool_bytes:  # a new shape is launched, in memory of its own
            raise RuntimeError("too little memory for launched layers beside recorded ones")
        return _Recording(kept, output.detach(), d_output, self._gradients, forward, backward)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recordings: Recordings, recording: _Recording, *parameters: Tensor) -> Tensor:
        recordings.turn += 1
        ctx.recordings, ctx.recording, ctx.turn = recordings, recording, recordings.turn
        recording.forward.replay()
        return recording.output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.recordings.turn:
            raise ModelError("with recorded layers each forward needs its own backward, once, before the next forward")
        ctx.recordings.turn += 1
        ctx.recording.d_output.copy_(d_output)
        ctx.recording.backward.replay()
        # Copies: a hook or torch.autograd.grad may keep them, and the next replay overwrites the recording's own.
        return None, None, *(gradient.clone() for gradient in ctx.recording.gradients)
