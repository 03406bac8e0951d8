"""``ChatStream``: a dataset that is read while it is trained on, for what is too large to tokenise first.

    rows     1 ............ 10,000 | 10,001 ........ 20,000 | ... 23,400 | 1 ............ 10,000 | ...
    windows            0           |           1            |     2      |           3           |

A window of ``buffer_size`` rows is a ``ChatDataset`` of its own, shuffled and packed within itself; after the last row
the first comes again. What a window holds depends on its number alone, so a run that was cut goes on at its window and
step: the rows before are read again, not tokenised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, is_int, short_repr
from .documents import NothingUsableError
from .rows import BadRows, NumberedRow, read_rows

if TYPE_CHECKING:
    from .dataset import ChatDataset


logger = logging.getLogger("phi3lora")


class ChatStream:
    """What ``ChatDataset.load(..., streaming=True)`` makes; ``train`` takes it with ``max_steps``.

    It has no length and cannot be split; :meth:`take` and :meth:`skip` set rows aside for evaluation.
    """

    def __init__(
        self,
        found: Path | Iterable[Any],
        window: Callable[[Iterable[NumberedRow], str, BadRows], ChatDataset],
        format: str,
        *,
        buffer_size: int,
        on_bad_row: str,
        skipped: int = 0,
    ) -> None:
        if isinstance(found, Iterator):
            raise DataError(
                f"a stream cannot be a {type(found).__name__}, which is read once; allowed: what can be read again "
                f"from its start (a path, a hub name, a Dataset, an IterableDataset, a list)"
            )
        self._found, self._window, self._format = found, window, format
        self.buffer_size, self._on_bad_row, self._skipped = buffer_size, on_bad_row, skipped
        self._after_first: tuple[Iterator[NumberedRow], BadRows, int] | None = None
        """Where ``first`` stopped reading, for the pass that begins there."""

    @cached_property
    def first(self) -> ChatDataset:
        """Window 0: what is looked at before a run."""
        rows, bad = self._open()
        window = list(islice(rows, self.buffer_size))
        documents = self._window(window, self._format, bad)
        self._after_first = (rows, bad, len(window))
        return documents

    @property
    def max_length(self) -> int:
        """Tokens of the longest document there may be."""
        return self.first.max_length

    def windows(
        self, start: int = 0, *, endless: bool = True, wanted: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, ChatDataset]]:
        """``(number, documents)`` of each window from number ``start`` on; one without a usable row is passed over.

        Args:
            start: the first window's number, counted from 0 through all passes.
            endless: begin again after the last row; False: one pass.
            wanted: asked before each row; False ends the iteration.

        Raises:
            DataError: with the row's number, whatever cannot be trained on.
        """
        (rows, bad, read), number = self._at(start, wanted), start
        while wanted():
            bad.forget()
            documents = self.first if read == 0 else None
            if read == 0 and self._after_first is not None:
                (rows, bad, count), self._after_first = self._after_first, None
            else:
                window = list(islice(_while(wanted, rows), self.buffer_size))
                if not wanted():
                    return
                count = len(window)
                documents = documents or (self._usable(window, number, bad) if window else None)
            if count:
                read, number = read + count, number + 1
                if documents is not None:
                    yield number - 1, documents
            elif endless and read:
                (rows, bad), read = self._open(), 0
            elif read:
                return
            else:
                raise DataError("the stream has no rows any more")

    def _at(self, start: int, wanted: Callable[[], bool]) -> tuple[Iterator[NumberedRow], BadRows, int]:
        """The rows from a window's first one on, and how many came before it in its pass."""
        (rows, bad), before = self._open(), start * self.buffer_size
        read = _count(islice(_while(wanted, rows), before))
        if read < before and wanted():  # the pass is shorter: in which one is the window, and where there?
            in_pass = -(-read // self.buffer_size)
            rows, bad = self._open()
            read = _count(islice(_while(wanted, rows), start % max(in_pass, 1) * self.buffer_size))
        return rows, bad, read

    def _usable(self, window: list[NumberedRow], number: int, bad: BadRows) -> ChatDataset | None:
        try:
            return self._window(window, self.first.format, bad)
        except NothingUsableError as why:
            logger.warning("window %d of the stream is passed over: %s", number, why)
            return None

    def take(self, rows: int) -> ChatDataset:
        """The documents of the first ``rows`` rows, in memory: to evaluate on."""
        self._check(rows)
        source, bad = self._open()
        return self._window(list(islice(source, rows)), self._format, bad)

    def skip(self, rows: int) -> ChatStream:
        """The stream without its first ``rows`` rows."""
        self._check(rows)
        return ChatStream(
            self._found, self._window, self._format, buffer_size=self.buffer_size, on_bad_row=self._on_bad_row,
            skipped=self._skipped + rows,
        )  # fmt: skip

    def split(self, fraction: float, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Not of a stream.

        Raises:
            DataError: always, with the way out.
        """
        raise DataError(
            "a stream's length is not known, so it cannot be split; take(1000) and skip(1000) set its first rows aside"
        )

    def __repr__(self) -> str:
        return f"ChatStream(windows of {self.buffer_size:,} rows; the first: {self.first!r})"

    def _open(self) -> tuple[Iterator[NumberedRow], BadRows]:
        """The rows from the start, and what keeps account of those that cannot be used."""
        bad = BadRows(self._on_bad_row)
        rows = iter(read_rows(self._found, bad))
        skipped = _count(islice(rows, self._skipped))
        if skipped < self._skipped:
            raise DataError(f"skip({self._skipped:,}) leaves nothing of a stream of {skipped:,} rows")
        return rows, bad

    @staticmethod
    def _check(rows: object) -> None:
        if not is_int(rows, 1):
            raise DataError(f"rows={short_repr(rows)}; allowed: a whole number >= 1")


def _while(wanted: Callable[[], bool], rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    while wanted():
        try:
            row = next(rows)
        except StopIteration:
            return
        yield row


def _count(rows: Iterable[Any]) -> int:
    return sum(1 for _ in rows)


def documents_at_hand(dataset: ChatDataset | ChatStream) -> ChatDataset:
    """The dataset itself, or a stream's first window: what can be counted and looked at."""
    return dataset.first if isinstance(dataset, ChatStream) else dataset
