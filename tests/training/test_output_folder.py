"""The output folder: its lock, another run's files, and which checkpoints stay."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import adapted_model, chat_dataset, on, quiet_config, stop_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.training import output_folder
from phi3lora.training.checkpoint import checkpoints, damage, newest_good_checkpoint
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
    def second(state):
        with pytest.raises(p3.CheckpointError, match="in use by another run"):
            run(tmp_path)

    assert run(tmp_path, [on(second)], max_steps=2).global_step == 2
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
    for folder in (tmp_path / "file" / "run", Path("/proc/self")):  # nobody can create a file there, not even root
        with pytest.raises(p3.CheckpointError, match="cannot be written"):
            run(folder, [on(steps.append)])
    assert steps == []


# --- Rotation


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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


# --- Links, other users' and immutable folders


def saved(folder, **changes):
    return run(folder, **{"save_strategy": "steps", "save_steps": 1, **changes})


def test_rotation_deletes_a_link_and_leaves_what_it_points_to(tmp_path):
    saved(tmp_path / "run", max_steps=2)
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    saved(tmp_path / "run", max_steps=4, save_total_limit=1, resume_from_checkpoint=True)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert damage(tmp_path / "elsewhere") is None


def test_what_a_protected_link_points_to_is_protected(tmp_path):
    for step in (2, 5, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-7").symlink_to("checkpoint-2")
    rotate(tmp_path, 1, "checkpoint-7")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-7", "checkpoint-9"]


@pytest.mark.parametrize("how", ["file", "folder"])
def test_a_checkpoint_that_cannot_be_deleted_is_our_error_and_may_be_skipped(tmp_path, monkeypatch, caplog, how):
    """As on an immutable file, or a folder of another user."""

    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")

    real = Path.rename
    if how == "file":
        monkeypatch.setattr(output_folder, "remove", refuse)
    else:
        monkeypatch.setattr(Path, "rename", lambda a, b: refuse() if a.name == "checkpoint-1" else real(a, b))
    settings = {"max_steps": 3, "save_total_limit": 1}
    with pytest.raises(p3.CheckpointError, match=r"save_total_limit=1.*checkpoint-1 .*be deleted.*permitted") as error:
        saved(tmp_path / "one", **settings)
    left = re.search("Delete '(.*)' yourself", str(error.value))[1]
    assert Path(left).is_dir() and (Path(left).name == "checkpoint-1") == (how == "folder")
    assert damage(tmp_path / "one" / "checkpoint-2") is None
    seen = []
    watch = on(lambda state, path: seen.append(path.name), hook="on_save")
    with caplog.at_level(logging.ERROR, logger="phi3lora"):
        result = saved(tmp_path / "two", callbacks=[watch], continue_on_save_error=True, **settings)
    assert result.global_step == 3 and "cannot be deleted" in caplog.text
    assert seen == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert damage(tmp_path / "two" / "checkpoint-3") is None


@pytest.mark.parametrize("kind", ["link", "file", "dead link"])
def test_leftovers_of_any_kind_are_removed_and_what_they_point_to_stays(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    saved(tmp_path / "run")
    leftover = tmp_path / "run" / ".checkpoint-9.77.tmp"
    if kind == "file":
        leftover.touch()
    else:
        leftover.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    saved(tmp_path / "run", max_steps=2, resume_from_checkpoint=True)
    assert not os.path.lexists(leftover) and (tmp_path / "mine" / "file").exists()


def test_overwriting_deletes_links_and_not_what_they_point_to(tmp_path):
    saved(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    saved(tmp_path / "run", overwrite_output_dir=True)
    assert damage(tmp_path / "elsewhere") is None and not (tmp_path / "run" / "checkpoint-1").is_symlink()


# --- Going back, and damaged checkpoints


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize("limit", [1, 2, None])
def test_a_run_that_goes_back_keeps_its_own_checkpoints_and_the_other_branchs(tmp_path, limit):
    saved(tmp_path, max_steps=8, save_steps=2)
    back = {"learning_rate": 1e-3, "resume_with_changes": True, "save_total_limit": limit, "max_steps": 8}
    go_back = {**back, "resume_from_checkpoint": tmp_path / "checkpoint-2"}
    saved(tmp_path, callbacks=[stop_at(5)], **go_back)
    own = {1: [5], 2: [4, 5], None: [2, 3, 4, 5]}[limit]
    aside = [f"checkpoint-{step}.set-aside" for step in (4, 6, 8)]
    assert names(tmp_path) == sorted([f"checkpoint-{step}" for step in own] + aside)
    assert all(damage(path) is None for path in tmp_path.glob("checkpoint-*"))
    assert newest_good_checkpoint(tmp_path).name == "checkpoint-5"
    del back["resume_with_changes"]  # the newest one is of this branch
    assert saved(tmp_path, resume_from_checkpoint=True, **back).global_step == 8


def test_a_branch_that_was_left_can_be_taken_again(tmp_path):
    first = saved(tmp_path, max_steps=4)
    saved(tmp_path, max_steps=3, resume_from_checkpoint=tmp_path / "checkpoint-2")
    again = saved(tmp_path, max_steps=4, resume_from_checkpoint=tmp_path / "checkpoint-4.set-aside")
    assert again.global_step == 4 and again.history == first.history
    third = saved(tmp_path, max_steps=3, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert third.global_step == 3
    assert {"checkpoint-3.set-aside", "checkpoint-3.set-aside-1"} <= set(names(tmp_path))


@pytest.mark.parametrize("resume", [True, "auto"])
def test_rotation_keeps_the_good_checkpoints_behind_a_damaged_one(tmp_path, resume):
    saved(tmp_path, max_steps=8, save_steps=2, save_total_limit=2)
    (tmp_path / "checkpoint-8" / "optimizer.pt").write_bytes(b"")
    saved(tmp_path, max_steps=9, callbacks=[stop_at(7)], save_total_limit=1, resume_from_checkpoint=resume)
    assert names(tmp_path) == ["checkpoint-7", "checkpoint-8.set-aside"]
    assert damage(tmp_path / "checkpoint-7") is None


def test_a_newer_folder_that_somebody_puts_there_is_not_taken_for_this_runs_newest(tmp_path):
    put = on(lambda state: (tmp_path / "checkpoint-99").mkdir(exist_ok=True))
    saved(tmp_path, callbacks=[put], max_steps=3, save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-99"]


# --- Another run's folder


def test_going_on_in_a_folder_with_another_runs_checkpoints_is_asked_for(tmp_path):
    saved(tmp_path / "a", max_steps=2)
    saved(tmp_path / "b", max_steps=1, seed=1)
    settings = {"max_steps": 3, "resume_from_checkpoint": tmp_path / "a" / "checkpoint-2"}
    before = sorted((tmp_path / "b").rglob("*"))
    with pytest.raises(
        p3.CheckpointError, match=r"holds another run's checkpoints.*checkpoint-1.*overwrite_output_dir"
    ):
        saved(tmp_path / "b", **settings)
    found = p3.doctor(adapted_model(), None, chat_dataset(), quiet_config(tmp_path / "b", **settings))["output"]
    assert found.status == "error" and "another run's checkpoints" in found.text
    assert sorted((tmp_path / "b").rglob("*")) == before
    saved(tmp_path / "b", overwrite_output_dir=True, **settings)
    assert names(tmp_path / "b") == ["checkpoint-3"] and names(tmp_path / "a") == ["checkpoint-1", "checkpoint-2"]


def test_a_second_run_keeps_the_first_ones_metrics_and_says_so(tmp_path, caplog):
    for number in (1, 2):
        with caplog.at_level(logging.WARNING, logger="phi3lora"):
            run(tmp_path, learning_rate=number * 1e-3)
        kept = [
            (tmp_path / name).read_text()
            for name in ("metrics.jsonl", *[f"metrics-{i}.jsonl" for i in range(1, number)])
        ]
        assert len(kept) == len(set(kept)) == number
    assert f"{tmp_path / 'metrics.jsonl'} is of an earlier run: renamed to metrics-1.jsonl" in caplog.text
    run(tmp_path, overwrite_output_dir=True)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["metrics-1.jsonl", "metrics.jsonl"]


# --- A folder that goes away


def test_a_folder_that_is_deleted_during_the_run_is_made_and_locked_anew(tmp_path, caplog):
    folder = tmp_path / "run"

    def second(state, path):
        with pytest.raises(p3.CheckpointError, match="in use by another run"):
            run(folder)

    callbacks = [on(lambda state: shutil.rmtree(folder), 2), on(second, 3, "on_save")]
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result = saved(folder, callbacks=callbacks, max_steps=4)
    assert names(folder) == ["checkpoint-3", "checkpoint-4"] and "was deleted or replaced" in caplog.text
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == result.history


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_run_does_not_write_into_the_folder_of_a_later_run_of_the_same_name(tmp_path, caplog, goes_on):
    folder = tmp_path / "run"

    def replace(state):
        shutil.rmtree(folder)
        saved(folder, max_steps=1, seed=1)

    def first():
        return saved(folder, callbacks=[on(replace, 2)], max_steps=4, continue_on_save_error=goes_on)

    if goes_on:
        assert first().global_step == 4
    else:
        with pytest.raises(p3.CheckpointError, match=r"deleted or replaced during the run.*another run's checkpoints"):
            first()
    assert names(folder) == ["checkpoint-1"]
    about = json.loads((folder / "checkpoint-1" / "trainer_state.json").read_text())
    assert about["config"]["seed"] == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_later_run_that_is_still_going_keeps_its_folder(tmp_path):
    folder, other = tmp_path / "run", ExitStack()

    def replace(state):
        shutil.rmtree(folder)
        other.enter_context(locked(folder))

    with other, pytest.raises(p3.CheckpointError, match="in use by another run"):
        saved(folder, callbacks=[on(replace, 2)], max_steps=4)
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    ready, done = os.pipe(), os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if not child:  # only waits
            os.write(ready[1], b"!")
            os.close(done[1])
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.close(done[1])
        os.waitpid(child, 0)


def test_a_forked_child_does_not_give_the_parents_lock_back(tmp_path):
    with locked(tmp_path):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(p3.CheckpointError, match="in use"), locked(tmp_path):
            pass


def test_a_relative_folder_stays_where_it_was_when_a_callback_changes_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    config = quiet_config("run", max_steps=2, save_strategy="steps", save_steps=1)
    leave = on(lambda state: os.chdir(tmp_path / "other"), 1)
    result = p3.train(adapted_model(), chat_dataset(), config, callbacks=[leave])
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"] and not list((tmp_path / "other").iterdir())
    assert config.output_dir == "run" and result.global_step == 2
