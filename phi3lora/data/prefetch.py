"""Work in background threads: batches during a step, a stream's next window, which several processes may share."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

logger = logging.getLogger("phi3lora")

_POLL_S, _JOIN_TIMEOUT_S = 0.2, 5.0


class NotWanted(Exception):
    """Raised by :class:`Share` in a background thread whose items nobody waits for any more."""


class Share(Protocol):
    """This process's part of work that several do together."""

    rank: int
    size: int

    def exchange(self, value: T) -> list[T]:
        """Return what each process gave in this turn, by rank. All processes take equally many turns.

        Raises:
            NotWanted: the processes have ended their turns.
        """
        ...

    def require_equal(self, facts: Mapping[str, Any], why: str) -> None:
        """Take a turn in which every process gives its ``facts``. If one differs, raise a ``TrainingError`` in each."""
        ...

    def leave(self) -> None:
        """Take a turn that ends the turns of all, unless they have ended."""
        ...

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that are this process's to work on; the parts by rank are the whole."""
        ...


def prefetched(
    make: Callable[[Callable[[], bool]], Iterator[T]], ahead: int, wanted: Callable[[], bool] = lambda: True
) -> Generator[T]:
    """Yield the items of ``make(wanted)`` in their order, while a thread prepares up to ``ahead`` more of them.

    An exception from the items is raised here unchanged, in its turn. The thread ends with this generator; leave
    early through ``contextlib.closing``. Closing waits at most 5 s for the item in preparation: a network read that
    hangs ends with its item, or with the process.

    Args:
        make: returns the items. Its argument is a function that returns False as soon as no more items are needed.
        ahead: number of items to prepare in advance, >= 1.
        wanted: polled while an item is awaited. False ends the iteration.
    """
    left, end = threading.Event(), object()
    items = make(lambda: not left.is_set() and wanted())
    tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: prepare one more item; False: stop
    prepared: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            while tickets.get() and not left.is_set():
                prepared.put((next(items, end), None))
        except BaseException as error:
            prepared.put((end, error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="phi3lora-prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(ahead):
            tickets.put(True)
        while True:
            try:
                item, error = prepared.get(timeout=_POLL_S)
            except queue.Empty:
                if not wanted():
                    return
                continue
            if error is not None:
                raise error
            if item is end:
                return
            tickets.put(True)
            yield item
    finally:
        left.set()
        tickets.put(False)
        thread.join(_JOIN_TIMEOUT_S)
        if thread.is_alive():
            logger.warning("a background read has taken more than %.0f s; it is left to finish alone", _JOIN_TIMEOUT_S)


def pinned(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return ``batch`` with its tensors in page-locked memory; ``batch`` itself if ``device`` is not CUDA.

    From page-locked memory, copies to the device run in the background.
    """
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # per thread; without it pinning would create a context on device 0 too
        return {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
