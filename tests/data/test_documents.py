"""Tokenised chats kept by ``datasets``: the same ones once, and what changed is never taken for them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from random import Random

import datasets
import pytest
from conftest import PHI3_TEMPLATE, PHI4_MINI_TEMPLATE, chat_rows, make_tokenizer
from pyarrow import Table, parquet

from phi3lora.data import documents
from phi3lora.data.dataset import ChatDataset
from phi3lora.data.template import ChatEncoder
from phi3lora.errors import DataError

ROWS = chat_rows(9)
PAIRS = [{"prompt": f"What is item {i}?", "completion": f"It is {i}.", "short": f"{i}"} for i in range(9)]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setattr(documents, "SMALLEST_BYTES", 0)
    return tmp_path / "kept"


@pytest.fixture
def encoded(monkeypatch):
    """The row numbers that were tokenised, in order."""
    numbers: list[int] = []
    encode = ChatEncoder.encode
    monkeypatch.setattr(ChatEncoder, "encode", lambda self, c, n, f: numbers.extend(n) or encode(self, c, n, f))
    return numbers


def written(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(source, tokenizer=None, **options):
    return ChatDataset.load(source, tokenizer or make_tokenizer(), **{"max_length": 64, **options})


def same(a, b):
    rows = [[d.row_number(i) for i in range(len(d))] for d in (a, b)]
    facts = [(d.statistics(), d.pad_token_id, d.end_of_turn_id, d.dropped_rows) for d in (a, b)]
    return a.fingerprint() == b.fingerprint() and rows[0] == rows[1] and facts[0] == facts[1]


SOURCES = {
    "jsonl": lambda folder: written(folder / "a.jsonl"),
    "parquet": lambda folder: (
        parquet.write_table(Table.from_pylist(ROWS), folder / "a.parquet") or folder / "a.parquet"
    ),
    "selected Dataset": lambda folder: datasets.Dataset.from_list([*chat_rows(2), *ROWS]).select(range(2, 11)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_second_load_tokenises_nothing_and_gives_the_same_documents(name, tmp_path, encoded):
    first = load(SOURCES[name](tmp_path))
    assert encoded == list(range(1, 10))
    encoded.clear()
    second = load(SOURCES[name](tmp_path))
    assert encoded == []
    assert same(first, second)
    assert same(first, load(ROWS))


def test_lists_and_small_files_are_not_kept(tmp_path, monkeypatch, encoded, empty_cache):
    load(ROWS)
    monkeypatch.setattr(documents, "SMALLEST_BYTES", 2**20)
    load(written(tmp_path / "a.jsonl"))
    load(datasets.Dataset.from_list(ROWS))
    assert len(encoded) == 27
    assert not empty_cache.exists()


def test_max_length_overflow_and_the_tokenizer_s_last_call_may_change(tmp_path, encoded):
    path, used = written(tmp_path / "a.jsonl"), make_tokenizer()
    used(["a", "b c"], padding=True, truncation=True, max_length=5)  # leaves settings in the tokenizer
    load(path, used)
    encoded.clear()
    for options in ({"max_length": 40}, {"max_length": 20, "overflow": "split"}, {"max_length": 48}):
        assert same(load(path, **options), load(ROWS, **options))
        assert encoded == list(range(1, 10)), "only the list is tokenised"
        encoded.clear()


def changed_tokenizer(added=(), **changes):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(added))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


CHANGES = {
    "train_on": lambda: {"train_on": "last"},
    "columns": lambda: {"columns": {"completion": "short"}},
    "the format": lambda: {"format": "alpaca", "columns": {"instruction": "prompt", "output": "completion"}},
    "the template": lambda: {"tokenizer": changed_tokenizer(chat_template=PHI4_MINI_TEMPLATE)},
    "eos_token": lambda: {"tokenizer": changed_tokenizer(eos_token="</s>")},
    "a token more": lambda: {"tokenizer": changed_tokenizer(added=["item"])},
    "another family member": lambda: {"tokenizer": make_tokenizer("phi-4")},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_option_tokenizer_or_template_tokenises_again(what, tmp_path, encoded):
    path, options = written(tmp_path / "a.jsonl", PAIRS), CHANGES[what]()
    load(path)
    encoded.clear()
    found = load(path, **options)
    assert encoded == list(range(1, 10))
    assert same(found, load(PAIRS, **options))


def test_another_content_or_suffix_tokenises_again_and_another_name_does_not(tmp_path, encoded):
    path = written(tmp_path / "a.jsonl")
    load(path)
    load(written(tmp_path / "b.jsonl"))
    assert len(encoded) == 9
    load(written(tmp_path / "a.json"))
    assert len(encoded) == 18
    encoded.clear()
    stamps = path.stat()
    text = path.read_text()
    path.write_text(text.replace("What is item 3?", "What is item 4?", 1))
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # not even the time of change tells
    assert path.stat().st_size == stamps.st_size
    load(path)
    assert encoded == list(range(1, 10))


def test_other_code_of_the_library_tokenises_again(tmp_path, monkeypatch, encoded):
    path = written(tmp_path / "a.jsonl")
    load(path)
    newer = tmp_path / "template.py"
    newer.write_text(documents._MODULES[2].read_text() + "# changed\n")
    monkeypatch.setattr(documents, "_MODULES", [*documents._MODULES[:2], newer, documents._MODULES[3]])
    load(path)
    assert len(encoded) == 18


class OwnTokenizer(type(make_tokenizer())):
    """A class whose code is not known to the digest."""


def own_class():
    tokenizer = make_tokenizer()
    tokenizer.__class__ = OwnTokenizer
    return tokenizer


@pytest.mark.parametrize("why", ["own class", "template that asks for the time", "caching is off"])
def test_nothing_is_kept_without_a_reliable_digest_or_cache(why, tmp_path, monkeypatch, encoded, empty_cache):
    tokenizer = own_class() if why == "own class" else make_tokenizer()
    if why == "template that asks for the time":
        tokenizer.chat_template = PHI3_TEMPLATE + "{# strftime_now #}"
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: why != "caching is off")
    for _ in range(2):
        load(written(tmp_path / "a.jsonl"), tokenizer)
    assert len(encoded) == 18
    assert not empty_cache.exists()


def test_a_cache_that_cannot_be_written_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "a file" / "kept")
    assert same(load(written(tmp_path / "a.jsonl")), load(ROWS))
    assert "cannot be cached" in caplog.text


def flipped(data, random):
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def zeroed(data, random):
    at = random.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :]


DAMAGE = {
    "a flipped bit": flipped,
    "cut": lambda data, random: data[: random.randrange(len(data))],
    "empty": lambda data, random: b"",
    "a page of zeros": zeroed,
    "longer": lambda data, random: data + b"x",
    "gone": lambda data, random: None,
}


@pytest.mark.parametrize("suffix", [".arrow", ".json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, encoded, empty_cache, caplog, damage, suffix):
    path, random = written(tmp_path / "a.jsonl"), Random(0)
    good = load(path)
    for _ in range(3 if suffix == ".arrow" else 1):
        for file in sorted(empty_cache.rglob(f"*{suffix}")):
            encoded.clear()
            caplog.clear()
            data = file.read_bytes()
            damaged = damage(data, random)
            file.unlink() if damaged is None else file.write_bytes(damaged)
            assert same(load(path), good) and len(encoded) == len(ROWS)
            assert "damaged or incomplete: tokenising again" in caplog.text
            assert same(load(path), good) and len(encoded) == len(ROWS), "it heals"


def test_a_disk_that_fills_up_while_caching_is_a_warning(tmp_path, monkeypatch, empty_cache, encoded, caplog):
    """Each row is tokenised once, and no half of a cache is left."""
    path, want = written(tmp_path / "a.jsonl", ROWS * 300), load(ROWS * 300)
    encoded.clear()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        found = load(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(found, want) and len(encoded) == len(ROWS) * 300
    assert "tokenised chats cannot be cached" in caplog.text and not list(empty_cache.rglob("*.arrow"))
    assert same(load(path), want) and same(load(path), want) and len(encoded) == len(ROWS) * 600


def test_the_cache_changes_no_error_message(tmp_path):
    path = written(tmp_path / "a.jsonl", [*ROWS[:3], {"messages": [{"role": "assistant", "content": "Hello"}]}])
    for _ in range(2):
        with pytest.raises(DataError, match="row 4: roles out of order"):
            load(path)
    assert same(load(written(path)), load(ROWS)), "the file mended"


def test_an_optional_column_that_no_row_has_is_refused_each_time_and_nothing_is_cached(tmp_path, empty_cache):
    path, columns = written(tmp_path / "a.jsonl", PAIRS), {"system": "contxt"}
    for _ in range(2):
        with pytest.raises(DataError, match=r"no row of .* has 'contxt'"):
            load(path, columns=columns)
    assert not list(empty_cache.rglob("*.arrow"))
    load(written(path, [*PAIRS, {**PAIRS[0], "contxt": "Be brief."}]), columns=columns)


def test_a_mixed_file_has_the_same_format_and_findings_from_the_cache(tmp_path):
    path = written(tmp_path / "a.jsonl", [*ROWS, *PAIRS])
    first, second = load(path), load(path)
    assert first.format == second.format == "messages, prompt_completion"
    assert first.findings == second.findings
    assert second.findings.rows_by_form == {"messages": 9, "prompt_completion": 9}


def test_a_document_that_is_too_long_is_named_when_it_comes_from_the_cache(tmp_path):
    path = written(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "Hi", "completion": "long " * 99}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"row 10: .* max_length=64"):
            load(path, overflow="error")


def keys(path) -> list[str | None]:
    dataset = datasets.Dataset.from_list(PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SMALLEST_BYTES", 0)
        return [documents.cache_key(source, make_tokenizer(), ["last"]) for source in (Path(path), dataset)]


@pytest.mark.slow
def test_the_key_is_the_same_in_another_process(tmp_path):
    path = written(tmp_path / "a.jsonl")
    folders = [Path(__file__).parent, *Path(__file__).parents[1:3]]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    probe = "import sys; from test_documents import keys; print(keys(sys.argv[1]))"
    command = [sys.executable, "-c", probe, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == str(keys(path))
    assert None not in keys(path)
