"""Numbered rows of a file, a hub dataset, a ``datasets.Dataset`` or a list of dicts; and what happens to bad ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..errors import DataError, as_path, error_line, short_repr
from ..files import parse_json

logger = logging.getLogger("phi3lora")

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row with its number. Rows count from 1; in a .jsonl file the number is the line's."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
_ROWS_AT_ONCE = 1000  # of a table
_QUOTED_ERRORS = 3


class BadRows:
    """Rows that cannot be trained on. With ``"error"`` the first one raises, with ``"skip"`` they are left out."""

    def __init__(self, choice: str) -> None:
        if choice not in ("error", "skip"):
            raise DataError(f"on_bad_row={short_repr(choice)}; allowed: 'error', 'skip'")
        self.skips = choice == "skip"
        self.numbers: list[int] = []
        self.errors: list[DataError] = []

    def reject(self, number: int, error: DataError) -> None:
        """Raise ``error``, or record row ``number`` (counted from 1) as skipped."""
        if not self.skips:
            raise error
        self.numbers.append(number)
        if len(self.errors) < _QUOTED_ERRORS:
            self.errors.append(error)

    def clear(self) -> None:
        self.numbers, self.errors = [], []

    def report(self) -> None:
        """Log one warning for all skipped rows."""
        if self.numbers:
            rest = len(self.numbers) - len(self.errors)
            more = f"; and {rest} more" if rest else ""
            logger.warning("%d bad rows skipped: %s%s", len(self.numbers), "; ".join(map(str, self.errors)), more)


def find_source(
    source: Any, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Path | Iterable[Any]:
    """Return the path of the file that ``source`` names, or an iterable of rows. Arguments: ``ChatDataset.load``."""
    if not isinstance(split, str):
        raise DataError(f"split={short_repr(split)}; allowed: a name")
    if isinstance(source, (str, os.PathLike)):
        path = as_path(source, "a dataset", DataError)
        suffix = path.suffix.lower()
        if suffix in SUFFIXES and path.is_file():
            return path
        if suffix in SUFFIXES:
            raise DataError(f"no such file: {str(path)!r}")
        if path.is_file():
            raise DataError(f"{str(path)!r} ends in {suffix or 'nothing'!r}; allowed: {', '.join(SUFFIXES)}")
        return _load_dataset(os.fspath(source), split, revision, streaming)
    if isinstance(source, Mapping) and split not in source:
        raise DataError(f"no split {split!r}; allowed: {', '.join(map(short_repr, source))}")
    rows = source[split] if isinstance(source, Mapping) else source
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, bytearray, type, Tensor)):
        raise DataError(f"a dataset cannot be a {type(rows).__name__}; allowed: a path, a hub name, a Dataset, dicts")
    return rows


def _load_dataset(name: str, split: str, revision: str | None, streaming: bool) -> Iterable[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
    # No such dataset, no such split, no network; a damaged folder raises errors of any kind.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DatasetsError) as error:
        raise DataError(f"cannot load the dataset {short_repr(name)}, split {split!r}: {error_line(error)}") from error
    return cast("Iterable[Any]", dataset)


def read_rows(source: Path | Iterable[Any], bad: BadRows) -> Iterator[NumberedRow]:
    """Yield the numbered rows of a source that :func:`find_source` returned."""
    if not isinstance(source, Path):
        yield from _numbered(source, bad)
        return
    suffix = source.suffix.lower()
    try:
        if suffix == ".csv":
            yield from _numbered(_csv_rows(source), bad)
        elif suffix == ".parquet":
            yield from _numbered(_parquet_rows(source), bad)
        elif suffix == ".json":
            yield from _json_rows(source, bad)
        else:
            yield from _jsonl_rows(source, bad)
    except UnicodeDecodeError as error:
        raise DataError(f"{str(source)!r} is not UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"{str(source)!r} cannot be read: {error}") from error


def _numbered(rows: Iterable[Any], bad: BadRows) -> Iterator[NumberedRow]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            yield number, row
            continue
        kind = type(row).__name__
        bad.reject(number, DataError(f"row {number} is a {kind} {short_repr(row, 60)}; allowed: a dict of columns"))


def _jsonl_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    with open(path, "rb") as file:  # as bytes: text would also end lines at a lone \r
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{str(path)!r}, row {number} is not UTF-8: {error}") from None
            if not text.strip():
                continue
            try:
                row = parse_json(text)
            except ValueError as error:  # also raised for an integer of too many digits
                what = f"not JSON: {error}; got {text[:60].rstrip()!r}"
            else:
                if isinstance(row, Mapping):
                    yield number, row
                    continue
                what = f"{text[:60].rstrip()!r}; allowed: a JSON object"
            bad.reject(number, DataError(f"{str(path)!r}, row {number}: {what}"))


def _json_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    """Read a list of objects; an object that holds one (``{"data": [...]}``); or, misnamed, one object a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            return _jsonl_rows(path, bad)
        raise DataError(f"{str(path)!r} is not JSON: {error}") from None
    if isinstance(value, Mapping):
        (name, content), *others = value.items() or [("", None)]
        is_row = others or name in ("messages", "conversations") or not isinstance(content, list)
        value = [value] if is_row else content
    if not isinstance(value, list):
        raise DataError(f"{str(path)!r} holds a {type(value).__name__}; allowed: a list of objects")
    return _numbered(value, bad)


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pandas  # comes with datasets

    try:
        with pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE) as tables:
            for table in tables:
                yield from table.to_dict("records")
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not a CSV table: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import ArrowException, parquet  # comes with datasets

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    # Not only Arrow's own errors: Python cannot hold all of its values (text that is not UTF-8, dates past 9999).
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError, ArrowException) as error:
        raise DataError(f"{str(path)!r} is not a Parquet table that can be read: {error_line(error)}") from None
