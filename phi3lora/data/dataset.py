"""``ChatDataset``: tokenised chats in memory. ``ChatStream``: chats that are read and tokenised during training.

The training loop takes *windows* from either; each window is a ``ChatDataset``:

    ChatDataset    window n is the dataset itself, for every n: a window is an epoch

    ChatStream     rows      1 ...... 10,000 | 10,001 ...... 20,000 | ... 23,400 | 1 ...... 10,000 | ...
                   windows          0        |          1           |      2     |        3        |

A stream's window of ``buffer_size`` rows is shuffled and packed within itself. After the last row, the stream starts
again at the first. A window's contents depend only on its number, so an interrupted run continues at its window and
step: the rows before are read again, but not tokenised.

Both classes have ``windows``, ``first_window``, ``known_length``, ``max_length``, ``max_document_tokens``, ``identity``
and ``describe``.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..config import IGNORE_INDEX
from ..errors import DataError, is_int, short_repr
from .documents import NoDocumentsError, RowTokenizer
from .findings import Findings
from .formats import check_columns, known_format
from .rows import BadRows, NumberedRow, find_source, read_rows
from .template import ChatEncoder

logger = logging.getLogger("phi3lora")


class ChatDataset:
    """A sequence of tokenised documents; ``d[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    Labels follow transformers: unshifted, -100 where nothing is trained. Packing happens in the loader
    (:func:`phi3lora.batches`), not here. Make one with :meth:`load`.
    """

    known_length = True
    """True if the number of documents is known, so that an epoch ends."""

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        starts: np.ndarray,
        *,
        max_length: int,
        pad_token_id: int,
        end_of_turn_id: int,
        format: str,
        rows: np.ndarray,
        truncated: np.ndarray,
        dropped_rows: int = 0,
        bad_rows: tuple[int, ...] = (),
        findings: Findings | None = None,
    ) -> None:
        # All documents end to end, and those that belong to this set. A label is its token's own id, or -100.
        self._input_ids, self._labels = input_ids, labels  # int32 (tokens,) each
        self._starts = starts  # position of each document's first token, and the end, int64 (documents + 1,)
        self._rows = rows  # number of each document's source row (documents,)
        self._truncated = truncated  # whether it was cut, bool (documents,)
        self._index = np.arange(len(starts) - 1)
        self.max_length, self.format = max_length, format
        self.pad_token_id, self.end_of_turn_id = pad_token_id, end_of_turn_id
        self.dropped_rows = dropped_rows
        """Number of source rows of which truncation left nothing to train."""
        self.bad_rows = bad_rows
        """Numbers of the source rows that ``on_bad_row="skip"`` left out."""
        self.findings = findings or Findings()
        """What loading found in the source: see ``data/findings.py``."""

    @classmethod
    def load(
        cls,
        source: Any,
        tokenizer: Any,
        *,
        max_length: int,
        split: str = "train",
        format: str = "auto",
        columns: Mapping[str, str] | None = None,
        overflow: str = "truncate",
        train_on: str = "assistant",
        revision: str | None = None,
        streaming: bool = False,
        buffer_size: int = 10_000,
        on_bad_row: str = "error",
    ) -> ChatDataset:
        """Read a chat dataset, recognise its format, render and tokenise it.

        Args:
            source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a hub name, a ``datasets.Dataset``, dicts.
            tokenizer: a fast tokenizer with a chat template.
            max_length: tokens of the longest document.
            split: split of a hub dataset.
            format: ``"auto"`` (by the first row's keys), ``"messages"``, ``"sharegpt"``, ``"alpaca"``,
                ``"prompt_completion"`` or ``"text"``; see ``data/formats.py``.
            columns: our column name -> yours, ``{"prompt": "question", "completion": "answer"}``.
            overflow: what happens to a longer document: ``"truncate"`` cuts it (and drops it if nothing trained is
                left; both are counted), ``"split"`` makes several documents and loses no trained token, ``"error"``
                raises.
            train_on: ``"assistant"`` turns, the ``"last"`` one, or ``"all"`` tokens. A message may carry
                ``"train": false``.
            revision: revision of a hub dataset.
            streaming: True returns a :class:`phi3lora.ChatStream`, which reads its rows during training.
            buffer_size: rows of a stream that are in memory, shuffled and packed at a time.
            on_bad_row: ``"error"`` raises with the row's number, ``"skip"`` leaves the row out and reports it.

        Raises:
            DataError: anything that cannot be trained on, with the row's number.

        Example:
            >>> rows = [{"prompt": "Hi", "completion": "Hello!"}]
            >>> chats = p3.ChatDataset.load(rows, tokenizer, max_length=64)
            >>> len(chats), chats.format
            (1, 'prompt_completion')
        """
        _check(is_int(max_length, 2), "max_length", max_length, "a whole number >= 2")
        is_known = overflow in ("truncate", "split", "error")
        _check(is_known, "overflow", overflow, "'truncate', 'split', 'error'")
        _check(isinstance(streaming, bool), "streaming", streaming, "True, False")
        _check(is_int(buffer_size, 1), "buffer_size", buffer_size, "a whole number >= 1")
        format, bad = known_format(format), BadRows(on_bad_row)
        check_columns(columns, format)
        # A stream is tokenised in a background thread, and a fast tokenizer must not be used by two threads at once.
        encoder = ChatEncoder(copy.deepcopy(tokenizer) if streaming else tokenizer, train_on)
        is_path = isinstance(source, (str, os.PathLike))
        description = short_repr(os.fspath(source)) if is_path else f"({type(source).__name__})"
        row_tokenizer = RowTokenizer(encoder, max_length, overflow, columns, description)
        found = find_source(source, split, revision, streaming)
        if streaming:
            stream = ChatStream(found, row_tokenizer, format, buffer_size, on_bad_row)
            return cast(ChatDataset, stream)  # declared as what all but streaming users get
        dataset = cls(**row_tokenizer.tokenize(read_rows(found, bad), format, bad, cached=found))
        logger.info("%s", dataset)
        return dataset

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids, labels = self.document(i)
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[i] for i in range(len(self)))

    def document(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return document ``i`` without copying it: input ids (n,) and labels (n,), int32."""
        at = self._index[i]
        part = slice(self._starts[at], self._starts[at + 1])
        return self._input_ids[part], self._labels[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._starts)[self._index]

    @property
    def truncated(self) -> np.ndarray:
        """Mask of the documents that were cut at ``max_length``, bool (documents,)."""
        return self._truncated[self._index]

    @property
    def max_document_tokens(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max(initial=0))

    def largest_token_id(self) -> int:
        """Return the largest token id in any document, to compare with a model's vocabulary."""
        return int(np.maximum.reduceat(self._input_ids, self._starts[:-1])[self._index].max())

    def row_number(self, i: int) -> int:
        """Return the source row (counted from 1) that document ``i`` came from."""
        return int(self._rows[self._index[i]])

    def windows(
        self, start: int = 0, *, endless: bool = True, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[tuple[int, ChatDataset]]:
        """Yield ``(n, self)``, one an epoch, from ``n = start`` on; see :meth:`ChatStream.windows`."""
        numbers = itertools.count(start) if endless else [start]
        return ((number, self) for number in takewhile(lambda _: wanted(), numbers))

    @property
    def first_window(self) -> ChatDataset:
        """The dataset itself."""
        return self

    def split(self, fraction: float, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Return ``(train, eval)``: a random ``fraction`` of the documents, at least one, becomes the second set.

        Documents made of one long row (``overflow="split"``) stay together, so no row is in both sets.
        """
        _check(isinstance(fraction, float) and 0 < fraction < 1, "fraction", fraction, "0 < fraction < 1")
        rows = np.unique(self._rows[self._index])
        if len(rows) < 2:
            raise DataError(f"cannot split a dataset of {len(rows)} row; allowed: 2 or more")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out = np.random.default_rng([seed]).permutation(rows)[:count]
        in_second = np.isin(self._rows[self._index], held_out)
        return self.select(~in_second), self.select(in_second)

    def select(self, documents: Any) -> ChatDataset:
        """Return the set of the given documents (their numbers in this one, or a mask); it shares this one's memory."""
        chosen = np.asarray(documents)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        selected = copy.copy(self)
        selected._index = self._index[chosen]
        return selected

    def statistics(self) -> dict[str, Any]:
        """Count documents, tokens, supervised tokens, truncated documents, dropped and bad rows; find the longest."""
        lengths = self.lengths
        of_each = np.add.reduceat(self._labels != IGNORE_INDEX, self._starts[:-1], dtype=np.int64)
        tokens, supervised = int(lengths.sum()), int(of_each[self._index].sum())
        return {
            "documents": len(self),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / max(tokens, 1),
            "truncated": int(self.truncated.sum()),
            "dropped": self.dropped_rows,
            "bad": len(self.bad_rows),
            "longest": self.max_document_tokens,
            "format": self.format,
            "max_length": self.max_length,
            **self.findings.counts(),
        }

    def fingerprint(self) -> str:
        """Return the SHA-256 of the documents in their order: equal exactly when the data is."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            for part in self.document(i):
                digest.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Return the facts by which a checkpoint recognises its data."""
        return {"documents": len(self), "fingerprint": self.fingerprint()}

    def describe(self) -> str:
        """Return a sentence for a model card."""
        s = self.statistics()
        return (
            f"{s['documents']:,} chats of {s['tokens']:,} tokens, {s['supervised_share']:.1%} of them trained; the "
            f"longest has {s['longest']:,} tokens (format `{s['format']}`)."
        )

    def __repr__(self) -> str:
        s = self.statistics()
        text = (
            f"ChatDataset({s['documents']:,} documents, {s['tokens']:,} tokens, {100 * s['supervised_share']:.1f} % "
            f"supervised, longest {s['longest']:,} of {self.max_length:,}, format {self.format!r}"
        )
        if s["truncated"] or s["dropped"]:
            text += f", {s['truncated']:,} truncated, {s['dropped']:,} rows dropped: nothing trained was left in them"
        if self.bad_rows:
            text += f", {len(self.bad_rows):,} bad rows skipped"
        return "; ".join([text, *self.findings.describe()]) + ")"


class ChatStream:
    """Chats that are read during training: what ``ChatDataset.load(..., streaming=True)`` returns.

    It has no length, so ``train`` needs ``max_steps``, and it cannot be split; :meth:`take` and :meth:`skip` set rows
    aside for evaluation.
    """

    known_length = False

    def __init__(
        self,
        source: Path | Iterable[Any],
        row_tokenizer: RowTokenizer,
        format: str,
        buffer_size: int,
        on_bad_row: str,
        skipped_rows: int = 0,
    ) -> None:
        if isinstance(source, Iterator):
            raise DataError(
                f"a stream cannot be a {type(source).__name__}, which can be read only once; "
                f"allowed: a path, a hub name, a Dataset, an IterableDataset, a list"
            )
        self._source, self._row_tokenizer, self._format = source, row_tokenizer, format
        self.buffer_size, self._on_bad_row, self._skipped_rows = buffer_size, on_bad_row, skipped_rows
        self.max_length = self.max_document_tokens = row_tokenizer.max_length
        self._first_pass: tuple[Iterator[NumberedRow], BadRows] | None = None

    @cached_property
    def first_window(self) -> ChatDataset:
        """Window 0, which stands for the whole stream in all checks before a run."""
        rows, bad = self._open()
        window = list(islice(rows, self.buffer_size))
        documents = self._documents(window, self._format, bad)
        self._first_pass = itertools.chain(window, rows), bad  # for windows(), so that nothing is read twice
        return documents

    def windows(
        self, start: int = 0, *, endless: bool = True, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[tuple[int, ChatDataset]]:
        """Yield the number and the documents of each window. One without a usable row is skipped.

        Args:
            start: number of the first window, counted from 0 through all passes.
            endless: start again after the last row; False: one pass.
            wanted: called after each row. False ends the iteration.

        Raises:
            DataError: anything that cannot be trained on, with the row's number.
        """
        first, number = self.first_window, 0
        (rows, bad), self._first_pass = self._first_pass or self._open(), None
        while True:
            in_pass = 0
            while window := list(islice(takewhile(lambda _: wanted(), rows), self.buffer_size)):
                if not wanted():
                    return
                if number >= start:
                    try:
                        documents = self._documents(window, self._format, bad) if in_pass else first
                    except NoDocumentsError as why:
                        logger.warning("window %d of the stream is skipped: %s", number, why)
                    else:
                        yield number, documents
                number, in_pass = number + 1, in_pass + 1
                bad.clear()
            if not wanted() or (not endless and number > start):
                return
            if not in_pass:
                raise DataError("the stream has no more rows")
            number += max(0, start - number) // in_pass * in_pass  # whole passes before the start are not read
            rows, bad = self._open()

    def take(self, rows: int) -> ChatDataset:
        """Return the documents of the first ``rows`` rows, in memory: to evaluate on."""
        _check(is_int(rows, 1), "rows", rows, "a whole number >= 1")
        source, bad = self._open()
        return self._documents(list(islice(source, rows)), self._format, bad)

    def skip(self, rows: int) -> ChatStream:
        """Return the stream without its first ``rows`` rows."""
        _check(is_int(rows, 1), "rows", rows, "a whole number >= 1")
        fixed = self._source, self._row_tokenizer, self._format, self.buffer_size, self._on_bad_row
        return ChatStream(*fixed, self._skipped_rows + rows)

    def split(self, fraction: float, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Raise a ``DataError`` that names the way out: a stream cannot be split."""
        raise DataError(
            "a stream's length is not known, so it cannot be split; take(1000) and skip(1000) set its first rows aside"
        )

    def identity(self) -> dict[str, Any]:
        """Return the facts by which a checkpoint recognises its data: the first window's, and ``buffer_size``."""
        return {**self.first_window.identity(), "buffer_size": self.buffer_size}

    def describe(self) -> str:
        """Return a sentence for a model card."""
        return f"Chats that were read as a stream (format `{self.first_window.format}`)."

    def __repr__(self) -> str:
        return f"ChatStream(windows of {self.buffer_size:,} rows; the first: {self.first_window!r})"

    def _open(self) -> tuple[Iterator[NumberedRow], BadRows]:
        """Return the rows from the start, and the record of those that cannot be used."""
        bad = BadRows(self._on_bad_row)
        rows = read_rows(self._source, bad)
        skipped = sum(1 for _ in islice(rows, self._skipped_rows))
        if skipped < self._skipped_rows:
            raise DataError(f"skip({self._skipped_rows:,}) leaves nothing of a stream of {skipped:,} rows")
        return rows, bad

    def _documents(self, window: list[NumberedRow], format: str, bad: BadRows) -> ChatDataset:
        return ChatDataset(**self._row_tokenizer.tokenize(window, format, bad))


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise DataError(f"{name}={short_repr(value)}; allowed: {allowed}")
