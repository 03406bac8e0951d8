"""File reading and writing: atomic writes, checksums, JSON, and tensors from a file of unknown origin.

Every reader returns the value, or raises OSError or ValueError with the reason. Nothing in a file is executed, and what
comes back is never larger than the file: a ``.pt`` may describe a tensor of 4 bytes as one of 64 GiB (strides of zero),
or be a zip that unpacks to a thousand times its size.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import error_line


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path and rename the result to ``path`` once it is on disk.

    If anything fails, the file that had this name before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal, reading 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Return ``json.loads(text)``; every refusal is a ValueError, also of text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Return the JSON value in a UTF-8 file."""
    return parse_json(path.read_bytes().decode("utf-8"))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a ``.safetensors`` file or of a pickled dict, on the CPU, and the header's metadata."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except Exception as error:  # OSError, torch's errors for a shape, and a class of the Rust library's own
            raise ValueError(error_line(error)) from error
    tensors = read_pickled(path)
    is_dict = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not (is_dict and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise ValueError("it does not hold a dict of tensors")
    return tensors, {}


def read_pickled(path: Path) -> Any:
    """Return what ``torch.save`` wrote: tensors, numbers, strings and containers of them, on the CPU."""
    try:
        if zipfile.is_zipfile(path):  # else torch's older format, or damage that torch.load reports
            _check_zip(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and the unpickler raise errors of many kinds for damaged bytes
        raise ValueError(error_line(error)) from error
    for tensor in _tensors_in(value):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"it holds a tensor that is {kind}; allowed: dense ones on the CPU")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)} that is larger than its data")
    return value


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
                raise ValueError(f"{member.filename!r} in it is compressed, which torch.save does not do")


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested containers, without recursion: a file may nest them to any depth."""
    seen, stack = set(), [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)
