"""Every kind of source gives the same chats; a row that cannot be read or trained on is named, or skipped."""

import csv
import json
import logging
import socket

import datasets
import huggingface_hub.constants
import pyarrow
import pytest
from conftest import chat_rows, make_tokenizer
from pyarrow import parquet

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


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "messages"])
        table.writerows([i, json.dumps(row["messages"])] for i, row in enumerate(ROWS))
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
    "chats.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path) or path,
}
OBJECTS = {
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "dict of splits": lambda: {"train": ROWS, "test": []},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_form_gives_the_documents_of_the_list_of_dicts(name, tmp_path):
    assert list(load(WRITERS[name](tmp_path / name))) == list(load(ROWS))


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_form_gives_the_documents_of_the_list_of_dicts(name):
    assert list(load(OBJECTS[name]())) == list(load(ROWS))


def test_a_dataset_dict_gives_the_split_asked_for_and_lists_its_splits_otherwise():
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:4]), "test": datasets.Dataset.from_list(ROWS[4:])}
    )
    assert list(load(splits)) == list(load(ROWS[:4]))
    assert list(load(splits, split="test")) == list(load(ROWS[4:]))
    message = refusal(splits, split="validation")
    assert "'validation'" in message
    assert "'train', 'test'" in message


def test_plain_columns_of_a_csv_are_text_whatever_they_look_like(tmp_path):
    path = written(tmp_path / "plain.csv", "prompt,completion\n007,NA\n1.50,null\n")
    expected = [{"prompt": "007", "completion": "NA"}, {"prompt": "1.50", "completion": "null"}]
    assert list(read_rows(path, BadRows("error"))) == [(1, expected[0]), (2, expected[1])]
    assert list(load(str(path))) == list(load(expected))


@pytest.mark.parametrize("row", [ROWS[0], {"prompt": "a", "completion": "b"}], ids=["one column", "two columns"])
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
    yield "late.jsonl", '\n\n{"question": "a"}\n', ["row 3", "'question'"]
    yield "list.json", '[{"prompt": "a"},\n {"prompt":\n]', ["list.json", "line 3"]
    yield "line.jsonl", JSONL + "[1, 2]\n", ["line.jsonl", "row 8", "allowed: a JSON object"]
    for text in ("3", '["a", "b"]'):
        yield "odd.json", text, ["allowed"]
    for name in ("deep.json", "deep.jsonl"):
        yield name, "[" * 100_000 + "]" * 100_000, [name]
    latin = {"csv": 'prompt,completion\n"café",b\n', "json": '{"prompt": "café", "completion": "b"}\n'}
    for name in ("latin.jsonl", "latin.json", "latin.csv"):
        yield name, latin["csv" if name.endswith("csv") else "json"].encode("latin-1"), [name, "0xe9"]
    yield "chats.txt", JSONL, ["chats.txt", *SUFFIXES]
    yield "chats", JSONL, ["chats", *SUFFIXES]
    for name, text in (("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("b.csv", "")):
        yield name, text, [name]
    yield "broken.parquet", b"PAR1 but not really", ["broken.parquet", "Parquet"]
    yield "open.csv", 'prompt,completion\na,b\n"c,d\n', ["open.csv"]


@pytest.mark.parametrize(("name", "content", "words"), list(refused_files()), ids=lambda value: str(value)[:20])
def test_a_file_that_cannot_be_read_is_refused_with_its_name_or_row(name, content, words, tmp_path):
    message = refusal(written(tmp_path / name, content))
    assert all(word in message for word in words), message


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
        (None, ["allowed: a path"]),
        (dict, ["allowed: a path"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_source_without_usable_rows_is_a_data_error(source, words):
    message = refusal(source)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["nobody/no-such-dataset", "./no_folder"])
def test_a_hub_name_offline_is_a_data_error_and_no_connection_is_tried(name, monkeypatch, tmp_path):
    connections = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # both are read once, at import
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: connections.append(a) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connections.append(address))
    message = refusal(name, split="validation")
    assert name in message
    assert "'validation'" in message
    assert connections == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_is_asked_for_with_its_split_and_revision(monkeypatch, streaming):
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", fake)
    chats = load("someone/chats", split="train_sft", revision="abc", streaming=streaming)
    assert list(chats.first_window) == list(load(ROWS))
    assert asked == {"name": "someone/chats", "split": "train_sft", "revision": "abc", "streaming": streaming}


# Rows that cannot be trained on.

GOOD = {"prompt": "What is 2 + 2?", "completion": "4, as ever."}
BAD = {
    "not JSON": "{'prompt': 1}",
    "a list": "[1, 2]",
    "no completion": json.dumps({"prompt": "What?"}),
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
    assert chats.statistics()["bad"] == 1 and "1 bad rows skipped" in repr(chats)
    assert chats.fingerprint() == load([GOOD] * 14).fingerprint()


def test_skipped_rows_are_reported_once_with_the_first_few(caplog):
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert len(load([GOOD] + [{"prompt": "x"}] * 5, on_bad_row="skip")) == 1
    (record,) = [r for r in caplog.records if "bad rows" in r.message]
    assert "5 bad rows skipped" in record.message and "row 2" in record.message and "2 more" in record.message


@pytest.mark.parametrize("rows", [[{"x": 1}] * 3, [GOOD | {"completion": 5}] * 2])
def test_a_source_of_bad_rows_alone_is_an_error_that_says_why(rows):
    message = refusal(rows, on_bad_row="skip")
    assert "usable" in message and "row 1" in message
