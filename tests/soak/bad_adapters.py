"""Adapter files (``.safetensors``, ``.pt`` and its ``.json``) and PEFT folders, damaged: load_adapter, import_peft."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from conftest import adapted_model, adapters_of, same_tensors, tiny_model
from damage import DEEP, damage_file, damaged_json, wild_value
from safetensors.torch import load_file, save_file

import phi3lora as p3

FUSED = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
_HOW = ("plain", "same", "beside")


@functools.cache
def _models() -> dict[str, Any]:
    """What adapters are loaded into."""
    return {
        "plain": tiny_model(),
        "same": adapted_model(**FUSED),
        "beside": adapted_model(target_modules=["down_proj"]),
    }


def load_into(load: Callable[[Any, str], object], how: str) -> None:
    """Load; after an error the model is as it was."""
    model = copy.deepcopy(_models()[how])
    before, loaded = adapters_of(model), p3.list_adapters(model)
    try:
        load(model, "other" if how == "beside" else "default")
    except p3.Phi3LoRAError:
        assert same_tensors(adapters_of(model), before) and p3.list_adapters(model) == loaded, "changed by a refusal"
        raise
    assert all(torch.isfinite(tensor).all() for tensor in adapters_of(model).values()), "not finite and accepted"


def _adapter(path: Path, how: str) -> Callable[[], None]:
    return lambda: load_into(lambda model, name: p3.load_adapter(model, path, name=name), how)


def _peft(folder: Path, how: str) -> Callable[[], None]:
    def load(model: Any, name: str) -> None:
        p3.import_peft(model, folder, name=name)

    return lambda: load_into(load, how)


# --- safetensors


def prepare_safetensors(good: Path) -> Callable[[], None]:
    """An adapter with fused and plain layers."""
    path = p3.save_adapter(adapted_model(**FUSED), good / "a.safetensors")
    return lambda: [_adapter(path, how)() for how in _HOW]


def make_safetensors(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Bytes, header, facts, tensors."""
    path, how = own / "a.safetensors", random.choice(_HOW)
    shutil.copy(good / "a.safetensors", path)
    return damage_safetensors(path, random), _adapter(path, how)


def damage_safetensors(path: Path, random: Random) -> str:
    """One of the layers of a ``.safetensors`` file: its bytes, its header, what we keep there, its tensors."""
    choice = random.randrange(4)
    if choice == 0:
        return damage_file(path, random)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    if choice == 1:
        state, metadata = load_file(path), header.get("__metadata__")
        said = damage_tensors(state, random)
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata)
        return said
    if choice == 2 and "phi3lora" in header.get("__metadata__", {}):
        said, text = damaged_json(json.loads(header["__metadata__"]["phi3lora"]), random)
        header["__metadata__"]["phi3lora"] = text
        said, text = f"facts: {said}", json.dumps(header)
    elif random.random() < 0.5:
        said, text = damaged_json(header, random)
    else:
        said = _damage_entry(header, random)
        text = json.dumps(header)
    encoded = text.encode(errors="surrogatepass")
    size = random.choice((0, 2**31, 2**63, 2**64 - 1, len(data))) if random.random() < 0.05 else len(encoded)
    path.write_bytes(struct.pack("<Q", size) + encoded + payload)
    return f"header ({size} bytes): {said}"


def _damage_entry(header: dict[str, Any], random: Random) -> str:
    """A tensor's own line: huge and odd shapes, other dtypes, offsets that overlap or leave the file."""
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    start, end = entry["data_offsets"]
    field, value = random.choice((
        ("shape", [2**40, 2**40]), ("shape", [2**31, 4]), ("shape", [2**63]), ("shape", [0, 2**60]), ("shape", []),
        ("shape", [1] * 2000), ("shape", [-1, 4]), ("shape", entry["shape"][::-1]), ("shape", [end - start]),
        ("dtype", "F64"), ("dtype", "BF16"), ("dtype", "I8"), ("dtype", "BOOL"), ("dtype", "F8_E4M3"), ("dtype", "C64"),
        ("dtype", "U64"), ("dtype", "X"), ("data_offsets", header[other]["data_offsets"]), ("data_offsets", [0, end]),
        ("data_offsets", [start, 2**40]), ("data_offsets", [end, start]), ("data_offsets", [0, 0]),
        ("data_offsets", [start, end, end]), ("data_offsets", [-4, end]),
    ))  # fmt: skip
    entry[field] = value
    if field == "dtype" and value in ("I8", "BOOL", "F8_E4M3", "BF16", "F64") and random.random() < 0.7:
        wide = {"F64": 8, "BF16": 2}.get(value, 1)  # a whole file of that dtype
        entry["shape"] = [(end - start) // wide]
    return f"{name}.{field}: {str(value)[:60]}"


def damage_tensors(state: dict[str, torch.Tensor], random: Random) -> str:
    """Other dtypes, shapes, names and numbers, in a dict of tensors."""
    name = random.choice(list(state))
    tensor = state[name]
    numbers = (float("nan"), float("inf"), 1e38, 0.0)
    how = random.randrange(9)
    if how == 0:
        del state[name]
        return f"{name} taken out"
    if how == 1:
        extra = random.choice(("other", "", name + ".x", "model.norm.weight", "lm_head.weight", "a" * 10_000, "b.bias"))
        state[extra] = tensor
        return f"{extra[:40]!r} added"
    if how == 2:
        number = random.choice(numbers)
        state[name] = tensor.clone()
        state[name].view(-1)[random.randrange(tensor.numel())] = number
        return f"a {number} in {name}"
    if how == 3:
        changes: list[torch.dtype] = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
        dtype = random.choice([*changes, torch.float8_e4m3fn, torch.complex64])
        names = [name] if random.random() < 0.5 else list(state)
        for at in names:
            state[at] = state[at].to(dtype)
        return f"{len(names)} as {dtype}"
    if how == 4:
        shapes = [(0,), (), (1,), (0, 5), tuple(tensor.shape[::-1]), (*tensor.shape, 1), (1, 1, 1, 1, 7), (3, 1000)]
        shape = random.choice(shapes)
        state[name] = torch.zeros(shape)
        return f"{name} of shape {shape}"
    if how == 5:
        other = random.choice(list(state))
        state[name], state[other] = state[other], tensor
        return f"{name} and {other} exchanged"
    if how == 6:
        state.clear()
        return "no tensors"
    if how == 7:
        for at in list(state):
            state["model." + at] = state.pop(at)
        return "other names"
    state[name.replace("lora_A", "lora_B")] = tensor
    return f"B is {name}"


# --- .pt


class _Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def prepare_pt(good: Path) -> Callable[[], None]:
    """An adapter with its JSON beside it."""
    path = p3.save_adapter(adapted_model(**FUSED), good / "a.pt")
    torch.save(torch.load(path, weights_only=True), path)  # under no process's number
    facts = json.loads((good / "a.pt.json").read_text())
    (good / "a.pt.json").write_text(json.dumps({**facts, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    return lambda: [_adapter(path, how)() for how in _HOW]


def make_pt(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """The pickle, the zip around it, the JSON beside it."""
    path, how = own / "a.pt", random.choice(_HOW)
    shutil.copy(good / "a.pt", path)
    shutil.copy(good / "a.pt.json", own)
    if random.random() < 0.4:
        sidecar = own / "a.pt.json"
        if random.random() < 0.3:
            return damage_file(sidecar, random), _adapter(path, how)
        said, text = damaged_json(json.loads(sidecar.read_text()), random)
        sidecar.write_bytes(text.encode(errors="surrogatepass"))
        return f"sidecar: {said}", _adapter(path, how)
    if random.random() < 0.7:
        (own / "a.pt.json").unlink()
    return damage_pickle(path, random, own), _never_runs(_adapter(path, how), own)


def _never_runs(read: Callable[[], None], own: Path) -> Callable[[], None]:
    def checked() -> None:
        try:
            read()
        finally:
            assert not (own / "ran").exists(), "code from the file was executed"

    return checked


def damage_pickle(path: Path, random: Random, own: Path) -> str:
    """A file of ``torch.save``: its bytes, its zip, what it holds; one that would run something."""
    choice = random.randrange(5)
    if choice == 0:
        return damage_file(path, random)
    state = torch.load(path, weights_only=True)
    if choice == 1 and all(isinstance(value, torch.Tensor) for value in state.values()):
        said = damage_tensors(state, random)
        torch.save(state, path)
        return said
    if choice == 2:
        runs = _Runs(str(own / "ran"))
        state[random.choice([*state, "more"])] = runs
        how = random.randrange(4)
        if how == 0:
            path.write_bytes(pickle.dumps(runs, protocol=random.randrange(6)))
        elif how == 1:
            torch.save(state, path, _use_new_zipfile_serialization=False)
        else:
            torch.save(runs if how == 2 else state, path)
        return f"would run code ({how})"
    if choice == 3:
        return _damage_zip(path, random)
    return _odd_contents(path, state, random)


def _odd_contents(path: Path, state: dict[str, Any], random: Random) -> str:
    """Something else than a dict of plain tensors."""
    name = random.choice(list(state))
    huge = torch.zeros(1).expand(2**17, 2**17)  # 64 GiB if anyone computes with it; 4 bytes in the file
    odd: dict[str, Any] = {
        "huge": huge,
        "huge in three dimensions": huge[None],
        "meta": torch.zeros(4, 4, device="meta"),
        "sparse": torch.eye(4).to_sparse(),
        "sparse csr": torch.eye(4).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "parameter": torch.nn.Parameter(torch.ones(4, 4)),
        "negative strides": torch.ones(4).flip(0),
        "zero-dimensional": torch.tensor(1.0),
        "a list": [1, 2],
        "None": None,
        "a string": "text",
        "bytes": b"\xff" * 100,
        "a dict": {"a": torch.ones(2)},
        "a number": 10**400,
    }
    what = random.choice(list(odd))
    where = random.randrange(4)
    value = {**state, name: odd[what]}
    if where == 1:
        value = {**state, random.choice((0, None, (1, 2), 1.5, True)): odd[what]}
    elif where == 2:
        value = odd[what]
    elif where == 3:
        value = [odd[what], state]
    try:
        torch.save(value, path)
    except (RuntimeError, NotImplementedError):  # meta tensors of some versions
        torch.save(None, path)
    return f"{what} at {where}"


def _damage_zip(path: Path, random: Random) -> str:
    """The zip around the pickle, with right checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    how = random.choice(("out", "cut", "bits", "bomb", "deep", "twice", "packed"))
    if how == "out":
        del members[name]
    elif how == "cut":
        members[name] = members[name][: random.randrange(len(members[name]) + 1)]
    elif how == "bits":
        name = next(n for n in members if n.endswith("data.pkl"))
        changed = bytearray(members[name])
        for _ in range(random.choice((1, 3, 10))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        members[name] = bytes(changed)
    elif how == "deep":
        name = next(n for n in members if n.endswith("data.pkl"))
        members[name] = b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b"."
    buffer = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if how in ("packed", "bomb") else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", packed, compresslevel=1) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        if how == "twice":
            archive.writestr(name + random.choice(("", ".x", "/../..")), members[name])
    contents = buffer.getvalue()
    if how == "bomb":
        contents = _bomb(members, name)
    path.write_bytes(contents)
    return f"zip: {name} {how}"


def _bomb(members: dict[str, bytes], name: str) -> bytes:
    """The zip with one member that unpacks to 1.5 GiB of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**26)) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    packed, size = block * 24 + packer.flush(), 24 * 2**26
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in members.items():
            if member != name:
                archive.writestr(member, data)
        archive.writestr(name, packed)
    contents = bytearray(buffer.getvalue())
    local, central = contents.find(name.encode()) - 30, contents.rfind(name.encode()) - 46
    for at in (local + 8, central + 10):  # method: deflate; sizes packed and unpacked
        struct.pack_into("<H", contents, at, 8)
        struct.pack_into("<II", contents, at + 10, len(packed), size)
    return bytes(contents)


# --- PEFT folders


def prepare_peft(good: Path) -> Callable[[], None]:
    """Our three layouts, one without our header, and one as ``.bin``."""
    model = adapted_model(**FUSED)
    for layout in ("uniform", "pattern", "split"):
        p3.export_peft(model, good / layout, layout=layout, base_model="base")
    for layout in ("split", "uniform"):
        shutil.copytree(good / layout, good / f"{layout}-theirs")
        tensors = good / f"{layout}-theirs" / "adapter_model.safetensors"
        save_file(load_file(tensors), tensors)
    shutil.copytree(good / "uniform", good / "bin")
    torch.save(load_file(good / "bin" / "adapter_model.safetensors"), good / "bin" / "adapter_model.bin")
    (good / "bin" / "adapter_model.safetensors").unlink()
    return lambda: [_peft(folder, "plain")() for folder in sorted(good.iterdir())]


def make_peft(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """The config, the tensors, the header."""
    source, how = random.choice(sorted(good.iterdir())), random.choice(_HOW)
    folder = own / "peft"
    shutil.copytree(source, folder)
    if random.random() < 0.5:
        config = folder / "adapter_config.json"
        if random.random() < 0.2:
            said = damage_file(config, random)
        else:
            said, text = damaged_json(json.loads(config.read_text()), random)
            config.write_bytes(text.encode(errors="surrogatepass"))
    elif source.name == "bin":
        said = damage_pickle(folder / "adapter_model.bin", random, own)
    else:
        said = damage_safetensors(folder / "adapter_model.safetensors", random)
    return f"{source.name}: {said}", _never_runs(_peft(folder, how), own)


# --- what is not a file


def make_argument(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """A path or a name that is none."""
    path, value, which = good / "a.safetensors", wild_value(random), random.randrange(3)
    calls: list[Callable[[Any, str], object]] = [
        lambda model, name: p3.load_adapter(model, value, name=name),
        lambda model, name: p3.load_adapter(model, path, name=value),
        lambda model, name: p3.import_peft(model, value, name=name),
    ]
    return f"{which}: {type(value)!s}", lambda: load_into(calls[which], random.choice(_HOW))


KINDS = {
    "adapter safetensors": (prepare_safetensors, make_safetensors, 12),
    "adapter pt": (prepare_pt, make_pt, 12),
    "adapter peft": (prepare_peft, make_peft, 14),
    "adapter arguments": (prepare_safetensors, make_argument, 2),
}
