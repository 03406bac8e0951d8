"""``ChatStream``: a dataset that is read while it is trained on, for what is too large to tokenise first.

    rows     1 ............ 10,000 | 10,001 ........ 20,000 | ... 23,400 | 1 ............ 10,000 | ...
    windows            0           |           1            |     2      |           3           |

A window of ``buffer_size`` rows is a ``ChatDataset`` of its own, shuffled and packed within itself; after the last row
the first comes again. What a window holds depends on its number alone, so a run that was cut goes on at its window and
step: the rows before are read again, not tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..values import is_count, shown
from .bad_rows import BadRows
from .sources import NumberedRow, read_rows

if TYPE_CHECKING:
    from .dataset import ChatDataset


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

    @cached_property
    def first(self) -> ChatDataset:
        """Window 0: what is looked at before a run."""
        rows, bad = self._open()
        return self._window(list(islice(rows, self.buffer_size)), self._format, bad)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document there may be."""
        return self.first.max_length

    def windows(self, start: int = 0, *, endless: bool = True) -> Iterator[tuple[int, ChatDataset]]:
        """``(number, documents)`` of each window from number ``start`` on.

        Args:
            start: the first window's number, counted from 0 through all passes.
            endless: begin again after the last row; False: one pass.

        Raises:
            DataError: with the row's number, whatever cannot be trained on.
        """
        rows, bad = self._open()
        before = start * self.buffer_size
        read = sum(1 for _ in islice(rows, before))
        if read < before:  # the pass is shorter: in which one is the window, and where there?
            in_pass = -(-read // self.buffer_size)
            rows, bad = self._open()
            read = sum(1 for _ in islice(rows, start % max(in_pass, 1) * self.buffer_size))
        number = start
        while True:
            bad.forget()
            window = list(islice(rows, self.buffer_size))
            if window:
                yield number, (self._window(window, self.first.format, bad) if read else self.first)
                read, number = read + len(window), number + 1
            elif read and endless:
                (rows, bad), read = self._open(), 0
            elif read or not endless:
                return
            else:
                raise DataError("the stream has no rows any more")

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
        skipped = sum(1 for _ in islice(rows, self._skipped))
        if skipped < self._skipped:
            raise DataError(f"skip({self._skipped:,}) leaves nothing of a stream of {skipped:,} rows")
        return rows, bad

    @staticmethod
    def _check(rows: object) -> None:
        if not is_count(rows, 1):
            raise DataError(f"rows={shown(rows)}; allowed: a whole number >= 1")


def documents_at_hand(dataset: ChatDataset | ChatStream) -> ChatDataset:
    """The dataset itself, or a stream's first window: what can be counted and looked at."""
    return dataset.first if isinstance(dataset, ChatStream) else dataset
