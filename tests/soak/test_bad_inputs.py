"""Some hundreds of bad inputs, and tests of the harness itself: it must find what is planted."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import bad_inputs

import phi3lora as p3

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(),
    reason="needs Linux's /proc, and fork, which autograd's GPU threads do not survive",
)
LIMIT_S = 600.0  # no input takes long; a busy machine may


def planted(read: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> dict[str, bad_inputs.Kind]:
    """Return a kind whose input 1 is read by ``read``; the others are accepted."""
    first = Random("planted 1").random()

    def make(random, good, own):
        return "planted", read if random.random() == first else lambda: None

    return {"planted": bad_inputs.Kind(lambda good: prepare, make, 1)}


def run_planted(read: Callable[[], object]) -> bad_inputs.Figures:
    return bad_inputs.run(planted(read), 4, workers=1, limit_s=LIMIT_S).kinds["planted"]


@pytest.mark.slow
def test_a_seeded_choice_of_bad_inputs_is_refused_or_accepted():
    report = bad_inputs.run(bad_inputs.all_kinds(), 300, seed=11, workers=1, limit_s=LIMIT_S)
    assert report.unhandled == [], str(report)
    assert report.tried >= 300
    for name, figures in report.kinds.items():
        assert figures.refused > 0, f"nothing bad about {name}"


def hang():
    faulthandler.dump_traceback_later(0.01, exit=True, file=2)  # brings the harness's own watchdog forward
    signal.pause()


class UnprintableError(p3.Phi3LoRAError):
    def __str__(self):
        return "\ud800"


def unprintable():
    raise UnprintableError


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda: {}["missing"], "KeyError at test_bad_inputs.py"),
        (lambda: b"x" * 2**27, "takes 128 MiB"),
        (lambda: bytearray(2**50), "MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process died"),
        (lambda: sys.exit(1), "SystemExit"),
        (unprintable, "UnicodeEncodeError"),
        (hang, "hangs: more than 600 s"),
    ],
    ids=["another exception", "memory", "too much memory", "death", "exit", "unprintable message", "hang"],
)
def test_a_planted_fault_is_found_and_the_inputs_after_it_are_tried(read, expected, monkeypatch):
    monkeypatch.setattr(bad_inputs, "LIMIT_BYTES", 2**26)
    figures = run_planted(read)
    assert figures.tried == 4 and figures.accepted == 3 and len(figures.unhandled) == 1
    assert figures.unhandled[0].startswith("planted 1 (planted): ") and expected in figures.unhandled[0]
    if read is hang:
        assert "test_bad_inputs.py" in figures.unhandled[0], "where it hangs"


def test_good_inputs_that_are_refused_stop_the_run():
    with pytest.raises(KeyError):
        bad_inputs.run(planted(lambda: None, prepare=lambda: {}["missing"]), 4, workers=1)


def test_an_input_is_the_same_each_time(tmp_path):
    descriptions = []
    for place in ("a", "b"):
        kinds = {name: kind for name, kind in bad_inputs.all_kinds().items() if name == "data file"}
        bad_inputs.prepare(kinds, tmp_path / place)
        for number in range(20):
            bad_inputs.handle(kinds["data file"], ("data file", number), tmp_path / place, descriptions.append)
    assert descriptions[:20] == descriptions[20:]
