"""Batches made ahead in a thread: the same ones in the same order, at most so many, and no thread left behind."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.data.batches import BatchPlan, Cursor, StepSchedule
from phi3lora.data.prefetch import pinned, prefetched
from phi3lora.errors import DataError

CPU = torch.device("cpu")


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("phi3lora-prefetch")]


def until(condition):
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.005)
    return False


def failing_after(count, error):
    yield from range(count)
    raise error


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 9), ahead=st.integers(1, 4))
def test_the_items_are_the_same_in_the_same_order(count, ahead):
    assert list(prefetched(lambda wanted: iter(range(count)), ahead)) == list(range(count))
    assert threads() == []


@pytest.mark.parametrize("error", [DataError("row 3"), MemoryError("full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_exception_keeps_its_type_and_its_place(error, count):
    taken = []
    with pytest.raises(type(error)) as caught:
        for item in prefetched(lambda wanted: failing_after(count, error), 2):
            taken.append(item)
    assert caught.value is error
    assert taken == list(range(count))
    assert threads() == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_slow_consumer_finds_ahead_items_ready_and_no_more(ahead):
    made = []
    with closing(prefetched(lambda wanted: (made.append(i) or i for i in range(99)), ahead)) as items:
        for taken in range(1, 5):
            next(items)
            assert until(lambda wanted=taken + ahead: len(made) == wanted)
            time.sleep(0.02)
            assert len(made) == taken + ahead


def test_nothing_is_made_before_the_first_item_is_asked_for():
    made = []
    prefetched(lambda wanted: (made.append(i) or i for i in range(9)), 2).close()
    assert made == []


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaving_early_ends_the_thread(error):
    try:
        with closing(prefetched(lambda wanted: iter(range(99)), 2)) as items:
            for item in items:
                assert len(threads()) == 1
                if item == 3 and error is not None:
                    raise error
                if item == 3:
                    break
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert threads() == []


def test_the_batches_of_the_steps_come_from_the_cursor():
    plan = BatchPlan(chat_dataset(24), 2, 64)
    schedule = StepSchedule(plan, quiet_config("unused", num_train_epochs=2), plan.dataset)
    expected = list(schedule.steps(3, Cursor(0, 3)))
    found = list(schedule.batches(3, Cursor(0, 3), CPU))
    assert [step for step, _ in found] == expected
    for step, micro_batches in found:
        for micro, batch in zip(step.micro_batches, micro_batches, strict=True):
            plain = plan.tensors(micro)
            assert batch.keys() == plain.keys()
            assert all(torch.equal(batch[k], v) for k, v in plain.items() if isinstance(v, torch.Tensor))


class Break(p3.Callback):
    """Ends a run after its second step, and notes the threads there were."""

    def __init__(self, error=None):
        self.error, self.threads = error, []

    def on_step_end(self, state):
        self.threads = threads()
        if state.global_step == 2:
            state.should_stop = True
            if self.error is not None:
                raise self.error


@pytest.mark.parametrize("error", [None, MemoryError("crash"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_ends_early_leaves_no_thread(tmp_path, error):
    ending = Break(error)
    try:
        p3.train(adapted_model(), chat_dataset(24), quiet_config(tmp_path, max_steps=50), callbacks=[ending])
    except MemoryError:
        assert isinstance(error, MemoryError)
    assert len(ending.threads) == 1
    assert threads() == []


def test_an_error_while_a_batch_is_made_ends_the_run_as_it_is(tmp_path, monkeypatch):
    tensors, made = BatchPlan.tensors, []

    def second_fails(plan, rows):
        made.append(rows)
        if len(made) == 2:
            raise MemoryError("no room for the batch")
        return tensors(plan, rows)

    monkeypatch.setattr(BatchPlan, "tensors", second_fails)
    with pytest.raises(MemoryError, match="no room for the batch"):
        p3.train(adapted_model(), chat_dataset(24), quiet_config(tmp_path, max_steps=50))
    assert threads() == []


def test_the_seconds_of_a_run_include_waiting_for_its_batches(tmp_path, monkeypatch):
    tensors = BatchPlan.tensors
    monkeypatch.setattr(BatchPlan, "tensors", lambda plan, rows: time.sleep(0.2) or tensors(plan, rows))
    result = p3.train(adapted_model(), chat_dataset(24), quiet_config(tmp_path, max_steps=3))
    assert result.metrics["train_seconds"] >= 0.6


def test_a_batch_for_the_cpu_stays_as_it_is():
    batch = BatchPlan(chat_dataset(4), 2, 64).tensors([(0,), (1,)])
    assert pinned(batch, CPU) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_for_a_gpu_is_pinned():
    batch = BatchPlan(chat_dataset(4), 2, 64).tensors([(0,), (1,)])
    for key, value in pinned(batch, torch.device("cuda", 0)).items():
        assert not isinstance(value, torch.Tensor) or (value.is_pinned() and torch.equal(value, batch[key]))
