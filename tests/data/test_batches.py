"""``batches`` and ``BatchPlan``: which documents share a batch, and how wide it is."""

from itertools import pairwise

import pytest
import torch
from conftest import token_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3lora.data.batches import BatchPlan, batches
from phi3lora.errors import DataError

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=40)
SOME = [3, 9, 4, 8, 12, 5, 7, 2, 6, 11, 10, 3, 9, 4]


def rows_in_order(dataset, **options):
    return [row for batch in batches(dataset, **options) for row in batch["documents"]]


@PROPERTY
@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3))
def test_the_order_of_the_rows_does_not_depend_on_the_batch_size(lengths, packing, shuffle, seed, epoch):
    dataset = token_documents(lengths)
    options = {"packing": packing, "shuffle": shuffle, "seed": seed, "epoch": epoch, "max_length": 30}
    orders = [rows_in_order(dataset, batch_size=size, **options) for size in (1, 3, 8, 1000)]
    assert orders[0] == orders[1] == orders[2] == orders[3]
    assert sorted(i for row in orders[0] for i in row) == list(range(len(lengths)))


def test_every_batch_but_the_last_has_batch_size_rows():
    for packing, rows in ((True, None), (False, len(SOME))):
        sizes = [len(b["documents"]) for b in batches(token_documents(SOME), batch_size=4, packing=packing)]
        assert sizes[:-1] == [4] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= 4
        assert rows is None or sum(sizes) == rows


def test_a_packed_batch_is_max_length_wide_and_the_dataset_s_by_default():
    dataset = token_documents(SOME, max_length=20)
    assert {b["input_ids"].shape[1] for b in batches(dataset, batch_size=3)} == {20}
    assert {b["input_ids"].shape[1] for b in batches(dataset, batch_size=3, max_length=33)} == {33}


@PROPERTY
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_without_packing_a_batch_is_documents_as_wide_as_its_longest(lengths, batch_size, shuffle):
    dataset = token_documents(lengths)
    for batch in batches(dataset, batch_size=batch_size, packing=False, shuffle=shuffle):
        assert all(len(row) == 1 for row in batch["documents"])
        longest = max(lengths[i] for (i,) in batch["documents"])
        assert batch["input_ids"].shape == (len(batch["documents"]), longest)


def test_unshuffled_and_unpacked_is_the_dataset_s_order():
    assert rows_in_order(token_documents(SOME), packing=False, shuffle=False) == [(i,) for i in range(len(SOME))]


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_trains_every_prediction_of_the_dataset_once(packing):
    dataset = token_documents(SOME)
    seen = sum(int((batch["labels"] != -100).sum()) for batch in batches(dataset, batch_size=3, packing=packing))
    assert seen == sum(label != -100 for document in dataset for label in document["labels"][1:])


def test_seed_and_epoch_fix_the_batches_and_change_them():
    dataset = token_documents(SOME * 3)

    def ids(seed, epoch):
        return [b["input_ids"] for b in batches(dataset, batch_size=2, seed=seed, epoch=epoch)]

    assert all(torch.equal(a, b) for a, b in zip(ids(1, 2), ids(1, 2), strict=True))
    assert len({str(ids(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0; allowed: a whole number >= 1"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"max_length": 11}, "max_length=11, but"),
        ({"max_length": 11, "packing": False}, "max_length=11, but"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": -1}, "max_length=-1"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_the_call_and_not_at_the_first_batch(options, words):
    with pytest.raises(DataError) as caught:
        batches(token_documents(SOME), **options)
    assert words in str(caught.value)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="empty"):
        batches(token_documents(SOME).select([]))


def plan(lengths, boundary, batch_size=3, max_length=40, **options):
    return BatchPlan(token_documents(lengths), batch_size, max_length, boundary=boundary, **options)


@PROPERTY
@given(LENGTHS, st.integers(1, 24), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_a_boundary_parts_the_documents_and_loses_none(lengths, boundary, batch_size, packing, epoch):
    micro_batches = plan(lengths, boundary, batch_size, packing=packing).micro_batches(epoch)
    kinds = [{lengths[i] <= boundary for row in rows for i in row} for rows in micro_batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert sorted(i for rows in micro_batches for row in rows for i in row) == list(range(len(lengths)))
    assert all(1 <= len(rows) <= batch_size for rows in micro_batches)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_of_documents_within_the_boundary_has_no_position_past_it(packing):
    """Padding counts: a longrope model takes its factors from the largest position in the batch, padded or not."""
    lengths, boundary = [5, 6, 7, 5, 20, 24, 6], 8
    batch_plan = plan(lengths, boundary, packing=packing)
    kinds = set()
    for rows in batch_plan.micro_batches(0):
        short = all(lengths[i] <= boundary for row in rows for i in row)
        largest = int(batch_plan.tensors(rows)["position_ids"].max())
        assert (largest < boundary) == short
        kinds.add(short)
    assert kinds == {True, False}


def test_batches_takes_the_boundary_of_a_longrope_model():
    dataset = token_documents(SOME)
    made = list(batches(dataset, batch_size=2, boundary=6, seed=3, epoch=1))
    rows = [batch["documents"] for batch in made]
    assert rows == BatchPlan(dataset, 2, dataset.max_length, seed=3, boundary=6).micro_batches(1)
    assert [int(batch["position_ids"].max()) < 6 for batch in made].count(True) > 0
    assert all(len({SOME[i] <= 6 for row in batch["documents"] for i in row}) == 1 for batch in made)


def test_a_boundary_spreads_the_rarer_kind_over_the_epoch():
    micro_batches = plan([4] * 60 + [20] * 6, 8, batch_size=1, packing=False).micro_batches(0)
    at = [n for n, rows in enumerate(micro_batches) if rows[0][0] >= 60]
    gaps = [b - a for a, b in pairwise(at)]
    assert len(at) == 6
    assert min(gaps) == max(gaps) == 11


def test_a_boundary_that_parts_nothing_changes_nothing():
    without = plan(SOME, None).micro_batches(1)
    assert plan(SOME, 12).micro_batches(1) == without
    assert plan(SOME, 1).micro_batches(1) == without
    assert plan(SOME, 6).micro_batches(1) != without


@PROPERTY
@given(LENGTHS, st.integers(1, 24))
def test_with_a_boundary_the_order_within_each_kind_does_not_depend_on_the_batch_size(lengths, boundary):
    def order(batch_size, short):
        rows = [row for batch in plan(lengths, boundary, batch_size).micro_batches(0) for row in batch]
        return [row for row in rows if (lengths[row[0]] <= boundary) == short]

    for short in (True, False):
        assert order(1, short) == order(4, short)
