"""The queue of numbers that a device is still computing."""

from __future__ import annotations

import pytest
import torch

from phi3lora.training.logging import LateValues


class Copy:
    """A copy to the host that is done when told so, in place of a CUDA event."""

    def __init__(self):
        self.done = self.waited = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = self.waited = True


@pytest.fixture
def pending():
    """A queue of three values whose copies are under way, and those copies."""
    late, copies = LateValues(), [Copy() for _ in range(3)]
    for i, copy in enumerate(copies):
        late._waiting.append((torch.tensor([float(i)]), copy, f"step {i}"))
    return late, copies


def test_on_the_cpu_values_arrive_at_once_in_order_and_once():
    late = LateValues()
    late.add(torch.tensor([1.0, 2.0]), "a")
    late.add(torch.tensor([3.0, 4.0]), "b")
    assert late.arrived() == [([1.0, 2.0], "a"), ([3.0, 4.0], "b")]
    assert late.arrived() == late.arrived(wait=True) == []


def test_a_value_that_is_not_there_holds_back_those_after_it(pending):
    late, copies = pending
    copies[1].done = copies[2].done = True
    assert late.arrived() == []
    copies[0].done, copies[2].done = True, False
    assert late.arrived() == [([0.0], "step 0"), ([1.0], "step 1")]
    copies[2].done = True
    assert late.arrived() == [([2.0], "step 2")]
    assert not any(copy.waited for copy in copies)


def test_waiting_gives_everything_and_waits_only_for_what_is_missing(pending):
    late, copies = pending
    copies[0].done = True
    assert late.arrived(wait=True) == [([0.0], "step 0"), ([1.0], "step 1"), ([2.0], "step 2")]
    assert [copy.waited for copy in copies] == [False, True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_value_is_the_one_at_the_time_of_adding():
    late, value = LateValues(), torch.ones(2, device="cuda")
    late.add(value, "before")
    value.mul_(5)
    late.add(value, "after")
    assert late.arrived(wait=True) == [([1.0, 1.0], "before"), ([5.0, 5.0], "after")]
