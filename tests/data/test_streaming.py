"""The windows of a stream: the documents of the whole dataset in their order, from any number on, pass after pass."""

from __future__ import annotations

import itertools
import threading

import datasets
import pandas
import pytest
from conftest import chat_rows, make_tokenizer

import phi3lora as p3

ROWS = chat_rows(23)
BUFFER = 5  # 5 windows a pass, the last of 3 rows


def stream(source=ROWS, buffer_size=BUFFER, **options) -> p3.ChatStream:
    return p3.ChatDataset.load(
        source, make_tokenizer(), max_length=64, streaming=True, buffer_size=buffer_size, **options
    )


def whole(source=ROWS, **options) -> p3.ChatDataset:
    return p3.ChatDataset.load(source, make_tokenizer(), max_length=64, **options)


@pytest.mark.parametrize("kind", ["list", "IterableDataset"])
def test_the_windows_of_a_pass_are_the_dataset(kind):
    source = ROWS if kind == "list" else datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)
    for _ in range(2):  # a stream can be read again
        windows = list(stream(source).windows(endless=False))
        assert [number for number, _ in windows] == [0, 1, 2, 3, 4]
        assert [len(window) for _, window in windows] == [5, 5, 5, 5, 3]
        assert list(itertools.chain.from_iterable(window for _, window in windows)) == list(whole())
    numbers = [window.row_number(i) for _, window in windows for i in range(len(window))]
    assert numbers == list(range(1, 24))


PAIRS = [{"prompt": f"What is item {i}?", "completion": f"It is {i}."} for i in range(8)]


def several(folder):
    path = folder / "pairs.csv"
    pandas.DataFrame(PAIRS).to_csv(path, index=False)
    return [datasets.Dataset.from_list(ROWS), path, datasets.Dataset.from_list(ROWS[:4])]


@pytest.mark.parametrize("buffer_size", [1, 5, 9, 100])
def test_several_sources_are_streamed_one_after_the_other(buffer_size, tmp_path):
    expected = whole(several(tmp_path))
    windows = dict(itertools.islice(stream(several(tmp_path), buffer_size).windows(), 80))
    passes = -(-35 // buffer_size)
    assert [document for n in range(passes) for document in windows[n]] == list(expected)
    facts = [(w.source(i), w.row_number(i)) for n in range(passes) for w in [windows[n]] for i in range(len(w))]
    assert facts == [(expected.source(i), expected.row_number(i)) for i in range(len(expected))]
    for start in (1, 4, 50):
        for number, window in itertools.islice(stream(several(tmp_path), buffer_size).windows(start), 3):
            assert window.fingerprint() == windows[number].fingerprint()
    assert list(stream(several(tmp_path)).skip(25).take(8)) == list(expected)[25:33]


def test_a_bad_row_of_one_of_several_streamed_sources_names_it(tmp_path, caplog):
    sources = [*several(tmp_path)[:2], datasets.Dataset.from_list([{"messages": "none"}] * 2), *several(tmp_path)[2:]]
    with pytest.raises(p3.DataError, match=r"source 3 \(Dataset\): row 1"):
        list(stream(sources).windows(endless=False))
    windows = [window for _, window in stream(sources, 30, on_bad_row="skip").windows(endless=False)]
    assert sum(map(len, windows)) == 35
    assert "left out: source 3 (Dataset)" in caplog.text


def test_a_folder_is_streamed(tmp_path):
    pandas.DataFrame(PAIRS).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(PAIRS[::-1]).to_csv(tmp_path / "b.csv.gz", index=False)
    assert list(stream(tmp_path).take(20)) == list(whole([*PAIRS, *PAIRS[::-1]]))


@pytest.mark.parametrize("split", ["train[:10]", "train[10%:]", "train[1:]+train[:1]"])
def test_a_part_of_a_stream_is_refused_with_the_way_out(split):
    for source in (ROWS, "someone/chats"):
        with pytest.raises(p3.DataError, match=r"take\(100\) and skip\(100\)"):
            stream(source, split=split)


@pytest.mark.parametrize("start", [0, 1, 5, 13, 25])
@pytest.mark.parametrize("buffer_size", [5, 23, 40])
def test_a_window_depends_on_its_number_alone(start, buffer_size):
    made = dict(itertools.islice(stream(buffer_size=buffer_size).windows(), 30))
    for number, window in itertools.islice(stream(buffer_size=buffer_size).windows(start), 4):
        assert window.fingerprint() == made[number].fingerprint()
        assert all(window.row_number(i) == made[number].row_number(i) for i in range(len(window)))


@pytest.mark.parametrize("kind", ["Parquet files", "Dataset"])
@pytest.mark.parametrize("skipped", [0, 3])
def test_rows_before_the_start_are_not_read_where_the_source_tells_their_number(kind, skipped, tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    for name, part in {"a": ROWS[:13], "b": ROWS[13:]}.items():
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet", row_group_size=4)
    source = tmp_path if kind == "Parquet files" else [datasets.Dataset.from_list(r) for r in (ROWS[:13], ROWS[13:])]

    def chats() -> p3.ChatStream:
        return stream(source, 3).skip(skipped) if skipped else stream(source, 3)

    made = dict(itertools.islice(chats().windows(), 30))
    read, iter_batches, select = [], parquet.ParquetFile.iter_batches, datasets.Dataset.select

    def noted_batches(self, *arguments, row_groups, **options):
        read.append(4 * row_groups[0])
        return iter_batches(self, *arguments, row_groups=row_groups, **options)

    def noted_select(self, rows):
        read.append(rows[0])
        return select(self, rows)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted_batches)
    monkeypatch.setattr(datasets.Dataset, "select", noted_select)
    for start in (1, 4, 5, 6, 20):
        again = chats()
        assert again.first_window.fingerprint() == made[0].fingerprint()
        read.clear()
        windows = again.windows(start)
        for number, window in itertools.islice(windows, 3):
            assert window.fingerprint() == made[number].fingerprint()
            names = [window.row_name(i) for i in range(len(window))]
            assert names == [made[number].row_name(i) for i in range(len(window))]
        position = start % -(-(23 - skipped) // 3) * 3 + skipped
        expected = position if position < 13 else position - 13
        assert read[0] == (expected // 4 * 4 if kind == "Parquet files" else expected)


def test_rows_are_read_when_they_are_asked_for():
    read = []

    class Counted:
        def __iter__(self):
            for i, row in enumerate(ROWS):
                read.append(i)
                yield row

    windows = stream(Counted()).windows()
    assert read == []
    next(windows)
    assert len(read) == BUFFER
    del read[:]
    next(windows)
    assert len(read) == BUFFER


def test_take_and_skip_share_no_row():
    chats = stream()
    held_out, rest = chats.take(7), chats.skip(7)
    parts = [held_out, *(window for _, window in rest.windows(endless=False))]
    assert [document for part in parts for document in part] == list(whole())
    assert list(rest.skip(3).take(2)) == list(whole())[10:12]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: stream(iter(ROWS)), "which can be read only once"),
        (lambda: stream(row for row in ROWS), "cannot be a generator"),
        (lambda: stream().split(0.1), "take(1000) and skip(1000)"),
        (lambda: stream().take(0), "rows=0; allowed: a whole number >= 1"),
        (lambda: stream().skip(30).first_window, "skip(30) leaves nothing of a stream of 23 rows"),
        (lambda: stream().skip(23).first_window, "skip(23) leaves nothing of a stream of 23 rows"),
        (lambda: stream().skip(20).skip(3).take(1), "skip(23) leaves nothing of a stream of 23 rows"),
        (lambda: list(stream().skip(23).windows(endless=False)), "skip(23) leaves nothing"),
        (lambda: stream([]).first_window, "it has no rows"),
        (lambda: stream("missing.jsonl"), "no such file"),
    ],
)
def test_a_wrong_use_of_a_stream_is_refused_with_the_way_out(call, said):
    with pytest.raises(p3.DataError) as error:
        call()
    assert said in str(error.value)


def test_a_bad_row_is_named_by_its_number_or_skipped_in_its_window():
    rows = [*ROWS[:11], {"messages": "no list"}, *ROWS[11:]]
    with pytest.raises(p3.DataError, match="row 12"):
        list(stream(rows).windows(endless=False))
    windows = [window for _, window in stream(rows, on_bad_row="skip").windows(endless=False)]
    assert [window.bad_rows for window in windows] == [(), (), (12,), (), ()]
    assert sum(map(len, windows)) == 23


TOO_LONG = {"messages": [{"role": "user", "content": "why " * 90}, {"role": "assistant", "content": "No."}]}


@pytest.mark.parametrize("at", [22, 10])
@pytest.mark.parametrize(("bad", "options"), [(TOO_LONG, {}), ({"messages": "none"}, {"on_bad_row": "skip"})])
def test_a_window_without_a_usable_row_is_skipped_and_keeps_its_number(at, bad, options, caplog):
    rows = [*ROWS[:at], bad, *ROWS[at + 1 :]]
    chats = stream(rows, buffer_size=1, **options)
    numbers = [number for number, _ in chats.windows(endless=False)]
    assert numbers == [n for n in range(23) if n != at]
    assert f"window {at} of the stream is skipped" in caplog.text
    again = [number for number, _ in itertools.islice(stream(rows, buffer_size=1, **options).windows(at), 3)]
    assert again == [at + 1, at + 2, at + 3]


def test_using_the_tokenizer_at_the_same_time_changes_no_window():
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"<|end|> said {i}, or not?", "completion": "A word."} for i in range(400)]
    chats = p3.ChatDataset.load(rows, tokenizer, max_length=64, streaming=True, buffer_size=4)
    expected = [window.fingerprint() for _, window in chats.windows(endless=False)]
    found, done = [], threading.Event()

    def windows():
        found.extend(window.fingerprint() for _, window in chats.windows(endless=False))
        done.set()

    thread = threading.Thread(target=windows)
    thread.start()
    while not done.is_set():
        tokenizer(["a few", "words of different <|end|> length"], padding=True, truncation=True, max_length=5)
    thread.join()
    assert found == expected


def test_reading_ends_when_wanted_is_false():
    read = []

    class Slow:
        def __iter__(self):
            for row in ROWS:
                read.append(row)
                yield row

    chats = stream(Slow(), buffer_size=20)
    windows = chats.windows(wanted=lambda: len(read) < 23)
    assert next(windows)[0] == 0
    assert list(windows) == []
    assert len(read) == 23


def test_batches_of_a_stream_are_one_pass_of_it():
    rows = [row for batch in p3.batches(stream(), batch_size=2, packing=False) for row in batch["documents"]]
    assert len(rows) == len(whole())


def test_a_dataset_offers_the_interface_of_a_stream():
    chats, one = stream(), whole()
    assert repr(chats).startswith("ChatStream(windows of 5 rows; the first: ChatDataset(5 documents, ")
    assert (chats.known_length, one.known_length) == (False, True)
    assert one.first_window is one
    assert list(itertools.islice(one.windows(3), 3)) == [(3, one), (4, one), (5, one)]
    assert list(one.windows(endless=False)) == [(0, one)]
    assert list(one.windows(wanted=lambda: False)) == []
    assert (chats.max_document_tokens, one.max_document_tokens) == (64, max(one.lengths))
    assert chats.identity() == {**chats.first_window.identity(), "buffer_size": BUFFER}
    assert chats.describe() == "Chats that were read as a stream (format `messages`)."
    assert one.describe().startswith("23 chats of ")
