"""The batches of the next steps, made ahead while a step runs: the device never waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ..data.prefetch import prefetched
from .plan import StepPlan, StepRows
from .state import TrainingState

_STEPS_AHEAD = 2


def prefetched_steps(
    steps: StepPlan, state: TrainingState, device: torch.device, wanted: Callable[[], bool] = lambda: True
) -> Generator[tuple[StepRows, list[dict[str, Any]]]]:
    """The steps from the state's cursor on, each with its micro-batches: CPU tensors, pinned for a CUDA ``device``.

    The state is read when the first step is asked for; it is moved by steps done, not by steps made ready. Close it
    (``contextlib.closing``) when leaving early, see :func:`phi3lora.data.ahead.prefetched`; ``wanted`` is asked while a
    step is waited for, and False ends them.
    """
    stop = threading.Event()

    def made() -> Iterator[tuple[StepRows, list[dict[str, Any]]]]:
        for rows in steps.remaining(state, stop):
            yield rows, [pinned(rows.plan.tensors(micro), device) for micro in rows.micro_batches]

    return prefetched(made(), _STEPS_AHEAD, stop, wanted)


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """``batch`` with its tensors in page-locked memory, from where copies to a CUDA device run beside the host."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # of this thread: pinning would otherwise wake device 0 too
        return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
