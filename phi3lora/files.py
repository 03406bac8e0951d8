"""File reading and writing: atomic writes of files and folders, checksums, JSON, and tensors from untrusted files.

Every reader returns the value, or raises OSError or ValueError with the reason. It reads a file's bytes once, executes
nothing in them, and builds nothing that is larger than the file.

A ``.pt`` is a zip archive of a pickle (``data.pkl``) and of one member with raw numbers for each storage
(``data/0``, ...). ``torch.load`` trusts the pickle on sizes: a storage of 4 bytes may be described as one of 64 GiB,
or one without data as whatever the process had freed there. So :func:`read_pickled` interprets the few instructions
that ``torch.save`` writes for tensors, numbers, strings and containers of them, and makes each storage from its member.
https://docs.python.org/3/library/pickletools.html, https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import io
import json
import os
import pickletools
import re
import shutil
import struct
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .errors import error_line, short_repr

# --- Writing


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path and rename the result to ``path`` once it is on disk.

    If anything fails, the file that had this name before is unchanged.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object], *, marker: str, replaces: Sequence[str] = ()) -> None:
    """Call ``write`` with a temporary folder and put the result at ``path``, as a whole, once it is on disk.

    If anything fails or the process is killed, the folder that had this name before is unchanged. Of its other files,
    those that match a pattern of ``replaces`` go and the rest stay (as hard links, so nothing is copied).

    A folder that cannot be renamed (the current one, a mount point, one in a folder that is not writable) gets the
    files one by one. ``marker``, the file without which no reader accepts the folder, is removed first and written
    last.
    """
    path = Path(os.path.realpath(path))
    old = path.with_name(f".{path.name}.old")
    if old.is_dir():  # a kill between two renames
        shutil.rmtree(old) if path.exists() else old.rename(path)
    is_fixed = path.is_dir() and not _can_be_renamed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path, path if is_fixed else path.parent)
    try:
        temporary.mkdir()
        write(temporary)
        if path.exists() and not is_fixed:
            shutil.copymode(path, temporary)
            for item in path.iterdir():
                if not any(fnmatch(item.name, pattern) for pattern in replaces):
                    _link(item, temporary / item.name)
        for item in (*temporary.rglob("*"), temporary):
            if not item.is_symlink() and (item.is_file() or item.is_dir()):
                fsync(item)
        if is_fixed:
            _move_into(path, temporary, marker, replaces)
        else:
            _rename_over(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def try_folder(folder: Path) -> None:
    """Raise the OSError that making ``folder``, or a file in it, would raise; leave nothing behind."""
    nearest = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    with tempfile.TemporaryFile(dir=nearest):
        pass


def is_leftover(name: str) -> bool:
    """Return whether a file of this name was left by a process that was killed while it wrote another file."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def _temporary(path: Path, folder: Path | None = None) -> Path:
    """Return a path to write to, beside ``path`` or in ``folder``, and delete what killed processes left there."""
    folder = folder or path.parent
    for old in folder.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = old.name.split(".")[-2]
        if process.isdecimal() and not _runs(int(process)):
            with contextlib.suppress(OSError):  # another user's: it stays
                remove(old)
    return folder / f".{path.name}.{os.getpid()}.tmp"


def _runs(process: int) -> bool:
    if os.name != "posix" or process == os.getpid():  # elsewhere os.kill would end it
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _can_be_renamed(folder: Path) -> bool:
    is_current = Path(os.path.realpath(os.curdir)).is_relative_to(folder)
    return not (is_current or folder.is_mount()) and os.access(folder.parent, os.W_OK)


def _link(source: Path, target: Path) -> None:
    """Give a file, link or folder of files the name ``target`` too, unless something has that name."""
    if os.path.lexists(target):
        return
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link_file)
    elif source.is_symlink():
        os.symlink(os.readlink(source), target)
    else:
        _link_file(str(source), str(target))


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _rename_over(source: Path, target: Path) -> None:
    """Give the folder ``source`` the name ``target``, and the earlier ``target``, if any, the name ``source``."""
    if target.exists() and not _exchange(source, target):
        old = target.with_name(f".{target.name}.old")
        target.rename(old)
        try:
            source.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(source)
    elif not target.exists():
        source.rename(target)
    fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step. False where the system cannot, and nothing has changed."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: https://man7.org/linux/man-pages/man2/rename.2.html
    return exchange is not None and exchange(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


def _move_into(folder: Path, source: Path, marker: str, replaces: Sequence[str]) -> None:
    (folder / marker).unlink(missing_ok=True)
    fsync(folder)
    for item in [*folder.iterdir()]:
        if item != source and any(fnmatch(item.name, pattern) for pattern in replaces):
            remove(item)
    for item in sorted(source.iterdir(), key=lambda item: item.name == marker):
        if (folder / item.name).is_dir():
            shutil.rmtree(folder / item.name)
        if item.name == marker:
            fsync(folder)
        os.replace(item, folder / item.name)
    fsync(folder)


def fsync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a folder, a file or a link; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- Checksums and JSON


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's contents in hexadecimal, reading 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Return ``json.loads(text)``; every refusal is a ValueError, also of text that is nested too deeply.

    A key that an object has twice with different values is refused; ``json.loads`` keeps the last one in silence.
    """
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key] and (value == value or found[key] == found[key]):  # NaN equals nothing
                both = f"{short_repr(value, 40)} and {short_repr(found[key], 40)}"
                raise ValueError(f"an object has the key {short_repr(key, 40)} twice, with the values {both}")
    return found


def read_json(path: Path) -> Any:
    """Return the JSON value in a UTF-8 file."""
    return parse_json(path.read_bytes().decode("utf-8"))


# --- Dicts of tensors


def tensor_file(suffix: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a ``.safetensors`` or ``.pt`` file: the same ones for the same tensors and metadata.

    The metadata of a ``.pt`` are a member ``metadata.json`` of its zip archive, which ``torch.load`` skips.
    """
    if suffix == ".safetensors":
        data = safetensors.torch.save(tensors, {"format": "pt", **metadata})
        header, start = _safetensors_header(data)
        text = json.dumps({"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + data[start:]
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{root}/{_METADATA}"), json.dumps(metadata))
    return buffer.getvalue()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a ``.safetensors`` file or of a pickled dict, on the CPU, and the file's metadata."""
    return parse_tensors(path.read_bytes(), path.suffix)


def parse_tensors(data: bytes, suffix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Do what :func:`read_tensors` does with the contents of a file."""
    if suffix == ".safetensors":
        try:
            return safetensors.torch.load(data), _safetensors_header(data)[0].get("__metadata__") or {}
        except Exception as error:  # torch's errors for a shape, and a class of the Rust library's own
            raise ValueError(error_line(error)) from error
    tensors, metadata = _read_archive(io.BytesIO(data))
    is_dict = isinstance(tensors, dict) and all(isinstance(key, str) for key in tensors)
    if not (is_dict and all(isinstance(tensor, Tensor) for tensor in tensors.values())):
        raise ValueError("it does not hold a dict of tensors")
    described = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if described > 2 * len(data):  # tied tensors share their numbers, more than two hardly do
        raise ValueError(f"its tensors share their numbers: they describe {described:,} bytes, it has {len(data):,}")
    return tensors, metadata


def _safetensors_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a file that the library has accepted, and where the numbers start."""
    start = 8 + int.from_bytes(data[:8], "little")
    return parse_json(data[8:start]), start


# --- torch.save's archives

_METADATA = "metadata.json"
_MOST_INSTRUCTIONS = 2**24  # bytes; 500 modules have 0.1 MB, and each byte can make a container of 64
_CONVERT = "to convert a file that you trust: torch.save(torch.load(path, weights_only=True), path)"
_ALLOWED = "allowed: dense ones on the CPU, numbers, strings, and dicts, lists and tuples of them"
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TAKEN = {  # from the stack; 0: all since MARK
    "TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": 0, "SETITEM": 2, "SETITEMS": 0,
}  # fmt: skip
_STORAGE_DTYPES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip


def read_pickled(path: Path) -> Any:
    """Return what ``torch.save`` wrote: tensors, numbers, strings and containers of them, on the CPU."""
    with open(path, "rb") as file:
        return _read_archive(file)[0]


def _read_archive(file: Any) -> tuple[Any, dict[str, str]]:
    """Return the value in an open archive, and the metadata that :func:`tensor_file` writes."""
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            members = _checked_members(archive, size)
            if "byteorder" in members and archive.read(members["byteorder"]) != sys.byteorder.encode():
                raise ValueError("its numbers are in another byte order than this machine's")
            if members["data.pkl"].file_size > _MOST_INSTRUCTIONS:
                raise ValueError(f"its pickle has more than {_MOST_INSTRUCTIONS:,} bytes")
            value = _Unpickler(archive, members).run(archive.read(members["data.pkl"]))
            found = parse_json(archive.read(members[_METADATA])) if _METADATA in members else {}
    except zipfile.BadZipFile as error:
        raise ValueError(f"it is no whole zip archive, as torch.save writes them ({error}); {_CONVERT}") from error
    except Exception as error:  # zipfile, torch and the instructions of damaged bytes raise errors of many kinds
        raise ValueError(error_line(error)) from error
    if not (isinstance(found, dict) and all(isinstance(text, str) for text in found.values())):
        raise ValueError(f"its {_METADATA} is not a dict of strings")
    return value, found


def _checked_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, without the common folder's; together they are no larger than the file."""
    members = {}
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{member.filename!r} in it is compressed, which torch.save does not do")
        name = member.filename.partition("/")[2]
        if name in members:
            raise ValueError(f"{member.filename!r} is in it twice")
        members[name] = member
    if sum(member.file_size for member in members.values()) > size:
        raise ValueError("its members overlap, which torch.save does not do")
    if "data.pkl" not in members:
        raise ValueError(f"it has no data.pkl, so torch.save did not write it; {_CONVERT}")
    return members


class _Unpickler:
    """Interprets a pickle of protocol 2 as far as ``torch.save`` needs it; UnpicklingError for anything else."""

    def __init__(self, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
        self.archive, self.members = archive, members
        self.storages: dict[str, Tensor] = {}
        self.functions: dict[str, Callable[..., Any]] = {
            "collections OrderedDict": lambda: OrderedDict(),
            "torch._utils _rebuild_parameter": lambda data, requires_grad, hooks: data,
            "torch._utils _rebuild_tensor_v2": _view,
            "torch._utils _rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, dtype, *others: _view(
                storage.view(dtype), offset, size, stride, grad, hooks, *others
            ),
        }

    def run(self, pickled: bytes) -> Any:
        """Return the value. Each instruction takes its operands from ``stack``; MARK puts the stack aside."""
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[Any, Any] = {}
        for code, argument, _ in pickletools.genops(pickled):
            name = code.name
            if name in ("PROTO", "STOP"):
                continue
            if name == "MARK":
                marked.append(stack)
                stack = []
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name in _LITERALS:
                stack.append(argument)
            elif name in _MADE:
                stack.append(_MADE[name]())
            elif name in _TAKEN:
                if count := _TAKEN[name]:
                    items = stack[-count:]
                    del stack[-count:]
                else:
                    items, stack = stack, marked.pop()
                if name.startswith("TUPLE"):
                    stack.append(tuple(items))
                else:
                    _add(stack[-1], items, name.startswith("APPEND"))
            elif name == "GLOBAL":
                stack.append(self._named(argument))
            elif name == "BINPERSID":
                stack.append(self._storage(*stack.pop()))
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.functions[function](*arguments))
            elif name == "BUILD" and isinstance(stack[-2], OrderedDict):
                stack.pop()  # the attributes of a state dict: versions of modules
            else:
                raise UnpicklingError(f"it holds an object that is none of torch's tensors ({name}); {_ALLOWED}")
        (value,) = stack
        return value

    def _named(self, name: Any) -> Any:
        """Return a dtype, or the name itself if :attr:`functions` has it."""
        module, _, attribute = name.partition(" ")
        dtype = getattr(torch, attribute, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name == "torch.storage UntypedStorage":
            return torch.uint8
        if module == "torch" and attribute.removesuffix("Storage") in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[attribute.removesuffix("Storage")]
        if name in self.functions:
            return name
        raise UnpicklingError(f"it holds {name.replace(' ', '.')}, which is none of torch's tensors; {_ALLOWED}")

    def _storage(self, kind: str, dtype: torch.dtype, key: str, location: str, numel: int) -> Tensor:
        """Return a storage's numbers: all those of its member, and no more."""
        if key not in self.storages:
            data = bytearray(self.archive.read(self.members[f"data/{key}"]))
            flat = torch.frombuffer(data, dtype=torch.uint8).clone() if data else torch.empty(0, dtype=torch.uint8)
            self.storages[key] = flat.view(dtype)
        flat = self.storages[key]
        if kind != "storage" or flat.dtype != dtype or flat.numel() != numel:
            what = f"{short_repr(numel)} numbers of {dtype} in data/{key}, which has {flat.nbytes:,} bytes"
            raise UnpicklingError(f"it describes {what}: larger than its data, or of another dtype")
        return flat


def _view(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *others: Any) -> Tensor:
    """Return a tensor on a storage; ``as_strided`` refuses one that leaves it, and this one that repeats numbers.

    The others are ``requires_grad``, hooks and, of a view that is yet to be computed, metadata.
    """
    if any(others[2:]):
        raise UnpicklingError("it holds a tensor that is yet to be conjugated or negated; save its clone()")
    tensor = flat.as_strided(size, stride, offset)
    if tensor.numel() > flat.numel():
        raise ValueError(f"it holds a tensor of shape {tuple(size)} that is larger than its data")
    return tensor


def _add(container: Any, items: list[Any], is_list: bool) -> None:
    """Extend a list, or a dict by keys and values in turn."""
    if is_list and isinstance(container, list):
        container.extend(items)
        return
    keys = items[::2]
    if is_list or not isinstance(container, dict) or not all(isinstance(key, (str, int)) for key in keys):
        raise UnpicklingError(f"it holds an object that is none of torch's tensors; {_ALLOWED}")
    container.update(zip(keys, items[1::2], strict=True))
