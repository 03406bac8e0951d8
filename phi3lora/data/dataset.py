"""``ChatDataset``: tokenised documents, held flat in memory."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

from ..errors import DataError, is_int, is_one_of, short_repr
from .documents import IGNORE, Recipe, cache_key
from .formats import check_columns, known_format
from .rows import BadRows, NumberedRow, find_source, read_rows
from .streaming import ChatStream
from .template import ChatEncoder

logger = logging.getLogger("phi3lora")

OVERFLOW = ("truncate", "split", "error")


class ChatDataset:
    """A sequence of tokenised documents; ``d[i]`` is ``{"input_ids": [...], "labels": [...]}``.

    Labels are as transformers has them: unshifted, -100 where nothing is trained. Packing happens in the loader
    (:func:`phi3lora.batches`), not here. Make one with :meth:`load`.
    """

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
        index: np.ndarray | None = None,
    ) -> None:
        self._input_ids, self._labels, self._starts = input_ids, labels, starts  # (tokens,), (tokens,), (documents+1,)
        self._rows, self._truncated = rows, truncated  # (documents,)
        self._index = np.arange(len(starts) - 1) if index is None else index  # the documents that belong to this set
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.end_of_turn_id = end_of_turn_id
        self.format = format
        self.dropped_rows = dropped_rows
        self.bad_rows = bad_rows
        """Rows of the source that ``on_bad_row="skip"`` left out."""

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
        """Read, recognise, render and tokenise a chat dataset.

        Args:
            source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a hub name, a ``datasets.Dataset``, dicts.
            tokenizer: a fast tokenizer with a chat template.
            max_length: the longest document, in tokens.
            split: of a hub dataset.
            format: ``"auto"`` (by the first row's keys), ``"messages"``, ``"sharegpt"``, ``"alpaca"``,
                ``"prompt_completion"`` or ``"text"``; see ``data/formats.py``.
            columns: our column name -> yours, ``{"prompt": "question", "completion": "answer"}``.
            overflow: a longer document is cut (``"truncate"``; dropped where nothing trained is left, both counted),
                made several documents (``"split"``; no trained token is lost), or an ``"error"``.
            train_on: ``"assistant"`` turns, the ``"last"`` one, or ``"all"`` tokens. A message may carry
                ``"train": false``.
            revision: of a hub dataset.
            streaming: True: a :class:`phi3lora.ChatStream` instead, whose rows are read while it is trained on.
            buffer_size: of a stream: rows that are in memory, shuffled and packed at a time.
            on_bad_row: ``"error"`` with the row's number, or ``"skip"``: go on without it, and say which were left out.

        Raises:
            DataError: with the row's number, whatever cannot be trained on.

        Example:
            >>> rows = [{"prompt": "Hi", "completion": "Hello!"}]
            >>> chats = p3.ChatDataset.load(rows, tokenizer, max_length=64)
            >>> len(chats), chats.format
            (1, 'prompt_completion')
        """
        _check(is_int(max_length, 2), "max_length", max_length, "a whole number >= 2")
        _check(is_one_of(overflow, OVERFLOW), "overflow", overflow, ", ".join(map(repr, OVERFLOW)))
        _check(isinstance(streaming, bool), "streaming", streaming, "True, False")
        _check(is_int(buffer_size, 1), "buffer_size", buffer_size, "a whole number >= 1")
        check_columns(columns)
        name, bad = known_format(format), BadRows(on_bad_row)
        own = copy.deepcopy(tokenizer) if streaming else tokenizer  # a fast tokenizer is not for two threads
        recipe = Recipe(ChatEncoder(own, train_on), max_length, overflow, columns, _short(source))
        found = find_source(source, split, revision, streaming)
        if streaming:
            one_at_a_time = threading.Lock()

            def window(rows: Iterable[NumberedRow], format: str, bad: BadRows) -> ChatDataset:
                with one_at_a_time:
                    return cls(**recipe.documents(rows, format, bad))

            return cast(Any, ChatStream(found, window, name, buffer_size=buffer_size, on_bad_row=on_bad_row))
        options = {"columns": sorted((columns or {}).items()), "train_on": train_on}
        key = partial(cache_key, found, tokenizer, **options)
        dataset = cls(**recipe.documents(read_rows(found, bad), name, bad, key=lambda name: key(format=name)))
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
        """Document ``i`` without a copy: input ids (n,) and labels (n,), int32."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        at = self._index[i]
        part = slice(self._starts[at], self._starts[at + 1])
        return self._input_ids[part], self._labels[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self._starts)[self._index]

    @property
    def truncated(self) -> np.ndarray:
        """Whether each document was cut at ``max_length``, bool (documents,)."""
        return self._truncated[self._index]

    def largest_token_id(self) -> int:
        """The largest token id in any document, to hold against a model's vocabulary."""
        return max(int(self.document(i)[0].max()) for i in range(len(self)))

    def row_number(self, i: int) -> int:
        """The row of the source (counted from 1) that document ``i`` came from."""
        return int(self._rows[self._index[i]])

    def split(self, fraction: float, seed: int = 0) -> tuple[ChatDataset, ChatDataset]:
        """``(train, eval)``: a random ``fraction`` of the documents, at least one, becomes the second set.

        Documents made of one long row (``overflow="split"``) stay together, so neither set has seen the other's rows.
        """
        _check(isinstance(fraction, float) and 0 < fraction < 1, "fraction", fraction, "0 < fraction < 1")
        rows = np.unique(self._rows[self._index])
        if len(rows) < 2:
            raise DataError(f"cannot split a dataset of {len(rows)} row; allowed: 2 or more")
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held_out = np.random.default_rng([seed]).permutation(rows)[:count]
        belongs = np.isin(self._rows[self._index], held_out)
        return self.select(np.flatnonzero(~belongs)), self.select(np.flatnonzero(belongs))

    def select(self, documents: Any) -> ChatDataset:
        """The set of the given documents (their numbers in this one, or a mask), sharing its memory."""
        chosen = np.asarray(documents)
        if chosen.dtype == bool:
            chosen = np.flatnonzero(chosen)
        return ChatDataset(
            self._input_ids, self._labels, self._starts, max_length=self.max_length, pad_token_id=self.pad_token_id,
            end_of_turn_id=self.end_of_turn_id, format=self.format, rows=self._rows, truncated=self._truncated,
            dropped_rows=self.dropped_rows, bad_rows=self.bad_rows, index=self._index[chosen.astype(np.int64)],
        )  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        """documents, (supervised) tokens, truncated documents, dropped rows, bad (skipped) rows, longest in tokens."""
        lengths = self.lengths
        before = np.concatenate([[0], np.cumsum(self._labels != IGNORE)])  # supervised tokens before each token
        supervised = int(np.diff(before[self._starts])[self._index].sum())
        tokens = int(lengths.sum())
        return {
            "documents": len(self),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "supervised_share": supervised / max(tokens, 1),
            "truncated": int(self.truncated.sum()),
            "dropped": self.dropped_rows,
            "bad": len(self.bad_rows),
            "longest": int(lengths.max(initial=0)),
            "format": self.format,
            "max_length": self.max_length,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the documents in their order: equal exactly when the data is."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            for part in self.document(i):
                digest.update(len(part).to_bytes(8, "little") + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

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
        return text + ")"


def _check(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise DataError(f"{name}={short_repr(value)}; allowed: {allowed}")


def _short(source: Any) -> str:
    return short_repr(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"({type(source).__name__})"
