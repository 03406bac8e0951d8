"""Sources of rows: files, folders, patterns, hub datasets, tables and lists; and their splits."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..display import quiet_libraries
from ..errors import DataError, as_path, counted, error_line, first_of, home_path, is_hub_name, short_repr
from .compression import COMPRESSIONS
from .rows import (
    SUFFIXES,
    BadRows,
    NumberedRow,
    columnar_rows,
    count_rows,
    file_kind,
    is_columnar,
    is_table,
    package_of,
    read_rows,
)

logger = logging.getLogger("phi3lora")

_ALLOWED_FILES = f"{', '.join(SUFFIXES)}, each also with {', '.join(COMPRESSIONS)}"
# Names that datasets takes for its own readers. They would look for files everywhere under the working directory.
_READERS = {"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"}
_NO_DATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}  # descriptions of a dataset
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")
_PART = re.compile(r"\s*([^\[\]+]+?)\s*(\[[^\[\]]*\](?:\(\w+\))?)?\s*")  # of a split: a name, a slice
_NAMED = 8  # of the files in a message
_HUB_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True)
class Source:
    """Rows that are read, and may be cached, on their own."""

    rows: Any
    """A file's path, a ``datasets.Dataset``, a table or an iterable of dicts: what ``read_rows`` takes."""
    name: str
    """How messages call it: a path or hub name in quotes, or the type of an object: ``"(list)"``."""
    ranges: tuple[tuple[int, int], ...] | None = None
    """First and end position of each part that is used, counted from 0; None: everything."""

    def count(self) -> int | None:
        """Return the number of rows, if the source tells it without being read: a Dataset or a Parquet file."""
        if self.ranges is None and isinstance(self.rows, Path):
            return count_rows(self.rows)
        return len(self.rows) if self.ranges is None and _is_dataset(self.rows) else None

    def read(self, bad: BadRows, start: int = 0) -> Iterator[NumberedRow]:
        """Yield the rows with the numbers that they have in the whole source.

        ``start`` is the number of rows to leave out, of a source that tells its :meth:`count`.
        """
        if start and _is_dataset(self.rows):
            return replace(self, ranges=((start, len(self.rows)),)).read(bad)
        if self.ranges is None:
            return read_rows(self.rows, bad, start)
        if _is_dataset(self.rows):
            parts = ((start, self.rows.select(range(start, end))) for start, end in self.ranges)
            return ((start + number, row) for start, part in parts for number, row in read_rows(part, bad))
        rows = list(islice(read_rows(self.rows, bad), max(end for _, end in self.ranges)))
        return chain.from_iterable(rows[start:end] for start, end in self.ranges)


def find_sources(
    source: Any, split: str = "train", name: str | None = None, revision: str | None = None, streaming: bool = False
) -> list[Source]:
    """Return the sources of rows that ``source`` names, in their order. Arguments: ``ChatDataset.load``."""
    for option, value in (("split", split), ("name", "" if name is None else name)):
        if not isinstance(value, str):
            raise DataError(f"{option}={short_repr(value)}; allowed: a name")
    if _is_list_of_sources(source):
        several = []
        for position, item in enumerate(source, start=1):
            for found in find_sources(item, split, name, revision, streaming):
                is_object = found.name.startswith("(")
                several.append(replace(found, name=f"source {position} {found.name}") if is_object else found)
        return several
    text = home_path(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    what = short_repr(text) if text is not None else f"a {type(source).__name__}"
    try:
        if text is not None and _is_from_hub(text, split):
            return [Source(_load_dataset(text, split, name, revision, streaming), repr(text))]
        for option, given in (("name", name), ("revision", revision)):
            if given is not None:
                raise DataError(f"{option}={short_repr(given)} is for a dataset of the hub, and {what} is none")
        return _select(_splits_of(source, text, split), split, streaming)
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error}") from error


def origin_of(source: Any, **options: Any) -> dict[str, Any] | None:
    """Return arguments of ``ChatDataset.load`` that read the same again; None where a source is an object, not a name.

    Paths are made absolute.
    """
    names = list(source) if isinstance(source, (list, tuple)) else [source]
    if not names or not all(isinstance(name, (str, os.PathLike)) for name in names):
        return None
    texts = [home_path(os.fspath(name)) for name in names]
    paths = [os.path.abspath(text) if os.path.exists(text) or glob.has_magic(text) else text for text in texts]
    return {"source": paths if len(paths) > 1 else paths[0], **options}


def distinct_names(names: Iterable[str]) -> list[str]:
    """Return the names of several sources: of two lists, which are two sources, the second is ``"(list) 2"``.

    Two mentions of one path stay one source.
    """
    found: list[str] = []
    for name in names:
        is_object = name in found and not name.startswith(("'", '"'))
        numbered = (f"{name} {n}" for n in count(2))
        found.append(next(new for new in numbered if new not in found) if is_object else name)
    return found


@contextmanager
def naming(name: str, is_one_of_several: bool) -> Generator[None]:
    """Add a source's name to the errors about one of several sources."""
    try:
        yield
    except DataError as error:
        if not is_one_of_several or name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def _is_list_of_sources(source: Any) -> bool:
    return isinstance(source, (list, tuple)) and bool(source) and all(map(_is_source, source))


def _is_source(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike)) or package_of(item) == "datasets" or is_table(item)


def _is_from_hub(text: str, split: str) -> bool:
    """Return whether a text names a dataset of the hub, or a folder that is a copy of one with configurations."""
    if "://" in text:
        raise DataError(f"{short_repr(text)} is a URL; allowed: a local file or a name on the hub. Download it first")
    path = as_path(text, "a dataset", DataError)
    if not text.strip("./\\ \n"):
        raise DataError(
            f"a dataset cannot be {text!r}; allowed: a file or folder by its name, a pattern such as './*.jsonl', a "
            f"hub name"
        )
    if path.is_dir():
        return _has_configurations(path)
    if path.is_file() or file_kind(path)[0] in SUFFIXES or glob.has_magic(text):
        return False
    if not is_hub_name(text):
        raise DataError(
            f"cannot load {short_repr(text, 100)}, split {split!r}: no file or folder here, and no name on the hub "
            f"('name' or 'owner/name'); allowed: a path, a pattern such as 'data/*.jsonl', a hub name"
        )
    if text in _READERS:
        raise DataError(f"{text!r} is a kind of file, not a dataset; allowed: the path of a file, or a hub name")
    return True


def _has_configurations(folder: Path) -> bool:
    """Return whether a README.md opens with YAML that has ``configs:``, which says what the folder's files are."""
    card = folder / "README.md"
    if not card.is_file() or (folder / "state.json").is_file():
        return False
    opening = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return opening is not None and re.search(r"^configs:", opening[1], re.MULTILINE) is not None


def _load_dataset(path: str, split: str, name: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    if streaming:
        _check_unsliced(split)
    config = {} if name is None else {"name": name}
    try:
        with quiet_libraries():
            return datasets.load_dataset(path, **config, split=split, revision=revision, streaming=streaming)
    # No such dataset, no such split, no network; a damaged folder raises errors of any kind.
    except (*_HUB_ERRORS, DatasetsError) as error:
        why = error_line(error)
        if "config" in str(error).lower():
            why += _configurations(path, revision)
        raise DataError(f"cannot load the dataset {short_repr(path)}, split {split!r}: {why}") from error


def _configurations(path: str, revision: str | None) -> str:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        names = datasets.get_dataset_config_names(path, revision=revision)
    except (*_HUB_ERRORS, DatasetsError) as error:
        return f" (its configurations cannot be listed: {error_line(error)})"
    return f"; choose a configuration with name=: {', '.join(map(short_repr, names))}"


# Splits. A source without splits has the single split None.


def _splits_of(source: Any, text: str | None, split: str) -> dict[str | None, Any]:
    """Return what each split of a local source holds: a ``Source`` for each file, or rows, or a source's name."""
    if text is not None:
        path = Path(text)
        if path.is_dir():
            return _splits_of_folder(path)
        if path.is_file():
            if file_kind(path)[0] not in SUFFIXES:
                ending = f"ends in {path.suffix!r}" if path.suffix else "has no file ending"
                raise DataError(f"{str(path)!r} {ending}; allowed: {_ALLOWED_FILES}")
            return {None: [_file(path)]}
        if not glob.has_magic(text):
            raise DataError(f"no such file: {text!r}")
        matches = sorted(glob.glob(text, recursive=True), key=lambda name: (len(Path(name).parts), name))
        files = {os.path.realpath(name): Path(name) for name in reversed(matches) if os.path.isfile(name)}
        if (others := sum(map(os.path.isfile, matches)) - len(files)) > 0:
            logger.info("the pattern %r finds %s again through links; each is read once", text, counted(others, "file"))
        return {None: list(map(_file, _readable(f"the pattern {text!r}", list(files.values()))))}
    if not isinstance(source, Mapping):
        return {None: source}
    is_table_of_rows = is_columnar(source) and split.partition("[")[0] not in source
    try:
        return {None: columnar_rows(source)} if is_table_of_rows else dict(source)
    except DataError as error:
        raise DataError(f"the dict {error}") from None


def _file(path: Path) -> Source:
    return Source(path, repr(str(path)))


def _readable(what: str, files: list[Path]) -> list[Path]:
    """Return the data files in sorted order. If there are none, raise an error that names what was found."""
    kinds = {path: file_kind(path)[0] in SUFFIXES and path.name not in _NO_DATA for path in files}
    readable = sorted(path for path in files if kinds[path] and path.is_file())
    others = sorted(f"{path.name}/" if path.is_dir() else path.name for path in set(files).difference(readable))
    listed = first_of([*map(repr, others)], _NAMED)
    if not readable:
        raise DataError(
            f"{what} has no file that can be read; found: {listed or 'nothing'}; allowed: {_ALLOWED_FILES}; files in "
            f"other folders by a pattern such as 'folder/**/*.jsonl'"
        )
    if others:
        logger.info("%s has %s of rows, and others that are not read: %s", what, counted(len(readable), "file"), listed)
    return readable


def _splits_of_folder(folder: Path) -> dict[str | None, Any]:
    """Return the splits that ``save_to_disk`` wrote; or the data files by the split that their names say.

    Files count that are in the folder itself, in its folder "data", and in folders named after a split: the layout of
    datasets on the hub. Without a split in any name, all files are the one split None.
    """
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        import datasets
        from pyarrow import ArrowException

        try:
            stored = datasets.load_from_disk(str(folder))
        except (*_HUB_ERRORS, ArrowException) as error:
            raise DataError(f"{str(folder)!r} is not what save_to_disk wrote: {error_line(error)}") from error
        return dict(stored) if isinstance(stored, dict) else {None: stored}
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    named = [path for path in inside if path.name.lower() in ("data", *_SPLIT_WORDS) and path.is_dir()]
    inside = [path for path in inside if path not in named]
    inside += [path for folder in named for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    splits: dict[str | None, Any] = {}
    for path in _readable(f"the folder {str(folder)!r}", inside):
        splits.setdefault(_split_in_name(path.relative_to(folder)), []).append(_file(path))
    if len(splits) > 1 and None in splits:  # files beside those of the splits
        splits["train"] = splits.pop(None) + splits.get("train", [])
    if len(splits) > 1:
        listed = "; ".join(f"{name!r}: {first_of([s.name for s in files], _NAMED)}" for name, files in splits.items())
        logger.info("the folder %r has several splits, by the names of its files: %s", str(folder), listed)
    return splits


def _split_in_name(path: Path) -> str | None:
    """Return the split that a file's name or folder says: "test" for ``test/a.jsonl``, ``my-eval.csv``."""
    shard = _SHARD.match(path.name) if path.parent.name == "data" else None
    if shard:  # data/train_sft-00000-of-00002.parquet
        return shard[1]
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _check_unsliced(split: str) -> None:
    if "[" in split:
        raise DataError(
            f"split={short_repr(split)} of a stream, whose length is not known; allowed: the name of a split. "
            f"take(100) and skip(100) set the first rows aside"
        )


def _select(splits: dict[str | None, Any], split: str, streaming: bool) -> list[Source]:
    """Return the sources of the split or splits that ``split`` asks for: ``"train"``, ``"train[:10%]+test"``."""
    if streaming:
        _check_unsliced(split)
    named: dict[str, Any] = {"train" if key is None else key: rows for key, rows in splits.items()}
    if split in named:
        slices: dict[str, list[str]] = {split: [""]}
    elif split == "all":
        slices = {key: [""] for key in named}
    else:
        slices = {}
        for part in split.split("+"):
            match = _PART.fullmatch(part)
            if match is None or match[1] not in named:
                raise DataError(_no_split(split, match[1] if match else part, splits, streaming))
            slices.setdefault(match[1], []).append(match[2] or "")
    allowed = _allowed_splits(splits, streaming)
    several = [_slice(_sources_of(named[key]), parts, split, allowed) for key, parts in slices.items()]
    if len(slices) > 1:
        several = [
            [replace(source, name=f"{source.name}, split {key!r}") for source in sources]
            for key, sources in zip(slices, several, strict=True)
        ]
    return list(chain.from_iterable(several))


def _no_split(split: str, name: str, splits: dict[str | None, Any], streaming: bool) -> str:
    within = f"(split={short_repr(split)})"
    if any(map(_holds_turns, splits.values())):
        keys = first_of([*map(short_repr, splits)])
        return f"no split {short_repr(name)} {within}: the keys {keys} are a row's. A single row goes into a list"
    if name == "all":
        why = f"no part or sum of 'all' {within}"
    else:
        why = f"no split {short_repr(name)} {within}" + (": the source has no splits" if None in splits else "")
    is_row = not all(
        isinstance(rows, (Iterable, os.PathLike)) and not isinstance(rows, str) for rows in splits.values()
    )
    hint = ". A single row goes into a list" if is_row else ""
    return f"{why}; allowed: {_allowed_splits(splits, streaming)}{hint}"


def _holds_turns(rows: Any) -> bool:
    first = rows[0] if isinstance(rows, list) and rows else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _allowed_splits(splits: dict[str | None, Any], streaming: bool) -> str:
    """Return what ``split`` may be for a source with these splits, in words."""
    names = ["train" if key is None else key for key in splits]
    listed = first_of([*map(short_repr, names)], 20) or "none"
    if None in splits:
        listed += " (all of it)"
    sums = "" if streaming and len(names) < 2 else ", sums of these with +"
    parts = "".join(f", parts such as '{name}[:100]' or '{name}[10%:20%]'" for name in names[:1] if not streaming)
    return f"{listed}{parts}{sums}, or 'all' alone"


def _sources_of(rows: Any) -> list[Source]:
    """Return the sources in what a split holds."""
    if isinstance(rows, list) and rows and isinstance(rows[0], Source):
        return rows
    if isinstance(rows, (str, os.PathLike)) or _is_list_of_sources(rows):
        return find_sources(rows)
    kind = type(rows).__name__
    is_rows = isinstance(rows, Iterable) and not isinstance(rows, (bytes, bytearray, type, Tensor))
    if not is_rows and not is_table(rows):
        raise DataError(f"a dataset cannot be a {kind}; allowed: a path, a hub name, a Dataset, a DataFrame, dicts")
    return [Source(rows, f"({kind})")]


def _slice(sources: list[Source], parts: list[str], split: str, allowed: str) -> list[Source]:
    """Return the parts of the sources that ``parts`` (``["[:50%]", "[90%:]"]``) asks for, of all of their rows."""
    if parts == [""]:
        return sources
    import datasets

    sources = [replace(s, rows=list(s.rows)) if isinstance(s.rows, Iterator) else s for s in sources]
    sizes = [_count(source.rows) for source in sources]
    try:
        instruction = datasets.ReadInstruction.from_spec("+".join(f"rows{part}" for part in parts))
        absolute = instruction.to_absolute({"rows": sum(sizes)})
    except (ValueError, AssertionError, LookupError) as error:
        why = error_line(error).replace("rows[", "[")
        raise DataError(f"split={split!r}: {why}; allowed: {allowed}") from None
    ranges = [(part.from_, part.to) for part in absolute if part.from_ < part.to]
    if not ranges:
        raise DataError(f"split={split!r} leaves nothing of {sum(sizes)} rows")
    chosen, first = [], 0
    for source, size in zip(sources, sizes, strict=True):
        inside = [(max(start - first, 0), min(end - first, size)) for start, end in ranges]
        if kept := tuple((start, end) for start, end in inside if start < end):
            chosen.append(replace(source, ranges=kept))
        first += size
    return chosen


def _count(rows: Any) -> int:
    return len(rows) if _is_dataset(rows) else sum(1 for _ in read_rows(rows, BadRows("skip")))


def _is_dataset(rows: Any) -> bool:
    """Return whether rows are a ``datasets.Dataset``, which knows its length and selects rows without reading them."""
    return package_of(rows) == "datasets" and hasattr(rows, "select") and hasattr(rows, "__len__")
