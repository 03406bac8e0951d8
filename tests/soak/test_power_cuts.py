"""Some power cuts, and tests of the harness itself: it must find a library that does not flush what it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import power_cuts

from phi3lora import files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/fd").exists() or torch.cuda.is_available(),
        reason="needs Linux's /proc, and fork, which autograd's GPU threads do not survive",
    ),
]


def test_a_seeded_choice_of_power_cuts_loses_nothing():
    report = power_cuts.run(most=8, seed=1, workers=1)
    assert report.lost == [], str(report)
    assert list(report.tried.values()) == [8 * power_cuts.STATES] * 4


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_export_is_whole_without_an_exchange_too(exchange, monkeypatch):
    """Between two renames the folder is not there, but the next write brings it back: only its readers wait."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    report = power_cuts.run(most=20, seed=2, workers=1, kinds=["exports"])
    gone = [line for line in report.lost if "is not a local folder" in line or "there is no folder" in line]
    assert gone == report.lost and not (exchange and gone), str(report)


@pytest.mark.parametrize("kind", ["files", "folders"])
@pytest.mark.parametrize("name", ["adapter files", "whole run"])
def test_a_library_that_does_not_flush_is_caught(monkeypatch, kind, name):
    """Planted faults: contents, or names, that are not on disk when a save returns."""
    real = files.fsync
    monkeypatch.setattr(files, "fsync", lambda path: None if path.is_dir() == (kind == "folders") else real(path))
    report = power_cuts.run(most=40, workers=1, kinds=[name])
    assert report.lost, str(report)
