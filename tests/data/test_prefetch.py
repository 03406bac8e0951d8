"""Items prepared in a thread: the same ones in the same order, never more than asked for, and no thread left behind."""

from __future__ import annotations

import threading
import time
from contextlib import closing, nullcontext

import pytest
import torch
from conftest import LIMIT_S, adapted_model, chat_dataset, prefetch_threads, quiet_config, until

import phi3lora as p3
from phi3lora.data import prefetch
from phi3lora.data.batches import BatchPlan
from phi3lora.data.prefetch import pinned, prefetched
from phi3lora.errors import DataError


def counted(made, count=99):
    """Integers that are also appended to ``made`` when they are made."""
    return lambda wanted: (made.append(i) or i for i in range(count))


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_items_are_the_same_in_the_same_order(count, ahead):
    assert list(prefetched(counted([], count), ahead)) == list(range(count))
    assert prefetch_threads() == []


@pytest.mark.parametrize("error", [DataError("row 3"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("count", [0, 5])
def test_an_exception_is_raised_unchanged_in_its_turn(error, count):
    def failing(wanted):
        yield from range(count)
        raise error

    taken = []
    with pytest.raises(type(error)) as caught:
        for item in prefetched(failing, 2):
            taken.append(item)  # not extend: what came before the error counts
    assert caught.value is error
    assert taken == list(range(count))
    assert prefetch_threads() == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_at_most_ahead_items_are_prepared(ahead):
    made = []
    prefetched(counted(made), ahead).close()
    assert made == [], "nothing is made before the first item is asked for"
    with closing(prefetched(counted(made), ahead)) as items:
        for taken in range(1, 5):
            next(items)
            assert until(lambda wanted=taken + ahead: len(made) == wanted)
            time.sleep(0.02)
            assert len(made) == taken + ahead


def test_leaving_early_ends_the_thread():
    closed = []

    def endless(wanted):
        try:
            while wanted():
                yield len(prefetch_threads())
        finally:
            closed.append(wanted())

    with closing(prefetched(endless, 2)) as items:
        assert [next(items) for _ in range(3)] == [1, 1, 1]
    assert prefetch_threads() == []
    assert closed == [False], "the items are closed, and can see that no more are wanted"


def test_a_wait_ends_when_wanted_is_false(monkeypatch):
    monkeypatch.setattr(prefetch, "_JOIN_TIMEOUT_S", 0.1)
    asked, over = [], threading.Event()

    def hanging(wanted):
        yield "came" if over.wait(LIMIT_S) else "waited in vain"

    assert list(prefetched(hanging, 1, wanted=lambda: asked.append(1) or len(asked) < 3)) == []
    over.set()
    assert until(lambda: prefetch_threads() == [])


@pytest.mark.parametrize("error", [None, MemoryError("crash")], ids=repr)
def test_a_run_that_ends_early_leaves_no_thread(tmp_path, error):
    found = []

    class Break(p3.Callback):
        def on_step_end(self, state):
            found.append(len(prefetch_threads()))
            if state.global_step == 2:
                state.should_stop = True
                if error is not None:
                    raise error

    expected = nullcontext() if error is None else pytest.raises(MemoryError, match="crash")
    with expected:
        p3.train(adapted_model(), chat_dataset(24), quiet_config(tmp_path, max_steps=50), callbacks=[Break()])
    assert found == [1, 1]
    assert prefetch_threads() == []


def test_the_seconds_of_a_run_include_waiting_for_its_batches(tmp_path, monkeypatch):
    tensors = BatchPlan.tensors
    monkeypatch.setattr(BatchPlan, "tensors", lambda plan, micro: time.sleep(0.5) or tensors(plan, micro))
    result = p3.train(adapted_model(), chat_dataset(24), quiet_config(tmp_path, max_steps=1))
    assert result.metrics["train_seconds"] >= 0.5


@pytest.mark.gpu
def test_a_batch_for_a_gpu_is_pinned():
    batch = BatchPlan(chat_dataset(4), 2, 64).tensors([(0,), (1,)])
    for key, value in pinned(batch, torch.device("cuda", 0)).items():
        assert not isinstance(value, torch.Tensor) or (value.is_pinned() and torch.equal(value, batch[key]))
