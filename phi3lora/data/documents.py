"""Rows -> chats -> tokenised documents of at most ``max_length`` tokens: what ``ChatDataset.load`` does to any rows."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from ..errors import DataError
from ..files import sha256_of
from . import formats, template
from . import rows as sources
from .formats import detect_format, to_messages
from .rows import BadRows, NumberedRow
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


# ----------------------------------------------------------------------------------------------------
# Tokenised chats kept on disk by ``datasets``: the same rows, tokenizer and options are tokenised once.
#
# The chats are a ``Dataset.from_generator`` whose fingerprint is a digest of everything that their tokens depend on,
# this
# library's own code included; what cannot be digested is not kept. How long documents are cut comes after, so
# ``max_length`` and ``overflow`` may change. ``datasets`` decides where they lie (``HF_DATASETS_CACHE``) and whether
# anything is kept at all (``datasets.disable_caching()``).


NumberedChat = tuple[int, EncodedChat]

SMALLEST_BYTES = 2**20  # less is tokenised in less than the second that importing datasets takes
_MODULES = (formats.__file__, sources.__file__, template.__file__, __file__)
_CHATS_AT_ONCE = 1000


def cache_key(found: Path | Iterable[Any], tokenizer: Any, **options: Any) -> str | None:
    """A digest of the rows, the tokenizer, the options and the code; None: these chats are not to be kept.

    Args:
        found: what ``sources.find_source`` found. Files and ``datasets.Dataset`` of :data:`SMALLEST_BYTES` and more
            are kept; their contents count, not their names.
        tokenizer: one of transformers' own classes, whose template does not ask for the time.
        options: values with a ``repr`` that tells them apart.
    """
    rows = _rows_digest(found)
    tokenizer_facts = _tokenizer_facts(tokenizer) if rows else None
    if tokenizer_facts is None:
        return None
    code = [sha256_of(Path(name)) for name in _MODULES]
    versions = [transformers.__version__, tokenizers.__version__]
    facts = [rows, tokenizer_facts, sorted((name, repr(value)) for name, value in options.items()), code, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _rows_digest(found: Path | Iterable[Any]) -> str | None:
    if isinstance(found, Path):
        if found.stat().st_size < SMALLEST_BYTES:
            return None
        return found.suffix.lower() + sha256_of(found)
    fingerprint = getattr(found, "_fingerprint", None)  # a datasets.Dataset has one
    return fingerprint if fingerprint and found.data.nbytes >= SMALLEST_BYTES else None  # type: ignore[attr-defined]


def _tokenizer_facts(tokenizer: Any) -> list[Any] | None:
    own_class = not type(tokenizer).__module__.startswith("transformers.")
    if own_class or "strftime_now" in str(tokenizer.chat_template):
        return None
    try:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # tokenizers raises this very class for a part that is written in Python
        return None
    del state["truncation"], state["padding"]  # what the last call left there
    return [state, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.split_special_tokens]


def kept(chats: Generator[NumberedChat], key: str | None) -> Iterator[NumberedChat]:
    """The same chats: those kept under ``key``, else ``chats``, which are then kept.

    What ``chats`` raises is raised as it is, and nothing is kept.
    """
    if key is None:
        return chats
    import datasets

    if not datasets.is_caching_enabled():
        return chats
    features = {"number": datasets.Value("int64")}
    features["input_ids"] = datasets.List(datasets.Value("int32"))
    features["trained"] = datasets.List(datasets.Value("bool"))

    def records() -> Iterator[dict[str, Any]]:
        for number, chat in chats:
            yield {"number": number, "input_ids": chat.input_ids, "trained": chat.trained}

    try:
        table = datasets.Dataset.from_generator(records, features=datasets.Features(features), fingerprint=key)
    except datasets.exceptions.DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error.__cause__.__cause__
    except OSError as error:
        if inspect.getgeneratorstate(chats) != inspect.GEN_CREATED:
            raise
        logger.warning("tokenised chats cannot be kept in datasets' cache: %s", error)
        return chats
    return _chats(table)


def _chats(table: Any) -> Iterator[NumberedChat]:
    for part in table.with_format("numpy").iter(_CHATS_AT_ONCE):
        for number, input_ids, trained in zip(part["number"], part["input_ids"], part["trained"], strict=True):
            yield int(number), EncodedChat(input_ids, trained)
