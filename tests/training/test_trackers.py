"""Trackers: each gets the lines of ``metrics.jsonl``; a missing one is refused before anything is written."""

from __future__ import annotations

import sys

import pytest
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3

DATA = chat_dataset(12)


def train(folder, **settings):
    config = quiet_config(folder, **{"max_steps": 3, **settings})
    eval_dataset = DATA if config.eval_strategy != "no" else None
    return p3.train(adapted_model(), DATA, config, eval_dataset=eval_dataset)


def test_tensorboard_gets_the_figures_of_every_line(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], line[name]) for line in result.history if name in line]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected])


class FakeWandb:
    """Records what it receives."""

    def __init__(self):
        self.settings, self.logged, self.finished = None, [], 0

    def init(self, **settings):
        self.settings = settings
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_gets_name_config_and_lines_and_is_finished(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = train(tmp_path, report_to=["wandb"], run_name="mine")
    assert (fake.settings["name"], fake.settings["config"]["learning_rate"]) == ("mine", 1e-2)
    assert fake.logged == [(x["step"], {k: v for k, v in x.items() if k != "step"}) for x in result.history]
    assert fake.finished == 1


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_tracker_is_one_line_before_any_file_is_written(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(p3.TrainingError, match=rf"report_to='{tracker}' needs {tracker}: pip install") as caught:
        train(tmp_path / "run", report_to=tracker)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
