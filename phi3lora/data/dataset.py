"""``ChatDataset``: tokenised chats in memory. ``ChatStream``: chats that are read and tokenised during training.

Either may have several sources, one after the other or mixed by weights (``data/mix.py``). Each source has its own
format and its own row numbers.

The training loop takes *windows* from either; each window is a ``ChatDataset``:

    ChatDataset    window n is the dataset itself, for every n: a window is an epoch

    ChatStream     rows      1 ...... 10,000 | 10,001 ...... 20,000 | ... 23,400 | 1 ...... 10,000 | ...
                   windows          0        |          1           |      2     |        3        |

A stream's window of ``buffer_size`` rows is shuffled and packed within itself. After the last row, the stream starts
again at the first. A window's contents depend only on its number, so an interrupted run continues at its window and
step: the rows before are read again, but not tokenised; those of a ``Dataset`` or Parquet files are not even read.
Several processes read all rows, and each tokenises its part of a window for all.

Both classes have ``windows``, ``first_window``, ``known_length``, ``max_length``, ``max_document_tokens``, ``identity``
and ``describe``.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice, takewhile
from typing import Any, NamedTuple, cast

import numpy as np

from ..config import IGNORE_INDEX
from ..display import Html, html, one_line, terminal_columns, wrap
from ..errors import SEED_END, DataError, is_int, short_repr
from .document_text import DocumentText, dataset_html, dataset_repr, dataset_summary, document_text
from .documents import NoDocumentsError, RowTokenizer
from .findings import Findings
from .formats import check_columns, known_format
from .mix import STRATEGIES, due_order, interleaved, weighted_sources
from .prefetch import NotWanted, Share
from .rows import BadRows
from .sources import Source, distinct_names, find_sources, naming, origin_of
from .template import ChatEncoder

logger = logging.getLogger("phi3lora")


class ChatDataset:
    """A sequence of tokenised documents; ``d[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    Labels follow transformers: unshifted, -100 where nothing is trained. Packing happens in the loader
    (:func:`phi3lora.batches`), not here. Make one with :meth:`load`.
    """

    known_length = True
    """True if the number of documents is known, so that an epoch ends."""
    origin: Mapping[str, Any] | None = None
    """Arguments of :meth:`load` (and of :meth:`split`) that give this set again; None: it was made of objects."""

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
        source: str = "(documents)",
    ) -> None:
        # All documents end to end, and those that belong to this set. A label is its token's own id, or -100.
        self._input_ids, self._labels = input_ids, labels  # int32 (tokens,) each
        self._starts = starts  # position of each document's first token, and the end, int64 (documents + 1,)
        self._rows = rows  # number of each document's row in its source (documents,)
        self._sources = np.zeros(len(rows), dtype=np.int64)  # position of its source in ``sources`` (documents,)
        self._truncated = truncated  # whether it was cut, bool (documents,)
        self._index = np.arange(len(starts) - 1)
        self.max_length, self.format = max_length, format
        self.pad_token_id, self.end_of_turn_id = pad_token_id, end_of_turn_id
        self.dropped_rows = dropped_rows
        """Number of source rows of which truncation left nothing to train."""
        self.bad_rows = bad_rows
        """Numbers of the source rows that ``on_bad_row="skip"`` left out, source after source."""
        self.sources: tuple[str, ...] = (source,)
        """Paths and hub names (in quotes), or types, of what the rows were read from."""
        self.tokenizer: Any = None
        """The tokenizer that :meth:`load` was given, for :meth:`show`."""
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
        name: str | None = None,
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
            source: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, packed (``.gz``,
                ``.bz2``, ``.xz``, ``.zst``) or not; a folder of them, or one that ``save_to_disk`` wrote; a pattern
                (``"data/*.jsonl"``); a hub name; a ``datasets.Dataset`` or ``DatasetDict``; a DataFrame or Arrow table;
                dicts; or a list of such sources, one after the other, each read in its own format.
            tokenizer: a fast tokenizer with a chat template.
            max_length: tokens of the longest document.
            split: split of the source, or a part of one as ``datasets`` writes it: ``"train[:100]"``,
                ``"train[10%:20%]"``, ``"train[:50%]+test"``, ``"all"``. A source without splits is all ``"train"``. Of
                a list of sources, each is split on its own. Rows of a file or object keep their numbers.
            name: configuration of a hub dataset.
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
        format = known_format(format)
        check_columns(columns, format)
        BadRows(on_bad_row)  # checks it
        # A stream is tokenised in a background thread, and a fast tokenizer must not be used by two threads at once.
        encoder = ChatEncoder(copy.deepcopy(tokenizer) if streaming else tokenizer, train_on)
        one_thread = threading.Lock()
        sources = find_sources(source, split, name, revision, streaming)
        parts = [
            _Part(RowTokenizer(encoder, max_length, overflow, columns, found, one_thread), format, on_bad_row)
            for found in sources
        ]
        options: dict[str, Any] = {
            "split": split,
            "name": name,
            "revision": revision,
            "format": format,
            "columns": columns,
        }
        options |= {"train_on": train_on, "max_length": max_length, "overflow": overflow, "on_bad_row": on_bad_row}
        origin = origin_of(source, {**options, "streaming": streaming, "buffer_size": buffer_size})
        if streaming:
            stream = ChatStream(parts, buffer_size)
            stream.origin = origin
            return cast(ChatDataset, stream)  # declared as what all but streaming users get
        dataset = _joined([part.load(len(parts) > 1) for part in parts])
        dataset.origin = origin
        logger.info("%s", dataset.summary())
        for sentence, count in dataset.findings.advice.items():
            logger.warning("%d row%s: %s", count, "s" * (count != 1), sentence)
        return dataset

    @classmethod
    def mix(
        cls,
        weights: Mapping[Any, float] | Iterable[tuple[Any, float]],
        tokenizer: Any = None,
        *,
        seed: int = 0,
        stopping_strategy: str = "first_exhausted",
        **options: Any,
    ) -> ChatDataset:
        """Mix the documents of several sources, so that each has the share that its weight says.

        A weight is a share of documents, not of tokens: with ``{"chat.jsonl": 3, "code.jsonl": 1}``, three documents
        in four are chats, to within one document. Weights need not add up to 1. The documents of the sources alternate;
        ``train`` shuffles them again every epoch.

        Args:
            weights: source -> weight > 0, or pairs. A source is a ``ChatDataset`` or ``ChatStream``, or what
                :meth:`load` reads. Pairs of loaded ones can have different formats, columns or splits.
            tokenizer, options: arguments of :meth:`load`, for sources that are not loaded yet.
            seed: which documents of a source are taken if not all are, and in which order. A stream's rows are taken
                in their order.
            stopping_strategy: ``"first_exhausted"`` takes no document twice: the mix ends when the first source has
                nothing left, and the others' rest is not used. ``"all_exhausted"`` takes every document at least
                once, and those of smaller sources again. The names are those of ``datasets.interleave_datasets``.

        Returns:
            A ``ChatDataset``; or a ``ChatStream`` if the sources are streams (``streaming=True``), whose weights are
            shares of rows. A pass of it ends where a mix of datasets would, and the next one is the same.

        Raises:
            DataError: a weight that is not positive, sources of different tokenizers, what :meth:`load` raises.
        """
        given, shares = weighted_sources(weights)
        _check(is_int(seed, 0, SEED_END), "seed", seed, f"a whole number from 0 to {SEED_END - 1}")
        is_known = stopping_strategy in STRATEGIES
        _check(is_known, "stopping_strategy", stopping_strategy, ", ".join(map(repr, STRATEGIES)))
        if tokenizer is None and not all(isinstance(source, (ChatDataset, ChatStream)) for source in given):
            raise DataError("a mix of sources that are not loaded needs the arguments of load: tokenizer, max_length=")
        parts: list[ChatDataset | ChatStream] = []
        for source in given:
            is_loaded = isinstance(source, (ChatDataset, ChatStream))
            is_path = isinstance(source, (str, os.PathLike))
            with naming(repr(os.fspath(source)) if is_path else f"({type(source).__name__})", True):
                parts.append(source if is_loaded else cls.load(source, tokenizer, **options))
        streams = [part for part in parts if isinstance(part, ChatStream)]
        if streams and len(streams) < len(parts):
            raise DataError("a mix of streams and datasets; allowed: one kind. Load all with the same streaming=")
        if streams:
            return cast(ChatDataset, _MixedStream(streams, shares, stopping_strategy))
        return _mixed(cast("list[ChatDataset]", parts), shares, stopping_strategy, seed)

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
    def supervised_tokens(self) -> np.ndarray:
        """Trained tokens of each document, its first token never among them, int64 (documents,)."""
        is_trained = self._labels != IGNORE_INDEX
        is_trained[self._starts[:-1]] = False  # nothing precedes it to predict it from
        return np.add.reduceat(is_trained, self._starts[:-1], dtype=np.int64)[self._index]

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
        """Return the row (counted from 1, in its source) that document ``i`` came from."""
        return int(self._rows[self._index[i]])

    def source(self, i: int) -> str:
        """Return which of :attr:`sources` document ``i`` came from. Its row number counts that source's rows."""
        return self.sources[int(self._sources[self._index[i]])]

    def documents_by_source(self) -> dict[str, int]:
        """Return the number of documents of each source."""
        counts = np.bincount(self._sources[self._index], minlength=len(self.sources)).tolist()
        return dict(zip(self.sources, counts, strict=True))

    def row_name(self, i: int) -> str:
        """Return what messages call the row of document ``i``: ``"row 3"``, or ``"row 3 of 'b.csv'"`` of several."""
        return f"row {self.row_number(i)}" + (f" of {self.source(i)}" if len(self.sources) > 1 else "")

    def row_names(self, documents: Iterable[int]) -> list[str]:
        """Return the rows of documents for messages, in order, each once: ``["3", "8"]``, or ``["3 of 'b.csv'"]``."""
        rows = sorted({(self.source(i), self.row_number(i), self.row_name(i)) for i in documents})
        return [name.removeprefix("row ") for _, _, name in rows]

    def windows(
        self,
        start: int = 0,
        *,
        endless: bool = True,
        wanted: Callable[[], bool] = lambda: True,
        share: Share | None = None,
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

        Documents made of one long row (``overflow="split"``), or of a row that a mix repeats, stay together, so no
        row is in both sets. Rows of different sources are different rows, whatever their numbers.
        """
        _check(isinstance(fraction, float) and 0 < fraction < 1, "fraction", fraction, "0 < fraction < 1")
        keys = (self._sources * 2**40 + self._rows)[self._index]  # one for each row of each source
        rows = np.unique(keys)
        if len(rows) < 2:
            raise DataError(f"cannot split a dataset of {len(rows)} row; allowed: 2 or more")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out = np.random.default_rng([seed]).permutation(rows)[:count]
        in_second = np.isin(keys, held_out)
        both = self.select(~in_second), self.select(in_second)
        for part in both:
            part.origin = self.origin and {**self.origin, "eval_share": fraction, "split_seed": seed}
        return both

    def select(self, documents: Any) -> ChatDataset:
        """Return the set of the given documents (their numbers in this one, or a mask); it shares this one's memory."""
        chosen = np.asarray(documents)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        selected = copy.copy(self)
        selected.origin = None
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

    def show(self, i: int, tokenizer: Any = None) -> DocumentText:
        """Return document ``i`` as text: ``print`` marks its trained parts, a notebook colours them.

        Args:
            i: the document's number.
            tokenizer: the one to decode with; None: the one that the dataset was loaded with.

        Raises:
            DataError: the dataset was not made by :meth:`load`, and no tokenizer is given.

        Example:
            >>> [text for text, is_trained in chats.show(0).pieces if not is_trained]
            ['<|user|>Which colour does the Derpa desk come in?<|end|><|assistant|>', '<|endoftext|>']
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            raise DataError("show: this dataset was made without a tokenizer; pass it: show(i, tokenizer)")
        return document_text(self.row_name(i), *self.document(i), tokenizer, self.end_of_turn_id)

    def summary(self) -> str:
        """Return one line about the documents, which loading logs and a run prints."""
        return dataset_summary(self)

    def __repr__(self) -> str:
        return dataset_repr(self)

    def __str__(self) -> str:
        return "\n".join(wrap(self.summary(), terminal_columns()))

    def _repr_html_(self) -> str:
        return dataset_html(self)


class _Part(NamedTuple):
    """One source, and how its rows become documents."""

    row_tokenizer: RowTokenizer
    format: str
    on_bad_row: str

    @property
    def source(self) -> Source:
        return self.row_tokenizer.source

    def load(self, is_one_of_several: bool) -> ChatDataset:
        """Return the documents of the whole source."""
        with naming(self.source.name, is_one_of_several):
            bad = BadRows(self.on_bad_row)
            rows = self.source.read(bad)
            return self.documents(self.row_tokenizer.tokenize(rows, self.format, bad, cache=True))

    def documents(self, tokenized: dict[str, Any]) -> ChatDataset:
        """Return the documents that the row tokenizer made of rows."""
        dataset = ChatDataset(**tokenized)
        dataset.tokenizer = self.row_tokenizer.encoder.tokenizer
        return dataset


_StreamRow = tuple[int, int, Mapping[str, Any]]
"""A row of a stream: the position of its part, its number there, and its columns."""


class ChatStream:
    """Chats that are read during training: what ``ChatDataset.load(..., streaming=True)`` returns.

    It has no length, so ``train`` needs ``max_steps``, and it cannot be split; :meth:`take` and :meth:`skip` set rows
    aside for evaluation.
    """

    known_length = False
    origin: Mapping[str, Any] | None = None

    def __init__(self, parts: Sequence[_Part], buffer_size: int, skipped_rows: int = 0) -> None:
        for part in parts:
            if isinstance(part.source.rows, Iterator):
                raise DataError(
                    f"a stream cannot be a {type(part.source.rows).__name__}, which can be read only once; "
                    f"allowed: a path, a hub name, a Dataset, an IterableDataset, a list"
                )
        self._parts, self.buffer_size, self._skipped_rows = list(parts), buffer_size, skipped_rows
        self._names = distinct_names(part.source.name for part in parts)
        self.max_length = self.max_document_tokens = max(part.row_tokenizer.max_length for part in parts)
        self._first_pass: tuple[Iterator[_StreamRow], list[BadRows]] | None = None

    @cached_property
    def first_window(self) -> ChatDataset:
        """Window 0, which stands for the whole stream in all checks before a run."""
        rows, bads = self._open()
        window = list(islice(rows, self.buffer_size))
        documents = self._documents(window, bads)
        self._first_pass = itertools.chain(window, rows), bads  # for windows(), so that nothing is read twice
        return documents

    def windows(
        self,
        start: int = 0,
        *,
        endless: bool = True,
        wanted: Callable[[], bool] = lambda: True,
        share: Share | None = None,
    ) -> Generator[tuple[int, ChatDataset]]:
        """Yield the number and the documents of each window. One without a usable row is skipped.

        Args:
            start: number of the first window, counted from 0 through all passes.
            endless: start again after the last row; False: one pass.
            wanted: called after each row. False ends the iteration.
            share: the processes that all take these windows and tokenise a part of each; None: this one alone. Window 0
                is tokenised by each, before it joins the others.

        Raises:
            DataError: anything that cannot be trained on, with the row's number.
        """

        def is_left() -> bool:
            if not wanted() and share is not None:
                share.leave()
            return not wanted()

        first, number = self.first_window, 0
        (rows, bads), self._first_pass = self._first_pass or self._open(), None
        in_pass = 0
        if start and (of_pass := self._windows_of_pass()):
            number, in_pass = start, start % of_pass
            rows, bads = self._open(in_pass * self.buffer_size)
        while True:
            while window := list(islice(takewhile(lambda _: wanted(), rows), self.buffer_size)):
                if is_left():
                    return
                if number >= start:
                    try:
                        documents = self._documents(window, bads, share) if in_pass else first
                    except NotWanted:
                        return
                    except NoDocumentsError as why:
                        logger.warning("window %d of the stream is skipped: %s", number, why)
                    else:
                        yield number, documents
                number, in_pass = number + 1, in_pass + 1
                for bad in bads:
                    bad.clear()
            if is_left() or (not endless and number > start):
                return
            if not in_pass:
                raise DataError("the stream has no more rows")
            number += max(0, start - number) // in_pass * in_pass  # whole passes before the start are not read
            (rows, bads), in_pass = self._open(), 0

    def take(self, rows: int) -> ChatDataset:
        """Return the documents of the first ``rows`` rows, in memory: to evaluate on."""
        _check(is_int(rows, 1), "rows", rows, "a whole number >= 1")
        stream, bads = self._open()
        return self._documents(list(islice(stream, rows)), bads)

    def skip(self, rows: int) -> ChatStream:
        """Return the stream without its first ``rows`` rows."""
        _check(is_int(rows, 1), "rows", rows, "a whole number >= 1")
        rest = copy.copy(self)
        rest.origin = None
        rest._skipped_rows, rest._first_pass = self._skipped_rows + rows, None
        vars(rest).pop("first_window", None)
        return rest

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

    def _open(self, start: int = 0) -> tuple[Iterator[_StreamRow], list[BadRows]]:
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

    def _rows_from(self, start: int, bads: Sequence[BadRows]) -> Iterator[_StreamRow]:
        """Yield the rows from position ``start`` on, of sources that tell their number; those before are not read."""
        for at, (part, bad) in enumerate(zip(self._parts, bads, strict=True)):
            count = part.source.count() or 0
            if start < count:
                with naming(self._names[at], len(self._parts) > 1):
                    for number, row in part.source.read(bad, start):
                        yield at, number, row
            start = max(0, start - count)

    def _rows(self, bads: Sequence[BadRows]) -> Iterator[_StreamRow]:
        rows = self._all_rows(bads)
        skipped = sum(1 for _ in islice(rows, self._skipped_rows))
        if skipped < self._skipped_rows:
            raise DataError(f"skip({self._skipped_rows:,}) leaves nothing of a stream of {skipped:,} rows")
        return rows

    def _all_rows(self, bads: Sequence[BadRows]) -> Iterator[_StreamRow]:
        for at, (part, bad) in enumerate(zip(self._parts, bads, strict=True)):
            with naming(self._names[at], len(self._parts) > 1):
                for number, row in part.source.read(bad):
                    yield at, number, row

    def _documents(self, window: list[_StreamRow], bads: Sequence[BadRows], share: Share | None = None) -> ChatDataset:
        """Return the documents of rows in their order. The rows of each part are tokenised together."""
        rows_of: dict[int, list[int]] = {}
        for place, (at, _, _) in enumerate(window):
            rows_of.setdefault(at, []).append(place)
        made: list[ChatDataset] = []
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
        return _joined(made).select(np.argsort(places, kind="stable")) if len(made) > 1 else made[0]


class _MixedStream(ChatStream):
    """Streams whose rows alternate as ``interleaved`` says."""

    def __init__(self, streams: Sequence[ChatStream], weights: list[float], strategy: str) -> None:
        parts = [part for stream in streams for part in stream._parts]
        super().__init__(parts, max(stream.buffer_size for stream in streams))
        self._streams, self._weights, self._strategy = streams, weights, strategy

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "weights": self._weights, "stopping_strategy": self._strategy}

    def _windows_of_pass(self) -> int | None:
        return None

    def _all_rows(self, bads: Sequence[BadRows]) -> Iterator[_StreamRow]:
        def open_stream(stream: ChatStream, first: int) -> Iterator[_StreamRow]:
            rows = stream._rows(bads[first : first + len(stream._parts)])
            return ((first + at, number, row) for at, number, row in rows)

        firsts = itertools.accumulate((len(stream._parts) for stream in self._streams), initial=0)
        openers = [partial(open_stream, stream, first) for stream, first in zip(self._streams, firsts, strict=False)]
        return interleaved(openers, self._weights, self._strategy)


def _joined(parts: Sequence[ChatDataset]) -> ChatDataset:
    """Return the documents of several sets, one set after the other. Sources of the same path are one source."""
    if len(parts) == 1:
        return parts[0]
    for name in ("pad_token_id", "end_of_turn_id"):
        if len(ids := {getattr(part, name) for part in parts}) > 1:
            raise DataError(f"datasets of different tokenizers: their {name}s are {ids}; allowed: one tokenizer")
    joined = copy.copy(parts[0])
    tokens = np.cumsum([0, *(len(part._input_ids) for part in parts)])
    documents = np.cumsum([0, *(len(part._rows) for part in parts)])
    starts = [part._starts[:-1] + first for part, first in zip(parts, tokens[:-1], strict=True)]
    joined._starts = np.concatenate([*starts, tokens[-1:]])
    joined._index = np.concatenate([part._index + first for part, first in zip(parts, documents[:-1], strict=True)])
    for name in ("_input_ids", "_labels", "_rows", "_truncated"):
        setattr(joined, name, np.concatenate([getattr(part, name) for part in parts]))
    resolved = distinct_names(name for part in parts for name in part.sources)
    names = list(dict.fromkeys(resolved))
    positions = [names.index(name) for name in resolved]
    firsts = itertools.accumulate((len(part.sources) for part in parts), initial=0)
    numbered = [part._sources + first for part, first in zip(parts, firsts, strict=False)]
    joined._sources, joined.sources = np.array(positions)[np.concatenate(numbered)], tuple(names)
    joined.format = ", ".join(sorted({name for part in parts for name in part.format.split(", ")}))
    joined.max_length = max(part.max_length for part in parts)
    joined.dropped_rows = sum(part.dropped_rows for part in parts)
    joined.bad_rows = tuple(number for part in parts for number in part.bad_rows)
    joined.findings = Findings()
    for part in parts:
        joined.findings += part.findings
    return joined


def _mixed(parts: Sequence[ChatDataset], weights: list[float], strategy: str, seed: int) -> ChatDataset:
    """Return the documents of several sets in the order of ``due_order``, each set's own order drawn from ``seed``."""
    sizes = [len(part) for part in parts]
    what = [" + ".join(part.sources) for part in parts]
    if 0 in sizes:
        raise DataError(f"source {sizes.index(0) + 1} of the mix, {what[sizes.index(0)]}, has no documents")
    sources, numbers = due_order(sizes, weights, strategy)
    taken = np.bincount(sources, minlength=len(parts)).tolist()
    counts = [f"{name} {n:,} of {size:,}" for name, n, size in zip(what, taken, sizes, strict=True)]
    if 0 in taken:
        why = f"the first source is exhausted before document 1 of source {taken.index(0) + 1} is due"
        raise DataError(
            f"a mix of documents: {', '.join(counts)}: {why}. Make the weights closer, or set "
            f"stopping_strategy='all_exhausted'"
        )
    chosen = np.empty(len(numbers), dtype=np.int64)
    for i, first in enumerate(np.cumsum([0, *sizes[:-1]])):
        order = np.random.default_rng([seed, i]).permutation(sizes[i])
        chosen[sources == i] = first + order[numbers[sources == i] % sizes[i]]
    logger.info("mix of documents: %s", ", ".join(counts))
    return _joined(parts).select(chosen)


def _places_of(documents: ChatDataset, numbers: list[int], places: list[int]) -> list[int]:
    """Return the place of each document's row, where rows of ``numbers`` have ``places``; some have no document."""
    found, at = [], 0
    for number in documents._rows.tolist():
        while numbers[at] != number:
            at += 1
        found.append(places[at])
    return found


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise DataError(f"{name}={short_repr(value)}; allowed: {allowed}")
