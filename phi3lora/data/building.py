"""Rows -> chats -> tokenised documents of at most ``max_length`` tokens: what ``ChatDataset.load`` does to any rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .bad_rows import BadRows
from .cache import NumberedChat, kept
from .formats import detect_format, to_messages
from .sources import NumberedRow
from .template import ChatEncoder, EncodedChat

logger = logging.getLogger("phi3lora")

IGNORE = -100
"""The label of a token that is not trained."""

_ROWS_AT_ONCE = 1000


class NothingUsableError(DataError):
    """Rows of which no document was left; none of them an error by itself."""


@dataclass(frozen=True)
class Recipe:
    """How rows become documents."""

    encoder: ChatEncoder
    max_length: int
    overflow: str
    columns: Mapping[str, str] | None
    source: str
    """What the rows come from, in words."""

    def documents(
        self, rows: Iterable[NumberedRow], format: str, bad: BadRows, key: Callable[[str], str | None] | None = None
    ) -> dict[str, Any]:
        """The documents, as ``ChatDataset`` takes them.

        Args:
            rows: numbered.
            format: ``"auto"``: as the first row says.
            bad: what happens to a row that cannot be used.
            key: format -> under what the tokenised chats are kept (cache.py); None: they are not.

        Raises:
            NothingUsableError: no document is left.
        """
        rows = iter(rows)
        name, first = _recognised(rows, format, self.columns, bad)
        if first is None:
            why = f"none of its {len(bad.numbers)} rows is usable: {bad.errors[0]}" if bad.errors else "it has no rows"
            raise NothingUsableError(f"the dataset {self.source} is empty: {why}")
        builder = _Builder(self.max_length, self.overflow, bad)
        chats = _encoded(self.encoder, _chunks(first, rows, name, self.columns, bad), bad)
        # What is kept does not say what was skipped.
        for number, chat in kept(chats, None if bad.skips or key is None else key(name)):
            builder.add(chat, number)
        bad.report()
        tokenizer = self.encoder.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return builder.finish(pad_token_id=pad or 0, end_of_turn_id=self.encoder.end_of_turn_id, format=name)


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

    def finish(self, **facts: Any) -> dict[str, Any]:
        if not self.ids and self.bad.errors and not self.dropped_rows:
            raise NothingUsableError(
                f"none of the {len(self.bad.numbers)} rows is usable; the first: {self.bad.errors[0]}"
            )
        if not self.ids:
            raise NothingUsableError(
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
        return {
            "input_ids": np.concatenate(self.ids), "labels": np.concatenate(self.labels), "starts": starts,
            "max_length": self.max_length, "rows": np.array(self.rows), "truncated": np.array(self.truncated),
            "dropped_rows": self.dropped_rows, "bad_rows": tuple(self.bad.numbers), **facts,
        }  # fmt: skip
