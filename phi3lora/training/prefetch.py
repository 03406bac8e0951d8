"""The batches of the next steps, made in one background thread while a step runs: the device never waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from .state import TrainingState
from .steps import StepPlan, StepRows

T = TypeVar("T")

_STEPS_AHEAD = 2


def prefetched_steps(
    steps: StepPlan, state: TrainingState, device: torch.device
) -> Generator[tuple[StepRows, list[dict[str, Any]]]]:
    """The steps from the state's cursor on, each with its micro-batches: CPU tensors, pinned for a CUDA ``device``.

    The state is read when the first step is asked for; it is moved by steps done, not by steps made ready. Close it
    (``contextlib.closing``) when leaving early, see :func:`prefetched`.
    """

    def made() -> Iterator[tuple[StepRows, list[dict[str, Any]]]]:
        for rows in steps.remaining(state):
            yield rows, [pinned(steps.plan.tensors(micro), device) for micro in rows.micro_batches]

    return prefetched(made(), _STEPS_AHEAD)


def prefetched(items: Iterator[T], ahead: int) -> Generator[T]:
    """The same items in the same order, at most ``ahead`` (>= 1) of them made by another thread before they are taken.

    What ``items`` raises is raised here, as it is, when its turn comes. The thread has ended when this iterator is
    exhausted, has raised, or is closed; closing waits for the item being made.
    """
    end: Any = object()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="phi3lora-batches")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """``batch`` with its tensors in page-locked memory, from where copies to a CUDA device run beside the host."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # of this thread: pinning would otherwise wake device 0 too
        return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
