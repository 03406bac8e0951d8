"""Damage: to the bytes of a file, to a file itself, to a JSON document, and values that no one expects.

Each takes a ``random.Random`` and says in words what it did, so that an input can be made again and understood.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

DEEP = 100_000
_BAD_UTF8 = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xfe\xff\x00A", b"\x00", b"\xef\xbb\xbf")

# JSON texts to put in the place of a value; None of them is what a field holds.
_FRAGMENTS = (
    "null", "true", "false", "0", "1", "-1", "7", "1.5", "-0.0", "1e-320", "1e308", "1e999", "NaN", "Infinity",
    "-Infinity", str(2**31), str(2**63), str(-(2**63) - 1), str(2**64), "1" + "0" * 400, "9" * 5000, '""', '"text"',
    '"\\ud800"', '"\\u0000"', '"../../outside"', '"a/b"', '"%s{0}\\\\"', '"' + "x" * 1_000_000 + '"', "[]", "{}",
    "[null]", "[[]]", '[1, "a", null]', '{"": null}', '{"a": {"b": [1, {}]}}', '["same", "same"]', "[NaN]",
    "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 900 + "]" * 900, "[" * DEEP, "'single'", "}", ",",
)  # fmt: skip
_MARK = "@@here@@"


class _Hostile:
    """An object whose every question is answered by an error."""

    def __repr__(self) -> str:
        return "<hostile>"

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __hash__(self) -> int:
        raise TypeError("not hashable")

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


def damaged_bytes(data: bytes, random: Random) -> tuple[str, bytes]:
    """One to three changes to ``data``."""
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = random.randrange(len(data) + 1)
        if random.random() < 0.5:  # formats keep what matters at the front
            at = min(at, random.randrange(400))
        length = random.choice((1, 1, 4, 64, 4096))
        how = random.randrange(9)
        if how == 0:
            said.append(f"cut at {at}")
            data = data[:at]
        elif how == 1 and data:
            bits = [random.randrange(8 * len(data)) for _ in range(random.choice((1, 1, 8, 64)))]
            if random.random() < 0.5:
                bits = [bit % (8 * 400) % (8 * len(data)) for bit in bits]
            said.append(f"{len(bits)} bits flipped, the first at byte {bits[0] // 8}")
            changed = bytearray(data)
            for bit in bits:
                changed[bit // 8] ^= 1 << bit % 8
            data = bytes(changed)
        elif how == 2:
            said.append(f"{length} random bytes into {at}")
            data = data[:at] + random.randbytes(length) + data[at:]
        elif how == 3:
            said.append(f"{length} bytes taken out at {at}")
            data = data[:at] + data[at + length :]
        elif how == 4:
            said.append(f"{length} bytes twice at {at}")
            data = data[: at + length] + data[at:]
        elif how == 5:
            said.append(f"{length} zeros over {at}")
            data = data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        elif how == 6:
            bad = random.choice(_BAD_UTF8)
            said.append(f"{bad!r} into {at}")
            data = data[:at] + bad + data[at:]
        elif how == 7:
            said.append(f"random bytes over {at}")
            data = data[:at] + random.randbytes(len(data[at : at + length])) + data[at + length :]
        else:
            data = random.choice((b"", b"\0" * 64, random.randbytes(200), data + data, b"[" * DEEP, b"{}", b"null"))
            said.append(f"replaced by {len(data)} bytes {data[:8]!r}")
    return "; ".join(said), data


def damage_file(path: Path, random: Random) -> str:
    """Damage a file's bytes or, less often, what it is."""
    how = random.randrange(40)
    if how == 0:
        path.unlink()
        return f"{path.name}: gone"
    if how == 1:
        path.unlink()
        path.mkdir()
        return f"{path.name}: a folder"
    if how == 2:
        path.unlink()
        os.symlink("nowhere", path)
        return f"{path.name}: a link to nowhere"
    if how == 3:
        other = random.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
        if other != path:
            shutil.copy(other, path)
        return f"{path.name}: contents of {other.name}"
    said, data = damaged_bytes(path.read_bytes(), random)
    path.write_bytes(data)
    return f"{path.name}: {said}"


def damaged_json(value: Any, random: Random) -> tuple[str, str]:
    """What was done to a JSON value, and its text: wrong types, missing, doubled and unknown keys, deep nesting."""
    value = json.loads(json.dumps(value))
    said, fragments = [], []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        holder, key, path = _random_node(value, random)
        if holder is None:
            continue
        fragment = random.choice(_FRAGMENTS)
        how = random.randrange(10)
        if how == 0:
            said.append(f"{path} taken out")
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            said.append(f"{path} twice, the second time {fragment[:40]}")
            fragments.append(f"1, {json.dumps(key)}: {fragment}" if random.random() < 0.5 else fragment)
            holder[key] = _MARK
        elif how == 2 and isinstance(holder, dict):
            name = random.choice(("unknown", "", "\x00", "é" * 20, key + "s", "__class__"))
            said.append(f"{name!r} beside {path}: {fragment[:40]}")
            fragments.append(fragment)
            holder[name] = _MARK
        elif how == 3 and isinstance(holder, dict):
            said.append(f"{path} under another name")
            holder[random.choice(("other", "", key.upper()))] = holder.pop(key)
        elif how == 4:
            other, its, where = _random_node(value, random)
            said.append(f"{where} in the place of {path}")
            if other is not None:
                holder[key] = json.loads(json.dumps(other[its]))
        else:
            said.append(f"{path}: {fragment[:40]}")
            fragments.append(fragment)
            holder[key] = _MARK
    text = json.dumps(value)
    for fragment in fragments:
        text = text.replace(json.dumps(_MARK), fragment, 1)
    if random.random() < 0.1:
        text = random.choice((*_FRAGMENTS, "", text + text, text[: random.randrange(len(text) + 1)]))
        said.append(f"the whole: {text[:40]}")
    return "; ".join(said), text


def _random_node(value: Any, random: Random) -> tuple[Any, Any, str]:
    """A place in a JSON value: its holder, its key, its path."""
    holder, key, path = None, None, "$"
    while isinstance(value, (dict, list)) and value and (holder is None or random.random() < 0.75):
        holder = value
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        path, value = f"{path}.{key}"[:120], value[key]
    return holder, key, path


_PLAIN = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 1.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, 2**31, 2**63,
    2**64, -(2**64), 10**400, -(10**400), 10**5000, "", " ", "no", "steps", "auto", "none", "true", "1", "1e-4",
    "\ud800", "a\x00b", "x" * 1_000_000, "é" * 100, "../..", "/nowhere/at/all", b"bytes", b"\xff", (),
    ("q_proj", "v_proj"), frozenset({1}), "q_proj", range(3), object(), type, int, Ellipsis, NotImplemented, 1j,
    np.float64("nan"), np.float32(0.1), np.int64(4), np.bool_(True), Path("a"), Path("\x00"), ValueError("a value"),
)  # fmt: skip
_MADE: tuple[Any, ...] = (
    list, dict, set, bytearray, lambda: [None], lambda: [[]], lambda: ["q_proj"], lambda: {"q_proj"}, lambda: {"a": 1},
    lambda: {1: 2}, lambda: [1, "a"], lambda: ["q_proj", None], lambda: [math.nan], lambda: iter("ab"), itertools.count,
    lambda: (c for c in "ab"), lambda: lambda: 1, _Hostile, lambda: [_Hostile()], lambda: {"a": _Hostile()},
    lambda: np.arange(3), lambda: np.array([]), lambda: torch.ones(2), lambda: torch.tensor(3),
    lambda: nested_list(DEEP), lambda: nested_list(500),
)  # fmt: skip


def wild_value(random: Random) -> Any:
    """A Python value for a setting or a cell: of any type, at the edges of numbers, without end, or hostile."""
    at = random.randrange(len(_PLAIN) + len(_MADE))
    return _PLAIN[at] if at < len(_PLAIN) else _MADE[at - len(_PLAIN)]()


def nested_list(depth: int) -> list:
    """``[[[...]]]``."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def settle(folder: Path) -> None:
    """Files that say the same in the same bytes, run after run: safetensors writes its header in any order."""
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    for path in folder.rglob("trainer_state.json"):
        about = json.loads(path.read_text())
        about["config"]["output_dir"], about["state"]["train_seconds"] = "run", 1.5
        for line in about["state"]["history"]:
            line.update({name: 1000.5 for name in line if name == "tokens_per_s"})
        path.write_text(json.dumps(about, indent=1))
