"""Where rows come from: a file, a hub name, a ``datasets.Dataset``, a list of dicts -> numbered rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError, as_path, error_line, is_one_of, is_text, short_repr
from ..files import parse_json

NumberedRow = tuple[int, Mapping[str, Any]]  # rows count from 1; in a .jsonl file the number is the line's

_ROWS_AT_ONCE = 1000

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def find_source(
    source: Any, split: str = "train", revision: str | None = None, streaming: bool = False
) -> Path | Iterable[Any]:
    """What ``source`` names: a file, or something to take rows from.

    Args:
        source: a path ending in one of :data:`SUFFIXES`, a folder or hub name for ``datasets``, a ``Dataset`` or
            ``DatasetDict``, or an iterable of dicts.
        split: of a hub dataset or a ``DatasetDict``.
        revision: of a hub dataset.
        streaming: a hub dataset is read over the network as its rows are asked for.

    Raises:
        DataError: a missing file, a dataset that cannot be loaded, something that holds no rows.
    """
    if not is_text(split):
        raise DataError(f"split={short_repr(split)}; allowed: a name")
    if isinstance(source, (str, os.PathLike)):
        as_path(source, "a dataset", DataError)
        return _find_named(os.fspath(source), split, revision, streaming)
    if isinstance(source, Mapping) and split not in source:
        raise DataError(f"no split {split!r}; allowed: {', '.join(map(short_repr, source))}")
    rows = source[split] if isinstance(source, Mapping) else source
    if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, bytearray, type, Tensor)):
        raise DataError(f"a dataset cannot be a {type(rows).__name__}; allowed: a path, a hub name, a Dataset, dicts")
    return rows


def _find_named(name: str, split: str, revision: str | None, streaming: bool) -> Path | Iterable[Any]:
    path = Path(name)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"no such file: {name!r}")
        return path
    if path.is_file():
        raise DataError(f"{name!r} ends in {suffix or 'nothing'!r}; allowed: {', '.join(SUFFIXES)}")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
    # Not found, no such split, no network: datasets says which, of a damaged folder in errors of any kind.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, DatasetsError) as error:
        raise DataError(f"cannot load the dataset {short_repr(name)}, split {split!r}: {error_line(error)}") from error


def read_rows(found: Path | Iterable[Any], bad: BadRows | None = None) -> Iterator[NumberedRow]:
    """Rows of what :func:`find_source` found, with their numbers.

    Args:
        found: the source.
        bad: what happens to a row that is not JSON or not a dict; None: it is an error.

    Raises:
        DataError: text that is not JSON or not UTF-8 (with its line), a row that is not a dict.
    """
    bad = bad or BadRows("error")
    if not isinstance(found, Path):
        return _numbered(found, bad)
    suffix = found.suffix.lower()
    if suffix in (".csv", ".parquet"):
        return _numbered(_csv_rows(found) if suffix == ".csv" else _parquet_rows(found), bad)
    return (_json_rows if suffix == ".json" else _jsonl_rows)(found, bad)


def _numbered(rows: Iterable[Any], bad: BadRows) -> Iterator[NumberedRow]:
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            yield number, row
            continue
        kind = type(row).__name__
        bad.met(number, DataError(f"row {number} is a {kind} {short_repr(row, 60)}; allowed: a dict of columns"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int = 0) -> DataError:
    at = f"byte {before + error.start} is {error.object[error.start]:#04x}"
    return DataError(f"{str(path)!r} is not UTF-8: {at}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, as they are asked for."""
    before = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _not_utf8(path, error, before) from None
                before += len(line)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error


def _jsonl_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:  # also: an integer of too many digits
            what = DataError(f"{str(path)!r}, row {number}: not JSON: {error}; got {line[:60].rstrip()!r}")
        else:
            if isinstance(row, Mapping):
                yield number, row
                continue
            what = DataError(f"{str(path)!r}, row {number}: {line[:60].rstrip()!r}; allowed: a JSON object")
        bad.met(number, what)


def _json_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    """A list of objects; an object that holds one (``{"data": [...]}``); or, misnamed, one object a line."""
    text = _text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            return _jsonl_rows(path, bad)
        raise DataError(f"{str(path)!r} is not JSON: {error}") from None
    if isinstance(value, Mapping):
        (name, held), *others = value.items() or [("", None)]
        is_row = others or name in ("messages", "conversations") or not isinstance(held, list)
        value = [value] if is_row else held
    if not isinstance(value, list):
        raise DataError(f"{str(path)!r} holds a {type(value).__name__}; allowed: a list of objects")
    return _numbered(value, bad)


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pandas  # comes with datasets

    try:
        with pandas.read_csv(path, dtype=str, keep_default_na=False, chunksize=_ROWS_AT_ONCE) as tables:
            for table in tables:
                yield from table.to_dict("records")
    except (OSError, ValueError, pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise DataError(f"{str(path)!r} is not a CSV table: {error}") from None


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow  # comes with datasets
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
    # Beside Arrow's own: what its values are not as Python's (text that is not UTF-8, dates past the year 9999).
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError, pyarrow.ArrowException) as error:
        raise DataError(f"{str(path)!r} is not a Parquet table that can be read: {error_line(error)}") from None


# ----------------------------------------------------------------------------------------------------
# Rows that cannot be trained on: the first is an error, or each is passed over and counted.

logger = logging.getLogger("phi3lora")

ON_BAD_ROW = ("error", "skip")
_SHOWN = 3


class BadRows:
    """What ``ChatDataset.load(on_bad_row=...)`` does with a row that raises a ``DataError``."""

    def __init__(self, choice: str) -> None:
        if not is_one_of(choice, ON_BAD_ROW):
            raise DataError(f"on_bad_row={short_repr(choice)}; allowed: {', '.join(map(repr, ON_BAD_ROW))}")
        self.skips = choice == "skip"
        self.numbers: list[int] = []
        self.errors: list[DataError] = []

    def met(self, number: int, error: DataError) -> None:
        """Raise ``error``, or remember row ``number`` (counted from 1) and go on."""
        if not self.skips:
            raise error
        self.numbers.append(number)
        if len(self.errors) < _SHOWN:
            self.errors.append(error)

    def forget(self) -> None:
        """Begin a new account."""
        self.numbers, self.errors = [], []

    def report(self) -> None:
        """One warning for all that were passed over."""
        if self.numbers:
            more = f"; and {len(self.numbers) - _SHOWN} more" if len(self.numbers) > _SHOWN else ""
            logger.warning("%d bad rows skipped: %s%s", len(self.numbers), "; ".join(map(str, self.errors)), more)
