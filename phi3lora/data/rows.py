"""Numbered rows of one file, table, ``datasets.Dataset`` or list of dicts; and what happens to bad ones.

A row is a dict of Python's own values. NaN, ``pandas.NA`` and NaT are None in it, and numpy's arrays are lists.
"""

from __future__ import annotations

import bisect
import csv
import io
import logging
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from json import JSONDecodeError
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError, counted, error_line, first_of, short_repr
from ..files import parse_json
from .compression import COMPRESSIONS, open_unpacked

logger = logging.getLogger("phi3lora")

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row with its number. Rows count from 1; in a .jsonl file the number is the line's."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")

_ROWS_AT_ONCE = 1000  # of a table
_ROWS_IN_PYTHON = 100  # of those, made Python objects at a time
_QUOTED_ERRORS = 3
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV cell, the most that every platform takes; Python's default is 131,072
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# Damaged files, and values that Python cannot hold: text that is not UTF-8, dates past 9999.
_TABLE_ERRORS = (OSError, LookupError, TypeError, ValueError, ArithmeticError, MemoryError)
_IN_A_ROW = ("messages", "conversations", "history", "tools", "functions")  # columns whose objects are not rows
_PYTHON_TYPES = frozenset({str, int, bool, type(None), bytes})


class BadRows:
    """Rows that cannot be trained on. With ``"error"`` the first one raises, with ``"skip"`` they are left out."""

    def __init__(self, choice: str) -> None:
        if choice not in ("error", "skip"):
            raise DataError(f"on_bad_row={short_repr(choice)}; allowed: 'error', 'skip'")
        self.choice, self.skips = choice, choice == "skip"
        self.numbers: list[int] = []
        self._first: list[tuple[int, DataError]] = []  # the errors to quote, with their rows' numbers, in order

    @property
    def errors(self) -> list[DataError]:
        """Errors of the first rows."""
        return [error for _, error in self._first]

    def reject(self, number: int, error: DataError) -> None:
        """Raise ``error``, or record row ``number`` (counted from 1) as skipped."""
        if not self.skips:
            raise error
        self._record([number], [(number, error)])

    def add(self, others: BadRows) -> None:
        """Record the rows that another process has skipped."""
        self._record(others.numbers, others._first)

    def _record(self, numbers: list[int], errors: list[tuple[int, DataError]]) -> None:
        self.numbers += numbers
        self._first = sorted([*self._first, *errors], key=itemgetter(0))[:_QUOTED_ERRORS]

    def clear(self) -> None:
        self.numbers, self._first = [], []

    def report(self) -> None:
        """Log one warning for all skipped rows."""
        if self.numbers:
            rest = len(self.numbers) - len(self.errors)
            more = f"; and {rest} more" if rest else ""
            logger.warning(
                "%s skipped: %s%s", counted(len(self.numbers), "bad row"), "; ".join(map(str, self.errors)), more
            )


def file_kind(path: Path) -> tuple[str, str]:
    """Return the endings that say how a file is read: one of :data:`SUFFIXES` (or another), and of the compression."""
    name = path.name.lower()
    compression = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    return os.path.splitext(name.removesuffix(compression))[1], compression


def package_of(value: Any) -> str:
    """Return the name of the package that a value's class is from, which need not be imported to ask."""
    return type(value).__module__.partition(".")[0]


def is_table(value: Any) -> bool:
    """Return whether a value is a DataFrame or an Arrow table, of any library."""
    if package_of(value) == "pandas":  # whose Series give an Arrow stream, too, of values and not of rows
        return type(value).__name__ == "DataFrame"
    return hasattr(value, "__arrow_c_stream__") and not isinstance(value, type)


def read_rows(source: Any, bad: BadRows, start: int = 0) -> Iterator[NumberedRow]:
    """Return the numbered rows of a file (a ``Path``), table, ``datasets.Dataset`` or iterable of dicts.

    ``start`` is the number of rows to leave out, of a Parquet file, whose groups of rows are then not read.
    """
    if isinstance(source, Path):
        return _file_rows(source, bad, start)
    if package_of(source) == "datasets":
        return _numbered(_without_format(source), bad)
    if is_table(source):
        return _numbered(_frame_rows(source) if package_of(source) == "pandas" else _arrow_rows(source), bad)
    return _numbered(source, bad)


def count_rows(path: Path) -> int | None:
    """Return the number of rows of a Parquet file, which it tells without being read; None for other files."""
    if file_kind(path) != (".parquet", ""):
        return None
    from pyarrow import ArrowException, parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (*_TABLE_ERRORS, ArrowException):
        return None  # reading it says what is wrong


def _file_rows(path: Path, bad: BadRows, start: int) -> Iterator[NumberedRow]:
    suffix, _ = file_kind(path)
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",", bad)
        elif suffix == ".parquet":
            yield from _numbered(_parquet_rows(path, start), bad, first=start + 1)
        elif suffix == ".arrow":
            yield from _numbered(_arrow_file_rows(path), bad)
        elif suffix == ".json":
            yield from _json_rows(path, bad)
        else:
            yield from _jsonl_rows(path, bad)
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{str(path)!r}", error) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error_line(error)}") from error


def _open(path: Path) -> Any:
    """Open a file of text, and unpack it on the way. One in UTF-16 or UTF-32 is refused."""
    file = open_unpacked(path, file_kind(path)[1])
    start = file.peek(4)[:4]
    wide = "UTF-32" if start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff") else "UTF-16"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        file.close()
        raise DataError(
            f"{str(path)!r} looks like {wide}, it starts with the bytes {start!r}; allowed: UTF-8. Save it as UTF-8"
        )
    return file


def _not_utf8(what: str, error: UnicodeDecodeError) -> DataError:
    """Return an error that names the encoding that the bytes look like."""
    near = error.object[max(0, error.start - 10) : error.start + 10].decode("cp1252", "replace")
    is_text = near.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable() and "\ufffd" not in near
    looks = f"; it looks like Latin-1 (Windows-1252), where it reads {near!r}" if is_text else ""
    return DataError(f"{what} is not UTF-8: {error}{looks}. Save the file as UTF-8")


def plain(value: Any) -> Any:
    """Return a cell's value in Python's own types, at any depth. No value (NaN, ``pandas.NA``, NaT) is None."""
    kind = type(value)
    if kind in _PYTHON_TYPES:
        return value
    if kind is float:
        return value if value == value else None
    if isinstance(value, Mapping):
        return {key: item if type(item) is str else plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return plain(value.tolist())
    if kind.__name__ in ("NAType", "NaTType"):  # of pandas, which is not imported for this
        return None
    if package_of(value) == "pyarrow" and hasattr(value, "as_py"):
        return plain(value.as_py())
    return value


def _numbered(rows: Iterable[Any], bad: BadRows, is_plain: bool = False, first: int = 1) -> Iterator[NumberedRow]:
    for number, row in enumerate(rows, start=first):
        if isinstance(row, Mapping):
            try:
                values = row if is_plain else plain(row)
            except RecursionError:
                bad.reject(number, DataError(f"row {number} is nested too deeply"))
                continue
            yield number, values
            continue
        kind = type(row).__name__
        bad.reject(number, DataError(f"row {number} is a {kind} {short_repr(row, 60)}; allowed: a dict of columns"))


def _jsonl_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    with _open(path) as file:  # as bytes: text would also end lines at a lone \r
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{str(path)!r}, row {number}", error) from None
            if not text.strip():
                continue
            try:
                row = parse_json(text)
                row = plain(row) if "NaN" in text else row
            except (ValueError, RecursionError) as error:  # also raised for an integer of too many digits
                at, found = 0, str(error)
                if isinstance(error, JSONDecodeError):
                    at, found = error.pos, f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
                what = f"not JSON: {found}; got {text[max(at - 40, 0) : at + 60].strip()!r}"
            else:
                if isinstance(row, Mapping):
                    yield number, row
                    continue
                what = f"{text[:60].rstrip()!r}"
            allowed = "a JSON object on each line (a list of rows goes into a .json file)"
            bad.reject(number, DataError(f"{str(path)!r}, row {number}: {what}; allowed: {allowed}"))


def _json_rows(path: Path, bad: BadRows) -> Iterator[NumberedRow]:
    """Read the forms of :func:`_rows_in`; or, misnamed, one object a line."""
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        value = parse_json(text)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            return _jsonl_rows(path, bad)
        raise DataError(f"{str(path)!r} is not JSON: {error}") from None
    try:
        rows = _rows_in(value)
    except DataError as error:
        raise DataError(f"{str(path)!r} {error}") from None
    if isinstance(value, Mapping) and any(item is rows for item in value.values()) and len(value) > 1:
        others = [short_repr(key, 40) for key, item in value.items() if item is not rows]
        logger.info("%r: only its list of rows is read; its other keys are not used: %s", str(path), first_of(others))
    return _numbered(rows, bad, is_plain="NaN" not in text)


def _rows_in(value: Any) -> list[Any]:
    """Return the rows in a JSON value.

    [row, ...]                                            a list of rows
    {"data": [row, ...], "version": ...}                  an object that holds one list of rows, also of "table" form
    {"prompt": [...], "completion": [...]}                columns
    {"prompt": {"0": ...}, "completion": {"0": ...}}      what DataFrame.to_json writes: "columns"
    {"0": row, "1": row}, {"columns": [...], "data": ...} its "index" and "split"
    row                                                   a single row
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise DataError(f"holds a {type(value).__name__}; allowed: a list of objects")
    held = {key: item for key, item in value.items() if key not in _IN_A_ROW and _is_list_of_rows(item)}
    if len(held) == 1:
        rows: list[Any] = held.popitem()[1]
        return rows
    if held:
        raise DataError(
            f"holds several lists of objects: {', '.join(map(short_repr, held))}; allowed: one list per file"
        )
    names, cells = value.get("columns"), value.get("data")
    if isinstance(names, list) and isinstance(cells, list) and value.keys() <= {"columns", "data", "index"}:
        if not all(isinstance(row, list) and len(row) == len(names) for row in cells):
            raise DataError(f"holds rows that are not lists of {len(names)} values, one for each of its 'columns'")
        return [dict(zip(map(str, names), row, strict=True)) for row in cells]
    if is_columnar(value):
        return columnar_rows(value)
    if value and all(isinstance(item, Mapping) for item in value.values()):
        first, *others = value.values()
        if first and all(key.isdigit() for key in first) and all(item.keys() == first.keys() for item in others):
            return [{name: column[key] for name, column in value.items()} for key in first]
        return list(value.values())
    only = next(iter(value.values())) if len(value) == 1 else None
    return only if only == [] else [value]


def _is_list_of_rows(value: Any) -> bool:
    """Return whether a value is a list of objects that are rows, not the messages of a chat."""
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        return False
    return "role" not in value[0] and "from" not in value[0]


def is_columnar(value: Mapping[Any, Any]) -> bool:
    """Return whether a dict holds columns, lists of cells, and not one row. Messages (dicts) are no cells."""
    columns = list(value.values())
    return bool(columns) and all(
        isinstance(column, (list, np.ndarray)) and len(column) and not isinstance(column[0], Mapping)
        for column in columns
    )


def columnar_rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of columns of equal length."""
    if len(set(map(len, columns.values()))) > 1:
        lengths = ", ".join(f"{short_repr(name, 40)} {len(column)}" for name, column in columns.items())
        raise DataError(f"holds columns of different lengths: {lengths}; allowed: equal ones")
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _csv_rows(path: Path, separator: str, bad: BadRows) -> Iterator[NumberedRow]:
    """Yield rows of text cells. Python's parser, unlike pandas', never shifts a row that has a field too many."""
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            filled = (fields for fields in lines if fields and not (len(fields) == 1 and fields[0].isspace()))
            names = _column_names(path, next(filled, []), separator)
            for number, fields in enumerate(filled, start=1):
                if len(fields) == len(names):
                    yield number, dict(zip(names, fields, strict=True))
                else:
                    bad.reject(number, _field_count_error(path, number, fields, names, separator))
        except csv.Error as error:  # nothing after it can be trusted to start where a row starts
            raise DataError(
                f"{str(path)!r} is not a CSV table: {error} (line {lines.line_num}); allowed: a field with quotes or "
                f'line breaks in double quotes, a quote inside it doubled: "say ""hi"""'
            ) from None


def _column_names(path: Path, header: list[str], separator: str) -> list[str]:
    other = next((mark for mark in _SEPARATORS if mark != separator and len(header) == 1 and mark in header[0]), None)
    if other:
        raise DataError(
            f"{str(path)!r} has one column, {short_repr(header[0], 60)}: its fields are separated by "
            f"{_SEPARATORS[other]}; allowed: {_SEPARATORS[separator]} (.csv: commas, .tsv: tabs)"
        )
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]  # as pandas names them
    _check_unique(str(path), names)
    return names


def _check_unique(what: str, names: Iterable[Any]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{what!r} has several columns of the name {short_repr(twice[0], 60)}; allowed: one each")


def _field_count_error(path: Path, number: int, fields: list[str], names: list[str], separator: str) -> DataError:
    mark = _SEPARATORS[separator].removesuffix("s")
    if len(fields) < len(names):
        cause = "a field is missing, or an unquoted line break cut the row"
    elif fields[len(names) :] == [""] * (len(fields) - len(names)):
        cause = f"the line ends in a {mark}"
    else:
        cause = f"an unquoted {mark} in a field"
    return DataError(
        f"{str(path)!r}, row {number}: {len(fields)} fields, the header has {len(names)} "
        f"({short_repr(separator.join(names), 60)}): {cause}? Allowed: as many as the header; a field with a {mark} "
        f"or line break in double quotes. Got {short_repr(separator.join(fields), 60)}"
    )


def _without_format(dataset: Any) -> Any:
    """Return a ``datasets.Dataset`` whose rows are Python's values, with the columns that its format shows."""
    format = getattr(dataset, "format", None)
    if not isinstance(format, dict) or format["type"] in (None, "custom"):
        return dataset
    return dataset.with_format(None, columns=format["columns"])


def _frame_rows(frame: Any) -> Iterator[Mapping[str, Any]]:
    if any(name is not None for name in frame.index.names):  # a named index is a column that was set aside
        try:
            frame = frame.reset_index()
        except ValueError as error:
            raise DataError(f"the DataFrame's index cannot become a column: {error_line(error)}") from None
    _check_unique("the DataFrame", frame.columns)
    for start in range(0, len(frame), _ROWS_AT_ONCE):
        yield from frame.iloc[start : start + _ROWS_AT_ONCE].to_dict("records")


def _arrow_rows(table: Any, what: str = "the table") -> Iterator[Mapping[str, Any]]:
    """Yield the rows of anything that gives an Arrow stream: a table of pyarrow, polars or duckdb."""
    from pyarrow import RecordBatchReader  # comes with datasets

    with _named_errors(what, "an Arrow table"):
        reader = table if isinstance(table, RecordBatchReader) else RecordBatchReader.from_stream(table)
        _check_unique(what, reader.schema.names)
        for batch in reader:
            batch.validate(full=True)  # offsets in a damaged file may point anywhere
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()


@contextmanager
def _named_errors(what: str, kind: str) -> Iterator[None]:
    """Raise a ``DataError`` that names the table for any error of Arrow's readers."""
    from pyarrow import ArrowException

    try:
        yield
    except DataError:
        raise
    except (*_TABLE_ERRORS, ArrowException) as error:
        raise DataError(f"{what!r} is not {kind} that can be read: {error_line(error)}") from None


def _table_bytes(path: Path) -> Any:
    """Return a file for Arrow: mapped into memory, or unpacked."""
    import pyarrow

    if not file_kind(path)[1]:
        return pyarrow.memory_map(str(path))
    with open_unpacked(path, file_kind(path)[1]) as file:
        return pyarrow.BufferReader(file.read())


def _arrow_file_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read both of Arrow's formats: the stream, which ``datasets`` writes, and the file."""
    from pyarrow import RecordBatchReader, ipc

    with _named_errors(str(path), "an Arrow table"), _table_bytes(path) as file:
        is_stream = file.read(6) != b"ARROW1"
        file.seek(0)
        if is_stream:
            table = ipc.open_stream(file)
        else:
            stored = ipc.open_file(file)
            batches = (stored.get_batch(i) for i in range(stored.num_record_batches))
            table = RecordBatchReader.from_batches(stored.schema, batches)
        yield from _arrow_rows(table, str(path))


def _parquet_rows(path: Path, start: int) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet, types

    with _named_errors(str(path), "a Parquet table"):
        source = _table_bytes(path)
        with parquet.ParquetFile(source) as file:
            schema = file.schema_arrow
        # A text that a kilobyte repeats in every row is in memory once, and in the rows of one part.
        texts = [field.name for field in schema if types.is_string(field.type) or types.is_binary(field.type)]
        with parquet.ParquetFile(source, read_dictionary=texts) as file:
            _check_unique(str(path), schema.names)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(accumulate(sizes))
            first = bisect.bisect_right(ends, start)
            left_out = start - sum(sizes[:first])
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=range(first, len(sizes))):
                for at in range(min(left_out, len(batch)), len(batch), _ROWS_IN_PYTHON):
                    yield from batch.slice(at, _ROWS_IN_PYTHON).to_pylist()
                left_out = max(0, left_out - len(batch))
