"""Reads and tokenises chats during training, window by window: what a ``ChatStream`` does.

    rows      1 ...... 10,000 | 10,001 ...... 20,000 | ... 23,400 | 1 ...... 10,000 | ...
    windows          0        |          1           |      2     |        3        |

A window is a ``ChatDataset`` of ``buffer_size`` rows, which are shuffled and packed within it. After the last row, the
stream starts again at the first. A window's contents depend only on its number, so an interrupted run continues at its
window and step: the rows before are read again, but not tokenised; those of a ``Dataset`` or Parquet files are not even
read. Several processes read all rows, compare a digest of them, and each tokenises its part of a window for all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, takewhile
from typing import Any, Generic, TypeVar

import numpy as np

from ..display import Html, html, one_line, terminal_columns, wrap
from ..errors import DataError, counted, is_int, plain_value, require
from .document_set import Documents, DocumentSet, joined
from .documents import NoDocumentsError, RowTokenizer
from .prefetch import NotWanted, Share
from .rows import BadRows
from .sources import Source, distinct_names, naming

logger = logging.getLogger("phi3lora")

Stream = TypeVar("Stream", bound="RowStream[Any]")


@dataclass(frozen=True)
class SourceReader(Generic[Documents]):
    """One source, and how its rows become documents."""

    row_tokenizer: RowTokenizer
    format: str
    on_bad_row: str
    set_class: type[Documents]
    """Class of the sets that it makes."""

    @property
    def source(self) -> Source:
        return self.row_tokenizer.source

    def load(self, is_one_of_several: bool) -> Documents:
        """Return the documents of the whole source."""
        with naming(self.source.name, is_one_of_several):
            bad = BadRows(self.on_bad_row)
            rows = self.source.read(bad)
            return self.documents(self.row_tokenizer.tokenize(rows, self.format, bad, is_whole=True))

    def documents(self, tokenized: dict[str, Any]) -> Documents:
        """Return the documents that the row tokenizer made of rows."""
        dataset = self.set_class(**tokenized)
        dataset.tokenizer = self.row_tokenizer.encoder.tokenizer
        return dataset


StreamRow = tuple[int, int, Mapping[str, Any]]
"""A row of a stream: the position of its part, its number there, and its columns."""


class RowStream(Generic[Documents]):
    """Rows that are read and tokenised window by window. A window is a set of the class that the readers make."""

    known_length = False
    origin: Mapping[str, Any] | None = None

    def __init__(self, parts: Sequence[SourceReader[Documents]], buffer_size: int, skipped_rows: int = 0) -> None:
        for part in parts:
            if isinstance(part.source.rows, Iterator):
                raise DataError(
                    f"a stream cannot be a {type(part.source.rows).__name__}, which can be read only once; "
                    f"allowed: a path, a hub name, a Dataset, an IterableDataset, a list"
                )
        self._parts, self.buffer_size, self._skipped_rows = list(parts), buffer_size, skipped_rows
        self._names = distinct_names(part.source.name for part in parts)
        self.max_length = self.max_document_tokens = max(part.row_tokenizer.max_length for part in parts)
        self._first_pass: tuple[Iterator[StreamRow], list[BadRows]] | None = None

    @cached_property
    def first_window(self) -> Documents:
        """Window 0, which stands for the whole stream in all checks before a run."""
        rows, bads = self._open()
        window = list(islice(rows, self.buffer_size))
        documents = self._documents(window, bads)
        self._first_pass = chain(window, rows), bads  # for windows(), so that nothing is read twice
        return documents

    def windows(
        self,
        start: int = 0,
        *,
        endless: bool = True,
        wanted: Callable[[], bool] = lambda: True,
        share: Share | None = None,
    ) -> Generator[tuple[int, Documents]]:
        """Yield the number and the documents of each window. One without a usable row is skipped.

        Args:
            start: number of the first window, counted from 0 through all passes.
            endless: start again after the last row; False: one pass.
            wanted: called after each row. False ends the iteration.
            share: the processes that all take these windows and tokenise a part of each; None: this one alone. Window 0
                is tokenised by each, before it joins the others.

        Raises:
            DataError: anything that cannot be trained on, with the row's number.
            TrainingError: the processes of a ``share`` have read different rows.
        """
        try:
            yield from self._windows(start, endless, wanted, share)
        except NotWanted:
            return
        except GeneratorExit:
            if share is not None:
                share.leave()
            raise
        if share is not None:
            share.leave()

    def _windows(
        self, start: int, endless: bool, wanted: Callable[[], bool], share: Share | None
    ) -> Generator[tuple[int, Documents]]:
        first, number = self.first_window, 0
        (rows, bads), self._first_pass = self._first_pass or self._open(), None
        in_pass = 0
        if start and (of_pass := self._windows_of_pass()):
            number, in_pass = start, start % of_pass
            rows, bads = self._open(in_pass * self.buffer_size)
        while True:
            while window := list(islice(takewhile(lambda _: wanted(), rows), self.buffer_size)):
                if not wanted():
                    return
                if number >= start:
                    if share is not None and number:  # a run compares the documents of window 0 before it starts
                        self._require_same_rows(number, window, share)
                    try:
                        documents = self._documents(window, bads, share) if in_pass else first
                    except NoDocumentsError as why:
                        logger.warning("window %d of the stream is skipped: %s", number, why)
                    else:
                        yield number, documents
                number, in_pass = number + 1, in_pass + 1
                for bad in bads:
                    bad.clear()
            if not wanted() or (not endless and number > start):
                return
            if not in_pass:
                raise DataError("the stream has no more rows")
            number += max(0, start - number) // in_pass * in_pass  # whole passes before the start are not read
            (rows, bads), in_pass = self._open(), 0

    def take(self, rows: int) -> Documents:
        """Return the documents of the first ``rows`` rows, in memory: to evaluate on."""
        rows = plain_value(rows)
        require(is_int(rows, 1), "rows", rows, "a whole number >= 1", DataError)
        stream, bads = self._open()
        return self._documents(list(islice(stream, rows)), bads)

    def skip(self: Stream, rows: int) -> Stream:
        """Return the stream without its first ``rows`` rows."""
        rows = plain_value(rows)
        require(is_int(rows, 1), "rows", rows, "a whole number >= 1", DataError)
        rest = copy.copy(self)
        rest.origin = None
        rest._skipped_rows, rest._first_pass = self._skipped_rows + rows, None
        vars(rest).pop("first_window", None)
        return rest

    def identity(self) -> dict[str, Any]:
        """Return the facts by which a checkpoint recognises its data: the first window's, and ``buffer_size``."""
        return {**self.first_window.identity(), "buffer_size": self.buffer_size}

    def describe(self) -> str:
        """Return a sentence for a model card."""
        return f"Chats that were read as a stream (format `{self.first_window.format}`)."

    def summary(self) -> str:
        """Return one line about the stream, which a run prints."""
        return f"ChatStream(windows of {self.buffer_size:,} rows; the first: {self.first_window.summary()})"

    def __repr__(self) -> str:
        return one_line("ChatStream", [f"windows of {self.buffer_size:,} rows; the first: {self.first_window!r}"])

    def __str__(self) -> str:
        return "\n".join(wrap(self.summary(), terminal_columns()))

    def _repr_html_(self) -> str:
        title = f"ChatStream, windows of {self.buffer_size:,} rows; the first:"
        return Html(f"<p><b>{html(title)}</b></p>{self.first_window._repr_html_()}")

    def _open(self, start: int = 0) -> tuple[Iterator[StreamRow], list[BadRows]]:
        """Return the rows from position ``start`` on, and the record of each part's that cannot be used.

        A start > 0 is for a stream of which :meth:`_windows_of_pass` is known.
        """
        bads = [BadRows(part.on_bad_row) for part in self._parts]
        return (self._rows_from(self._skipped_rows + start, bads) if start else self._rows(bads)), bads

    def _windows_of_pass(self) -> int | None:
        """Return the number of windows of a pass, if the sources tell without being read."""
        counts = [part.source.count() for part in self._parts]
        known = [count for count in counts if count is not None]
        return -(-(sum(known) - self._skipped_rows) // self.buffer_size) if len(known) == len(counts) else None

    def _rows_from(self, start: int, bads: Sequence[BadRows]) -> Iterator[StreamRow]:
        """Yield the rows from position ``start`` on, of sources that tell their number; those before are not read."""
        for at, bad in enumerate(bads):
            count = self._parts[at].source.count() or 0
            if start < count:
                yield from self._rows_of_part(at, bad, start)
            start = max(0, start - count)

    def _rows(self, bads: Sequence[BadRows]) -> Iterator[StreamRow]:
        rows = self._all_rows(bads)
        if not self._skipped_rows:
            return rows
        skipped, first = sum(1 for _ in islice(rows, self._skipped_rows)), list(islice(rows, 1))
        if not first:
            raise DataError(f"skip({self._skipped_rows:,}) leaves nothing of a stream of {skipped:,} rows")
        return chain(first, rows)

    def _all_rows(self, bads: Sequence[BadRows]) -> Iterator[StreamRow]:
        return chain.from_iterable(self._rows_of_part(at, bad) for at, bad in enumerate(bads))

    def _rows_of_part(self, at: int, bad: BadRows, start: int = 0) -> Iterator[StreamRow]:
        with naming(self._names[at], len(self._parts) > 1):
            for number, row in self._parts[at].source.read(bad, start):
                yield at, number, row

    def _require_same_rows(self, number: int, window: list[StreamRow], share: Share) -> None:
        """Raise an error in every process if the processes have read different rows for a window."""
        at, first, _ = window[0]
        content = hashlib.sha256()
        for row in window:
            content.update(json.dumps(row, default=_plain, skipkeys=True).encode())
        facts = {
            "the window": f"{counted(len(window), 'row')} from row {first} of {self._names[at]}",
            "the SHA-256 of all columns": content.hexdigest()[:16],
        }
        why = (
            f"the processes read different rows for window {number} of the stream. Give every process all rows in the "
            f"same order; train divides them"
        )
        share.require_equal(facts, why)

    def _documents(self, window: list[StreamRow], bads: Sequence[BadRows], share: Share | None = None) -> Documents:
        """Return the documents of rows in their order. The rows of each part are tokenised together."""
        rows_of: dict[int, list[int]] = {}
        for place, (at, _, _) in enumerate(window):
            rows_of.setdefault(at, []).append(place)
        made: list[Documents] = []
        places: list[int] = []
        unusable: list[NoDocumentsError] = []
        for at, inside in (rows_of or {0: []}).items():
            part, rows = self._parts[at], [window[place][1:] for place in inside]
            try:
                with naming(self._names[at], len(self._parts) > 1):
                    made.append(part.documents(part.row_tokenizer.tokenize(rows, part.format, bads[at], share=share)))
            except NoDocumentsError as error:
                unusable.append(error)
            else:
                made[-1].sources = (self._names[at],)
                places += _places_of(made[-1], [number for number, _ in rows], inside)
        if not made:
            raise unusable[0]
        for why in unusable:
            logger.warning("left out: %s", why)
        return joined(made).select(np.argsort(places, kind="stable")) if len(made) > 1 else made[0]


def _places_of(documents: DocumentSet, numbers: list[int], places: list[int]) -> list[int]:
    """Return the place of each document's row, where rows of ``numbers`` have ``places``; some have no document."""
    found, at = [], 0
    for number in documents._rows.tolist():
        while numbers[at] != number:
            at += 1
        found.append(places[at])
    return found


def _plain(value: object) -> object:
    """Return what JSON can say of a value in a row, the same in every process."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):  # whose order differs from process to process
        return sorted(str(_plain(item)) for item in value)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
