"""Items made by a background thread before they are asked for: batches while a step runs, a stream's next window."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], ahead: int) -> Generator[T]:
    """The same items in the same order, at most ``ahead`` (>= 1) of them made by another thread before they are taken.

    What ``items`` raises is raised here, as it is, when its turn comes. The thread has ended when this iterator is
    exhausted, has raised, or is closed; closing waits for the item being made.
    """
    end: Any = object()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="phi3lora-ahead")
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(ahead))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
