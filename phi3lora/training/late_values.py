"""Numbers that a GPU is still computing, read once they have arrived, so that no step waits for its own loss."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class LateValues(Generic[T]):
    """A queue of small tensors, each with a note. On the CPU they arrive at once."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, T]] = deque()

    def add(self, values: Tensor, note: T) -> None:
        """Start copying ``values`` (n,) to the host."""
        if not values.is_cuda:
            self._waiting.append((values, None, note))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._waiting.append((host, done, note))

    def arrived(self, wait: bool = False) -> list[tuple[list[float], T]]:
        """Those that are there, in order; with ``wait`` all of them."""
        ready = []
        while self._waiting:
            host, done, note = self._waiting[0]
            if done is not None and not done.query():
                if not wait:
                    break
                done.synchronize()
            self._waiting.popleft()
            ready.append((host.tolist(), note))
        return ready
