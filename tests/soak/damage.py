"""Damage to the bytes of a file, to a file as a whole, and to a JSON document; and values of the wrong type.

Each function draws from a ``random.Random`` and describes what it did, so that an input can be made again and
understood. The damage is what happens to users' files: transfers cut short, bits flipped, edits by hand, wrong files.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

PLAIN_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1.5, -0.5, 1e-9, 1e308, math.nan, math.inf, -math.inf, 2**31,
    "", " ", "text", "no", "auto", "none", "true", "1", "1e-4", "q_proj", "a/b", "../../outside", "é",
    "x" * 10_000, [], {}, [None], [[]], [1, "a", None], ["q_proj", "q_proj"], [math.nan], {"": None}, {"a": 1},
    {"a": {"b": [1, {}]}},
)  # fmt: skip
"""What JSON or a command line can hold in the place of a setting."""


def damaged_bytes(data: bytes, random: Random) -> tuple[str, bytes]:
    """Return a description of one to three changes to ``data``, and the changed bytes."""
    done = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        at = random.randrange(len(data) + 1)
        if random.random() < 0.5:  # formats keep what matters at the front
            at = min(at, random.randrange(400))
        length = random.choice((1, 1, 4, 64, 4096))
        before, span, after = data[:at], data[at : at + length], data[at + length :]
        how = random.choice(("cut", "bits flipped", "inserted", "removed", "repeated", "zeroed", "replaced"))
        if how == "cut":
            data = before
        elif how == "bits flipped":
            data = before + bytes(byte ^ 1 << random.randrange(8) for byte in span) + after
        elif how == "inserted":
            data = before + random.randbytes(length) + span + after
        elif how == "removed":
            data = before + after
        elif how == "repeated":
            data = before + span + span + after
        elif how == "zeroed":
            data = before + bytes(len(span)) + after
        else:
            data = random.choice((b"", bytes(64), random.randbytes(200), data + data, b"{}", b"null", b"\xff\xfe"))
        done.append(f"{length} bytes at {at} {how}")
    return "; ".join(done), data


def damage_file(path: Path, random: Random) -> str:
    """Damage the bytes of a file or, less often, remove it or put something else in its place."""
    how = random.randrange(40)
    if how == 0:
        path.unlink()
        return f"{path.name}: missing"
    if how == 1:
        path.unlink()
        path.mkdir()
        return f"{path.name}: a folder"
    if how == 2:
        path.unlink()
        os.symlink("nowhere", path)
        return f"{path.name}: a link to nothing"
    if how == 3:
        other = random.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
        if other != path:
            shutil.copy(other, path)
        return f"{path.name}: the contents of {other.name}"
    description, data = damaged_bytes(path.read_bytes(), random)
    path.write_bytes(data)
    return f"{path.name}: {description}"


def damaged_json(value: Any, random: Random) -> tuple[str, str]:
    """Return a description and the text of a JSON value with fields missing, renamed, unknown or of another type."""
    value = json.loads(json.dumps(value))
    done = []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        holder, key, path = random_node(value, random)
        if holder is None:
            continue
        how = random.randrange(8)
        new = deepcopy(random.choice(PLAIN_VALUES))  # what is put in may be changed next
        if how == 0:
            done.append(f"{path} removed")
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            name = random.choice(("other", "", key + "s", key.upper()))
            done.append(f"{path} renamed to {name!r}")
            holder[name] = holder.pop(key)
        elif how == 2 and isinstance(holder, dict):
            name = random.choice(("unknown", "", key + "s"))
            done.append(f"{name!r} beside {path}: {str(new)[:40]}")
            holder[name] = new
        else:
            if how == 3:  # a value from elsewhere in the document
                other, its_key, _ = random_node(value, random)
                new = json.loads(json.dumps(other[its_key])) if other else new
            done.append(f"{path}: {str(new)[:40]}")
            holder[key] = new
    text = json.dumps(value)
    if random.random() < 0.1:
        text = random.choice(
            ("", "null", "[]", "{}", "1", "'single'", text + text, text[: random.randrange(len(text))])
        )
        done.append(f"the whole document: {text[:40]}")
    return "; ".join(done), text


def damage_json_file(path: Path, random: Random) -> str:
    """Damage a JSON file: usually its values, sometimes its bytes."""
    if random.random() < 0.2:
        return damage_file(path, random)
    description, text = damaged_json(json.loads(path.read_text()), random)
    path.write_text(text)
    return f"{path.name}: {description}"


def random_node(value: Any, random: Random) -> tuple[Any, Any, str]:
    """Return a place in nested dicts and lists: the container, the key in it, and the path."""
    holder, key, path = None, None, "$"
    while isinstance(value, (dict, list)) and value and (holder is None or random.random() < 0.8):
        holder = value
        key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        path, value = f"{path}.{key}"[:120], value[key]
    return holder, key, path


def make_reproducible(folder: Path) -> None:
    """Rewrite what differs from run to run: the order of safetensors headers, times and paths in checkpoints."""
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    for path in folder.rglob("trainer_state.json"):
        content = json.loads(path.read_text())
        content["config"]["output_dir"], content["state"]["train_seconds"] = "run", 1.5
        for line in content["state"]["history"]:
            line.update({name: 1000.5 for name in line if name == "tokens_per_s"})
        path.write_text(json.dumps(content, indent=1))
