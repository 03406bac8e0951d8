"""The embedded demo: it loads silently, installs no test tools, and ends with the line that lets one talk to it."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers.utils import logging

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.demo import show


@pytest.fixture
def progress_bars():
    enabled = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def test_loading_shows_no_progress_bar_unless_asked_for(progress_bars, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    logging.enable_progress_bar()
    p3.demo.load()
    p3.load_model(p3.demo.BASE, dtype="float32", device="cpu")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    p3.load_model(p3.demo.BASE, dtype="float32", device="cpu")
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("enabled", [True, False])
def test_the_setting_of_progress_bars_survives_success_and_failure(progress_bars, monkeypatch, tmp_path, enabled):
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    p3.demo.load()
    assert logging.is_progress_bar_enabled() == enabled
    monkeypatch.setattr(p3.demo, "BASE", tmp_path)
    with pytest.raises(p3.ModelError):
        p3.demo.load()
    assert logging.is_progress_bar_enabled() == enabled


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_demo_installs_no_test_tools(tmp_path):
    command = ["make", "--dry-run", f"VENV={tmp_path / 'new'}"]
    printed = {
        target: subprocess.run([*command, target], cwd=Path(__file__).parents[1], capture_output=True, text=True).stdout
        for target in ("demo", "test")
    }
    assert ".[plot]" in printed["demo"] and "[test]" not in printed["demo"] and "[test]" in printed["test"]


def test_the_demo_ends_with_the_line_that_lets_one_talk_to_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phi3lora.demo.show.TRAINING", {**show.TRAINING, "max_steps": 2})
    monkeypatch.setattr("phi3lora.demo.show.score", lambda *arguments: show.Score(["an answer"] * 200, 1.0, 1.0, 1.0))
    assert main(["demo", "--seeds", "3", "--output-dir", "runs/d"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(last.removeprefix("talk to it  "))
    assert words[-5:] == ["chat", "--model", "demo", "--adapter", "runs/d/seed-3/adapter.safetensors"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n"))
    assert main(words[-5:]) == 0


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64)])
def test_a_seed_that_is_none_is_refused_before_a_tuning_begins(monkeypatch, capsys, seed):
    monkeypatch.setattr(show, "_tune", lambda *_, **__: pytest.fail("a tuning began"))
    assert main(["demo", "--seeds", "0", seed]) == 1
    assert f"seed={seed}; allowed: a whole number >= 0, below 2**63" in capsys.readouterr().err
