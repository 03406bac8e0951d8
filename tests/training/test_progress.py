"""Progress of a run in a terminal, a notebook and a pipe; the last lines of a run; plots of runs."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import adapted_model, chat_dataset, interrupt, on, quiet_config
from matplotlib.backends.backend_agg import FigureCanvasAgg

import phi3lora as p3
from phi3lora.display import width_of
from phi3lora.training.progress import log_line

DATA = chat_dataset(12)
LOUD = {"log_level": "passive", "disable_tqdm": None}


def train(folder, callbacks=(), model=None, **settings):
    config = quiet_config(folder, **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, **LOUD, **settings})
    return p3.train(model or adapted_model(), DATA, config, eval_dataset=DATA, callbacks=callbacks)


class Screen(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self):
        return True


warns = on(lambda state: logging.getLogger("phi3lora").warning("a warning in the middle"), 3)


# --- Where a run is shown


@pytest.mark.parametrize("disable_tqdm", [None, True])
def test_a_pipe_gets_one_line_a_log_line_and_no_carriage_return(tmp_path, capsys, disable_tqdm):
    result = train(tmp_path, disable_tqdm=disable_tqdm)
    captured = capsys.readouterr()
    assert "\r" not in captured.out and captured.err == ""
    shown = [line for line in captured.out.splitlines() if line.startswith("step ") and "/4 " in line]
    assert [int(re.match(r"step (\d+)/4  ", line)[1]) for line in shown] == [line["step"] for line in result.history]
    first = result.history[0]
    assert f"loss {first['loss']:.4g}  lr {first['learning_rate']:.2e}  grad {first['grad_norm']:.3g}" in shown[0]
    assert " tok/s  ETA " in shown[0] and "held out: loss " in shown[2]


def test_logging_steps_sets_how_many_lines_there_are(tmp_path, capsys):
    train(tmp_path, logging_steps=2, eval_strategy="no")
    assert len(re.findall(r"^step \d/4  ", capsys.readouterr().out, re.M)) == 2


def test_each_line_is_flushed(tmp_path, monkeypatch):
    class Buffered(io.StringIO):
        def __init__(self):
            super().__init__()
            self.at_flush = []

        def flush(self):
            self.at_flush.append(self.getvalue())

    screen = Buffered()
    monkeypatch.setattr("sys.stdout", screen)
    train(tmp_path)
    assert any(text.rpartition("\nstep 1/4")[2].count("\n") == 1 for text in screen.at_flush if "\nstep 1/4" in text)


def test_a_terminal_has_a_bar_below_whole_lines(tmp_path, monkeypatch):
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", screen)
    root = logging.getLogger().handlers[:]
    train(tmp_path, [warns])
    text = screen.getvalue()
    assert "4/4 [" in text
    whole = [part for line in text.split("\n") for part in [line.rpartition("\r")[2]] if part.strip()]
    assert "a warning in the middle" in whole
    assert len([line for line in whole if re.match(r"step \d/4  ", line)]) == 6
    assert logging.getLogger().handlers == root


def test_disable_tqdm_false_shows_the_bar_everywhere(tmp_path, capsys):
    train(tmp_path, disable_tqdm=False)
    captured = capsys.readouterr()
    assert "4/4 [" in captured.err and "\r" not in captured.out and "step 1/4  " in captured.out


def test_a_quiet_run_prints_nothing_in_a_pipe(tmp_path, capsys):
    train(tmp_path, log_level="error")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def notebook(monkeypatch):
    """A module ``IPython`` whose kernel shows what it is given in ``pages``."""
    pages = []
    handle = SimpleNamespace(update=lambda shown: pages.append(shown))

    def display(shown, display_id):
        pages.append(shown)
        return handle

    ipython, displays = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    displays.display, displays.HTML = display, str
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    return pages


def test_a_notebook_has_a_table_of_the_run_and_its_curves_at_the_end(tmp_path, capsys, notebook):
    train(tmp_path)
    assert "<table>" not in notebook[0] and "<svg" not in notebook[-2]
    assert notebook[-1].count("<tr>") == 5 and "held-out loss" in notebook[-1] and "<svg" in notebook[-1]
    printed = capsys.readouterr()
    assert printed.err == "" and "step 1/4" not in printed.out and "\ndone " in printed.out
    assert max(map(len, printed.out.splitlines())) <= 100


def test_a_long_line_fits_80_columns():
    line = {
        "step": 123456, "loss": 2.345678, "learning_rate": 1.2345e-4, "grad_norm": 12.3456, "tokens_per_s": 123456.7,
    }  # fmt: skip
    assert len(log_line(line, 500000, 36000)) <= 90
    assert len(log_line({**line, "step": 12345}, 50000, 3600)) <= 80
    assert log_line({"step": 1, "loss": None}, 5) == "step 1/5"


# --- The last lines


def last_lines(capsys):
    printed = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith(("done ", "interrupted ")))
    return printed[start:]


def facts_of(lines):
    return {line.split()[0]: line.split(None, 1)[1] for line in lines}


def test_the_last_lines_have_the_losses_the_adapter_and_the_next_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    result = train("run", save_strategy="steps")
    facts = facts_of(last_lines(capsys))
    before, after = result.history[0]["loss"], result.history[-2]["loss"]
    assert facts["loss"] == f"{before:.4g} -> {after:.4g} (steps 1 and 4)"
    assert (
        facts["adapter"] == "run/checkpoint-4" and facts["next"] == "p3.save_adapter(model, 'run/adapter.safetensors')"
    )
    model = adapted_model()
    model.origin = {"name_or_path": "owner/a name"}
    train("run", save_strategy="steps", overwrite_output_dir=True, model=model)
    assert facts_of(last_lines(capsys))["next"].endswith(" chat --model 'owner/a name' --adapter run/checkpoint-4")
    last = train("other", logging_steps=4).history[-2]["loss"]
    assert facts_of(last_lines(capsys))["loss"] == f"{before:.4g} -> {last:.4g} (steps 1 and 4)"
    train("other")
    assert facts_of(last_lines(capsys))["adapter"] == "in the model only"
    assert (result.checkpoint, result.output_dir) == (str(tmp_path / "run/checkpoint-4"), str(tmp_path / "run"))


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys):
    train(tmp_path, [on(interrupt)])
    facts = facts_of(last_lines(capsys))
    assert facts["interrupted"].startswith("1 step,") and "resume_from_checkpoint=True" in facts["next"]


def test_the_banner_fits_and_names_the_defaults_in_force(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    train(tmp_path, max_steps=1)
    printed = capsys.readouterr().out
    assert max(map(width_of, printed.splitlines())) <= 80 or len(str(tmp_path)) > 60
    banner = " ".join(printed.partition("\nstep 1/")[0].split())
    defaults = banner.partition("defaults ")[2]
    config = p3.TrainingConfig()
    given = {"output_dir", "max_steps", "learning_rate", "logging_steps", "per_device_train_batch_size"}
    for name in config.to_dict():
        if name not in {*given, "eval_strategy", "eval_steps", "disable_tqdm", "log_level", "save_strategy"}:
            assert re.search(rf"\b{name}\b", defaults), name
    assert not re.search(r"\blearning_rate=", defaults) and "lora_dropout=0.0" in defaults and " r=" not in defaults


# --- Plots


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first" / "run"
    folder.mkdir(parents=True)
    lines = [
        {"step": i, "loss": 3 / i, "learning_rate": 1e-3 / i, "grad_norm": 1.0, "tokens_per_s": 9.0} for i in (1, 2)
    ]
    lines += [{"step": 2, "eval_loss": 1.4}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_writes_the_file_and_prints_a_table_of_the_runs(tmp_path, run, suffix):
    other = tmp_path / "second" / "run"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() * 1)
    out = tmp_path / "new" / f"runs.{suffix}"
    plot = p3.plot(run, other / "metrics.jsonl", out=out)
    assert out.stat().st_size > 4000 and len(plot.figure.axes) == 4
    assert list(plot.runs) == ["first/run", "second/run"]
    assert str(plot).splitlines()[2].split() == ["first/run", "2", "3", "->", "1.5", "1.4", "9"]
    loss = plot.figure.axes[0].get_lines()
    assert [line.get_xydata().tolist() for line in loss] == [[[1, 3], [2, 1.5]], [[2, 1.4]]] * 2


def test_plot_marks_the_only_point_of_a_curve(tmp_path, run):
    only = tmp_path / "metrics.jsonl"
    only.write_text((run / "metrics.jsonl").read_text().partition("\n")[0] + "\n")
    markers = [[curve.get_marker() for curve in axes.lines] for axes in p3.plot(only, run).figure.axes]
    assert markers == [["o", "None", "o"], *[["o", "None"]] * 3]
    canvas = FigureCanvasAgg(p3.plot(only).figure)
    canvas.draw()
    for axes in canvas.figure.axes:
        (curve,) = axes.lines
        x, y = curve.get_transform().transform(curve.get_xydata()[0]).round().astype(int)
        pixel = np.asarray(canvas.buffer_rgba())[-1 - y, x, :3]
        assert pixel.tolist() == [31, 119, 180]  # matplotlib's first colour


def test_plot_refuses_what_is_no_run_and_skips_a_half_written_last_line(tmp_path, run, caplog):
    for runs, message in (
        ((), "no run given"),
        ((tmp_path,), "there is no run in"),
        ((3,), "a run cannot be 3"),
        ((run, tmp_path / "none.jsonl"), "none.jsonl"),
    ):
        with pytest.raises(p3.TrainingError, match=message):
            p3.plot(*runs)
    with pytest.raises(p3.TrainingError, match="cannot be written"):
        p3.plot(run, out=tmp_path / "runs.unknown")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "lo')
    assert list(p3.plot(run).runs) == ["run"] and "half written" in caplog.text
    file.write_text("5\n" + file.read_text())
    with pytest.raises(p3.TrainingError, match=r"line 1 of .*metrics.jsonl' is not a line of metrics"):
        p3.plot(run)
    file.write_text('{"other": 1}\n')
    with pytest.raises(p3.TrainingError, match="no line with a step"):
        p3.plot(run)


def test_plot_without_matplotlib_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(p3.TrainingError, match=r"plot needs matplotlib.*install"):
        p3.plot(run)
