"""Items made by a background thread before they are asked for: batches while a step runs, a stream's next window."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("phi3lora")

_POLL_S = 0.2
_PATIENCE_S = 5.0  # for a thread to end whose work is no longer wanted


def prefetched(
    items: Iterator[T], ahead: int, stop: threading.Event | None = None, wanted: Callable[[], bool] = lambda: True
) -> Generator[T]:
    """The same items in the same order, at most ``ahead`` (>= 1) of them made by another thread before they are taken.

    What ``items`` raises is raised here, as it is, when its turn comes. The thread has ended when this iterator is
    exhausted, has raised, or is closed; closing waits for the item being made, or some seconds where that takes longer
    (a network that hangs): the thread then ends with its item, or with the process.

    Args:
        items: what makes them; closed by the thread if it can be.
        ahead: how many are made ahead.
        stop: set when no more are wanted, for ``items`` to see.
        wanted: asked while an item is waited for; False ends the iteration.
    """
    stop, end = stop or threading.Event(), object()
    tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()  # one for each item that may be made; False: no more
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            while tickets.get() and not stop.is_set():
                made.put((next(items, end), None))
        except BaseException as error:
            made.put((end, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="phi3lora-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(ahead):
            tickets.put(True)
        while True:
            try:
                item, error = made.get(timeout=_POLL_S)
            except queue.Empty:
                if stop.is_set() or not wanted():
                    return
                continue
            if error is not None:
                raise error
            if item is end:
                return
            tickets.put(True)
            yield item
    finally:
        stop.set()
        tickets.put(False)
        thread.join(_PATIENCE_S)
        if thread.is_alive():
            logger.warning("what was being read ahead is left unfinished: it takes more than %.0f s", _PATIENCE_S)
