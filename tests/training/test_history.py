"""Log lines on disk: a save costs the same at any length, lines are whole, and a checkpoint has its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil

import pytest
from conftest import adapted_model, chat_dataset, quiet_config, stop_at

import phi3lora as p3
from phi3lora.training import checkpoint as module
from phi3lora.training.checkpoint import TrainingState, damage
from phi3lora.training.history import HistoryFile, read_history


@pytest.fixture
def long(monkeypatch):
    """Three lines make a long history."""
    monkeypatch.setattr(module, "_LAST_LINES", 2)


def run(folder, callbacks=(), **settings):
    config = quiet_config(folder, **{"max_steps": 6, "save_strategy": "steps", "save_steps": 2, **settings})
    return p3.train(adapted_model(lora_dropout=0.1), chat_dataset(), config, callbacks=callbacks)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(lines):
    return [line["step"] for line in lines]


def test_a_save_after_100_000_lines_writes_no_more_than_one_after_a_few(tmp_path):
    written = {}

    class Fill(p3.Callback):
        def on_train_begin(self, state):
            state.history += [{"step": 0, "loss": i / 7} for i in range(100_000)]

        def on_save(self, state, path):
            files = [file for file in path.iterdir() if file.stat().st_nlink == 1]
            written[state.global_step] = sum(file.stat().st_size for file in files)

    result = run(tmp_path, [Fill()], max_steps=3, save_steps=1)
    run(tmp_path / "few", max_steps=3, save_steps=1)
    few = sum(file.stat().st_size for file in (tmp_path / "few" / "checkpoint-3").iterdir())
    assert written[3] < few + 200_000  # at most 1,000 lines more
    assert len(lines_of(tmp_path / "metrics.jsonl")) == len(result.history) == 100_003
    assert len(run(tmp_path, resume_from_checkpoint=True, max_steps=4, save_steps=1).history) == 100_004


@pytest.mark.parametrize("links", [True, False])
def test_each_checkpoint_has_exactly_the_lines_up_to_its_step(tmp_path, monkeypatch, long, links):
    if not links:

        def link(*arguments):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)
    result = run(tmp_path)
    for step in (4, 6):
        path = tmp_path / f"checkpoint-{step}"
        about = json.loads((path / "trainer_state.json").read_text())
        assert steps(read_history(path, about["history"])) == list(range(1, step + 1))
        assert damage(path) is None
        assert (path / "history.jsonl").samefile(tmp_path / "metrics.jsonl") is links
    again = run(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert steps(again.history) == steps(result.history) == steps(lines_of(tmp_path / "metrics.jsonl"))
    path = tmp_path / "checkpoint-6.set-aside"  # its lines are still its own
    assert steps(read_history(path, json.loads((path / "trainer_state.json").read_text())["history"])) == [*range(1, 7)]


@pytest.mark.parametrize("how", ["deleted", "emptied", "edited", "replaced"])
def test_checkpoints_keep_their_lines_whatever_happens_to_the_file_in_between(tmp_path, long, how):
    path = tmp_path / "metrics.jsonl"

    class Meddle(p3.Callback):
        def on_step_end(self, state):
            if state.global_step == 3:
                if how == "emptied":
                    path.write_text("")
                elif how == "edited":
                    path.write_text(path.read_text() + "mine\n")
                else:
                    path.unlink()
                if how == "replaced":
                    path.write_text("mine\n")
            state.should_stop = state.global_step == 5

    run(tmp_path, [Meddle()])
    assert steps(lines_of(path)) == [1, 2, 3, 4, 5]
    assert steps(run(tmp_path, resume_from_checkpoint=True).history) == [1, 2, 3, 4, 5, 6]


def test_damaged_lines_cost_the_lines_and_not_the_checkpoint(tmp_path, long, caplog):
    expected = run(tmp_path / "whole").metrics["train_loss"]
    run(tmp_path / "cut", callbacks=[stop_at(4)])
    shutil.copytree(tmp_path / "cut", tmp_path / "moved")
    path = tmp_path / "moved" / "checkpoint-4" / "history.jsonl"
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result = run(tmp_path / "moved", resume_from_checkpoint=True)
    assert steps(result.history) == [3, 4, 5, 6]
    assert result.metrics["train_loss"] == expected
    assert "all log lines but the last 2 are lost: ValueError: history.jsonl has changed" in caplog.text


def test_half_a_line_that_a_power_cut_left_is_gone_after_the_resume(tmp_path):
    run(tmp_path, callbacks=[stop_at(4)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    run(tmp_path, resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")
    assert steps(lines_of(tmp_path / "metrics.jsonl")) == [1, 2, 3, 4, 5, 6]


def test_a_resume_that_is_killed_while_it_writes_the_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    state = TrainingState(history=[{"step": 1}, {"step": 2}])

    def killed(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        HistoryFile(path, state).start()
    assert path.read_text() == '{"step": 1}\n'


def test_a_full_disk_ends_the_file_after_a_whole_line_and_checkpoints_have_the_rest(tmp_path, long, caplog):
    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    state = TrainingState(history=[{"step": 1}])
    lines = HistoryFile(tmp_path / "metrics.jsonl", state)
    lines.start()
    lines._file = Full(lines._file)
    state.history.append({"step": 2, "loss": 1.0})
    lines.append()
    state.history.append({"step": 3})
    lines.append()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert "no longer written: the disk is full" in caplog.text
    (tmp_path / "checkpoint").mkdir()
    assert (
        read_history(tmp_path / "checkpoint", lines.attach(tmp_path / "checkpoint" / "history.jsonl")) == state.history
    )


def test_a_callback_may_add_and_remove_lines(tmp_path):
    class Edit(p3.Callback):
        def on_step_end(self, state):
            if state.global_step == 2:
                del state.history[:]
                state.history.append({"note": "from here"})

    result = run(tmp_path, [Edit()])
    assert lines_of(tmp_path / "metrics.jsonl") == result.history
    assert [line.get("step", line.get("note")) for line in result.history] == ["from here", 3, 4, 5, 6]
