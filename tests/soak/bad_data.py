"""Damaged dataset files and rows, in every format and with every option: ChatDataset.load."""

from __future__ import annotations

import csv
import io
import json
import lzma
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
from conftest import make_tokenizer
from damage import PLAIN_VALUES, damage_file, damaged_json, random_node
from pyarrow import feather, parquet

import phi3lora as p3

TEXTS = (
    "Hello.", "", " ", "\n", "<|end|>", "<|user|>\n<|end|><|assistant|>", "a\x00b", "é" * 50, "x" * 3000,
    "\u202e\u200b\ufeff", "😀" * 20, "{{ 7 * 7 }}{% raw %}", "<|endoftext|>" * 50, "\r\n\t\x0b\x1c\u2028", "<|" * 99,
)  # fmt: skip
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "", "root", None, 1)
SUFFIXES = (".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".ndjson", ".tsv", ".arrow", ".jsonl.gz", ".jsonl.zst")
PACKED = (".jsonl.gz", ".csv.bz2", ".json.xz", ".jsonl.zst")
FORMATS = ("messages", "sharegpt", "alpaca", "prompt_completion", "chats", "text")


def _rows(form: str, random: Random) -> list[dict[str, Any]]:
    """Return good rows of a format."""
    rows: list[dict[str, Any]] = []
    for i in range(random.choice((1, 3, 6))):
        question, answer = f"What is {i}?", f"It is {i * 7}."
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({
            "messages": {"messages": chat * random.choice((1, 2))},
            "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            "alpaca": {"instruction": question, "input": "", "output": answer, "system": "Be brief."},
            "prompt_completion": {"prompt": question, "completion": answer},
            "chats": {"prompt": chat[:1], "completion": chat[1:]},
            "text": {"text": f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>"},
        }[form])  # fmt: skip
    return rows


def prepare(good: Path) -> Callable[[], None]:
    """Read rows of every format from every kind of file."""

    def read() -> None:
        for form in FORMATS:
            rows = _rows(form, Random(0))
            for suffix in (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", *PACKED):
                path = good / f"{form}{suffix}"
                _write(path, rows)
                _load(path, {})
            _load(rows, {})

    return read


def _load(source: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = p3.ChatDataset.load(source, make_tokenizer(), **{"max_length": 64, **options})
    assert len(dataset) > 0 and dataset.statistics()["supervised_tokens"] > 0, "nothing to train on"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format that the suffix names."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows if len(rows) % 2 else {"data": rows}))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        feather.write_feather(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith(PACKED):
        unpacked = path.with_suffix("")
        _write(unpacked, rows)
        codec = {".gz": "gzip", ".bz2": "bz2", ".xz": None, ".zst": "zstd"}[path.suffix]
        with lzma.open(path, "wb") if codec is None else pyarrow.output_stream(path, compression=codec) as file:
            file.write(unpacked.read_bytes())
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
        path.write_text(text.getvalue())


def _options(random: Random) -> dict[str, Any]:
    """Draw options of ``ChatDataset.load``, now and then a wrong one."""
    formats = ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "chatml")
    options: dict[str, Any] = {
        "on_bad_row": random.choice(("error", "skip")),
        "overflow": random.choice(("truncate", "split", "error")),
        "train_on": random.choice(("assistant", "last", "all")),
        "max_length": random.choice((2, 16, 64, 4096)),
        "format": random.choice(formats) if random.random() < 0.3 else "auto",
    }
    if random.random() < 0.1:
        options["columns"] = {random.choice(("prompt", "messages", "x")): random.choice(("text", "instruction", "y"))}
    if random.random() < 0.08:
        options[random.choice((*options, "columns", "split", "streaming"))] = random.choice(PLAIN_VALUES)
    return options


def make_file(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Write a file whose JSON, table or bytes are damaged."""
    form = random.choice(FORMATS)
    rows, suffix = _rows(form, random), random.choice(SUFFIXES)
    path = own / f"rows{suffix}"
    if suffix in (".jsonl", ".ndjson") and random.random() < 0.5:
        lines = [damaged_json(row, random) if random.random() < 0.6 else ("", json.dumps(row)) for row in rows]
        path.write_text("\n".join(text for _, text in lines))
        description = "; ".join(done for done, _ in lines if done)
    elif suffix == ".json" and random.random() < 0.5:
        description, text = damaged_json(rows, random)
        path.write_text(text)
    elif suffix == ".parquet" and random.random() < 0.5:
        description = _write_odd_table(path, next(iter(rows[0])), len(rows), random)
    else:
        _write(path, rows)
        description = damage_file(path, random)
    if random.random() < 0.03 and path.is_file():
        path = path.rename(path.with_suffix(random.choice((".txt", "", ".JSONL", ".parquet", ".json", ".csv"))))
    options = _options(random)
    return f"{form}{suffix}: {description}; {options}", lambda: _load(path, options)


def _write_odd_table(path: Path, column: str, count: int, random: Random) -> str:
    """Write a Parquet file with a column of an unexpected type, or without rows or columns."""
    arrays: dict[str, pyarrow.Array] = {
        "nulls": pyarrow.nulls(count),
        "bytes": pyarrow.array([b"\xff\xfe"] * count),
        "decimals": pyarrow.array([1] * count, pyarrow.decimal128(30, 3)),
        "dates": pyarrow.array([10**9] * count, pyarrow.timestamp("s")),
        "durations": pyarrow.array([10**9] * count, pyarrow.duration("s")),
        "lists": pyarrow.array([[["a"]]] * count),
        "maps": pyarrow.array([[("a", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "text that is not UTF-8": pyarrow.array([b"\xff\xff"] * count).view(pyarrow.string()),
        "floats": pyarrow.array([float("nan")] * count),
    }
    what = random.choice(list(arrays))
    table = pyarrow.table(dict.fromkeys((column, "completion")[: random.choice((1, 2))], arrays[what]))
    if random.random() < 0.3:
        table = random.choice((table.slice(0, 0), pyarrow.table({})))
    parquet.write_table(table, path)
    return f"{column} of {what}"


def make_rows(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Put wrong values, texts and roles into Python rows, or give something that is not rows."""
    rows: Any = _rows(random.choice(FORMATS), random)
    options, done = _options(random), []
    for _ in range(random.choice((1, 1, 2, 3))):
        holder, key, path = random_node(rows, random)
        if holder is None:
            continue
        how = random.choice(("removed", "added", "role", "text", "text", "repeated", "value", "value"))
        value = random.choice((*PLAIN_VALUES, b"bytes", ("a", "b")))
        if how == "removed":
            del holder[key]
        elif how == "added" and isinstance(holder, dict):
            holder[random.choice(("train", "tool_calls", "name", "", "weight", "system"))] = value
        elif how == "repeated" and isinstance(holder, list):
            holder.insert(key, holder[random.randrange(len(holder))])
        else:
            holder[key] = random.choice({"role": ROLES, "text": TEXTS}.get(how, (value,)))
        done.append(f"{path} ({how})")
    if random.random() < 0.06:
        rows = random.choice(PLAIN_VALUES)
        done = [f"rows are {str(rows)[:40]}"]
    return f"{'; '.join(done)}; {options}", lambda: _load(rows, options)


KINDS = {"data file": (prepare, make_file, 14), "data rows": (prepare, make_rows, 12)}
