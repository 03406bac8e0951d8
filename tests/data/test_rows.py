"""The same chats from every kind of source; a source that cannot be read is named with its line."""

import csv
import json
import socket

import datasets
import huggingface_hub.constants
import pyarrow
import pytest
from conftest import chat_rows, make_tokenizer
from pyarrow import parquet

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.rows import SUFFIXES, read_rows
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
    "chats.ndjson": lambda path: written(path, JSONL),
    "CHATS.JSONL": lambda path: written(path, JSONL),
    "list.json": lambda path: written(path, json.dumps(ROWS, indent=1)),
    "data.json": lambda path: written(path, json.dumps({"data": ROWS})),
    "misnamed_jsonl.json": lambda path: written(path, JSONL),
    "chats.csv": write_csv,
    "chats.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path) or path,
}
OBJECTS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "dict of splits": lambda: {"train": ROWS, "test": []},
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_form_gives_the_documents_of_the_list_of_dicts(name, tmp_path):
    path = WRITERS[name](tmp_path / name)
    assert list(load(path)) == list(load(str(path))) == list(load(ROWS))


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
    assert [row for _, row in read_rows(path)] == expected
    assert list(load(path)) == list(load(expected))


@pytest.mark.parametrize("row", [ROWS[0], {"prompt": "a", "completion": "b"}], ids=["one column", "two columns"])
def test_a_json_file_with_a_single_row_is_a_dataset_of_one(row, tmp_path):
    """One line of JSONL, misnamed: its list of messages is a chat, not a list of rows."""
    assert list(load(written(tmp_path / "one.json", json.dumps(row)))) == list(load([row]))


def test_a_row_of_jsonl_has_the_number_of_its_line(tmp_path):
    path = written(tmp_path / "gaps.jsonl", "\n" + JSONL.replace("\n", "\n\n"))
    assert [number for number, _ in read_rows(path)] == [2, 4, 6, 8, 10, 12, 14]
    dataset = load(path)
    assert [dataset.row_number(i) for i in range(len(dataset))] == [2, 4, 6, 8, 10, 12, 14]


def test_rows_of_other_sources_are_counted_from_one(tmp_path):
    assert [number for number, _ in read_rows(ROWS)] == [1, 2, 3, 4, 5, 6, 7]
    assert [number for number, _ in read_rows(write_csv(tmp_path / "a.csv"))] == [1, 2, 3, 4, 5, 6, 7]


def test_a_first_row_of_unknown_format_is_named_by_its_line(tmp_path):
    path = written(tmp_path / "late.jsonl", '\n\n{"question": "a"}\n')
    message = refusal(path)
    assert "'question'" in message
    assert "row 3" in message


@pytest.mark.parametrize("name", ["broken.jsonl", "misnamed.json"])
def test_bad_json_is_named_with_file_and_line(name, tmp_path):
    lines = JSONL.splitlines(keepends=True)[:3]
    path = written(tmp_path / name, lines[0] + lines[1] + lines[2][:30] + "\n")
    message = refusal(path)
    assert name in message
    assert "row 3" in message
    assert "not JSON" in message


def test_a_broken_json_list_is_named_with_the_line_of_the_error(tmp_path):
    message = refusal(written(tmp_path / "broken.json", '[{"prompt": "a"},\n {"prompt":\n]'))
    assert "broken.json" in message
    assert "line 3" in message


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"text"', "null"])
def test_a_line_that_is_json_but_no_object_is_refused(line, tmp_path):
    message = refusal(written(tmp_path / "rows.jsonl", JSONL + line + "\n"))
    assert "row 8" in message
    assert "object" in message


@pytest.mark.parametrize("text", ["3", '"text"', "null", '["a", "b"]'])
def test_a_json_file_that_holds_no_objects_is_refused(text, tmp_path):
    assert "allowed" in refusal(written(tmp_path / "odd.json", text))


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl"])
def test_json_nested_past_the_recursion_limit_is_a_data_error(name, tmp_path):
    assert name in refusal(written(tmp_path / name, "[" * 100_000 + "]" * 100_000))


@pytest.mark.parametrize("name", ["latin.jsonl", "latin.json", "latin.csv"])
def test_a_file_that_is_not_utf_8_is_refused_by_name(name, tmp_path):
    text = 'prompt,completion\n"café",b\n' if name.endswith("csv") else '{"prompt": "café", "completion": "b"}\n'
    message = refusal(written(tmp_path / name, text.encode("latin-1")))
    assert name in message
    assert "0xe9" in message


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_said_to_be_missing(suffix, tmp_path):
    message = refusal(tmp_path / f"nowhere{suffix}")
    assert "no such file" in message
    assert f"nowhere{suffix}" in message


@pytest.mark.parametrize("name", ["chats.txt", "chats"])
def test_a_file_with_another_suffix_is_refused_and_the_suffixes_are_listed(name, tmp_path):
    message = refusal(written(tmp_path / name, JSONL))
    assert name in message
    assert all(suffix in message for suffix in SUFFIXES)


EMPTY = {"a.jsonl": "", "blank.jsonl": "\n \n", "a.json": "[]", "head.csv": "prompt,completion\n", "nothing.csv": ""}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file_is_refused_by_name(name, tmp_path):
    assert name in refusal(written(tmp_path / name, EMPTY[name]))


@pytest.mark.parametrize("source", [[], iter(()), {"train": []}], ids=["list", "iterator", "splits"])
def test_an_empty_object_is_refused(source):
    assert "empty" in refusal(source)


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"\x00" * 64])
def test_a_broken_parquet_file_is_refused_by_name(content, tmp_path):
    message = refusal(written(tmp_path / "broken.parquet", content))
    assert "broken.parquet" in message
    assert "Parquet" in message


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"\xff\xff"]).view(pyarrow.string()),
        pyarrow.array([10**13], pyarrow.timestamp("s")),
        pyarrow.array([2**62], pyarrow.duration("s")),
    ],
    ids=["not UTF-8", "past the year 9999", "too long a time"],
)
def test_parquet_values_that_python_cannot_hold_are_refused_by_name(column, tmp_path):
    path = tmp_path / "odd.parquet"
    parquet.write_table(pyarrow.table({"prompt": column, "completion": column}), path)
    assert "odd.parquet" in refusal(path)


def test_a_csv_with_an_open_quote_is_refused_by_name(tmp_path):
    assert "open.csv" in refusal(written(tmp_path / "open.csv", 'prompt,completion\na,b\n"c,d\n'))


def test_a_row_that_is_no_dict_is_named_with_its_number():
    message = refusal([ROWS[0], "just text", ROWS[1]])
    assert "row 2" in message
    assert "just text" in message


@pytest.mark.parametrize("source", [5, None, object], ids=repr)
def test_a_source_that_cannot_be_one_is_a_data_error(source):
    assert "allowed: a path" in refusal(source)


@pytest.mark.parametrize("name", ["nobody/no-such-dataset", "no such name!", "./no_folder"])
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


def test_a_hub_name_is_asked_for_with_its_split_and_revision(monkeypatch):
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert list(load("someone/chats", split="train_sft", revision="abc")) == list(load(ROWS))
    assert asked == {"name": "someone/chats", "split": "train_sft", "revision": "abc", "streaming": False}
