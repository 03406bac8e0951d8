"""``ChatDataset``: rows -> chats -> tokenised documents, held flat in memory."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import DataError
from ..values import is_count, is_one_of, shown
from .bad_rows import BadRows
from .cache import NumberedChat, cache_key, kept
from .formats import check_columns, detect_format, known_format, to_messages
from .sources import NumberedRow, find_source, read_rows
from .template import ChatEncoder, EncodedChat

logger = logging.getLogger("phi3lora")

IGNORE = -100
"""The label of a token that is not trained."""

OVERFLOW = ("truncate", "split", "error")
_ROWS_AT_ONCE = 1000


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
            streaming: only False so far.
            on_bad_row: ``"error"`` with the row's number, or ``"skip"``: go on without it, and say which were left out.

        Raises:
            DataError: with the row's number, whatever cannot be trained on.

        Example:
            >>> rows = [{"prompt": "Hi", "completion": "Hello!"}]
            >>> chats = p3.ChatDataset.load(rows, tokenizer, max_length=64)
            >>> len(chats), chats.format
            (1, 'prompt_completion')
        """
        _check(is_count(max_length, 2), "max_length", max_length, "a whole number >= 2")
        _check(is_one_of(overflow, OVERFLOW), "overflow", overflow, ", ".join(map(repr, OVERFLOW)))
        _check(streaming is False, "streaming", streaming, "False (the whole dataset is tokenised first)")
        check_columns(columns)
        encoder, bad = ChatEncoder(tokenizer, train_on), BadRows(on_bad_row)
        found = find_source(source, split, revision)
        rows = iter(read_rows(found, bad))
        name, first = _recognised(rows, known_format(format), columns, bad)
        if first is None:
            why = f"none of its {len(bad.numbers)} rows is usable: {bad.errors[0]}" if bad.errors else "it has no rows"
            raise DataError(f"the dataset {_short(source)} is empty: {why}")
        builder = _Builder(max_length, overflow, bad)
        key = cache_key(found, tokenizer, format=name, columns=sorted((columns or {}).items()), train_on=train_on)
        chats = _encoded(encoder, _chunks(first, rows, name, columns, bad), bad)
        for number, chat in kept(chats, None if bad.skips else key):  # what is kept does not say what was skipped
            builder.add(chat, number)
        bad.report()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        dataset = builder.finish(pad_token_id=pad or 0, end_of_turn_id=encoder.end_of_turn_id, format=name)
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
        raise DataError(f"{name}={shown(value)}; allowed: {allowed}")


def _short(source: Any) -> str:
    return shown(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else f"({type(source).__name__})"


def _recognised(
    rows: Iterator[NumberedRow], name: str, columns: Mapping[str, str] | None, bad: BadRows
) -> tuple[str, NumberedRow | None]:
    """The format, and the first row that says so; None: there is none."""
    for number, row in rows:
        try:
            return (detect_format(row, columns, number) if name == "auto" else name), (number, row)
        except DataError as error:
            bad.met(number, error)
    return name, None


def _chunks(
    first: NumberedRow, rest: Iterator[NumberedRow], format: str, columns: Mapping[str, str] | None, bad: BadRows
) -> Iterator[tuple[list[int], list[Any]]]:
    """Row numbers and checked chats, some at a time, so that the tokenizer has a batch to spread over the cores."""
    numbers, chats = [], []
    for number, row in itertools.chain([first], rest):
        try:
            chats.append(to_messages(row, format, number, columns))
            numbers.append(number)
        except DataError as error:
            bad.met(number, error)
        if len(chats) == _ROWS_AT_ONCE:
            yield numbers, chats
            numbers, chats = [], []
    if chats:
        yield numbers, chats


def _encoded(
    encoder: ChatEncoder, chunks: Iterator[tuple[list[int], list[Any]]], bad: BadRows
) -> Generator[NumberedChat]:
    for numbers, chats in chunks:
        try:
            yield from zip(numbers, encoder.encode(chats, numbers), strict=True)
        except DataError:
            if not bad.skips:
                raise
            for number, chat in zip(numbers, chats, strict=True):  # one by one, to know which
                try:
                    yield number, encoder.encode([chat], [number])[0]
                except DataError as error:
                    bad.met(number, error)


class _Builder:
    """Collects documents of at most ``max_length`` tokens."""

    def __init__(self, max_length: int, overflow: str, bad: BadRows) -> None:
        self.max_length, self.overflow, self.bad = max_length, overflow, bad
        self.ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.rows: list[int] = []
        self.truncated: list[bool] = []
        self.dropped_rows = 0
        self.longest_prompt = 0

    def add(self, chat: EncodedChat, number: int) -> None:
        ids = np.array(chat.input_ids, dtype=np.int32)
        labels = np.where(chat.trained, ids, IGNORE).astype(np.int32)
        if len(ids) <= self.max_length:
            self._append(ids, labels, number, False)
        elif self.overflow == "error":
            what = f"row {number}: {len(ids)} tokens; allowed: max_length={self.max_length}. "
            self.bad.met(number, DataError(f"{what}Raise max_length, or set overflow='truncate' or 'split'"))
        else:
            # A document's first token is never predicted, so the parts of a split overlap by one token.
            step = self.max_length - 1
            starts = [0] if self.overflow == "truncate" else range(0, len(ids) - 1, step)
            parts = [slice(start, start + self.max_length) for start in starts]
            kept = [part for part in parts if (labels[part][1:] != IGNORE).any()]
            for part in kept:
                self._append(ids[part], labels[part], number, self.overflow == "truncate")
            if not kept:
                self.dropped_rows += 1
                self.longest_prompt = max(self.longest_prompt, int(np.argmax(chat.trained)))

    def _append(self, ids: np.ndarray, labels: np.ndarray, number: int, truncated: bool) -> None:
        self.ids.append(ids)
        self.labels.append(labels)
        self.rows.append(number)
        self.truncated.append(truncated)

    def finish(self, **facts: Any) -> ChatDataset:
        if not self.ids and self.bad.errors and not self.dropped_rows:
            raise DataError(f"none of the {len(self.bad.numbers)} rows is usable; the first: {self.bad.errors[0]}")
        if not self.ids:
            raise DataError(
                f"max_length={self.max_length} is too small: cut there, none of the {self.dropped_rows} rows has a "
                f"trained token left. Allowed: more than {self.longest_prompt + 1}, or overflow='split'"
            )
        if self.dropped_rows:
            logger.warning(
                "%d rows dropped: within max_length=%d nothing trained was left of them",
                self.dropped_rows,
                self.max_length,
            )
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in self.ids])])
        return ChatDataset(
            np.concatenate(self.ids), np.concatenate(self.labels), starts, max_length=self.max_length,
            rows=np.array(self.rows), truncated=np.array(self.truncated), dropped_rows=self.dropped_rows,
            bad_rows=tuple(self.bad.numbers), **facts,
        )  # fmt: skip
