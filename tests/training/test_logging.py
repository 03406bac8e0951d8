"""Output of a run: metrics.jsonl, the loss picture, the banner, the bar; and metrics that are read late."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training.checkpoint import TrainingState
from phi3lora.training.logging import DeferredMetrics, Reporter
from phi3lora.training.picture import draw_run

DATA = chat_dataset(12)


@pytest.fixture(autouse=True)
def no_picture():
    """Draw the pictures here."""


def train(folder, callbacks=(), **settings):
    config = quiet_config(folder, **{"max_steps": 3, **settings})
    eval_dataset = DATA if config.eval_strategy != "no" else None
    return p3.train(adapted_model(), DATA, config, eval_dataset=eval_dataset, callbacks=callbacks)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- Files


def test_metrics_jsonl_equals_the_history_all_the_time_and_has_the_documented_figures(tmp_path):
    seen = []

    class Look(p3.Callback):
        def on_log(self, state, line):
            seen.append(lines(tmp_path) == state.history)

    result = train(tmp_path, [Look()], eval_strategy="steps", eval_steps=2)
    assert seen == [True] * 3
    assert lines(tmp_path) == result.history
    assert [line["step"] for line in result.history] == [1, 2, 2, 3, 3]
    figures = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_s"}
    evaluation = {"step", "epoch", "eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_n_tokens"}
    assert [set(line) for line in result.history] == [figures, figures, evaluation, figures, evaluation]
    assert result.history[0]["tokens_per_s"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run.yaml", "training.png"]
    picture = (tmp_path / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000


def test_a_resumed_run_rewrites_the_file_to_the_checkpoints_history_and_its_bar_starts_there(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lost": tr')  # a killed process
    state = TrainingState(total_steps=10, global_step=7, history=[{"step": 1}, {"step": 2}])
    with Reporter(quiet_config(tmp_path, disable_tqdm=False), state) as report:
        report.log({"step": 3, "grad_norm": float("inf")})
        report.advance()
    assert lines(tmp_path) == state.history == [{"step": 1}, {"step": 2}, {"step": 3, "grad_norm": None}]
    assert "8/10" in capsys.readouterr().err


def test_the_picture_shows_the_held_out_loss_too(tmp_path):
    train_lines = [{"step": i, "loss": 3.0 / i} for i in range(1, 9)]
    held_out = [{"step": 4, "eval_loss": 2.0}, {"step": 8, "eval_loss": 1.0}]
    alone = draw_run(train_lines, tmp_path / "alone.png")
    both = draw_run([*train_lines, *held_out], tmp_path / "both.png")
    assert alone.read_bytes() != both.read_bytes()


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "eval_loss": 2.0}]])
def test_fewer_than_two_points_make_no_picture(tmp_path, history):
    assert draw_run(history, tmp_path / "training.png") is None
    assert not (tmp_path / "training.png").exists()


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(tmp_path).global_step == 3
    assert not (tmp_path / "training.png").exists()


# --- Terminal


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_quiet_log_level_prints_nothing(tmp_path, capsys, level):
    train(tmp_path, log_level=level, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_default_level_prints_banner_findings_and_bar_in_this_order(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    train(tmp_path, disable_tqdm=False, log_level="passive", learning_rate=0, tf32=True, do_eval=False)
    printed = screen.getvalue().replace("\r", "\n").splitlines()
    [banner] = [i for i, line in enumerate(printed) if line.startswith("model  ")]
    [finding] = [i for i, line in enumerate(printed) if line.startswith("warning  learning rate")]
    first_bar = next(i for i, line in enumerate(printed) if " 0/3 " in line)
    assert banner < finding < first_bar
    assert any("3/3" in line and "loss=" in line for line in printed)
    [row] = [line for line in printed if line.startswith("without effect")]
    assert row.split(None, 2)[2] == "do_eval, tf32"


# --- Metrics that a GPU is still computing


class Copy:
    """A copy to the host that is done when the test says so, in place of a CUDA event."""

    def __init__(self):
        self.done = self.waited = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = self.waited = True


@pytest.fixture
def pending():
    """A queue of three values whose copies are under way, and those copies."""
    metrics, copies = DeferredMetrics(), [Copy() for _ in range(3)]
    for i, copy in enumerate(copies):
        metrics._queue.append((torch.tensor([float(i)]), copy, f"step {i}"))
    return metrics, copies


def test_on_the_cpu_values_are_ready_at_once_in_order_and_once():
    metrics = DeferredMetrics()
    metrics.add(torch.tensor([1.0, 2.0]), "a")
    metrics.add(torch.tensor([3.0, 4.0]), "b")
    assert metrics.ready() == [([1.0, 2.0], "a"), ([3.0, 4.0], "b")]
    assert metrics.ready() == metrics.ready(wait=True) == []


def test_a_value_that_is_not_ready_holds_back_those_after_it(pending):
    metrics, copies = pending
    copies[1].done = copies[2].done = True
    assert metrics.ready() == []
    copies[0].done, copies[2].done = True, False
    assert metrics.ready() == [([0.0], "step 0"), ([1.0], "step 1")]
    assert not any(copy.waited for copy in copies)


def test_waiting_returns_everything_and_waits_only_for_what_is_missing(pending):
    metrics, copies = pending
    copies[0].done = True
    assert metrics.ready(wait=True) == [([0.0], "step 0"), ([1.0], "step 1"), ([2.0], "step 2")]
    assert [copy.waited for copy in copies] == [False, True, True]


@pytest.mark.gpu
def test_on_a_gpu_the_value_is_the_one_at_the_time_of_adding():
    metrics, value = DeferredMetrics(), torch.ones(2, device="cuda")
    metrics.add(value, "before")
    value.mul_(5)
    metrics.add(value, "after")
    assert metrics.ready(wait=True) == [([1.0, 1.0], "before"), ([5.0, 5.0], "after")]
