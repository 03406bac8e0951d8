"""What a run shows: metrics.jsonl, the picture, the banner, trackers; and silence when asked for."""

from __future__ import annotations

import io
import json
import sys

import pytest
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training.logging import Reporter, draw_loss
from phi3lora.training.state import TrainingState

DATA = chat_dataset(12)


def train(folder, **settings):
    config = quiet_config(folder, **{"max_steps": 3, **settings})
    return p3.train(adapted_model(), DATA, config, eval_dataset=DATA if config.eval_strategy != "no" else None)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_equals_the_history(tmp_path):
    result = train(tmp_path, eval_strategy="steps", eval_steps=2)
    assert lines(tmp_path) == result.history
    assert [sorted(line)[0] for line in result.history] == ["epoch"] * 3 + ["epoch", "epoch"]
    assert [line["step"] for line in result.history] == [1, 2, 2, 3, 3]


def test_a_line_has_the_documented_figures(tmp_path):
    line = train(tmp_path, max_steps=1).history[0]
    assert set(line) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s"}
    assert line["tokens_per_s"] > 0


def test_a_line_is_on_disk_while_the_run_goes_on(tmp_path):
    seen = []

    class Look(p3.Callback):
        def on_log(self, state, line):
            seen.append(lines(tmp_path) == state.history)

    p3.train(adapted_model(), DATA, quiet_config(tmp_path, max_steps=2), callbacks=[Look()])
    assert seen == [True, True]


def test_a_resumed_reporter_rewrites_the_file_to_the_checkpoints_history(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lost": tr')  # a killed process
    state = TrainingState(history=[{"step": 1}, {"step": 2}])
    with Reporter(quiet_config(tmp_path), state) as report:
        report.line({"step": 3})
    assert lines(tmp_path) == state.history == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_the_loss_picture_is_a_png(tmp_path):
    train(tmp_path, eval_strategy="steps", eval_steps=1)
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


def test_the_picture_shows_the_held_out_loss_too(tmp_path):
    train_lines = [{"step": i, "loss": 3.0 / i} for i in range(1, 9)]
    alone = draw_loss(train_lines, tmp_path / "alone.png")
    both = draw_loss(
        [*train_lines, {"step": 4, "eval_loss": 2.0}, {"step": 8, "eval_loss": 1.0}], tmp_path / "both.png"
    )
    assert alone.read_bytes() != both.read_bytes()


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "eval_loss": 2.0}] * 3])
def test_fewer_than_two_points_make_no_picture(tmp_path, history):
    assert draw_loss(history, tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()


def test_without_matplotlib_there_is_no_picture_and_no_complaint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = train(tmp_path)
    assert result.global_step == 3
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("level", ["warning", "error", "critical"])
def test_a_quiet_log_level_prints_nothing(tmp_path, capsys, level):
    train(tmp_path, log_level=level, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize("level", ["passive", "info"])
def test_other_levels_print_the_banner_once_with_the_names_without_effect(tmp_path, capsys, level):
    train(tmp_path, log_level=level, remove_unused_columns=False, dataloader_num_workers=4)
    out = capsys.readouterr().out
    assert out.count("trainable") == 1
    (row,) = [line for line in out.splitlines() if line.startswith("without effect")]
    assert row.split(None, 2)[2] == "dataloader_num_workers, remove_unused_columns"


def test_the_bar_begins_below_the_banner(tmp_path, monkeypatch):
    """Before it, on one screen: the first fact stood behind the bar, on its line."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    config = quiet_config(tmp_path, max_steps=2, disable_tqdm=False, log_level="info", learning_rate=0)
    p3.train(adapted_model(), chat_dataset(8), config)
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    [first_bar] = [i for i, line in enumerate(lines) if " 0/2 " in line][:1]
    [banner] = [i for i, line in enumerate(lines) if line.startswith("model  ")]
    [finding] = [i for i, line in enumerate(lines) if line.startswith("warning  learning rate")]
    assert banner < finding < first_bar


def test_disable_tqdm_hides_the_bar_and_its_absence_shows_it(tmp_path, capsys):
    train(tmp_path / "off")
    assert "step" not in capsys.readouterr().err
    train(tmp_path / "on", disable_tqdm=False)
    err = capsys.readouterr().err
    assert "3/3" in err
    assert "loss=" in err


def test_the_bar_of_a_resumed_run_starts_where_it_stood(tmp_path, capsys):
    config = quiet_config(tmp_path, disable_tqdm=False)
    with Reporter(config, TrainingState(total_steps=10, global_step=7)) as report:
        report.step_done()
    assert "8/10" in capsys.readouterr().err


def test_tensorboard_gets_the_figures_of_every_line(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        written = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], line[name]) for line in result.history if name in line]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected])


def test_no_tracker_writes_nothing_of_its_own(tmp_path):
    train(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("tracker", "module"),
    [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")],
    ids=["wandb", "tensorboard"],
)
def test_a_missing_tracker_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(p3.TrainingError, match=rf"report_to='{tracker}' needs {tracker}: pip install") as caught:
        train(tmp_path / "run", report_to=tracker)
    assert "\n" not in str(caught.value)


def test_a_missing_tracker_is_noticed_before_any_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(p3.TrainingError):
        train(tmp_path / "run", report_to="wandb")
    assert not (tmp_path / "run").exists()


class FakeWandb:
    """Keeps what it is told."""

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
    assert fake.settings["name"] == "mine"
    assert fake.settings["config"]["learning_rate"] == 1e-2
    assert fake.logged == [(x["step"], {k: v for k, v in x.items() if k != "step"}) for x in result.history]
    assert fake.finished == 1
