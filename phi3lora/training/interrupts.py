"""Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger("phi3lora")


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
