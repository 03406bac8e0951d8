"""Files that are there whole or not at all: written beside their place, on disk before they get their name."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, which refuses with a ValueError whatever it refuses."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The JSON of a file; OSError or ValueError where there is none."""
    return parse_json(path.read_bytes().decode("utf-8"))


def fsync(path: Path) -> None:
    """Return when a file's contents, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file, then give it the name ``path``. Until then what had the name before is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------
# Files of tensors from anyone: ``.safetensors``, and what ``torch.save`` wrote. Nothing in them is executed.
#
# Both readers return, or raise ValueError with the reason. What they return is as large as the file: a ``.pt`` may
# spell
# a tensor of 4 bytes as one of 64 GiB (strides of zero), or be a zip that unpacks to a thousand times its size.


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Key -> tensor, on the CPU, and the header's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # Rust's own class, torch's for a shape, OSError: one call, and all say the same
        raise ValueError(_first_line(error)) from error


def read_pickled(path: Path) -> Any:
    """What ``torch.save`` wrote: plain tensors, numbers, strings and containers of them, on the CPU."""
    _refuse_packed(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets damaged bytes, and code, with errors of many kinds
        raise ValueError(_first_line(error)) from error
    for tensor in _tensors(value):
        _refuse_larger_than_stored(tensor)
    return value


def _refuse_packed(path: Path) -> None:
    """torch.save packs nothing; a member that is packed may unpack to any size."""
    try:
        if not zipfile.is_zipfile(path):
            return  # torch's older format, or damage for torch.load to find
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(f"a damaged zip: {_first_line(error)}") from error
    size = path.stat().st_size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise ValueError(f"{member.filename!r} in it is compressed, which torch.save does not do")


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in nested containers, which may be nested to any depth."""
    found, seen, waiting = [], set(), [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (dict, list, tuple, set, frozenset)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return found


def _refuse_larger_than_stored(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout}, on {tensor.device}"
        raise ValueError(f"it holds a tensor that is {kind}; allowed: dense ones")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)} that is larger than its data")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:500] or type(error).__name__
