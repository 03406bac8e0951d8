"""Every kind of source gives the same chats; a row that cannot be read or trained on is named, or skipped."""

import bz2
import csv
import gzip
import json
import logging
import lzma
import math
import subprocess
import sys
import tracemalloc
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from conftest import chat_rows, make_tokenizer
from pyarrow import feather, ipc, parquet

from phi3lora.data.compression import COMPRESSIONS, open_unpacked
from phi3lora.data.dataset import ChatDataset
from phi3lora.data.rows import SUFFIXES, BadRows, read_rows
from phi3lora.errors import DataError

TOKENIZER = make_tokenizer()
ROWS = chat_rows(7)
ROWS[2]["messages"][0]["content"] = 'Où est l\'été ? 😀\u2028\tnext\nline, with "quotes"'
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def load(source, **options) -> ChatDataset:
    return ChatDataset.load(source, TOKENIZER, max_length=256, **options)


def refusal(source, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(source, **options)
    return str(caught.value)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["id", "messages"])
        table.writerows([i, json.dumps(row["messages"])] for i, row in enumerate(ROWS))
    return path


IDS = list(range(len(ROWS)))
TABLE = pyarrow.Table.from_pylist(ROWS)
FRAME = pandas.DataFrame(ROWS)


class ArrowStream:
    """What polars and duckdb give: a table that is known by Arrow's protocol only."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


def write_stream(path):
    with ipc.new_stream(path, TABLE.schema) as file:
        file.write_table(TABLE)
    return path


def to_json(path, orient):
    FRAME.to_json(path, orient=orient)
    return path


WRITERS = {
    "chats.jsonl": lambda path: written(path, JSONL),
    "no_final_line_end.jsonl": lambda path: written(path, JSONL.rstrip("\n")),
    "byte_order_mark.jsonl": lambda path: written(path, b"\xef\xbb\xbf" + JSONL.encode()),
    "windows_line_ends.jsonl": lambda path: written(path, JSONL.replace("\n", "\r\n")),
    "blank_lines.jsonl": lambda path: written(path, "\n" + JSONL.replace("\n", "\n  \n")),
    "CHATS.NDJSON": lambda path: written(path, JSONL),
    "list.json": lambda path: written(path, json.dumps(ROWS, indent=1)),
    "data.json": lambda path: written(path, json.dumps({"data": ROWS})),
    "misnamed_jsonl.json": lambda path: written(path, JSONL),
    "chats.csv": write_csv,
    "byte_order_mark.csv": lambda path: write_csv(path, encoding="utf-8-sig"),
    "chats.tsv": lambda path: write_csv(path, "\t"),
    "chats.parquet": lambda path: parquet.write_table(TABLE, path) or path,
    "file.arrow": lambda path: feather.write_feather(TABLE, path, compression="uncompressed") or path,
    "stream.arrow": lambda path: write_stream(path),
    "several.json": lambda path: written(path, json.dumps({"version": "1.0", "data": ROWS, "license": None})),
    "columnar.json": lambda path: written(path, json.dumps({"id": IDS, "messages": [r["messages"] for r in ROWS]})),
    "columns.json": lambda path: FRAME.to_json(path) or path,  # pandas' own default
    **{f"{orient}.json": partial(to_json, orient=orient) for orient in ("records", "index", "split", "table")},
}
OBJECTS = {
    "DataFrame": lambda: FRAME,
    "DataFrame with a named index": lambda: FRAME.assign(a=1).set_index("messages"),
    "Table": lambda: TABLE,
    "Arrow stream of another library": lambda: ArrowStream(TABLE),
    "formatted Dataset": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
    "Dataset as pandas": lambda: datasets.Dataset.from_list(ROWS).with_format("pandas"),
    "columns": lambda: {"messages": [row["messages"] for row in ROWS], "id": IDS},
    "numpy arrays in cells": lambda: [{"messages": np.array(row["messages"])} for row in ROWS],
    "tuple": lambda: tuple(ROWS),
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "dict of splits": lambda: {"train": ROWS, "test": []},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_form_gives_the_documents_of_the_list_of_dicts(name, tmp_path):
    assert list(load(WRITERS[name](tmp_path / name))) == list(load(ROWS))


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def pack(content: bytes, compression: str) -> bytes:
    if compression == ".zst":
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return PACKERS[compression](content)


def packed(path, compression):
    return written(path.with_name(path.name + compression.upper()), pack(path.read_bytes(), compression))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_a_packed_file_gives_the_documents_of_the_file(name, compression, tmp_path):
    writer = {"a.jsonl": "chats.jsonl", "a.json": "list.json", "a.arrow": "stream.arrow"}.get(name, f"chats{name[1:]}")
    path = packed(WRITERS[writer](tmp_path / name), compression)
    assert list(load(path)) == list(load(ROWS))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_packed_file_that_is_cut_or_not_packed_is_refused_by_name(compression, tmp_path):
    path = packed(written(tmp_path / "a.jsonl", JSONL), compression)
    for content in (path.read_bytes()[:-9], JSONL.encode()):
        assert "a.jsonl" in refusal(written(path, content))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_each_part_of_a_packed_file_is_read_and_a_damaged_one_is_refused(compression, tmp_path):
    path, part = tmp_path / f"a.jsonl{compression}", pack(JSONL.encode(), compression)
    padding = b"\0" * 4 if compression == ".xz" else b""
    assert list(load(written(path, part + padding + pack(b"", compression) + part))) == [*load(ROWS), *load(ROWS)]
    for damaged in (part[:-1], b"\xff" * 4 + part[4:], JSONL.encode()):
        assert repr(str(path)) in refusal(written(path, part + damaged))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 100_000])
def test_a_file_is_unpacked_to_its_bytes_in_reads_of_any_size(size, compression, tmp_path):
    content = np.random.default_rng(0).bytes(size) + b"a" * size
    path = written(tmp_path / "packed", pack(content, compression) * 2)
    with open_unpacked(path, compression) as file:
        assert b"".join(iter(lambda: file.read(777), b"")) == 2 * content


def test_a_key_that_an_object_has_twice_with_two_values_is_refused(tmp_path):
    chat = '{"prompt": "Q", "completion": "A", "id": NaN, %s}'
    for text in ('"prompt": "P"', '"meta": {"a": 1, "a": 2}', '"id": 3', '"prompt": null'):
        for name in ("a.jsonl", "a.json"):
            assert "twice" in refusal(written(tmp_path / name, chat % text))
    assert len(load(written(tmp_path / "a.jsonl", chat % '"prompt": "Q", "id": NaN'))) == 1


def test_what_a_file_of_one_list_of_rows_has_beside_it_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "phi3lora")
    path = written(tmp_path / "a.json", json.dumps({"version": 2, "system": "Be brief.", "data": ROWS}))
    assert list(load(path)) == list(load(ROWS))
    assert "its other keys are not used: 'version', 'system'" in caplog.text
    caplog.clear()
    load(written(path, json.dumps({"data": ROWS})))
    assert "not used" not in caplog.text


def test_a_series_is_no_table():
    assert "row 1 is a list" in refusal(FRAME["messages"])


def test_zstd_without_its_codec_is_refused_with_the_way_out(tmp_path, monkeypatch):
    path = packed(written(tmp_path / "a.jsonl", JSONL), ".zst")
    monkeypatch.setattr(pyarrow, "Codec", SimpleNamespace(is_available=lambda name: False))
    assert "unpack the file" in refusal(path)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_form_gives_the_documents_of_the_list_of_dicts(name):
    assert list(load(OBJECTS[name]())) == list(load(ROWS))


def test_plain_columns_of_a_csv_are_text_whatever_they_look_like(tmp_path):
    path = written(tmp_path / "plain.csv", "prompt,completion\n007,NA\n1.50,null\n")
    expected = [{"prompt": "007", "completion": "NA"}, {"prompt": "1.50", "completion": "null"}]
    assert list(read_rows(path, BadRows("error"))) == [(1, expected[0]), (2, expected[1])]
    assert list(load(str(path))) == list(load(expected))


SINGLE = {
    "one column": ROWS[0],
    "two columns": {"prompt": "a", "completion": "b"},
    "lists of messages": {"prompt": ROWS[0]["messages"][:1], "completion": ROWS[0]["messages"][1:2]},
    "messages and text": {"prompt": ROWS[0]["messages"][:1], "completion": "b"},
    "messages and tools": {"messages": ROWS[0]["messages"], "meta": {"tools": [{"name": "f"}]}},
}


@pytest.mark.parametrize("row", SINGLE.values(), ids=SINGLE)
def test_a_json_file_with_a_single_row_is_a_dataset_of_one(row, tmp_path):
    """One line of JSONL, misnamed: its list of messages is a chat, not a list of rows."""
    assert list(load(written(tmp_path / "one.json", json.dumps(row)))) == list(load([row]))


def test_a_row_of_jsonl_has_the_number_of_its_line_and_others_are_counted_from_one(tmp_path):
    path = written(tmp_path / "gaps.jsonl", "\n" + JSONL.replace("\n", "\n\n"))
    dataset = load(path)
    assert [dataset.row_number(i) for i in range(len(dataset))] == [2, 4, 6, 8, 10, 12, 14]
    assert [number for number, _ in read_rows(ROWS, BadRows("error"))] == [1, 2, 3, 4, 5, 6, 7]


def refused_files():
    """(name, content, words of the message)."""
    lines = JSONL.splitlines(keepends=True)[:3]
    cut = lines[0] + lines[1] + lines[2][:30] + "\n"
    for name in ("broken.jsonl", "misnamed.json"):
        yield name, cut, ["row 3", "not JSON"]
    yield "open.jsonl", '{"prompt": "a"\n{}\n', ["row 1", "Expecting ',' delimiter at character 16;"]
    late = '{"prompt": "' + 200 * "a" + '", "completion": \'b\'}\n'
    yield "quote.jsonl", late, ["Expecting value at character 230;", ": \\'b\\'}'"]
    yield "end.jsonl", '{"prompt": "a', ["Unterminated string starting at character 12;"]
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=1), json.dumps(ROWS[0], indent=1)):
        yield "list.jsonl", text, ["row 1", "a JSON object on each line (a list of rows goes into a .json file)"]
    yield "late.jsonl", '\n\n{"question": "a"}\n', ["row 3", "'question'"]
    yield "list.json", '[{"prompt": "a"},\n {"prompt":\n]', ["list.json", "line 3"]
    yield "line.jsonl", JSONL + "[1, 2]\n", ["line.jsonl", "row 8", "allowed: a JSON object"]
    for text in ("3", '["a", "b"]'):
        yield "odd.json", text, ["allowed"]
    for name in ("deep.json", "deep.jsonl"):
        yield name, "[" * 100_000 + "]" * 100_000, [name]
    for name in ("utf16.jsonl", "utf16.json", "utf16.csv"):
        for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
            yield name, JSONL.encode(encoding), [name, "UTF-16", "UTF-8"]
    yield "utf32.csv", "prompt,completion\na,b\n".encode("utf-32"), ["utf32.csv", "UTF-32"]
    yield "row.jsonl", JSONL.encode() + '{"prompt": "café"}'.encode("latin-1"), ["row 8", "Latin-1", "café"]
    latin = {"csv": 'prompt,completion\n"café",b\n', "json": '{"prompt": "café", "completion": "b"}\n'}
    for name in ("latin.jsonl", "latin.json", "latin.csv"):
        yield (
            name,
            latin["csv" if name.endswith("csv") else "json"].encode("latin-1"),
            [name, "0xe9", "Latin-1", "café"],
        )
    yield "chats.txt", JSONL, ["chats.txt", *SUFFIXES]
    yield "chats", JSONL, ["chats", *SUFFIXES]
    for name, text in (("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("b.csv", "")):
        yield name, text, [name]
    yield "broken.parquet", b"PAR1 but not really", ["broken.parquet", "Parquet"]
    yield "open.csv", 'prompt,completion\na,b\n"c,d\n', ["open.csv"]
    yield "quotes.csv", 'prompt,completion\n"say "hi"",b\n', ["quotes.csv", "line 2", '""hi""']
    yield "twice.csv", "prompt,completion,prompt\na,b,c\n", ["twice.csv", "'prompt'"]
    yield "semicolons.csv", "prompt;completion\na;b\n", ["semicolons.csv", "'prompt;completion'", "semicolons"]
    yield "tabs.csv", "prompt\tcompletion\na\tb\n", ["tabs.csv", "tabs", ".tsv"]
    yield "commas.tsv", "prompt,completion\na,b\n", ["commas.tsv", "commas", ".csv"]
    yield (
        "lengths.json",
        '{"prompt": ["a", "b"], "completion": ["c"]}',
        ["lengths.json", "'prompt' 2", "'completion' 1"],
    )
    yield "lists.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', ["lists.json", "'train', 'test'"]
    yield "split.json", '{"columns": ["prompt", "completion"], "data": [["a"]]}', ["split.json", "2 values"]
    yield "broken.arrow", b"ARROW1 but not really", ["broken.arrow", "Arrow"]
    yield "empty.arrow", b"", ["empty.arrow"]


@pytest.mark.parametrize(("name", "content", "words"), list(refused_files()), ids=lambda value: str(value)[:20])
def test_a_file_that_cannot_be_read_is_refused_with_its_name_or_row(name, content, words, tmp_path):
    message = refusal(written(tmp_path / name, content))
    assert all(word in message for word in words), message


SHIFTED = {
    "an unquoted comma in row 1": ("prompt,completion\nHi?,Hello, friend.\nBye?,See you.\n", 1, "3 fields", "unquoted"),
    "an unquoted comma in row 2": ("prompt,completion\nHi?,Hello.\nBye?,See you, friend.\n", 2, "3 fields", "unquoted"),
    "two commas": ("prompt,completion\nHi?,Hello.\n\nBye?,See, you, friend.\n", 2, "4 fields", "unquoted"),
    "a comma at each line's end": (
        "prompt,completion\nHi?,Hello.,\nBye?,See you.,\n",
        1,
        "3 fields",
        "ends in a comma",
    ),
    "no last field": ("prompt,completion\nHi?,Hello.\nBye?\n", 2, "1 fields", "missing"),
    "no last field at once": ("prompt,completion\nHi?\nBye?,See you.\n", 1, "1 fields", "missing"),
    "alpaca": ("instruction,input,output\nTranslate,cat,Katze,\nGo on,dog,Hund,\n", 1, "4 fields", "ends in a comma"),
    "no field of three": ("instruction,input,output\nTranslate,Katze\nGo on,,Yes.\n", 1, "2 fields", "missing"),
    "one column": ("text\nHello, you\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n", 1, "2 fields", "unquoted"),
}


@pytest.mark.parametrize(("text", "row", "count", "cause"), SHIFTED.values(), ids=SHIFTED)
def test_a_csv_row_with_more_or_fewer_fields_than_the_header_is_a_bad_row(text, row, count, cause, tmp_path):
    path = written(tmp_path / "shifted.csv", text)
    message = refusal(path)
    assert all(word in message for word in ("shifted.csv", f"row {row}:", count, cause, "header")), message
    bad = BadRows("skip")
    header, kept = text.split("\n")[0].split(","), [row for _, row in read_rows(path, bad)]
    assert row in bad.numbers
    assert all(list(row) == header and None not in row.values() for row in kept)


def test_quoted_csv_fields_hold_commas_line_ends_quotes_and_any_length(tmp_path):
    answer = 'a, "b"\n\nc;\td' + "x" * 200_000
    path = tmp_path / "quoted.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["prompt", "completion"], [answer, answer], [], ["  "], ["second", ""]])
    rows = [(1, {"prompt": answer, "completion": answer}), (2, {"prompt": "second", "completion": ""})]
    assert list(read_rows(path, BadRows("error"))) == rows


def test_csv_columns_without_a_name_are_named_as_pandas_names_them(tmp_path):
    path = written(tmp_path / "index.csv", ",prompt,completion,\n0,a,b,\n")
    expected = {"Unnamed: 0": "0", "prompt": "a", "completion": "b", "Unnamed: 3": ""}
    assert list(read_rows(path, BadRows("error"))) == [(1, expected)]
    assert list(load(path)) == list(load([{"prompt": "a", "completion": "b"}]))


NO_VALUE = {"NaN": math.nan, "pandas.NA": pandas.NA, "NaT": pandas.NaT, "numpy's NaN": np.float32("nan")}


@pytest.mark.parametrize("value", NO_VALUE.values(), ids=NO_VALUE)
def test_nan_and_its_kin_are_no_value_at_any_depth(value):
    row = {"instruction": "Hi", "input": value, "output": "Hello", "more": {"a": [value, 1.5, (value,)]}}
    expected = {"instruction": "Hi", "input": None, "output": "Hello", "more": {"a": [None, 1.5, [None]]}}
    assert list(read_rows([row], BadRows("error"))) == [(1, expected)]
    assert list(load([row])) == list(load([expected]))


def test_a_frame_with_missing_cells_is_read_as_the_rows_without_them(tmp_path):
    path = written(tmp_path / "a.csv", "instruction,input,output\nTranslate,Bonjour,Hello\nSay hi,,Hi\n")
    chats = [("Translate\n\nBonjour", "Hello"), ("Say hi", "Hi")]
    expected = list(load([{"prompt": question, "completion": answer} for question, answer in chats]))
    assert list(load(path)) == expected
    for frame in (pandas.read_csv(path), pandas.read_csv(path, dtype_backend="numpy_nullable")):
        assert list(load(frame)) == list(load(frame.to_dict("records"))) == expected
        frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
        assert list(load(tmp_path / "a.jsonl")) == expected
    nan = written(tmp_path / "nan.jsonl", '{"instruction": "Say hi", "input": NaN, "output": "Hi"}')
    assert list(load(nan)) == expected[1:]


def test_numpy_values_become_python_s():
    row = {"a": np.str_("x"), "b": np.array([[1, 2]]), "c": np.int64(3), "d": np.array(["x", None], dtype=object)}
    assert list(read_rows([row], BadRows("error"))) == [(1, {"a": "x", "b": [[1, 2]], "c": 3, "d": ["x", None]})]
    ((_, values),) = read_rows([row], BadRows("error"))
    assert [type(value) for value in values.values()] == [str, list, int, list]


@pytest.mark.parametrize(
    "table",
    [
        pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "completion", "prompt"]),
        pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"]),
    ],
    ids=["DataFrame", "Table"],
)
def test_a_table_with_two_columns_of_a_name_is_refused(table):
    assert "'prompt'" in refusal(table)


def test_pandas_is_not_imported_for_a_csv(tmp_path):
    path = write_csv(tmp_path / "a.csv")
    probe = (
        "import sys\nfrom pathlib import Path\nfrom phi3lora.data.rows import BadRows, read_rows\n"
        "before = 'pandas' in sys.modules\n"
        f"assert len(list(read_rows(Path({str(path)!r}), BadRows('error')))) == 7\n"
        "assert before or 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


@pytest.mark.parametrize("writer", ["file.arrow", "stream.arrow"])
def test_an_arrow_file_whose_offsets_are_damaged_is_read_or_refused(writer, tmp_path):
    """Arrow's own reader believes them: unchecked, they point outside the file."""
    content = WRITERS[writer](tmp_path / "a.arrow").read_bytes()
    refused = 0
    for at in range(0, len(content), 8):
        for damage in (b"\0\0\0\0", b"\xff\xff\xff\x7f"):
            path = written(tmp_path / "a.arrow", content[:at] + damage + content[at + 4 :])
            try:
                list(read_rows(path, BadRows("skip")))
            except DataError as error:
                assert "a.arrow" in str(error)
                refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "column",
    [pyarrow.array([b"\xff\xff"]).view(pyarrow.string()), pyarrow.array([2**62], pyarrow.duration("s"))],
    ids=["not UTF-8", "too long a time"],
)
def test_parquet_values_that_python_cannot_hold_are_refused_by_name(column, tmp_path):
    path = tmp_path / "odd.parquet"
    parquet.write_table(pyarrow.table({"prompt": column, "completion": column}), path)
    assert "odd.parquet" in refusal(path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jsonl", ["no such file", "nowhere.jsonl"]),
        ([], ["empty"]),
        (iter(()), ["empty"]),
        ({"train": []}, ["empty"]),
        ([ROWS[0], "just text", ROWS[1]], ["row 2", "just text"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_source_without_usable_rows_is_a_data_error(source, words):
    message = refusal(source)
    assert all(word in message for word in words), message


# Rows that cannot be trained on.

GOOD = {"prompt": "What is 2 + 2?", "completion": "4, as ever."}
BAD = {
    "not JSON": "{'prompt': 1}",
    "a list": "[1, 2]",
    "no completion": json.dumps({"prompt": "What?"}),
    "deep": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nothing supervised": '{"prompt": "a", "completion": [{"role": "assistant", "content": "b", "train": false}]}',
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("at", [0, 3, 12])
def test_a_bad_row_stops_with_its_number_or_is_left_out(tmp_path, monkeypatch, bad, at):
    monkeypatch.setattr("phi3lora.data.documents._CHATS_AT_ONCE", 10)
    lines = [json.dumps(GOOD)] * 15
    lines[at] = bad
    path = written(tmp_path / "chats.jsonl", "\n".join(lines))
    assert f"row {at + 1}" in refusal(path)
    chats = load(path, on_bad_row="skip")
    assert len(chats) == 14 and chats.bad_rows == (at + 1,)
    assert [chats.row_number(i) for i in range(len(chats))] == [n for n in range(1, 16) if n != at + 1]
    assert chats.statistics()["bad"] == 1 and "1 bad row skipped" in repr(chats)
    assert chats.fingerprint() == load([GOOD] * 14).fingerprint()


def test_skipped_rows_are_reported_once_with_the_first_few(caplog):
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert len(load([GOOD] + [{"prompt": "x"}] * 5, on_bad_row="skip")) == 1
    (record,) = [r for r in caplog.records if "bad rows" in r.message]
    caplog.clear()
    assert len(load([GOOD, {"prompt": "x"}], on_bad_row="skip")) == 1
    assert "1 bad row skipped: row 2" in caplog.text
    assert "5 bad rows skipped" in record.message and "row 2" in record.message and "2 more" in record.message


@pytest.mark.parametrize("rows", [[{"x": 1}] * 3, [GOOD | {"completion": 5}] * 2])
def test_a_source_of_bad_rows_alone_is_an_error_that_says_why(rows):
    message = refusal(rows, on_bad_row="skip")
    assert "usable" in message and "row 1" in message


def test_a_text_that_a_parquet_file_repeats_does_not_fill_the_memory(tmp_path):
    count, text = 300, "x" * 2**20  # 300 MiB in a kilobyte
    junk = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))
    table = pyarrow.table({"prompt": ["Hi"] * count, "completion": ["Hello!"] * count, "junk": junk})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 4096
    tracemalloc.start()
    rows = sum(1 for _ in read_rows(tmp_path / "a.parquet", BadRows("error")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == count and peak < 150 * 2**20
