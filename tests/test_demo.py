"""The embedded demo loads without a word, and leaves transformers' progress bars as the caller has them."""

from __future__ import annotations

import pytest
from transformers.utils import logging

import phi3lora as p3


@pytest.fixture
def bars():
    shown = logging.is_progress_bar_enabled()
    yield
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


def test_loading_the_demo_shows_no_bar_and_loading_a_model_still_does(bars, capsys):
    logging.enable_progress_bar()
    p3.demo.load()
    assert capsys.readouterr() == ("", "")
    p3.load_model(p3.demo.BASE, dtype="float32", device="cpu")
    assert "Loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_the_callers_choice_stays(bars, monkeypatch, shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    p3.demo.load()
    assert logging.is_progress_bar_enabled() == shown
    monkeypatch.setattr(p3.demo, "BASE", "nowhere")
    with pytest.raises(p3.ModelError):
        p3.demo.load()
    assert logging.is_progress_bar_enabled() == shown
