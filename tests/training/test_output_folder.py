"""The output folder: its lock, another run's files, and which checkpoints stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import adapted_model, chat_dataset, quiet_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.training.checkpoint import checkpoints
from phi3lora.training.output_folder import claim_output_dir, locked, rotate

# --- Another run's files


@pytest.fixture
def used(tmp_path):
    """A folder with another run's checkpoints, metrics, and a file of the user's."""
    for name in ("checkpoint-2/x", "checkpoint-10/x", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    return tmp_path


def test_a_folder_with_another_runs_checkpoints_is_refused_and_left_alone(used):
    before = sorted(used.rglob("*"))
    message = r"newest is checkpoint-10.*resume_from_checkpoint.*overwrite_output_dir"
    with pytest.raises(p3.CheckpointError, match=message):
        p3.train(adapted_model(), chat_dataset(), quiet_config(used))
    assert sorted(used.rglob("*")) == before


def test_overwriting_deletes_that_runs_checkpoints_and_metrics_and_nothing_else_and_resuming_wins(used):
    before = sorted(used.rglob("*"))
    for resume in (True, "auto"):
        claim_output_dir(quiet_config(used, overwrite_output_dir=True, resume_from_checkpoint=resume), resuming=True)
    assert sorted(used.rglob("*")) == before
    claim_output_dir(quiet_config(used, overwrite_output_dir=True), resuming=False)
    assert [p.name for p in used.iterdir()] == ["notes.txt"]
    claim_output_dir(quiet_config(used), resuming=False)  # a folder without checkpoints is free


def run(folder, callbacks=(), **changes):
    config = quiet_config(folder, **{"max_steps": 1, **changes})
    return p3.train(adapted_model(), chat_dataset(), config, callbacks=callbacks)


def test_a_second_run_in_the_same_process_is_refused_and_the_first_continues(tmp_path):
    class Second(p3.Callback):
        def on_step_end(self, state):
            with pytest.raises(p3.CheckpointError, match="in use by another run"):
                run(tmp_path)

    assert run(tmp_path, [Second()], max_steps=2).global_step == 2
    run(tmp_path)  # the folder is free again


HOLD = """
import sys
from phi3lora.training.output_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_another_process_holds_the_folder_until_it_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(p3.CheckpointError, match="in use by another run"):
            run(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        run(tmp_path)
    finally:
        holder.kill()
        holder.communicate()


def test_a_new_folder_is_removed_if_it_stays_empty(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "empty"):
        raise KeyboardInterrupt
    assert not (tmp_path / "empty").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["file"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    steps = []

    class Count(p3.Callback):
        def on_step_end(self, state):
            steps.append(state.global_step)

    for folder in (tmp_path / "file" / "run", Path("/proc/self")):  # nobody can create a file there, not even root
        with pytest.raises(p3.CheckpointError, match="cannot be written"):
            run(folder, [Count()])
    assert steps == []


# --- Rotation


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.sets(st.integers(1, 120), min_size=1, max_size=7),
    keep=st.one_of(st.none(), st.integers(1, 8)),
    data=st.data(),
)
def test_rotation_keeps_the_newest_and_the_best_and_no_more_than_asked(tmp_path_factory, steps, keep, data):
    folder = tmp_path_factory.mktemp("rotation")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
    best = data.draw(st.one_of(st.none(), st.sampled_from(sorted(steps))))
    deleted = rotate(folder, keep, None if best is None else f"checkpoint-{best}")
    newest_first = sorted(steps, reverse=True)
    kept = {newest_first[0]} | ({best} if best is not None else set())
    for step in newest_first:
        if keep is None or len(kept) < keep:
            kept.add(step)
    assert {int(p.name.removeprefix("checkpoint-")) for p in folder.iterdir()} == kept
    assert {p.name for p in deleted} == {f"checkpoint-{step}" for step in steps - kept}


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(1, 2, [2, 9]), (1, None, [9]), (2, 2, [2, 9]), (3, 2, [2, 7, 9]), (1, 9, [9])]
)
def test_the_newest_checkpoint_survives_even_where_the_best_one_alone_fills_the_limit(tmp_path, keep, best, left):
    for step in (2, 5, 7, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, keep, f"checkpoint-{best}")
    assert sorted(int(p.name.removeprefix("checkpoint-")) for p in tmp_path.iterdir()) == left


def test_a_run_keeps_as_many_checkpoints_as_save_total_limit(tmp_path):
    run(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-4"]
