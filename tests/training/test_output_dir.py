"""A run's folder: one run at a time, a lock that a killed process cannot leave behind, nothing made for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training.setup import locked

HOLD = """
import sys
from phi3lora.training.setup import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def train(folder, **changes):
    return p3.train(adapted_model(), chat_dataset(), quiet_config(folder, max_steps=1, **changes))


def test_a_second_run_in_the_same_process_is_refused_and_the_first_goes_on(tmp_path):
    class Second(p3.Callback):
        def on_step_end(self, state):
            with pytest.raises(p3.CheckpointError, match="in use by another run"):
                train(tmp_path)

    result = p3.train(adapted_model(), chat_dataset(), quiet_config(tmp_path, max_steps=2), callbacks=[Second()])
    assert result.global_step == 2
    train(tmp_path)  # and afterwards the folder is free


def test_another_process_holds_it_until_it_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(p3.CheckpointError, match="in use by another run"):
            train(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        train(tmp_path)
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_folder_made_for_nothing_goes_again_and_one_with_something_stays(tmp_path, error):
    with pytest.raises(error or ZeroDivisionError), locked(tmp_path / "empty"):
        raise error or ZeroDivisionError
    assert not (tmp_path / "empty").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    steps = []

    class Count(p3.Callback):
        def on_step_end(self, state):
            steps.append(state.global_step)

    with pytest.raises(p3.CheckpointError, match="cannot be written"):
        p3.train(adapted_model(), chat_dataset(), quiet_config(tmp_path / "file" / "run"), callbacks=[Count()])
    read_only = Path("/proc/self")  # nobody can make a file there, not even root
    with pytest.raises(p3.CheckpointError, match="cannot be written"):
        p3.train(adapted_model(), chat_dataset(), quiet_config(read_only), callbacks=[Count()])
    assert steps == []
