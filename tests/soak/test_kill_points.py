"""A few of the kill points, and tests of the harness itself."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import kill_points

from phi3lora import files

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(),
    reason="needs fork, which autograd's GPU threads do not survive",
)


@pytest.mark.slow
def test_a_seeded_choice_of_kill_points_loses_nothing():
    report = kill_points.run(most=10, randomly=1, seed=1, workers=1)
    assert report.lost == [], str(report)
    assert sum(report.tried.values()) == 11 and len(report.tried) >= 3


@pytest.mark.slow
def test_a_library_that_replaces_in_place_is_caught(monkeypatch, tmp_path):
    """A planted fault: the old checkpoint is deleted before the new one has its name."""

    def careless(source: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)

    monkeypatch.setattr(files, "_rename_over", careless)
    kill_points.prepare("whole run", tmp_path / "prepared")
    last = kill_points.count_points("whole run", tmp_path / "prepared")  # step 8 is saved again, with its evaluation
    jobs = [kill_points.Job("whole run", point) for point in range(last - 4, last - 24, -4)]
    lost = [kill_points.try_job(job, tmp_path / "prepared", {}) for job in jobs]
    assert any(wrong and "1 good checkpoints where 2 were saved" in wrong for wrong in lost)


def test_a_child_that_hangs_is_ended():
    with pytest.raises(TimeoutError):
        kill_points._wait(kill_points._fork(lambda: signal.pause()), 0.2)
