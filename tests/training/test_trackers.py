"""Trackers: each gets the lines of ``metrics.jsonl``; a missing one is refused before anything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import quiet_config
from test_logging import train

import phi3lora as p3
from phi3lora.training.trackers import tracker_names


def test_tensorboard_gets_the_figures_of_every_line(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], line[name]) for line in result.history if name in line]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected])


def test_a_resumed_run_replaces_what_the_killed_one_wrote_beyond_its_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, report_to="tensorboard", max_steps=5, save_strategy="steps", save_steps=2)
    for path in tmp_path.glob("checkpoint-*"):
        if path.name != "checkpoint-2":
            shutil.rmtree(path)
    result = train(tmp_path, report_to="tensorboard", max_steps=4, resume_from_checkpoint=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [line["step"] for line in result.history] == [1, 2, 3, 4]


class Library:
    """A stand-in for the three libraries with runs: it records what it receives, and fails where it is told to."""

    run = None

    def __init__(self, fails_in=()):
        self.fails_in, self.settings, self.logged, self.ended = fails_in, {}, [], []
        self.info = self
        self.run_id = "1"

    def _call(self, name):
        if name in self.fails_in:
            raise ConnectionError(f"no server for {name}")

    def init(self, **settings):
        self._call("init")
        self.settings = settings
        return self

    def start_run(self, **settings):
        return self.init(**settings)

    def active_run(self):
        return self.run

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def log_params(self, params):
        self.settings["config"] = params

    def log(self, values, step):
        self._call("log")
        self.logged.append((step, values))

    def log_metrics(self, values, step, run_id):
        self.log(values, step)

    def finish(self, exit_code=0):
        self._call("finish")
        self.ended.append(exit_code)

    def end_run(self, status):
        self._call("finish")
        self.ended.append(int(status == "FAILED"))


LIBRARIES = ("wandb", "trackio", "mlflow")


def library(monkeypatch, name, **options):
    fake = Library(**options)
    monkeypatch.setitem(sys.modules, name, fake)
    return fake


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tracker_gets_name_project_config_and_the_figures_of_every_line(tmp_path, monkeypatch, name):
    fake = library(monkeypatch, name)
    result = train(tmp_path, report_to=[name], run_name="mine", project="bots", eval_strategy="steps", eval_steps=2)
    settings = fake.settings
    assert settings.get("name", settings.get("run_name")) == "mine"
    assert settings.get("project", settings.get("experiment_id")) == "bots"
    assert settings["config"]["learning_rate"] == 1e-2
    assert fake.logged == [(x["step"], {k: v for k, v in x.items() if k != "step"}) for x in result.history]
    assert fake.ended == [0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_run_that_is_open_is_used_and_left_open(tmp_path, monkeypatch, name):
    fake = library(monkeypatch, name)
    fake.run = Library()
    fake.log_metrics = lambda values, step, run_id: fake.run.log(values, step)
    train(tmp_path, report_to=name)
    assert [step for step, _ in fake.run.logged] == [1, 2, 3]
    assert (fake.run.ended, fake.ended, fake.settings) == ([], [], {})


@pytest.mark.parametrize("fails_in", [("log",), ("log", "finish")])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tracker_that_fails_in_the_run_is_named_once_closed_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog, name, fails_in
):
    fake = library(monkeypatch, name, fails_in=fails_in)
    result = train(tmp_path, report_to=["tensorboard", name])
    assert result.global_step == 3
    assert fake.ended == ([] if "finish" in fails_in else [0])
    assert caplog.messages == [
        f"{name} failed at step 1: no server for log; the run goes on without this tracker, and metrics.jsonl has "
        f"every line"
    ]


def test_a_tracker_that_does_not_close_is_named(tmp_path, monkeypatch, caplog):
    library(monkeypatch, "wandb", fails_in=("finish",))
    assert train(tmp_path, report_to="wandb").global_step == 3
    assert caplog.messages == ["wandb did not close: no server for finish"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_tracker_that_does_not_start_ends_the_run_in_one_line_and_closes_the_others(tmp_path, monkeypatch, name):
    library(monkeypatch, name, fails_in=("init",))
    other = library(monkeypatch, "trackio" if name == "wandb" else "wandb")
    with pytest.raises(p3.TrainingError, match=rf"report_to='{name}' does not start: no server for init") as caught:
        train(tmp_path, report_to=["trackio" if name == "wandb" else "wandb", name])
    assert "\n" not in str(caught.value)
    assert len(other.ended) == 1


def test_an_error_in_the_run_marks_the_trackers_run_as_failed(tmp_path, monkeypatch):
    fakes = [library(monkeypatch, name) for name in ("wandb", "mlflow")]

    class Fails(p3.Callback):
        def on_step_end(self, state):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        train(tmp_path, report_to=["wandb", "mlflow"], callbacks=[Fails()])
    assert [fake.ended for fake in fakes] == [[1], [1]]


def test_all_stands_for_the_trackers_that_are_installed(monkeypatch):
    installed = {"tensorboard", "trackio"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert tracker_names(quiet_config("unused", report_to="all")) == ["tensorboard", "trackio"]
    assert tracker_names(quiet_config("unused", report_to=["mlflow", "mlflow"])) == ["mlflow"]
    assert tracker_names(quiet_config("unused", report_to="none")) == []


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_a_missing_tracker_is_one_line_before_any_file_is_written(tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(tracker, tracker), None)
    with pytest.raises(p3.TrainingError, match=rf"report_to='{tracker}' needs {tracker}: pip install") as caught:
        train(tmp_path / "run", report_to=tracker)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- The libraries themselves, offline, each in a process of its own: they leave threads and settings behind

OFFLINE = """
import json, sys, warnings
import phi3lora as p3
from conftest import adapted_model, chat_dataset, quiet_config
name, folder = sys.argv[1:]
config = quiet_config(folder, max_steps=3, report_to=name, run_name="mine", log_level="warning")
print(json.dumps(p3.train(adapted_model(), chat_dataset(12), config).history))
"""


def train_offline(tmp_path, name, **environment):
    """Train with the real library in another process and no network; return the history."""
    pytest.importorskip(name)
    tests = str(Path(__file__).parents[1])
    environment = {
        **os.environ, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([tests, str(Path(tests).parent)]),
        "HF_HUB_OFFLINE": "1", "https_proxy": "http://127.0.0.1:9", **environment,
    }  # fmt: skip
    command = [sys.executable, "-c", OFFLINE, name, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()  # the history; a quiet run's tracker prints nothing
    return json.loads(line)


def test_wandb_records_a_run_offline(tmp_path):
    history = train_offline(tmp_path, "wandb", WANDB_MODE="offline")
    [file] = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()  # protobuf messages: the key, three bytes of tags and lengths, the value as JSON
    losses = [json.loads(text) for text in re.findall(rb"\x04loss\x82\x01.([\d.e-]+)", written, re.DOTALL)]
    assert sorted(set(losses), reverse=True) == [line["loss"] for line in history]
    assert b"mine" in written and b"learning_rate" in written


def test_trackio_records_a_run_on_this_machine(tmp_path):
    history = train_offline(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "phi3lora.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step, json.loads(text)["loss"]) for name, step, text in rows] == [
        ("mine", line["step"], pytest.approx(line["loss"])) for line in history
    ]


def test_mlflow_records_a_run_in_a_database_file(tmp_path):
    history = train_offline(tmp_path, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        losses = database.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
        runs = database.execute("SELECT name, status FROM runs").fetchall()
        rate = database.execute("SELECT value FROM params WHERE key = 'learning_rate'").fetchall()
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in history]
    assert (runs, rate) == ([("mine", "FINISHED")], [("0.01",)])
