"""``ChatDataset``: what happens to long documents, and what the set says about itself."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import chat_dataset, chat_rows, make_tokenizer, token_documents
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.config import IGNORE_INDEX
from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import DataError

TOKENIZER = make_tokenizer()
PROPERTY = settings(max_examples=40, derandomize=True)
MODES = st.sampled_from(["assistant", "last", "all"])


def load(rows, max_length=10_000, **options) -> ChatDataset:
    return ChatDataset.load(rows, TOKENIZER, max_length=max_length, **options)


def row(question: str, answer: str) -> dict:
    return {"prompt": question, "completion": answer}


def predictions(document) -> list[int]:
    """The labels that have a token before them to be predicted from."""
    return [label for label in document["labels"][1:] if label != IGNORE_INDEX]


@st.composite
def row_sets(draw):
    texts = st.text("ab c", max_size=30)
    turns = draw(st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), min_size=1, max_size=4))
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": t} for pair in chat for r, t in zip(roles, pair, strict=True)]}
        for chat in turns
    ]


def of_row(dataset, number):
    return [dataset[i] for i in range(len(dataset)) if dataset.row_number(i) == number]


@PROPERTY
@given(row_sets(), st.integers(2, 40), MODES)
def test_split_loses_no_trained_token_and_trains_none_twice(rows, max_length, train_on):
    whole = load(rows, train_on=train_on)
    parts = load(rows, max_length, overflow="split", train_on=train_on)
    assert parts.lengths.max() <= max_length
    for number in range(1, len(rows) + 1):
        (document,) = of_row(whole, number)
        pieces = of_row(parts, number)
        assert [p for piece in pieces for p in predictions(piece)] == predictions(document)
        assert all(predictions(piece) for piece in pieces), "a part with nothing to train is dropped"
        if train_on == "all":
            assert all(a["input_ids"][-1] == b["input_ids"][0] for a, b in pairwise(pieces)), "overlap by one token"
            assert all(len(piece["input_ids"]) == max_length for piece in pieces[:-1])


@PROPERTY
@given(row_sets(), st.integers(2, 40), MODES)
def test_truncate_keeps_the_beginning_and_counts_what_it_cut_and_dropped(rows, max_length, train_on):
    whole = list(load(rows, train_on=train_on))
    cut = [{key: values[:max_length] for key, values in document.items()} for document in whole]
    kept = [i for i, document in enumerate(cut) if predictions(document)]
    if not kept:
        with pytest.raises(DataError, match=f"max_length={max_length} is too small"):
            load(rows, max_length, train_on=train_on)
        return
    dataset = load(rows, max_length, train_on=train_on)
    assert list(dataset) == [cut[i] for i in kept]
    assert [dataset.row_number(i) for i in range(len(dataset))] == [i + 1 for i in kept]
    assert dataset.statistics()["truncated"] == sum(len(whole[i]["input_ids"]) > max_length for i in kept)
    assert dataset.statistics()["dropped"] == len(rows) - len(kept)


def test_overflow_error_takes_a_document_of_max_length_and_names_the_row_of_a_longer_one():
    rows = [row("Hi", "Hello!"), row("Hi", "Hello! Hello!"), row("Hi", "Hello!")]
    limit = int(load(rows).lengths[1])
    assert len(load(rows, limit, overflow="error")) == 3
    with pytest.raises(
        DataError, match=rf"row 2: {limit} tokens; allowed: max_length={limit - 1}.*'truncate'.*'split'"
    ):
        load(rows, limit - 1, overflow="error")
    assert load(rows, limit - 1, overflow="error", on_bad_row="skip").bad_rows == (2,)


def test_a_max_length_that_leaves_nothing_to_train_is_refused_with_one_that_works():
    rows = [row("a long question " * 5, "yes"), row("a longer question " * 6, "no")]
    with pytest.raises(DataError, match=r"max_length=5 is too small.* 2 rows.*overflow='split'") as caught:
        load(rows, 5)
    advised = int(str(caught.value).split("more than ")[1].split(",")[0])
    assert len(load(rows, advised + 1)) == 2
    assert len(load(rows, advised - 1)) < 2, "the advice is not far more than is needed"
    assert len(load(rows, 5, overflow="split")) >= 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 1}, "max_length=1; allowed: a whole number >= 2"),
        ({"overflow": "drop"}, "overflow='drop'; allowed: 'truncate', 'split', 'error'"),
        ({"train_on": "user"}, "train_on='user'; allowed"),
        ({"format": "csv"}, "format='csv'; allowed"),
        ({"streaming": 1}, "streaming=1; allowed: True, False"),
        ({"streaming": True, "buffer_size": 0}, "buffer_size=0; allowed: a whole number >= 1"),
        ({"on_bad_row": "ignore"}, "on_bad_row='ignore'; allowed: 'error', 'skip'"),
    ],
)
def test_an_invalid_option_is_refused_with_the_allowed_values(options, words):
    with pytest.raises(DataError) as caught:
        ChatDataset.load(chat_rows(2), TOKENIZER, **{"max_length": 64, **options})
    assert words in str(caught.value)


def test_a_buffer_size_without_streaming_is_said_to_have_no_effect(caplog):
    rows = chat_rows(2)
    ChatDataset.load(rows, TOKENIZER, max_length=64, streaming=True, buffer_size=1)
    assert not caplog.records
    said = "buffer_size=1 has no effect without streaming=True"
    ChatDataset.load(rows, TOKENIZER, max_length=64, buffer_size=1)
    assert [record.getMessage() for record in caplog.records] == [said]
    ChatDataset.mix([(rows, 1), (chat_rows(3), 1)], TOKENIZER, max_length=64, buffer_size=1)
    assert [record.getMessage() for record in caplog.records] == [said] * 2, "once for a mix"


def test_labels_are_unshifted_ids_where_trained_and_minus_100_elsewhere():
    assert IGNORE_INDEX == -100
    (document,) = load([row("Hi", "Hello!")])
    assert set(document) == {"input_ids", "labels"}
    trained = [i for i, label in enumerate(document["labels"]) if label != IGNORE_INDEX]
    assert [document["labels"][i] for i in trained] == [document["input_ids"][i] for i in trained]
    assert TOKENIZER.decode([document["input_ids"][i] for i in trained]) == "Hello!<|end|>"


def test_it_is_a_sequence():
    dataset = load(chat_rows(5))
    everything = list(dataset)
    assert set(dataset[0]) == {"input_ids", "labels"}
    assert len(dataset) == len(everything) == 5
    assert [dataset[i] for i in range(5)] == everything == [dataset[-i] for i in range(5, 0, -1)]
    assert all(type(token) is int for token in everything[0]["input_ids"])
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            dataset[beyond]
    with pytest.raises(IndexError):
        dataset.select([0, 1])[2]


@PROPERTY
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 9))
def test_statistics_are_the_sums_over_the_documents(lengths, seed):
    dataset = token_documents(lengths, seed)
    documents = list(dataset)
    s = dataset.statistics()
    labels = [label for document in documents for label in document["labels"]]
    assert s["documents"] == len(documents)
    assert s["tokens"] == len(labels) == sum(lengths)
    assert s["supervised_tokens"] == sum(label != IGNORE_INDEX for label in labels)
    assert s["supervised_share"] == s["supervised_tokens"] / len(labels)
    assert s["longest"] == max(lengths) == s["max_length"]
    assert dataset.largest_token_id() == max(max(document["input_ids"]) for document in documents)


def test_statistics_repr_and_a_warning_count_truncated_and_dropped_rows(caplog):
    rows = [row("Hi", "yes"), row("Hi", "no " * 60), row("long " * 60, "lost")]
    dataset = load(rows, 40)
    assert ["1 row dropped" in record.getMessage() for record in caplog.records] == [True]
    s = dataset.statistics()
    assert (s["documents"], s["truncated"], s["dropped"], s["longest"]) == (2, 1, 1, 40)
    assert "1 truncated, 1 row dropped because nothing" in repr(dataset)
    assert "truncated" not in repr(load(rows))
    assert [dataset.select([i]).statistics()["truncated"] for i in (0, 1)] == [0, 1]


@PROPERTY
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_the_two_sides_of_split_are_disjoint_and_cover_the_rows(count, fraction, seed):
    dataset = token_documents([2 + i % 5 for i in range(count)])
    train, held_out = dataset.split(fraction, seed)
    sides = [sorted(side.row_number(i) for i in range(len(side))) for side in (train, held_out)]
    assert sorted(sides[0] + sides[1]) == list(range(1, count + 1))
    assert len(sides[1]) == min(max(1, round(fraction * count)), count - 1)
    numbers = {dataset.row_number(i): dataset[i] for i in range(count)}
    assert all(side[i] == numbers[side.row_number(i)] for side in (train, held_out) for i in range(len(side)))


def test_split_draws_rows_from_everywhere_fixed_by_its_seed_and_keeps_their_order():
    dataset = token_documents([5] * 400)
    train, held_out = dataset.split(0.25, seed=1)
    rows = np.array([held_out.row_number(i) for i in range(len(held_out))])
    assert 150 < rows.mean() < 250
    assert (np.diff(rows) > 0).all()
    assert held_out.fingerprint() == dataset.split(0.25, seed=1)[1].fingerprint()
    assert held_out.fingerprint() != dataset.split(0.25, seed=2)[1].fingerprint()
    numbers = {train.row_number(i) for i in range(len(train))}
    sides = train.split(0.2, seed=0)  # a side can be split again
    assert [len(side) for side in sides] == [240, 60]
    assert {side.row_number(i) for side in sides for i in range(len(side))} == numbers


def test_split_keeps_the_parts_of_one_row_together():
    rows = [row("Hi", "hello! " * (20 + 7 * i)) for i in range(8)]
    dataset = load(rows, 20, overflow="split")
    assert len(dataset) > 3 * len(rows)
    train, held_out = dataset.split(0.4, seed=3)
    sides = [{side.row_number(i) for i in range(len(side))} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 3, "the fraction is one of rows"
    assert len(train) + len(held_out) == len(dataset)
    with pytest.raises(DataError, match="1 row"):
        load(rows[:1], 20, overflow="split").split(0.5)


@pytest.mark.parametrize("fraction", [0.0, 1.0, "half", float("nan")])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(DataError, match="fraction"):
        token_documents([5] * 4).split(fraction)


def test_select_numbers_the_documents_of_the_set_it_is_called_on():
    dataset = token_documents(range(2, 12))
    some = dataset.select([7, 3, 3, -1])
    assert list(some) == [dataset[7], dataset[3], dataset[3], dataset[9]]
    assert list(some.select(np.array([1, 0]))) == [dataset[3], dataset[7]]
    assert some.lengths.tolist() == [9, 5, 5, 11]
    assert some.row_number(0) == 8
    assert list(dataset.select(dataset.lengths > 9)) == [dataset[8], dataset[9]], "a mask is no list of numbers"
    assert len(dataset.select([])) == 0
    assert dataset.select([]).statistics()["tokens"] == 0
    with pytest.raises(IndexError):
        dataset.select([10])


def test_the_fingerprint_is_equal_for_equal_data_and_changes_with_every_part_of_it():
    dataset = load(chat_rows(6))
    assert dataset.fingerprint() == load(chat_rows(12)).select(range(6)).fingerprint()
    changes = [token_documents([4, 6, 5]) for _ in range(4)]
    changes[1]._input_ids[7] += 1
    changes[2]._labels[0] = IGNORE_INDEX
    changes[3]._starts[1] += 1  # the same tokens, cut elsewhere
    changes += [changes[0].select(chosen) for chosen in ([1, 0, 2], [0, 1], [0, 1, 2, 2])]
    assert len({changed.fingerprint() for changed in changes}) == len(changes)
    assert changes[0].fingerprint() == token_documents([4, 6, 5]).fingerprint()


def test_the_fingerprint_sees_the_borders_of_documents_that_repeat_one_token():
    sevens = np.full(4, 7, dtype=np.int32)
    prints = set()
    for starts in ([0, 4], [0, 2, 4], [0, 1, 4], [0, 3, 4], [0, 1, 2, 3, 4]):
        none = np.zeros(len(starts) - 1, dtype=np.int64)
        facts = {"max_length": 9, "pad_token_id": 0, "end_of_turn_id": 7, "format": "text"}
        prints.add(ChatDataset(sevens, sevens, np.array(starts), rows=none, truncated=none, **facts).fingerprint())
    assert len(prints) == 5


def test_a_dataset_and_its_splits_know_the_special_tokens():
    dataset = load(chat_rows(4))
    assert dataset.pad_token_id == TOKENIZER.pad_token_id
    assert TOKENIZER.convert_ids_to_tokens(dataset.end_of_turn_id) == "<|end|>"
    unpadded = make_tokenizer()
    unpadded.pad_token = None
    held_out = ChatDataset.load(chat_rows(4), unpadded, max_length=99).split(0.5)[1]
    assert held_out.pad_token_id == unpadded.eos_token_id
    assert (held_out.max_length, held_out.end_of_turn_id) == (99, dataset.end_of_turn_id)


@pytest.mark.parametrize("seed", [-1, 2**63, None, True, 1.5, "1", np.int64(-1)], ids=repr)
def test_a_seed_that_is_none_is_refused_by_name_everywhere(seed):
    chats = chat_dataset()
    uses = [
        lambda: chats.split(0.5, seed=seed),
        lambda: p3.batches(chats, seed=seed),
        lambda: p3.ChatDataset.mix([(chats, 1), (chats, 1)], seed=seed),
    ]
    for use in uses:
        with pytest.raises(DataError, match=r"seed=.*; allowed: a whole number >= 0, below 2\*\*63"):
            use()


def test_numbers_of_numpy_are_numbers():
    chats = chat_dataset()
    for seed in (3, 2**32, 2**63 - 1):
        expected = [part.fingerprint() for part in chats.split(0.5, seed=seed)]
        assert [part.fingerprint() for part in chats.split(np.float32(0.5), seed=np.int64(seed))] == expected
    origin = chats.split(np.float64(0.5), seed=np.int64(3))[1].origin
    assert origin is None or json.dumps(origin)
    same = load(chat_rows(), np.int64(64))
    assert same.fingerprint() == chats.fingerprint() and type(same.max_length) is int
    first, second = (
        next(p3.batches(chats, batch_size=kind(2), max_length=kind(80), seed=kind(1), epoch=kind(1)))
        for kind in (int, np.int64)
    )
    assert torch.equal(first["input_ids"], second["input_ids"])


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 1.5}, {"max_length": 0}, {"epoch": -1}, {"epoch": None}], ids=str
)
def test_a_wrong_argument_of_batches_is_refused_by_name(options):
    with pytest.raises(DataError, match=f"{next(iter(options))}=.*; allowed: a whole number"):
        p3.batches(chat_dataset(), **options)
