"""``ChatDataset``: tokenised chats in memory; ``load`` reads and ``mix`` mixes their sources.

Either takes several sources, one after the other or mixed by weights. Each source has its own format and its own row
numbers. With ``streaming=True`` they return a ``ChatStream``, whose rows are read during training. The training loop
takes *windows* from both, and each window is a ``ChatDataset``:

    ChatDataset    window n is the dataset itself, for every n: a window is an epoch
    ChatStream     window n is the next ``buffer_size`` rows: see ``data/stream.py``

Both classes have ``windows``, ``first_window``, ``known_length``, ``max_length``, ``max_document_tokens``, ``identity``
and ``describe``.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from ..errors import DataError, counted, is_int, plain_value, require
from .document_set import DocumentSet, check_seed, joined
from .documents import RowTokenizer
from .formats import check_columns, known_format
from .mix import STRATEGIES, due_order, interleaved, weighted_sources
from .rows import BadRows
from .sources import find_sources, naming, origin_of
from .stream import RowStream, SourceReader, StreamRow
from .template import ChatEncoder

logger = logging.getLogger("phi3lora")

_BUFFER_SIZE = 10_000  # load's default


def require_dataset(name: str, value: object) -> None:
    """Raise unless an argument is a dataset of ours, and not the file or the rows that one is loaded from."""
    allowed = "a ChatDataset or a ChatStream, which ChatDataset.load(...) returns"
    require(hasattr(type(value), "first_window"), name, value, allowed, DataError)


class ChatDataset(DocumentSet):
    """A sequence of tokenised documents; ``d[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    Labels follow transformers: unshifted, -100 where nothing is trained. Packing happens in the loader
    (:func:`phi3lora.batches`), not here. Make one with :meth:`load`.
    """

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
        buffer_size: int = _BUFFER_SIZE,
        on_bad_row: str = "error",
    ) -> ChatDataset:
        """Read a chat dataset, recognise its format, render and tokenise it.

        Args:
            source: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow`` file, compressed (``.gz``,
                ``.bz2``, ``.xz``, ``.zst``) or not; a folder of them, or one that ``save_to_disk`` wrote; a pattern
                (``"data/*.jsonl"``); a hub name; a ``datasets.Dataset`` or ``DatasetDict``; a DataFrame or Arrow table;
                dicts; or a list of such sources, one after the other, each read in its own format.
            tokenizer: a fast tokenizer with a chat template.
            max_length: tokens of the longest document.
            split: split of the source, or a part of one as ``datasets`` writes it: ``"train[:100]"``,
                ``"train[10%:20%]"``, ``"train[:50%]+test"``, ``"all"``. A source without splits is all ``"train"``. In
                a list of sources, each is split separately. Rows of a file or object keep their numbers.
            name: configuration of a hub dataset.
            format: ``"auto"`` (each row's own, recognised by its keys), ``"messages"``, ``"sharegpt"``, ``"alpaca"``,
                ``"prompt_completion"`` or ``"text"``; see ``data/formats.py``.
            columns: column name of the format -> your name, ``{"prompt": "question", "completion": "answer"}``.
            overflow: what happens to a longer document: ``"truncate"`` cuts it (and drops it if nothing trained is
                left; both are counted), ``"split"`` makes several documents and loses no trained token, ``"error"``
                raises.
            train_on: ``"assistant"`` turns, the ``"last"`` one, or ``"all"`` tokens. A message may carry
                ``"train": false``.
            revision: revision of a hub dataset.
            streaming: True returns a :class:`phi3lora.ChatStream`, which reads its rows during training.
            buffer_size: rows of a stream that are held in memory, shuffled and packed together. A warning says that it
                has no effect without ``streaming``.
            on_bad_row: ``"error"`` raises with the row's number, ``"skip"`` leaves the row out and reports it.

        Raises:
            DataError: anything that cannot be trained on, with the row's number.

        Example:
            >>> rows = [{"prompt": "Hi", "completion": "Hello!"}]
            >>> chats = p3.ChatDataset.load(rows, tokenizer, max_length=64)
            >>> len(chats), chats.format
            (1, 'prompt_completion')
        """
        max_length, buffer_size = plain_value((max_length, buffer_size))
        require(is_int(max_length, 2), "max_length", max_length, "a whole number >= 2", DataError)
        is_known = overflow in ("truncate", "split", "error")
        require(is_known, "overflow", overflow, "'truncate', 'split', 'error'", DataError)
        require(isinstance(streaming, bool), "streaming", streaming, "True, False", DataError)
        require(is_int(buffer_size, 1), "buffer_size", buffer_size, "a whole number >= 1", DataError)
        format = known_format(format)
        check_columns(columns, format)
        BadRows(on_bad_row)  # checks it
        if buffer_size != _BUFFER_SIZE and not streaming:
            logger.warning("buffer_size=%d has no effect without streaming=True", buffer_size)
        # A stream is tokenised in a background thread, and a fast tokenizer must not be used by two threads at once.
        encoder = ChatEncoder(copy.deepcopy(tokenizer) if streaming else tokenizer, train_on)
        one_thread = threading.Lock()
        sources = find_sources(source, split, name, revision, streaming)
        tokenizers = [RowTokenizer(encoder, max_length, overflow, columns, found, one_thread) for found in sources]
        parts = [SourceReader(each, format, on_bad_row, ChatDataset) for each in tokenizers]
        origin = origin_of(
            source, split=split, name=name, revision=revision, format=format, columns=columns, train_on=train_on,
            max_length=max_length, overflow=overflow, on_bad_row=on_bad_row, streaming=streaming,
            buffer_size=buffer_size,
        )  # fmt: skip
        if streaming:
            stream = ChatStream(parts, buffer_size)
            stream.origin = origin
            return cast(ChatDataset, stream)  # declared as what all but streaming users get
        dataset = joined([part.load(len(parts) > 1) for part in parts])
        dataset.origin = origin
        logger.info("%s", dataset.summary())
        for sentence, count in dataset.findings.advice.items():
            logger.warning("%s: %s", counted(count, "row"), sentence)
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
        """Mix the documents of several sources, each with the share that its weight gives.

        A weight is a share of documents, not of tokens: with ``{"chat.jsonl": 3, "code.jsonl": 1}``, three documents
        in four are chats, to within one document. Weights need not add up to 1. The documents of the sources alternate;
        ``train`` shuffles them again every epoch.

        Args:
            weights: source -> weight > 0, or pairs. A source is a ``ChatDataset`` or ``ChatStream``, or what
                :meth:`load` reads. Pairs of loaded ones can have different formats, columns or splits.
            tokenizer, options: arguments of :meth:`load`, for sources that are not loaded yet. A warning names those
                that have no effect because all are loaded.
            seed: which documents of a source are taken if not all are, and in which order. A stream's rows are taken
                in their order.
            stopping_strategy: ``"first_exhausted"`` takes no document twice: the mix ends when one source has nothing
                left, and the rest of the others is not used. ``"all_exhausted"`` takes every document at least
                once, and those of smaller sources again. The names are those of ``datasets.interleave_datasets``.

        Returns:
            A ``ChatDataset``, or a ``ChatStream`` if the sources are streams (``streaming=True``). The weights of a
            stream are shares of rows. A pass of it ends where a mix of datasets would, and the next pass is the same.

        Raises:
            DataError: a weight that is not positive, sources of different tokenizers, what :meth:`load` raises.
        """
        given, shares = weighted_sources(weights)
        seed = plain_value(seed)
        check_seed(seed)
        is_known = stopping_strategy in STRATEGIES
        require(is_known, "stopping_strategy", stopping_strategy, ", ".join(map(repr, STRATEGIES)), DataError)
        all_loaded = all(isinstance(source, (ChatDataset, ChatStream)) for source in given)
        if all_loaded and options:
            logger.warning("%s: no effect on a mix of loaded sources", ", ".join(f"{name}=" for name in options))
        if tokenizer is None and not all_loaded:
            raise DataError("a mix of sources that are not loaded needs the arguments of load: tokenizer, max_length=")
        parts: list[ChatDataset | ChatStream] = []
        for source in given:
            is_loaded = isinstance(source, (ChatDataset, ChatStream))
            is_path = isinstance(source, (str, os.PathLike))
            with naming(repr(os.fspath(source)) if is_path else f"({type(source).__name__})", True):
                parts.append(source if is_loaded else cls.load(source, tokenizer, **options))
            if not (is_loaded or options.get("streaming")):
                options.pop("buffer_size", None)  # load has said that it has no effect
        streams = [part for part in parts if isinstance(part, ChatStream)]
        if streams and len(streams) < len(parts):
            raise DataError("a mix of streams and datasets; allowed: one kind. Load all with the same streaming=")
        if streams:
            return cast(ChatDataset, _MixedStream(streams, shares, stopping_strategy))
        return _mixed(cast("list[ChatDataset]", parts), shares, stopping_strategy, seed)


class ChatStream(RowStream[ChatDataset]):
    """Chats that are read during training; ``ChatDataset.load(..., streaming=True)`` makes one.

    It has no length, so ``train`` needs ``max_steps``, and it cannot be split; :meth:`take` and :meth:`skip` set rows
    aside for evaluation.
    """

    def split(self, fraction: float, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """Raise a ``DataError`` that names the way out: a stream cannot be split."""
        raise DataError(
            "a stream's length is not known, so it cannot be split; take(1000) and skip(1000) set its first rows aside"
        )


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

    def _all_rows(self, bads: Sequence[BadRows]) -> Iterator[StreamRow]:
        def open_stream(stream: ChatStream, first: int) -> Iterator[StreamRow]:
            rows = stream._rows(bads[first : first + len(stream._parts)])
            return ((first + at, number, row) for at, number, row in rows)

        firsts = itertools.accumulate((len(stream._parts) for stream in self._streams), initial=0)
        openers = [partial(open_stream, stream, first) for stream, first in zip(self._streams, firsts, strict=False)]
        return interleaved(openers, self._weights, self._strategy)


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
    return joined(parts).select(chosen)
