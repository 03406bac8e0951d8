"""Damage to files of tensors: ``.safetensors`` and what ``torch.save`` writes."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from damage import damage_file, damaged_json
from safetensors.torch import load_file, save_file


def damage_safetensors(path: Path, random: Random) -> str:
    """Damage a ``.safetensors`` file: its bytes, its tensors, its header, or the metadata that phi3lora keeps there."""
    how = random.randrange(4)
    if how == 0:
        return damage_file(path, random)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    if how == 1:
        state = load_file(path)
        description = damage_tensors(state, random)
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata or None)
        return description
    if how == 2 and "phi3lora" in metadata:
        description, metadata["phi3lora"] = damaged_json(json.loads(metadata["phi3lora"]), random)
        text = json.dumps(header)
    else:
        description, text = damaged_json(header, random)
    encoded = text.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    return f"header: {description}"


def damage_tensors(state: dict[str, torch.Tensor], random: Random) -> str:
    """Change the dtypes, shapes, names or numbers in a dict of tensors."""
    name, other = random.choice(list(state)), random.choice(list(state))
    tensor = state[name]
    how = random.randrange(8)
    if how == 0:
        del state[name]
        return f"{name} removed"
    if how == 1:
        extra = random.choice(("other", name + ".x", "model.norm.weight", "lm_head.weight", "b.bias"))
        state[extra] = tensor
        return f"{extra!r} added"
    if how == 2:
        number = random.choice((float("nan"), float("inf"), 1e38))
        state[name] = tensor.clone()
        state[name].view(-1)[random.randrange(tensor.numel())] = number
        return f"a {number} in {name}"
    if how == 3:
        dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool)
        dtype = random.choice((*dtypes, torch.float8_e4m3fn, torch.complex64))
        names = [name] if random.random() < 0.5 else list(state)
        for at in names:
            state[at] = state[at].to(dtype)
        return f"{len(names)} as {dtype}"
    if how == 4:
        shape = random.choice(((0,), (), (1,), (0, 5), tuple(tensor.shape[::-1]), (*tensor.shape, 1), (3, 1000)))
        state[name] = torch.zeros(shape)
        return f"{name} of shape {shape}"
    if how == 5:
        state[name], state[other] = state[other], tensor
        return f"{name} and {other} exchanged"
    if how == 6:
        state.clear()
        return "no tensors"
    for at in list(state):
        state["model." + at] = state.pop(at)
    return "other names"


class _MakesAFolder:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def damage_pickle(path: Path, random: Random, own: Path) -> str:
    """Damage a file of ``torch.save``: its bytes, its zip, its contents; or put code into it."""
    how = random.randrange(5)
    if how == 0:
        return damage_file(path, random)
    state = torch.load(path, weights_only=True)
    if how == 1 and all(isinstance(value, torch.Tensor) for value in state.values()):
        description = damage_tensors(state, random)
        torch.save(state, path)
        return description
    if how == 2:
        code = _MakesAFolder(str(own / "executed"))
        state[random.choice([*state, "more"])] = code
        if random.random() < 0.3:
            path.write_bytes(pickle.dumps(code, protocol=random.randrange(6)))
        else:
            torch.save(state, path, _use_new_zipfile_serialization=random.random() < 0.5)
        return "code"
    if how == 3:
        return _damage_zip(path, random)
    odd: dict[str, Any] = {
        "a tensor larger than its data": torch.zeros(1).expand(2**17, 2**17),  # 64 GiB for whoever computes with it
        "a meta tensor": torch.zeros(4, 4, device="meta"),
        "a sparse tensor": torch.eye(4).to_sparse(),
        "a parameter": torch.nn.Parameter(torch.ones(4, 4)),
        "a scalar": torch.tensor(1.0),
        "a list": [1, 2],
        "None": None,
        "a string": "text",
        "a dict": {"a": torch.ones(2)},
    }
    what = random.choice(list(odd))
    key = random.choice((*state, 0, None))
    torch.save(random.choice(({**state, key: odd[what]}, odd[what], [odd[what], state])), path)
    return f"{what} for {key}"


def _damage_zip(path: Path, random: Random) -> str:
    """Change members of the zip around the pickle, with correct checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice(list(members))
    how = random.choice(("removed", "cut", "changed", "compressed"))
    if how == "removed":
        del members[name]
    elif how == "cut":
        members[name] = members[name][: random.randrange(len(members[name]) + 1)]
    elif how == "changed":
        name = next(n for n in members if n.endswith("data.pkl"))
        changed = bytearray(members[name])
        for _ in range(random.choice((1, 3, 10))):
            changed[random.randrange(len(changed))] = random.randrange(256)
        members[name] = bytes(changed)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    path.write_bytes(buffer.getvalue())
    return f"zip: {name} {how}"


def never_executes(read: Callable[[], None], own: Path) -> Callable[[], None]:
    """Return ``read`` with a check that the code of :func:`damage_pickle` did not run."""

    def checked() -> None:
        try:
            read()
        finally:
            assert not (own / "executed").exists(), "code from the file was executed"

    return checked
