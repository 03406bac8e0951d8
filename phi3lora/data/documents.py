"""Rows -> chats -> tokenised documents of at most ``max_length`` tokens, and the cache of tokenised chats.

    rows -> chats -> EncodedChats, 1,000 at a time -> cache -> documents

A source of many rows is encoded by forks of this process, one for each core, and the parts are put together in the
order of their rows: see :func:`phi3lora.data.forks.in_processes`.

The same rows, tokenizer and options are tokenised once. ``datasets`` caches the tokenised chats of a file or dataset of
1 MiB and more: they are a ``Dataset.from_generator`` whose fingerprint is a digest of everything that the tokens depend
on, this library's own code included. Long chats are cut after the cache, so ``max_length`` and ``overflow`` may change.
``datasets`` decides where its cache is (``HF_DATASETS_CACHE``) and whether there is one
(``datasets.disable_caching()``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from ..config import IGNORE_INDEX
from ..display import quiet_libraries
from ..errors import DataError, counted, did_you_mean, error_line
from ..files import read_json, sha256_of, write_atomic
from .findings import Findings
from .forks import cores, in_processes
from .formats import Chat, detect_format, keys_of, to_chat
from .prefetch import Share
from .rows import BadRows, NumberedRow, file_kind
from .sources import Source
from .template import ChatEncoder, EncodedChat

logger = logging.getLogger("phi3lora")

SMALLEST_BYTES = 2**20  # a smaller source is tokenised in less than the second that importing datasets takes
_READING = "compression rows formats turns marked_text other_jobs findings template tokens tools documents".split()
_MODULES = [Path(__file__).with_name(f"{name}.py") for name in _READING]
_CHATS_AT_ONCE = 1000
_ROWS_TO_FORK = 4096  # a source of fewer is encoded in two or three seconds
_DIGESTS = "sha256.json"
_DTYPES = {"numbers": np.int64, "lengths": np.int64, "ids": np.int32, "trained": np.uint8}  # of a cached record


class NoDocumentsError(DataError):
    """A source of which no row became a document."""


@dataclass(frozen=True)
class EncodedChats:
    """Encoded chats of one source, end to end."""

    numbers: np.ndarray  # of their rows, int64 (chats,)
    lengths: np.ndarray  # in tokens, int64 (chats,)
    ids: np.ndarray  # int32 (tokens,)
    trained: np.ndarray  # a bit for each token, packed, uint8

    @classmethod
    def of(cls, numbers: Sequence[int], chats: Sequence[EncodedChat]) -> EncodedChats:
        ids, mask = (np.concatenate(column) for column in zip(*((chat.ids, chat.mask) for chat in chats), strict=True))
        lengths = np.array([len(chat.ids) for chat in chats], dtype=np.int64)
        return cls(np.array(numbers, dtype=np.int64), lengths, ids, np.packbits(mask))

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the row, the ids int32 (n,) and the mask of trained tokens, bool (n,), of each chat."""
        mask = np.unpackbits(self.trained, count=len(self.ids)).astype(bool)
        ends = np.cumsum(self.lengths)[:-1]
        return zip(self.numbers.tolist(), np.split(self.ids, ends), np.split(mask, ends), strict=True)


class RowTokenizer:
    """A tokenizer for the numbered rows of one source: rows in, documents of at most ``max_length`` tokens out.

    ``overflow`` ("truncate", "split" or "error") sets what happens to a longer chat, and ``columns`` maps our column
    names to the source's. ``one_thread`` is held while the encoder is used: a fast tokenizer must not be used by two
    threads at once.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        max_length: int,
        overflow: str,
        columns: Mapping[str, str] | None,
        source: Source,
        one_thread: threading.Lock,
    ) -> None:
        self.encoder, self.max_length, self.overflow = encoder, max_length, overflow
        self.columns, self.source = columns or {}, source
        self._not_met = set(self.columns.values())  # mapped columns that no row had so far
        self._one_thread = one_thread

    def tokenize(
        self,
        rows: Iterable[NumberedRow],
        format: str,
        bad: BadRows,
        *,
        is_whole: bool = False,
        share: Share | None = None,
    ) -> dict[str, Any]:
        """Return the documents of ``rows`` as the arguments of ``ChatDataset``.

        ``format`` is one of ``formats.COLUMNS``, or ``"auto"``: each row's own, the first row's before others.
        If ``rows`` are all the rows of the source (``is_whole``), several cores tokenise them and the chats are cached.
        With a ``share`` each process tokenises its part of the rows, and gets the others' from them.
        """
        with self._one_thread:
            rows, findings = iter(rows), Findings()
            form, first = self._first_row(rows, format, bad)
            rows = chain([first], rows)

            def encode(rows: Iterable[NumberedRow], bad: BadRows, findings: Findings) -> Iterator[EncodedChats]:
                return self._encode(self._read_chats(rows, format, form, bad, findings), bad, findings)

            rows = self._noting_columns(rows)
            if share is not None:
                chats = _shared(list(rows), encode, bad, findings, share)
            elif is_whole:
                chats = _forked(rows, encode, bad, findings)
            else:
                chats = encode(rows, bad, findings)
            if is_whole and not bad.skips:  # the cache does not record which rows were skipped
                options = [format, sorted(self.columns.items()), self.encoder.train_on, self.source.ranges]
                chats = cached_chats(chats, findings, cache_key(self.source.rows, self.encoder.tokenizer, options))
            documents = self._cut(chats, bad)
            formats = sorted({form.partition(" as ")[0] for form in findings.rows_by_form})
            facts = {"format": ", ".join(formats), "findings": findings, "source": self.source.name}
            return {**documents, **facts}

    def _first_row(self, rows: Iterator[NumberedRow], format: str, bad: BadRows) -> tuple[str, NumberedRow]:
        """Return the format of the first row that has a known one, and that row."""
        for number, row in rows:
            try:
                return (detect_format(row, self.columns, number) if format == "auto" else format), (number, row)
            except DataError as error:
                bad.reject(number, error)
        why = f"none of its {len(bad.numbers)} rows is usable: {bad.errors[0]}" if bad.errors else "it has no rows"
        raise NoDocumentsError(f"the dataset {self.source.name} is empty: {why}")

    def _noting_columns(self, rows: Iterable[NumberedRow]) -> Iterator[NumberedRow]:
        """Yield the rows.

        A mapped column that none of the rows has is refused after the last row (of a stream: after the first window),
        before anything is cached.
        """
        for number, row in rows:
            if self._not_met:
                self._not_met.difference_update(row)
            yield number, row
        if self._not_met:
            missing = sorted(self._not_met)
            what = f"columns={dict(self.columns)}: no row of {self.source.name} has {', '.join(map(repr, missing))}"
            hint = did_you_mean(missing[0], map(str, row))
            raise DataError(f"{what}; the last row has the keys {keys_of(row)}.{hint}")

    def _read_chats(
        self, rows: Iterable[NumberedRow], format: str, first: str, bad: BadRows, findings: Findings
    ) -> Iterator[tuple[int, Chat]]:
        """Yield the chats of the rows; ``first`` is the first row's format."""
        for number, row in rows:
            try:
                form = detect_format(row, self.columns, number, first) if format == "auto" else format
                yield number, to_chat(row, form, number, self.columns, findings)
            except DataError as error:
                bad.reject(number, error)

    def _encode(self, chats: Iterator[tuple[int, Chat]], bad: BadRows, findings: Findings) -> Iterator[EncodedChats]:
        """Yield the encoded chats, many at a time."""
        while batch := list(islice(chats, _CHATS_AT_ONCE)):
            try:
                yield self._encode_batch(batch, findings)
            except DataError:
                if not bad.skips:
                    raise
                for chat in batch:  # one by one, to find the bad ones
                    try:
                        yield self._encode_batch([chat], findings)
                    except DataError as error:
                        bad.reject(chat[0], error)

    def _encode_batch(self, batch: list[tuple[int, Chat]], findings: Findings) -> EncodedChats:
        numbers, found = [number for number, _ in batch], Findings()
        encoded = self.encoder.encode([chat for _, chat in batch], numbers, found)
        findings += found
        return EncodedChats.of(numbers, encoded)

    def _cut(self, chats: Iterable[EncodedChats], bad: BadRows) -> dict[str, Any]:
        """Cut the chats into documents of at most ``max_length`` tokens."""
        documents: list[tuple[int, bool, np.ndarray, np.ndarray]] = []  # (row, truncated, ids, labels)
        dropped_rows = longest_prompt = 0
        for number, ids, mask in chain.from_iterable(chats):
            labels = np.where(mask, ids, np.int32(IGNORE_INDEX))
            is_long = len(ids) > self.max_length
            if is_long and self.overflow == "error":
                what = f"row {number}: {len(ids)} tokens; allowed: max_length={self.max_length}. "
                bad.reject(number, DataError(f"{what}Raise max_length, or set overflow='truncate' or 'split'"))
                continue
            parts = self._parts(ids, labels) if is_long else [(ids, labels)]
            documents += [(number, is_long and self.overflow == "truncate", *part) for part in parts]
            if not parts:
                dropped_rows += 1
                longest_prompt = max(longest_prompt, int(np.argmax(mask)))
        bad.report()
        if not documents and not dropped_rows:
            raise NoDocumentsError(f"none of the {len(bad.numbers)} rows is usable; the first: {bad.errors[0]}")
        if not documents:
            raise NoDocumentsError(
                f"max_length={self.max_length} is too small: cut there, none of the {dropped_rows} rows has a trained "
                f"token left. Allowed: more than {longest_prompt + 1}, or overflow='split'"
            )
        if dropped_rows:
            logger.warning(
                "%s dropped: no trained token within max_length=%d", counted(dropped_rows, "row"), self.max_length
            )
        rows, truncated, all_ids, all_labels = zip(*documents, strict=True)
        tokenizer = self.encoder.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return {
            "input_ids": np.concatenate(all_ids),
            "labels": np.concatenate(all_labels),
            "starts": np.cumsum([0, *map(len, all_ids)]),
            "rows": np.array(rows),
            "truncated": np.array(truncated),
            "dropped_rows": dropped_rows,
            "bad_rows": tuple(sorted(bad.numbers)),
            "max_length": self.max_length,
            "pad_token_id": pad or 0,
            "end_of_turn_id": self.encoder.end_of_turn_id,
        }

    def _parts(self, ids: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the parts of a long chat that have something to train: one at most for ``"truncate"``.

        A document's first token is never predicted, so the parts of a split overlap by one token.
        """
        starts = [0] if self.overflow == "truncate" else range(0, len(ids) - 1, self.max_length - 1)
        parts = [slice(start, start + self.max_length) for start in starts]
        return [(ids[part], labels[part]) for part in parts if (labels[part][1:] != IGNORE_INDEX).any()]


Encode = Callable[[Iterable[NumberedRow], BadRows, Findings], Iterator[EncodedChats]]
_Part = tuple[BadRows, Findings, list[EncodedChats]]  # what came of some of the rows


def _encoded_part(encode: Encode, choice: str, rows: Iterable[NumberedRow]) -> _Part:
    bad, findings = BadRows(choice), Findings()
    return bad, findings, list(encode(rows, bad, findings))


def _put_together(parts: Iterable[_Part], bad: BadRows, findings: Findings) -> Iterator[EncodedChats]:
    for part_bad, part_findings, chats in parts:
        bad.add(part_bad)
        findings += part_findings
        yield from chats


def _forked(rows: Iterator[NumberedRow], encode: Encode, bad: BadRows, findings: Findings) -> Iterator[EncodedChats]:
    """Yield the chats of all rows, which forks of this process encode if the rows are many."""
    parts = _parts_of(rows)
    first, processes = next(parts, []), cores()
    if len(first) < _ROWS_TO_FORK or processes == 1:
        yield from encode(chain(first, chain.from_iterable(parts)), bad, findings)
        return
    work = partial(_encoded_part, encode, bad.choice)
    for part in chain([first], parts):
        yield from _put_together(in_processes(work, part, processes), bad, findings)


def _parts_of(rows: Iterator[NumberedRow]) -> Iterator[list[NumberedRow]]:
    """Yield the rows, many at a time. An error in reading is raised after the rows before it, as one by one."""
    part: list[NumberedRow] = []
    try:
        for row in rows:
            part.append(row)
            if len(part) == _ROWS_TO_FORK:
                yield part
                part = []
    except DataError:
        yield part
        raise
    yield part


def _shared(
    rows: Sequence[NumberedRow], encode: Encode, bad: BadRows, findings: Findings, share: Share
) -> Iterator[EncodedChats]:
    """Return the chats of all rows, of which each process encodes its part.

    The error of the first row that has one is raised in every process.
    """
    done: _Part | DataError
    try:
        done = _encoded_part(encode, bad.choice, share.part(rows))
    except DataError as why:
        done = why
    parts = []
    for part in share.exchange(done):
        if isinstance(part, DataError):
            raise part
        parts.append(part)
    return _put_together(parts, bad, findings)


def cache_key(source: Any, tokenizer: Any, options: list[Any]) -> str | None:
    """Return a digest of the rows, the tokenizer, the options (JSON values) and the code; None for no cache.

    The contents of the rows count, not the name of their file. Only files and ``datasets.Dataset`` of
    :data:`SMALLEST_BYTES` and more are cached, and only with one of transformers' own tokenizers (the code of another
    class may change) whose template does not ask for the time.
    """
    rows = _rows_digest(source)
    is_own_class = not type(tokenizer).__module__.startswith("transformers.")
    if rows is None or is_own_class or "strftime_now" in str(tokenizer.chat_template):
        return None
    try:
        tables = tokenizer.backend_tokenizer.to_str()
    except Exception:  # tokenizers raises this very class for a component written in Python
        return None
    tables = tables[tables.index('"added_tokens"') :]  # without truncation and padding, which every call sets
    special_tokens = [tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    code = [sha256_of(path) for path in _MODULES]
    versions = [transformers.__version__, tokenizers.__version__]
    facts = [rows, tables, tokenizer.chat_template, special_tokens, options, code, versions]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _rows_digest(source: Any) -> str | None:
    if isinstance(source, Path):
        is_large = source.stat().st_size >= SMALLEST_BYTES
        return "".join(file_kind(source)) + sha256_of(source) if is_large else None
    fingerprint: str | None = getattr(source, "_fingerprint", None)  # a datasets.Dataset has one
    return fingerprint if fingerprint and source.data.nbytes >= SMALLEST_BYTES else None


def cached_chats(chats: Iterator[EncodedChats], findings: Findings, key: str | None) -> Iterator[EncodedChats]:
    """Return the chats cached under ``key``. If there are none, return ``chats``, which are then cached.

    ``findings``, complete once ``chats`` is exhausted, is cached with them, as the last record. A cache whose files do
    not have their checksums is made again; one that cannot be written is a warning. An exception that ``chats`` raises
    is raised unchanged, and nothing is cached.
    """
    if key is None:
        return chats
    import datasets
    from filelock import FileLock

    if not datasets.is_caching_enabled():
        return chats
    columns = {name: datasets.Value("binary") for name in _DTYPES}
    features = datasets.Features(**columns, findings=datasets.Value("string"))
    started = False
    written: list[EncodedChats] = []  # what chats gave: it cannot be asked again if the disk fills up
    raised: list[Exception] = []

    def records() -> Iterator[dict[str, Any]]:
        nonlocal started
        started = True
        try:
            for several in chats:
                written.append(several)
                yield {**{name: getattr(several, name).tobytes() for name in _DTYPES}, "findings": None}
        except Exception as error:
            raised.append(error)
            raise
        yield {**dict.fromkeys(_DTYPES, b""), "findings": findings.to_json()}

    folder = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "phi3lora" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"), quiet_libraries():
            if folder.exists() and not _is_whole(folder):
                logger.warning("the cached tokens in %s are damaged or incomplete: tokenising again", folder)
                shutil.rmtree(folder)
            source = datasets.Dataset.from_generator
            options = {"features": features, "fingerprint": key, "writer_batch_size": 1}
            table = source(records, cache_dir=str(folder), **options)
            if started:
                digests = {
                    str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*.*") if path.is_file()
                }
                write_atomic(folder / _DIGESTS, lambda file: file.write_text(json.dumps(digests)))
    except Exception as error:  # datasets, pyarrow and the file system have many
        if started:
            shutil.rmtree(folder, ignore_errors=True)
        if raised:
            raise raised[0] from raised[0].__cause__
        logger.warning("tokenised chats cannot be cached by datasets: %s", error_line(error.__cause__ or error))
        return chain(written, chats)
    if started:
        return iter(written)
    findings += Findings.from_json(table[-1]["findings"])
    return (
        EncodedChats(**{name: np.frombuffer(record[name], dtype) for name, dtype in _DTYPES.items()})
        for record in map(table.__getitem__, range(len(table) - 1))
    )


def _is_whole(folder: Path) -> bool:
    """Return whether each file of a cache has the checksum that was written after all of them."""
    try:
        digests = read_json(folder / _DIGESTS)
        return all(sha256_of(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False
