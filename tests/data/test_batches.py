"""Packed rows, the tensors of a batch, the batches of an epoch, and the optimizer steps of a run."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import chat_dataset, quiet_config, token_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3lora.config import IGNORE_INDEX
from phi3lora.data.batches import START, BatchPlan, Cursor, StepSchedule, batches, collate, pack
from phi3lora.errors import DataError

PROPERTY = settings(max_examples=60, derandomize=True)
LENGTHS = st.lists(st.integers(1, 24), min_size=1, max_size=40)
SOME = [3, 9, 4, 8, 12, 5, 7, 2, 6, 11, 10, 3, 9, 4]
DATA = chat_dataset(24)


def plan_of(lengths, boundary=None, batch_size=3, max_length=40, **options):
    return BatchPlan(token_documents(lengths), batch_size, max_length, boundary=boundary, **options)


def rows_of(micro_batches):
    return [row for micro in micro_batches for row in micro]


# Packing.


def best_fit_decreasing(lengths, max_length):
    """The textbook's O(n^2) form: the longest first, each into the fullest row with room, the oldest of equals."""
    rows = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [max_length - sum(lengths[j] for j in row) for row in rows]
        fitting = [(left, at) for at, left in enumerate(room) if left >= lengths[i]]
        if fitting:
            rows[min(fitting)[1]].append(i)
        else:
            rows.append([i])
    return rows


@PROPERTY
@given(LENGTHS, st.integers(24, 60))
def test_pack_is_best_fit_decreasing(lengths, max_length):
    assert pack(lengths, max_length) == best_fit_decreasing(lengths, max_length)


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_chats_are_97_percent_full(seed):
    lengths = np.clip(np.random.default_rng(seed).lognormal(4.5, 0.8, 600), 8, 512).astype(int)
    assert lengths.sum() / (len(pack(lengths, 512)) * 512) > 0.97


# Tensors.


@st.composite
def packed(draw):
    """(dataset, rows, row_length): rows of some of its documents, some room left."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=10))
    dataset = token_documents(lengths, seed=draw(st.integers(0, 5)))
    order = draw(st.permutations(range(len(lengths))))
    cuts = sorted(draw(st.sets(st.integers(1, len(lengths)), max_size=3)) | {0, len(lengths)})
    rows = [tuple(order[a:b]) for a, b in pairwise(cuts)]
    rows = rows[: draw(st.integers(1, len(rows)))]
    longest = max(sum(lengths[i] for i in row) for row in rows)
    return dataset, rows, longest + draw(st.integers(0, 5))


@PROPERTY
@given(packed())
def test_a_batch_holds_the_documents_of_its_rows_end_to_end_and_padding(case):
    dataset, rows, row_length = case
    before = dataset.fingerprint()
    batch = collate(dataset, rows, row_length)
    edges = [0]
    for b, row in enumerate(rows):
        documents = [dataset[i] for i in row]
        lengths = [len(document["input_ids"]) for document in documents]
        padding = row_length - sum(lengths)
        ids = [token for document in documents for token in document["input_ids"]]
        labels = [label for document in documents for label in [IGNORE_INDEX, *document["labels"][1:]]]
        positions = [position for length in lengths for position in range(length)]
        assert batch["input_ids"][b].tolist() == ids + [dataset.pad_token_id] * padding
        assert batch["labels"][b].tolist() == labels + [IGNORE_INDEX] * padding
        assert batch["position_ids"][b].tolist() == positions + [0] * padding
        for length in [*lengths, *([padding] if padding else [])]:
            edges.append(edges[-1] + length)
    assert batch["cu_seqlens"].tolist() == edges and batch["cu_seqlens"].dtype == torch.int32
    assert {batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["max_seqlen"] == max(b - a for a, b in pairwise(edges))
    assert batch["documents"] == rows
    assert not (batch["labels"] != IGNORE_INDEX)[batch["position_ids"] == 0].any()
    batch["input_ids"].zero_()
    assert dataset.fingerprint() == before, "the tensors are copies"


# The micro-batches of an epoch.


@PROPERTY
@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3), st.none() | st.integers(1, 24))
def test_an_epoch_has_each_document_once_in_an_order_independent_of_batch_size(
    lengths, packing, shuffle, seed, epoch, boundary
):
    orders = []
    for batch_size in (1, 3, 1000):
        plan = plan_of(lengths, boundary, batch_size, packing=packing, shuffle=shuffle, seed=seed)
        micro_batches = plan.micro_batches(epoch)
        assert micro_batches == plan.micro_batches(epoch), "deterministic"
        assert all(1 <= len(micro) <= batch_size for micro in micro_batches)
        rows = rows_of(micro_batches)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
        kinds = [{lengths[i] <= (boundary or 24) for row in micro for i in row} for micro in micro_batches]
        assert all(len(kind) == 1 for kind in kinds), "no micro-batch has documents on both sides of the boundary"
        orders.append(sorted(rows, key=lambda row: lengths[row[0]] <= (boundary or 24)))  # stable: the order in each
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("packing", [True, False])
def test_seed_and_epoch_each_change_the_order_and_the_packing(packing):
    lengths = [3 + i % 7 for i in range(50)]

    def rows(seed, epoch, shuffle=True):
        return tuple(
            rows_of(plan_of(lengths, None, 1, 16, packing=packing, shuffle=shuffle, seed=seed).micro_batches(epoch))
        )

    orders = {(s, e): rows(s, e) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert not packing or len({frozenset(order) for order in orders.values()}) == 9
    assert len({rows(s, s, shuffle=False) for s in range(3)}) == 1


def test_without_shuffling_and_packing_the_rows_are_the_documents_in_order():
    made = list(batches(token_documents(SOME), packing=False, shuffle=False))
    assert [row for batch in made for row in batch["documents"]] == [(i,) for i in range(len(SOME))]


def test_long_documents_do_not_all_come_first():
    """Best fit decreasing makes them the first rows, so the rows are shuffled again."""
    lengths = [4 + i for i in range(200)]
    rows = rows_of(plan_of(lengths, max_length=204).micro_batches(0))
    longest = np.array([max(lengths[i] for i in row) for row in rows])
    assert abs(np.corrcoef(np.arange(len(rows)), longest)[0, 1]) < 0.4


def test_only_documents_near_each_other_in_the_order_share_a_row(monkeypatch):
    monkeypatch.setattr("phi3lora.data.batches._PACKED_TOGETHER", 10)
    rows = rows_of(plan_of([3] * 35, max_length=9).micro_batches(0))
    part = {int(i): at // 10 for at, i in enumerate(np.random.default_rng([0, 0]).permutation(35))}
    assert all(len({part[i] for i in row}) == 1 for row in rows)
    assert [part[row[0]] for row in rows] == sorted(part[row[0]] for row in rows)
    assert len(rows) == 4 * 3 + 2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_length", [64, 200])
def test_position_ids_stay_on_the_same_side_of_the_boundary_as_the_documents(packing, max_length):
    """Padding counts: a longrope model takes its factors from the largest position in the batch, padded or not."""
    boundary = int(np.median(DATA.lengths))
    plan, kinds = BatchPlan(DATA, 3, max_length, packing, boundary=boundary), set()
    for micro in plan.micro_batches(0):
        is_long = max(DATA.lengths[i] for row in micro for i in row) > boundary
        assert bool(plan.tensors(micro)["position_ids"].max() + 1 > boundary) == is_long
        kinds.add(is_long)
    assert kinds == {True, False}


def test_a_boundary_spreads_the_rarer_kind_over_the_epoch():
    micro_batches = plan_of([4] * 60 + [20] * 6, 8, batch_size=1, packing=False).micro_batches(0)
    at = [n for n, rows in enumerate(micro_batches) if rows[0][0] >= 60]
    assert len(at) == 6
    assert {b - a for a, b in pairwise(at)} == {11}


# phi3lora.batches.


@pytest.mark.parametrize("packing", [True, False])
def test_all_batches_but_the_last_are_full_and_have_the_documented_width(packing):
    dataset = token_documents(SOME, max_length=20)
    made = list(batches(dataset, batch_size=3, packing=packing))
    assert [len(batch["documents"]) for batch in made[:-1]] == [3] * (len(made) - 1)
    for batch in made:
        longest = max(SOME[i] for row in batch["documents"] for i in row)
        assert batch["input_ids"].shape == (len(batch["documents"]), 20 if packing else longest)
    assert {b["input_ids"].shape[1] for b in batches(dataset, batch_size=3, max_length=33)} == {33}
    trained = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in made)
    assert trained == sum(label != IGNORE_INDEX for document in dataset for label in document["labels"][1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0; allowed: a whole number >= 1"),
        ({"max_length": 11}, "max_length=11, but the dataset (loaded with max_length=12) has a document of 12 tokens"),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_the_call_and_not_at_the_first_batch(options, words):
    with pytest.raises(DataError) as caught:
        batches(token_documents(SOME), **options)
    assert words in str(caught.value)
    with pytest.raises(DataError, match="empty"):
        batches(token_documents(SOME).select([]))


# The steps of a run.


def schedule(batch=2, accumulation=2, packing=True, seed=0, boundary=None, **config):
    plan = BatchPlan(DATA, batch, 64, packing, seed=seed, boundary=boundary)
    return StepSchedule(plan, quiet_config("unused", gradient_accumulation_steps=accumulation, **config), DATA)


@pytest.mark.parametrize("boundary", [None, 40])
def test_steps_and_batches_give_the_same_micro_batches(boundary):
    steps = list(schedule(3, 2, seed=5, num_train_epochs=2, boundary=boundary).steps())
    options = {"batch_size": 3, "seed": 5, "boundary": boundary}
    made = [b["documents"] for epoch in (0, 1) for b in batches(DATA, epoch=epoch, **options)]
    assert [micro for step in steps for micro in step.micro_batches] == made
    for step in steps:
        assert step.tokens == sum(DATA.lengths[i] for row in rows_of(step.micro_batches) for i in row)


@settings(max_examples=60)
@given(
    epochs=st.sampled_from([0.5, 1, 1.5, 2, 2.25]), max_steps=st.sampled_from([-1, 1, 5, 30]), data=st.data(),
    batch=st.integers(1, 7), accumulation=st.integers(1, 5), packing=st.booleans(),
)  # fmt: skip
def test_the_steps_from_any_cursor_are_the_tail_of_all_steps(epochs, max_steps, data, **sizes):
    plan = schedule(**sizes, num_train_epochs=epochs, max_steps=max_steps)
    steps = list(plan.steps())
    assert len(steps) == plan.total
    k = data.draw(st.integers(1, len(steps)))
    assert list(plan.steps(k, steps[k - 1].next_cursor)) == steps[k:]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, -1, 6), (2, -1, 12), (0.5, -1, 3), (1.5, -1, 9), (0.01, -1, 1), (3, 4, 4), (1, 20, 20), (2, 0, 12)],
)
def test_the_number_of_steps_follows_epochs_unless_max_steps_is_given(epochs, max_steps, expected):
    plan = schedule(packing=False, num_train_epochs=epochs, max_steps=max_steps)  # 24 / 4 = 6 steps an epoch
    assert plan.total == expected == len(list(plan.steps()))


def test_the_last_step_of_an_epoch_has_the_remaining_rows_and_no_step_spans_two_epochs():
    steps = list(schedule(5, 2, packing=False, num_train_epochs=2).steps())
    assert [[len(micro) for micro in step.micro_batches] for step in steps] == [[5, 5], [5, 5], [4]] * 2
    assert [step.ends_epoch for step in steps] == [False, False, True] * 2
    assert [step.epoch_progress for step in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    cursors = [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [step.next_cursor for step in steps] == [Cursor(*cursor) for cursor in cursors]


def test_prefetched_batches_equal_the_tensors_of_the_steps():
    plan, cursor = schedule(accumulation=1, num_train_epochs=2), Cursor(0, 3)
    assert list(plan.steps()) == list(plan.steps(0, START))
    expected, found = list(plan.steps(3, cursor)), list(plan.batches(3, cursor, torch.device("cpu")))
    assert [step for step, _ in found] == expected
    for step, micro_batches in found:
        for micro, batch in zip(step.micro_batches, micro_batches, strict=True):
            plain = step.plan.tensors(micro)
            assert batch.keys() == plain.keys()
            assert all(torch.equal(batch[k], v) for k, v in plain.items() if isinstance(v, torch.Tensor))


def test_data_facts_change_with_the_data_and_the_row_length():
    facts = schedule().data_facts()
    assert facts == schedule(batch=3, accumulation=1, seed=4).data_facts()  # the config says those
    others = [
        BatchPlan(DATA, 2, 65),
        BatchPlan(DATA, 2, 64, boundary=40),
        BatchPlan(DATA.select(range(23)), 2, 64),
        BatchPlan(DATA.select([1, 0, *range(2, 24)]), 2, 64),
        BatchPlan(chat_dataset(24, train_on="all"), 2, 64),
    ]
    for other in others:
        assert StepSchedule(other, quiet_config("unused"), other.dataset).data_facts() != facts


def test_a_fraction_of_an_epoch_has_as_many_steps_as_in_transformers():
    for batch, per_epoch in ((24, 1), (8, 3), (2, 12), (1, 24)):
        for tenths in range(1, 60):
            plan = schedule(batch, 1, packing=False, num_train_epochs=tenths / 10)
            assert plan.total == math.ceil(tenths / 10 * per_epoch), (tenths, per_epoch)


def test_the_first_epoch_is_planned_once_before_the_run_and_in_it(monkeypatch):
    planned, micro_batches = [], BatchPlan.micro_batches
    monkeypatch.setattr(BatchPlan, "micro_batches", lambda plan, n: planned.append(n) or micro_batches(plan, n))
    schedule = StepSchedule(BatchPlan(DATA, 2, 256), quiet_config("unused", num_train_epochs=2), DATA)
    assert schedule.total == len(list(schedule.steps()))
    assert planned.count(0) == 1
    other = BatchPlan(DATA, 2, 256, seed=1)
    assert schedule.steps_of_epoch(0, other) != schedule.steps_of_epoch(0)
