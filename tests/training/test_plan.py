"""Which rows make which step: every document once an epoch, the same from any cursor, at any batch size."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from conftest import chat_dataset, quiet_config, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3lora.data.batches import START, BatchPlan, Cursor, StepSchedule, batches
from phi3lora.model.load import longrope_boundary
from phi3lora.training.run import is_due
from phi3lora.training.state import TrainingState

DATA = chat_dataset(24)


def step_plan(batch=2, accumulation=2, packing=True, seed=0, boundary=None, max_length=64, **config):
    plan = BatchPlan(DATA, batch, max_length, packing, seed=seed, boundary=boundary)
    return StepSchedule(plan, quiet_config("unused", gradient_accumulation_steps=accumulation, **config), DATA)


def all_steps(schedule, steps_done=0, cursor=START):
    return list(schedule.steps(steps_done, cursor))


def rows_of(steps):
    return [row for step in steps for micro in step.micro_batches for row in micro]


sizes = {"batch": st.integers(1, 7), "accumulation": st.integers(1, 5), "packing": st.booleans()}


@settings(max_examples=40, deadline=None)
@given(epochs=st.integers(1, 3), seed=st.integers(0, 9), boundary=st.sampled_from([None, 40]), **sizes)
def test_every_epoch_has_every_document_exactly_once(epochs, seed, boundary, **size):
    steps = all_steps(step_plan(**size, seed=seed, boundary=boundary, num_train_epochs=epochs))
    ends = [i + 1 for i, step in enumerate(steps) if step.ends_epoch]
    assert len(ends) == epochs
    assert ends[-1] == len(steps)
    for start, stop in itertools.pairwise([0, *ends]):
        assert sorted(i for row in rows_of(steps[start:stop]) for i in row) == list(range(24))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9), **sizes)
def test_the_order_of_rows_does_not_depend_on_batch_size_or_accumulation(seed, batch, accumulation, packing):
    settings = {"packing": packing, "seed": seed, "num_train_epochs": 2}
    one_by_one = rows_of(all_steps(step_plan(1, 1, **settings)))
    assert rows_of(all_steps(step_plan(batch, accumulation, **settings))) == one_by_one


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_and_the_company_of_documents_depend_on_seed_and_epoch(packing):
    first, second = (rows_of([s]) for s in all_steps(step_plan(99, 99, packing, num_train_epochs=2)))
    other = rows_of(all_steps(step_plan(99, 99, packing, num_train_epochs=1, seed=1)))
    assert first != second
    assert first != other
    if packing:  # not only the same rows in another order
        assert set(first) != set(second)
        assert set(first) != set(other)


def test_the_batches_of_a_plan_are_those_of_p3_batches():
    steps = all_steps(step_plan(3, 1, seed=5, num_train_epochs=2))
    mine = [micro for step in steps for micro in step.micro_batches]
    theirs = [b["documents"] for epoch in (0, 1) for b in batches(DATA, batch_size=3, seed=5, epoch=epoch)]
    assert mine == theirs


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.sampled_from([0.5, 1, 1.5, 2, 2.25]), max_steps=st.sampled_from([-1, 1, 5, 30]), data=st.data(), **sizes
)
def test_the_steps_from_any_cursor_are_the_tail_of_all_steps(epochs, max_steps, data, **size):
    plan = step_plan(**size, num_train_epochs=epochs, max_steps=max_steps)
    steps = all_steps(plan)
    assert len(steps) == plan.total
    k = data.draw(st.integers(1, len(steps)))
    assert all_steps(plan, k, steps[k - 1].next_cursor) == steps[k:]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"),
    [(1, -1, 6), (2, -1, 12), (0.5, -1, 3), (1.5, -1, 9), (0.01, -1, 1), (3, 4, 4), (1, 20, 20), (2, 0, 12)],
)
def test_the_number_of_steps_follows_epochs_unless_max_steps_is_given(epochs, max_steps, expected):
    plan = step_plan(2, 2, packing=False, num_train_epochs=epochs, max_steps=max_steps)  # 24 / 4 = 6 an epoch
    assert plan.total == expected == len(all_steps(plan))


def test_the_last_step_of_an_epoch_has_what_is_left_and_no_step_spans_two_epochs():
    steps = all_steps(step_plan(5, 2, packing=False, num_train_epochs=2))
    assert [[len(micro) for micro in step.micro_batches] for step in steps] == [[5, 5], [5, 5], [4]] * 2
    assert [step.ends_epoch for step in steps] == [False, False, True] * 2
    assert [step.epoch_progress for step in steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [step.next_cursor for step in steps] == [
        Cursor(*at) for at in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    ]


@settings(max_examples=20, deadline=None)
@given(**sizes)
def test_the_tokens_of_a_step_are_those_of_its_documents(**size):
    for step in all_steps(step_plan(**size, num_train_epochs=1)):
        assert step.tokens == sum(len(DATA[i]["input_ids"]) for row in rows_of([step]) for i in row)


@settings(max_examples=30, deadline=None)
@given(boundary=st.integers(28, 62), seed=st.integers(0, 5), **sizes)
def test_documents_on_both_sides_of_the_longrope_boundary_never_share_a_micro_batch(boundary, seed, **size):
    lengths = DATA.lengths
    assert len({bool(n > boundary) for n in lengths}) == 2
    plan = step_plan(**size, seed=seed, boundary=boundary, num_train_epochs=1)
    for step in all_steps(plan):
        for micro in step.micro_batches:
            assert len({bool(lengths[i] > boundary) for row in micro for i in row}) == 1


@settings(max_examples=30, deadline=None)
@given(boundary=st.integers(28, 62), max_length=st.sampled_from([64, 128, 200]), **sizes)
def test_the_largest_position_of_a_batch_is_on_its_documents_side_of_the_boundary(boundary, max_length, **size):
    plan = step_plan(**size, boundary=boundary, max_length=max_length, num_train_epochs=1)
    for step in all_steps(plan):
        for micro in step.micro_batches:
            batch = plan.plan.tensors(micro)  # transformers compares position_ids.max() + 1, padding included
            long = max(DATA.lengths[i] for row in micro for i in row) > boundary
            assert bool(batch["position_ids"].max() + 1 > boundary) == long


def test_both_kinds_of_documents_are_spread_over_the_epoch():
    boundary = int(np.median(DATA.lengths))
    (epoch,) = [all_steps(step_plan(1, 1, packing=False, boundary=boundary, num_train_epochs=1))]
    long = [bool(DATA.lengths[rows_of([step])[0][0]] > boundary) for step in epoch]
    assert 0 < sum(long[: len(long) // 2]) < sum(long)


def test_the_boundary_is_the_models():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40, **factors}
    assert longrope_boundary(tiny_config(rope_parameters=rope, original_max_position_embeddings=40)) == 40
    assert longrope_boundary(tiny_config()) is None


@given(
    every=st.one_of(st.integers(1, 12), st.sampled_from([0.1, 0.25, 0.34, 0.5, 0.99])),
    total=st.integers(1, 40),
    data=st.data(),
)
def test_a_step_is_due_every_so_many_steps_or_share_of_all_of_them(every, total, data):
    step = data.draw(st.integers(1, total))
    interval = every if isinstance(every, int) else math.ceil(every * total)
    ends = data.draw(st.booleans())
    state = TrainingState(global_step=step, total_steps=total)
    assert is_due("steps", every, state, ends) == (step in range(interval, total + 1, interval))
    assert is_due("epoch", every, state, ends) == ends
    assert not is_due("no", every, state, ends)


def test_data_facts_tell_other_data_and_other_row_lengths_apart():
    facts = step_plan().data_facts()
    assert facts == step_plan(batch=3, accumulation=1, seed=4).data_facts()  # the config says those
    others = [
        BatchPlan(DATA, 2, 65),
        BatchPlan(DATA, 2, 64, boundary=40),
        BatchPlan(DATA.select(range(23)), 2, 64),
        BatchPlan(DATA.select([1, 0, *range(2, 24)]), 2, 64),
        BatchPlan(chat_dataset(24, train_on="all"), 2, 64),
    ]
    for other in others:
        assert StepSchedule(other, quiet_config("unused"), other.dataset).data_facts() != facts
