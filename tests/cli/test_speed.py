"""The speed of an answer is shown to a person at a terminal, and to nobody else."""

from __future__ import annotations

import io
import re
import sys

import pytest

import phi3lora as p3
from phi3lora.cli.speed import speed_shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def demo():
    model, tokenizer, _, _ = p3.demo.load()
    return model, tokenizer


def streams(monkeypatch, out: io.StringIO, err: io.StringIO) -> tuple[io.StringIO, io.StringIO]:
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_tokens_speed_and_the_first_tokens_time(monkeypatch, demo, colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    out, err = streams(monkeypatch, Terminal(), Terminal())
    model, tokenizer = demo
    with speed_shown(tokenizer):
        answer = p3.generate(model, tokenizer, "What is the price of the Fusgus scarf?", max_new_tokens=8, stream=True)
    assert sys.stdout is out
    assert out.getvalue().strip() == answer
    line = err.getvalue()
    assert line.startswith("\x1b[2m") == line.endswith("\x1b[0m\n") == colour
    pattern = r"(\d+) tokens in (\d+\.\d\d) s \(([\d.e+]+) tok/s\), the first after (\d+\.\d\d) s"
    tokens, seconds, _, first = re.search(pattern, line).groups()
    assert int(tokens) == 8  # as asked for, without the end of the line
    assert float(first) <= float(seconds)


@pytest.mark.parametrize(("out", "err"), [(Terminal, io.StringIO), (io.StringIO, Terminal)])
def test_a_pipe_sees_the_answer_alone(monkeypatch, demo, out, err):
    out, err = streams(monkeypatch, out(), err())
    with speed_shown(demo[1]):
        assert sys.stdout is out
        print("Hello")
    assert (out.getvalue(), err.getvalue()) == ("Hello\n", "")


def test_an_answer_without_text_and_one_that_is_interrupted_have_no_speed(monkeypatch, demo):
    out, err = streams(monkeypatch, Terminal(), Terminal())
    with speed_shown(demo[1]):
        print("")
    with pytest.raises(KeyboardInterrupt), speed_shown(demo[1]):
        print("Hel", end="")
        raise KeyboardInterrupt
    assert sys.stdout is out
    assert err.getvalue() == ""
