"""Dataset files and rows, damaged, in every format and with every option: ChatDataset.load."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
from conftest import make_tokenizer
from damage import _random_node, damage_file, damaged_json, wild_value
from pyarrow import parquet

import phi3lora as p3

_TEXTS = (
    "Hello.", "", " ", "\n", "<|end|>", "<|user|>\n<|end|><|assistant|>", "a\x00b", "\ud800", "é" * 50, "x" * 3000,
    "\u202e\u200b\ufeff", "😀" * 20, "{{ 7 * 7 }}{% raw %}", "<|endoftext|>" * 50, "\r\n\t\x0b\x1c\u2028", "<|" * 99,
)  # fmt: skip
_ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "", "root", None, 1)


def _rows(form: str, random: Random) -> list[dict[str, Any]]:
    """Good rows of a format."""
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


_FORMS = ("messages", "sharegpt", "alpaca", "prompt_completion", "chats", "text")


def prepare(good: Path) -> Callable[[], None]:
    """Rows of every format from every kind of file."""

    def read() -> None:
        for form in _FORMS:
            rows = _rows(form, Random(0))
            for suffix in (".jsonl", ".json", ".parquet", ".csv"):
                path = good / f"{form}{suffix}"
                _write(path, rows)
                _load(path, {})
            _load(rows, {})

    return read


def _load(source: Any, options: dict[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = p3.ChatDataset.load(source, make_tokenizer(), **{"max_length": 64, **options})
    assert len(dataset) > 0 and dataset.statistics()["supervised_tokens"] > 0, "nothing to train on"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """As the suffix says."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows if len(rows) % 2 else {"data": rows}))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
        path.write_text(text.getvalue())


def _options(random: Random) -> dict[str, Any]:
    """Right ones, and now and then a wild one."""
    options: dict[str, Any] = {
        "on_bad_row": random.choice(("error", "skip")),
        "overflow": random.choice(("truncate", "split", "error")),
        "train_on": random.choice(("assistant", "last", "all")),
        "max_length": random.choice((2, 16, 64, 4096)),
    }
    if random.random() < 0.3:
        options["format"] = random.choice(
            ("auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "chatml")
        )
    if random.random() < 0.1:
        options["columns"] = {random.choice(("prompt", "messages", "x")): random.choice(("text", "instruction", "y"))}
    if random.random() < 0.08:
        names = (*options, "format", "columns", "split", "streaming", "revision")
        options[random.choice(names)] = wild_value(random)
    return options


def make_file(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """A file whose JSON, table or bytes are damaged."""
    form = random.choice(_FORMS)
    rows, suffix = _rows(form, random), random.choice((".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".ndjson"))
    path = own / f"rows{suffix}"
    said = f"{form}{suffix}: "
    if suffix in (".jsonl", ".ndjson", ".json") and random.random() < 0.5:
        parts = [damaged_json(row, random) if random.random() < 0.6 else ("", json.dumps(row)) for row in rows]
        if suffix == ".json":
            what, text = damaged_json(rows, random)
        else:
            what, text = "; ".join(p[0] for p in parts), "\n".join(p[1] for p in parts)
        path.write_bytes(text.encode(errors="surrogatepass"))
        said += what
    elif suffix == ".parquet" and random.random() < 0.5:
        said += _odd_table(path, rows, random)
    else:
        _write(path, rows)
        said += damage_file(path, random)
    if random.random() < 0.03:
        renamed = path.with_suffix(random.choice((".txt", "", ".JSONL", ".parquet", ".json", ".csv", ".\ud800")))
        path = path.rename(renamed) if path.exists() and "\ud800" not in renamed.name else renamed
    options = _options(random)
    return f"{said}; {_said(options)}", lambda: _load(path, options)


def _odd_table(path: Path, rows: list[dict[str, Any]], random: Random) -> str:
    """A Parquet file of other types."""
    column, number = next(iter(rows[0])), len(rows)
    arrays: dict[str, pyarrow.Array] = {
        "nulls": pyarrow.nulls(number),
        "bytes": pyarrow.array([b"\xff\xfe"] * number),
        "decimals": pyarrow.array([1] * number, pyarrow.decimal128(30, 3)),
        "dates": pyarrow.array([2**62] * number, pyarrow.timestamp("ns", "Nowhere/Land")),
        "long dates": pyarrow.array([10**13] * number, pyarrow.timestamp("s")),
        "durations": pyarrow.array([2**62] * number, pyarrow.duration("s")),
        "lists": pyarrow.array([[["a"]]] * number),
        "maps": pyarrow.array([[("a", 1)]] * number, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "not UTF-8": pyarrow.array([b"\xff\xff"] * number).view(pyarrow.string()),
        "floats": pyarrow.array([float("nan")] * number),
    }
    what = random.choice(list(arrays))
    tables = [pyarrow.table({column: arrays[what]}), pyarrow.table({column: arrays[what], "completion": arrays[what]})]
    table = random.choice(tables)
    if random.random() < 0.3:
        table = random.choice(
            (table.slice(0, 0), pyarrow.table({}), pyarrow.table([arrays[what]] * 2, names=["prompt"] * 2))
        )
    parquet.write_table(table, path)
    return f"{column} of {what}"


def make_rows(random: Random, good: Path, own: Path) -> tuple[str, Callable[[], None]]:
    """Python rows with wild values, texts and roles in them; or a source that is none."""
    rows: Any = _rows(random.choice(_FORMS), random)
    options, said = _options(random), []
    for _ in range(random.choice((1, 1, 2, 3))):
        holder, key, path = _random_node(rows, random)
        if holder is None:
            continue
        how = random.randrange(8)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[random.choice(("train", "tool_calls", "name", "", None, 1, "weight", "system"))] = wild_value(random)
        elif how == 2:
            holder[key] = random.choice(_ROLES)
        elif how in (3, 4):
            holder[key] = random.choice(_TEXTS)
        elif how == 5 and isinstance(holder, list):
            holder.insert(key, holder[random.randrange(len(holder))])
        else:
            holder[key] = wild_value(random)
        said.append(f"{path} ({how})")
    if random.random() < 0.06:
        rows = wild_value(random)
        said = [f"rows are a {type(rows).__name__}"]
        options["on_bad_row"] = "error"  # there is no end of bad rows in some
    return f"{'; '.join(said)}; {_said(options)}", lambda: _load(rows, options)


def _said(options: dict[str, Any]) -> str:
    plain = {name: value if isinstance(value, (str, int)) else type(value).__name__ for name, value in options.items()}
    return ascii({name: value if value.__sizeof__() < 200 else "..." for name, value in plain.items()})


KINDS = {"data file": (prepare, make_file, 14), "data rows": (prepare, make_rows, 12)}
