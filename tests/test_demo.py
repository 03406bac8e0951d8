"""The embedded demo loads silently and leaves transformers' progress bars as they were."""

from __future__ import annotations

import pytest
from transformers.utils import logging

import phi3lora as p3


@pytest.fixture
def progress_bars():
    enabled = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()


def test_loading_the_demo_shows_no_progress_bar_and_loading_a_model_does(progress_bars, capsys):
    logging.enable_progress_bar()
    p3.demo.load()
    assert capsys.readouterr() == ("", "")
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
