"""Files that are compressed with gzip, bzip2, xz or Zstandard, read as bytes; one that is damaged or cut raises."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files."""


def open_unpacked(path: Path, compression: str) -> Any:
    """Open a file for reading bytes, and unpack it on the way; ``compression`` is its ending, ``""`` for none."""
    if not compression:
        return path.open("rb")
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression in _DECOMPRESSORS:
        return io.BufferedReader(_Unpacked(path, _DECOMPRESSORS[compression]))
    import pyarrow  # comes with datasets

    if not pyarrow.Codec.is_available("zstd"):
        raise DataError(f"{str(path)!r}: this pyarrow cannot read .zst; unpack the file, or save it as .gz")
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


class _Unpacked(io.RawIOBase):
    """The contents of a file of one or more compressed parts, end to end.

    ``bz2.open`` and ``lzma.open`` take bytes after the first part that they cannot unpack for the end of the file.
    """

    def __init__(self, path: Path, decompressor: Callable[[], Any]) -> None:
        self._file, self._decompressor = path.open("rb"), decompressor
        self._part, self._packed, self._is_between = decompressor(), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._part.eof:
                self._packed, self._is_between = self._part.unused_data, True
                self._part = self._decompressor()
            if self._is_between:
                self._packed = self._packed.lstrip(b"\0")  # xz pads its parts
            if not self._packed and self._part.needs_input:
                self._packed = self._file.read(io.DEFAULT_BUFFER_SIZE)
                if self._packed:
                    continue
                if self._is_between:
                    return 0
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            data = self._part.decompress(self._packed, len(buffer))
            self._packed, self._is_between = b"", False
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


_DECOMPRESSORS: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}
