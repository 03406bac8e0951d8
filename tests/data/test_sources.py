"""What a source names: files, folders, patterns, splits and their parts, configurations, lists of sources."""

from __future__ import annotations

import json
import re
import socket

import datasets
import huggingface_hub.constants
import pandas
import pyarrow
import pytest
from conftest import chat_rows
from test_rows import TOKENIZER, load, refusal

from phi3lora.data import documents
from phi3lora.data.dataset import ChatDataset

ROWS = chat_rows(12)
PAIRS = [{"prompt": f"What is item {i}?", "completion": f"It is {i}."} for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "kept")


def written(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows=PAIRS):
    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def numbers(dataset) -> list[int]:
    return [dataset.row_number(i) for i in range(len(dataset))]


SINGLE = {
    "file": lambda folder: written(folder / "a.jsonl"),
    "list": lambda folder: ROWS,
    "generator": lambda folder: (row for row in ROWS),
    "Dataset": lambda folder: datasets.Dataset.from_list(ROWS),
    "IterableDataset": lambda folder: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "DataFrame": lambda folder: pandas.DataFrame(ROWS),
    "Table": lambda folder: pyarrow.Table.from_pylist(ROWS),
    "folder": lambda folder: written(folder / "data" / "a.jsonl").parent,
    "saved Dataset": lambda folder: saved(folder / "saved", datasets.Dataset.from_list(ROWS)),
    "split of a dict": lambda folder: {"train": ROWS, "test": PAIRS},
}
PARTS = {
    "train": range(12),
    "train[:4]": range(4),
    "train[4:]": range(4, 12),
    "train[-3:]": range(9, 12),
    "train[25%:50%]": range(3, 6),
    "train[:50%]+train[75%:]": [*range(6), *range(9, 12)],
    "train[10:]+train[:2]": [10, 11, 0, 1],
    "train[:100]": range(12),
}


def saved(path, dataset):
    dataset.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("split", PARTS)
def test_a_part_of_every_source_is_the_part_that_datasets_takes_and_keeps_its_row_numbers(kind, split, tmp_path):
    part, whole = load(SINGLE[kind](tmp_path), split=split), load(ROWS)
    assert list(part) == list(whole.select(list(PARTS[split])))
    assert numbers(part) == [i + 1 for i in PARTS[split]]
    on_the_hub = datasets.load_dataset("json", data_files=str(written(tmp_path / "hub.jsonl")), split=split)
    assert list(load(on_the_hub)) == list(part)


def test_blank_and_bad_lines_are_no_rows_of_a_part(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n{bad\n" + "\n\n".join(map(json.dumps, ROWS)))
    assert numbers(load(path, split="train[:2]", on_bad_row="skip")) == [3, 5]
    assert numbers(load(path, split="train[2:4]", on_bad_row="skip")) == [7, 9]


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("test", ["'test'", "'train' (all of it)", "'train[:100]'"]),
        ("train+test", ["'test'"]),
        ("train[", ["split='train['", "allowed"]),
        ("train[a:b]", ["split='train[a:b]'", "allowed"]),
        ("train[::2]", ["split='train[::2]'"]),
        ("train[5:5]", ["split='train[5:5]'", "nothing of 12 rows"]),
        ("train[20:]", ["nothing of 12 rows"]),
        ("train[:150%]", ["split='train[:150%]'"]),
        ("", ["split=''"]),
        ("all[:2]", ["no part or sum of 'all' (split='all[:2]')", "'train[:100]'", "or 'all' alone"]),
        ("train+all", ["no part or sum of 'all' (split='train+all')"]),
        (7, ["split=7"]),
    ],
)
def test_a_split_that_a_list_does_not_have_is_refused_with_what_is_allowed(split, words):
    message = refusal(ROWS, split=split)
    assert all(word in message for word in words), message


SPLITS = {"train_sft": ROWS[:6], "test_sft": ROWS[6:]}
DICTS = {
    "dict of lists": lambda folder: SPLITS,
    "DatasetDict": lambda folder: dataset_dict(),
    "saved DatasetDict": lambda folder: saved(folder / "saved", dataset_dict()),
    "dict of files": lambda folder: {name: written(folder / f"{name}.jsonl", rows) for name, rows in SPLITS.items()},
    "shards": lambda folder: shards(folder / "shards"),
}


def dataset_dict():
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in SPLITS.items()})


def shards(folder):
    written(folder / "data" / "train_sft-00001-of-00002.jsonl", ROWS[2:6])
    written(folder / "data" / "train_sft-00000-of-00002.jsonl", ROWS[:2])
    written(folder / "data" / "test_sft-00000-of-00001.jsonl", ROWS[6:])
    (folder / "README.md").write_text("# A dataset\n")
    return folder


@pytest.mark.parametrize("kind", DICTS)
def test_splits_of_any_name_are_read_by_name_and_never_guessed(kind, tmp_path):
    source = DICTS[kind](tmp_path)
    assert list(load(source, split="train_sft")) == list(load(ROWS[:6]))
    assert list(load(source, split="test_sft[3:]")) == list(load(ROWS[9:]))
    assert sorted(map(str, load(source, split="all"))) == sorted(map(str, load(ROWS)))
    assert list(load(source, split="test_sft+train_sft[:1]")) == list(load([*ROWS[6:], ROWS[0]]))
    for split in ("train", "validation"):
        message = refusal(source, split=split)
        assert f"'{split}'" in message
        assert all(repr(name) in message for name in SPLITS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", DICTS)
def test_every_split_that_a_refusal_allows_can_be_loaded(kind, streaming, tmp_path):
    source = DICTS[kind](tmp_path)
    for split in ("train", "all+test_sft", *([] if streaming else ["all[:2]", "test_sft[::2]"])):
        allowed = re.findall(r"'([^']+)'", refusal(source, split=split, streaming=streaming).split("allowed: ")[1])
        assert {*SPLITS, "all"} <= set(allowed) and any("[" in name for name in allowed) != streaming
        for name in [*allowed, "+".join(SPLITS)]:
            rows = load(source, split=name.replace("[10%", "[0%"), streaming=streaming)  # 10 % of six rows are none
            assert rows.take(1) if streaming else rows is not None


def test_the_only_split_is_not_taken_for_train():
    message = refusal(datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}))
    assert "'train'" in message and "'test'" in message


@pytest.mark.parametrize(
    "row",
    [PAIRS[0], {"prompt": "a", "completion": ROWS[0]["messages"]}, {"messages": "[]"}, ROWS[0]],
    ids=["text", "mixed", "JSON", "turns"],
)
def test_a_single_row_is_refused_with_the_way_out(row):
    assert "goes into a list" in refusal(row)


# Folders and patterns.


def test_the_files_of_a_folder_are_read_in_sorted_order_with_their_own_row_numbers(tmp_path, caplog):
    for name, part in (("b.jsonl", ROWS[4:6]), ("a.jsonl", ROWS[:4]), (".hidden.jsonl", ROWS)):
        written(tmp_path / "chats" / name, part)
    write_csv(tmp_path / "chats" / "c.csv")
    (tmp_path / "chats" / "notes.txt").write_text("Not data.")
    with caplog.at_level("INFO", logger="phi3lora"):
        chats = load(tmp_path / "chats")
    assert list(chats) == list(load([*ROWS[:6]])) + list(load(PAIRS))
    assert numbers(chats) == [1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 5]
    assert [chats.source(i)[-8:-1] for i in (0, 4, 6)] == ["a.jsonl", "b.jsonl", "s/c.csv"]
    assert chats.format == "messages, prompt_completion"
    assert "'notes.txt'" in caplog.text
    assert list(load(str(tmp_path / "chats" / "*.jsonl"))) == list(load(ROWS[:6]))
    assert list(load(str(tmp_path / "**" / "?.*l"))) == list(load(ROWS[:6]))
    assert list(load(tmp_path / "chats", split="train[3:7]")) == list(load(ROWS[3:6])) + list(load(PAIRS[:1]))


@pytest.mark.parametrize(
    ("train", "test"),
    [("train.jsonl", "test.jsonl"), ("my-train-1.jsonl", "my_eval_2.jsonl"), ("train/a.jsonl", "testing/a.jsonl"),
     ("chats.jsonl", "chats_test.jsonl"), ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")],
)  # fmt: skip
def test_files_named_after_a_split_are_that_split(train, test, tmp_path):
    """Above all, a test set beside the training set is not trained on."""
    written(tmp_path / train, ROWS[:9])
    written(tmp_path / test, ROWS[9:])
    assert list(load(tmp_path)) == list(load(ROWS[:9]))
    assert list(load(tmp_path, split="test")) == list(load(ROWS[9:]))


def test_hidden_files_are_read_nowhere_in_a_folder_and_its_splits_are_said(tmp_path, caplog):
    caplog.set_level("INFO", "phi3lora")
    for name in ("dev-docs.jsonl", "other.jsonl", "data/more.jsonl", "data/._more.jsonl", "train/.a.jsonl", ".b.jsonl"):
        written(tmp_path / name)
    assert len(load(tmp_path)) == 2 * len(ROWS)
    assert "several splits" in caplog.text and "'validation': " in caplog.text and "dev-docs.jsonl" in caplog.text


def test_a_pattern_reads_a_file_once_however_many_links_lead_to_it(tmp_path, caplog):
    caplog.set_level("INFO", "phi3lora")
    path = written(tmp_path / "chats" / "a.jsonl")
    (tmp_path / "chats" / "loop").symlink_to(tmp_path / "chats")
    (tmp_path / "z.jsonl").symlink_to(path)
    chats = load(str(tmp_path / "chats" / "**" / "*.jsonl"))
    assert list(chats) == list(load(ROWS)) and "each is read once" in caplog.text


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "a.jsonl")
    assert list(load("~/a.jsonl")) == list(load("~/*.jsonl")) == list(load(ROWS))


def test_a_folder_or_pattern_without_data_is_refused_with_what_was_found(tmp_path):
    assert "found: nothing" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("Not data.")
    written(tmp_path / "inner" / "a.jsonl")
    message = refusal(tmp_path)
    assert "'notes.txt'" in message and "'inner/'" in message and ".jsonl" in message and "**" in message
    assert "'notes.txt'" in refusal(str(tmp_path / "*.txt"))
    assert "found: nothing" in refusal(str(tmp_path / "*.jsonl"))


def test_a_damaged_save_to_disk_folder_is_refused_by_name(tmp_path):
    folder = saved(tmp_path / "saved", datasets.Dataset.from_list(ROWS))
    (folder / "state.json").write_text("{}")
    assert "saved" in refusal(folder)


# Names.


@pytest.mark.parametrize(
    "name", ["", " ", "/", "..", ".", "../..", "//", "\n", "two words", "a/b/c", "-a", "a--b", "é", "json", "text", "?",
             "./no_folder", "../../outside", "https://example.com/a.jsonl", "a\0b", "x" * 10_000],
)  # fmt: skip
def test_a_text_that_names_nothing_is_refused_before_any_search(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("datasets would search for files"))
    message = refusal(name)
    assert "allowed" in message
    assert repr(name)[:50] in message


@pytest.mark.parametrize("source", [None, 3, dict, b"a.jsonl", bytearray(b"a")], ids=str)
def test_what_is_no_source_is_refused(source):
    assert "allowed: a path" in refusal(source)
    assert "allowed: a path" in refusal(source, streaming=True)


def test_a_hub_name_offline_is_a_data_error_and_no_connection_is_tried(monkeypatch, tmp_path):
    connections = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # both are read once, at import
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: connections.append(a) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connections.append(address))
    message = refusal("nobody/no-such-dataset", split="validation")
    assert "nobody/no-such-dataset" in message
    assert "'validation'" in message
    assert connections == []


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_name_is_asked_for_with_its_configuration_split_and_revision(monkeypatch, streaming):
    asked = []

    def fake(path, **options):
        asked.append((path, options))
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", fake)
    options = {"split": "train_sft", "revision": "abc", "streaming": streaming}
    assert list(load("someone/chats", **options).first_window) == list(load(ROWS))
    load("someone/chats", name="small", **options)
    assert asked == [("someone/chats", options), ("someone/chats", {"name": "small", **options})]


@pytest.mark.parametrize(
    "error",
    ["Config name is missing.\nPlease pick one", "BuilderConfig 'x' not found. Available: ['en', 'de']"],
)
def test_a_missing_configuration_is_answered_with_those_there_are(error, monkeypatch):
    def fail(*args, **options):
        raise ValueError(error)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path, revision: ["en", "de"])
    message = refusal("someone/chats")
    assert "name=: 'en', 'de'" in message
    assert "\n" not in message
    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    assert "cannot be listed" in refusal("someone/chats")


def test_a_copy_of_a_hub_dataset_with_configurations_is_read_as_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    written(tmp_path / "copy" / "english.jsonl", ROWS[:5])
    written(tmp_path / "copy" / "german.jsonl", ROWS[5:])
    configs = "- config_name: en\n  data_files: english.jsonl\n- config_name: de\n  data_files: german.jsonl\n"
    (tmp_path / "copy" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert list(load(tmp_path / "copy", name="de")) == list(load(ROWS[5:]))
    message = refusal(tmp_path / "copy")
    assert "'en'" in message and "'de'" in message


@pytest.mark.parametrize("option", ["name", "revision"])
def test_a_configuration_or_revision_of_what_is_not_from_the_hub_is_refused(option, tmp_path):
    for source in (ROWS, written(tmp_path / "a.jsonl"), tmp_path, datasets.Dataset.from_list(ROWS)):
        assert f"{option}='small'" in refusal(source, **{option: "small"})


# Lists of sources.


def mixed_list(folder):
    files = [written(folder / "a.jsonl", ROWS[:4]), str(write_csv(folder / "b.csv"))]
    return [*files, datasets.Dataset.from_list(ROWS[4:]), pandas.DataFrame(PAIRS)]


def test_a_list_of_sources_is_each_source_in_its_own_format_one_after_the_other(tmp_path):
    sources = mixed_list(tmp_path)
    chats, parts = load(sources), [load(source) for source in sources]
    assert list(chats) == [document for part in parts for document in part]
    assert numbers(chats) == [number for part in parts for number in numbers(part)]
    names = [repr(str(sources[0])), repr(str(sources[1])), "source 3 (Dataset)", "source 4 (DataFrame)"]
    assert list(chats.sources) == names
    assert [chats.source(i) for i in (0, 4, 9, 17)] == names
    assert chats.row_name(9) == "row 1 of source 3 (Dataset)" and parts[0].row_name(0) == "row 1"
    statistics = [part.statistics() for part in (chats, *parts)]
    for count in ("documents", "tokens", "supervised_tokens", "truncated", "dropped", "bad"):
        assert statistics[0][count] == sum(s[count] for s in statistics[1:])
    assert f"{names[0]} 4, {names[1]} 5" in chats.summary()
    assert chats.largest_token_id() == max(part.largest_token_id() for part in parts)
    assert list(load(sources, split="train[:2]")) == [d for part in parts for d in part.select([0, 1])]


def test_an_error_about_one_of_several_sources_names_it(tmp_path):
    bad = [{"prompt": "a"}]
    for rows, word in ((bad, "row 1"), ([], "empty")):
        path = written(tmp_path / "bad.jsonl", rows)
        message = refusal([written(tmp_path / "a.jsonl"), path])
        assert "bad.jsonl" in message and word in message
    assert "source 2 (DataFrame): row 1" in refusal([tmp_path / "a.jsonl", pandas.DataFrame(bad)])
    assert "no such file" in refusal([tmp_path / "a.jsonl", "missing.jsonl"])


@pytest.mark.parametrize(("name", "said"), [("chats", "has no file ending"), ("chats.txt", "ends in '.txt'")])
def test_a_file_of_another_ending_or_without_one_is_refused(name, said, tmp_path):
    assert f"{name}' {said}; allowed: .jsonl" in refusal(written(tmp_path / name))


def test_rows_of_the_same_number_in_different_sources_are_different_rows(tmp_path):
    long = [{"prompt": "Hi", "completion": f"hello {i}! " * 40} for i in range(4)]
    frames = [pandas.DataFrame(long), pandas.DataFrame(long[::-1])]
    chats = ChatDataset.load(frames, TOKENIZER, max_length=40, overflow="split")
    assert len(chats) > 3 * 8
    train, held_out = chats.split(0.25, seed=1)
    rows = [{(side.source(i), side.row_number(i)) for i in range(len(side))} for side in (train, held_out)]
    assert not rows[0] & rows[1]
    assert (len(rows[0]), len(rows[1])) == (6, 2)
    path = written(tmp_path / "a.jsonl", long)
    twice = ChatDataset.load([path, path], TOKENIZER, max_length=40, overflow="split")
    assert twice.sources == (repr(str(path)),)
    rows = [{side.row_number(i) for i in range(len(side))} for side in twice.split(0.5)]
    assert not rows[0] & rows[1], "a file that is listed twice has each row once"


def test_each_source_of_a_list_is_cached_on_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(documents, "SMALLEST_BYTES", 0)
    tokenised = []
    encode = documents.RowTokenizer._encode
    spy = lambda self, rows, *rest: encode(self, (tokenised.append(n) or (n, row) for n, row in rows), *rest)  # noqa: E731
    monkeypatch.setattr(documents.RowTokenizer, "_encode", spy)
    sources = mixed_list(tmp_path)[:3]
    first = load(sources)
    assert len(tokenised) == 17
    del tokenised[:]
    again, part = load(sources[::-1]), load(sources[0])
    assert tokenised == []
    assert sorted(map(str, again)) == sorted(map(str, first)) and list(part) == list(first)[:4]
    cut = load(sources[2], split="train[2:4]")
    assert tokenised == [3, 4], "a part is not the whole"
    assert numbers(load(sources[2], split="train[2:4]")) == numbers(cut) == [3, 4]
    assert tokenised == [3, 4]


@pytest.mark.parametrize("source", [["a.jsonl", ROWS[0]], [ROWS, ROWS], ["a.jsonl", 3]], ids=["row", "lists", "number"])
def test_a_list_of_sources_and_rows_is_refused(source):
    assert "row 1 is a" in refusal(source)
