"""Work on the parts of a list in forks of this process, one for each core.

A fork has the list and the function already. So nothing is sent to it, a script needs no ``__main__`` guard, and it
works in a notebook. It answers through a pipe, touches no device and runs none of its parent's clean-up.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST = 8  # beyond that, reading the rows in one process is most of the time
_PARALLELISM = "TOKENIZERS_PARALLELISM"


def cores() -> int:
    """Return the number of processes that may work at once: one for each core, up to eight.

    The processes that torchrun started on a machine share its cores.
    """
    if sys.platform != "linux":  # a fork of a process with threads is not safe elsewhere
        return 1
    return max(1, min(_MOST, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def in_processes(work: Callable[[Sequence[T]], R], items: Sequence[T], count: int) -> list[R]:
    """Return ``work(part)`` for each of ``count`` parts of ``items``, in their order.

    The first part is done here. A part that fails elsewhere is done again here, so that errors are raised as if there
    were one process.
    """
    edges = [len(items) * i // count for i in range(count + 1)]
    parts = [items[edges[i] : edges[i + 1]] for i in range(count)]
    forks: list[_Fork] = []
    try:
        for part in parts[1:]:
            forks.append(_Fork(work, part))
        done = [work(parts[0])]
        for fork, part in zip(forks, parts[1:], strict=True):
            try:
                done.append(fork.answer())
            except (EOFError, pickle.UnpicklingError):  # it has failed, was killed or could not start
                done.append(work(part))
        return done
    finally:
        for fork in forks:
            fork.close()


class _Fork:
    """A process that works on one part."""

    def __init__(self, work: Callable[[Sequence[T]], R], part: Sequence[T]) -> None:
        reader, writer = os.pipe()
        self._pipe = os.fdopen(reader, "rb")
        with os.fdopen(writer, "wb") as pipe, warnings.catch_warnings(), _one_thread_for_tokenizers():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of a fork of a process with threads
            try:
                self._process = os.fork()
            except OSError:  # no memory, or too many processes
                self._process = -1
            if self._process == 0:
                _answer(work, part, pipe)

    def answer(self) -> Any:
        """Wait for the answer.

        Raises:
            EOFError, UnpicklingError: no answer, or half of one.
        """
        return pickle.load(self._pipe)

    def close(self) -> None:
        """End the process, which has answered or whose answer is not needed."""
        self._pipe.close()
        if self._process > 0:
            with suppress(ProcessLookupError, ChildProcessError):  # SIGCHLD is ignored: it is gone
                os.kill(self._process, signal.SIGKILL)
                os.waitpid(self._process, 0)


@contextmanager
def _one_thread_for_tokenizers() -> Iterator[None]:
    """Set the variable that keeps a tokenizer in a fork from waiting for the threads of its parent."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _answer(work: Callable[[Sequence[T]], R], part: Sequence[T], pipe: BinaryIO) -> None:
    """Write ``work(part)``, in the fork, and end it there."""
    try:
        gc.disable()  # the parent's garbage is the parent's to clean up
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        pickle.dump(work(part), pipe, protocol=pickle.HIGHEST_PROTOCOL)
        pipe.flush()
    finally:
        os._exit(0)  # without an answer, the parent does the part itself
