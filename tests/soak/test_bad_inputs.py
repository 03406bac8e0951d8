"""Some hundreds of bad inputs in the normal suite, and a look at the harness itself: it must find what is planted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bad_inputs

import phi3lora as p3
from phi3lora.adapters import adapter_file as files

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(),
    reason="needs Linux's /proc, and fork, which autograd's GPU threads do not survive",
)


def planted(read: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> dict[str, bad_inputs.Kind]:
    """A kind whose input 1 is read by ``read``; the others are accepted."""
    first = Random("planted 1").random()

    def make(random, good, own):
        return "planted", read if random.random() == first else lambda: None

    return {"planted": bad_inputs.Kind(lambda good: prepare, make, 1)}


def run_planted(read: Callable[[], object], **options) -> bad_inputs.Figures:
    report = bad_inputs.run(planted(read), 4, workers=1, **options)
    return report.kinds["planted"]


def test_a_seeded_choice_of_bad_inputs_is_refused_or_accepted():
    report = bad_inputs.run(bad_inputs.all_kinds(), 300, seed=11, workers=1)
    assert report.unhandled == [], str(report)
    assert report.tried >= 300 and len(report.kinds) >= 12
    for name, figures in report.kinds.items():
        assert figures.refused > 0, f"nothing bad about {name}"


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: {}["missing"], "KeyError"),
        (lambda: b"x" * (bad_inputs.GIB * 3 // 2), "takes 1.5 GiB"),
        (lambda: bytearray(2**50), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died"),
        (lambda: sys.exit(1), "SystemExit"),
    ],
    ids=["another exception", "memory", "more memory than there is", "death", "exit"],
)
def test_a_planted_fault_is_found_and_the_inputs_after_it_are_tried(read, said):
    figures = run_planted(read)
    assert figures.tried == 4 and len(figures.unhandled) == 1
    assert figures.unhandled[0].startswith("planted 1 (planted): ") and said in figures.unhandled[0]
    assert figures.accepted == 3


def test_a_hang_is_ended_and_says_where():
    started = time.perf_counter()
    figures = run_planted(lambda: time.sleep(60), limit_s=0.5)
    assert figures.tried == 4 and figures.accepted == 3 and time.perf_counter() - started < 20
    assert "hangs: longer than 0.5 s" in figures.unhandled[0] and "test_bad_inputs.py" in figures.unhandled[0]


def test_a_refusal_whose_message_cannot_be_printed_is_no_refusal():
    def read():
        raise p3.Phi3LoRAError("\ud800")

    assert "UnicodeEncodeError" in run_planted(read).unhandled[0]


def test_good_inputs_that_are_refused_stop_the_run():
    with pytest.raises(KeyError):
        bad_inputs.run(planted(lambda: None, prepare=lambda: {}["missing"]), 4, workers=1)


def test_a_reader_that_lets_a_json_error_through_is_found(monkeypatch):
    """A fault in the library itself: settings beside an adapter are read without a look at what they are."""
    monkeypatch.setattr(files, "_is_facts", lambda value: True)
    kinds = {name: kind for name, kind in bad_inputs.all_kinds().items() if name == "adapter pt"}
    report = bad_inputs.run(kinds, 150, seed=2, workers=1)
    assert report.unhandled and all("adapter_file.py" in line or "inject.py" in line for line in report.unhandled)


def test_an_input_is_the_same_each_time(tmp_path):
    said = []
    for place in ("a", "b"):
        kinds = {name: kind for name, kind in bad_inputs.all_kinds().items() if name == "data file"}
        bad_inputs.prepare(kinds, tmp_path / place)
        for number in range(20):
            bad_inputs.handle(kinds["data file"], ("data file", number), tmp_path / place, said.append)
    assert said[:20] == said[20:]
