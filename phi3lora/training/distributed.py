"""The process that trains: its place among the processes of a run, and the signals that stop it.

A run has one process. The loop, the loss and the checkpoints ask :class:`World` for its rank.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..errors import TrainingError

logger = logging.getLogger("phi3lora")


@dataclass(frozen=True)
class World:
    """Process number ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the one process that prints and writes the log."""
        return self.rank == 0

    def sum_over_ranks(self, count: int) -> int:
        """Return the sum of every process's ``count``."""
        return count


def require_one_process() -> None:
    """Refuse to run as one of several processes: each would train a copy of its own, in the same folder.

    Raises:
        TrainingError: torchrun, or another launcher that sets ``WORLD_SIZE``, started more than one process.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        raise TrainingError(
            f"WORLD_SIZE={size}, one of {size} processes; allowed: 1, which trains on one GPU. Start it with plain "
            f"python or torchrun --nproc_per_node=1, and choose the GPU with CUDA_VISIBLE_DEVICES"
        )


class Interrupts:
    """SIGINT and SIGTERM as a request to stop, which the loop answers after the step with a checkpoint.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread Python does not allow signal handlers, and
    the signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that came first."""
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        logger.warning("%s: saving a checkpoint after this step, then stopping", signal.Signals(number).name)
