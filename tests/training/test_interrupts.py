"""Ctrl-C and SIGTERM become requests; the handlers before come back."""

from __future__ import annotations

import logging
import os
import signal
import threading

import pytest

from phi3lora.training.interrupts import Interrupts

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_a_request_and_is_told(number, caplog):
    with Interrupts() as interrupts, caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert not interrupts.requested
        os.kill(os.getpid(), number)
        assert interrupts.requested
    assert number.name in caplog.text
    assert "checkpoint" in caplog.text


@pytest.mark.parametrize("first", SIGNALS, ids=lambda number: number.name)
def test_a_ctrl_c_after_a_request_interrupts_at_once(first):
    with Interrupts() as interrupts:
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested


def test_a_repeated_sigterm_is_still_one_request():
    with Interrupts() as interrupts:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_handlers_before_come_back_also_after_an_error(error):
    before = handlers()
    try:
        with Interrupts():
            assert handlers() != before
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert handlers() == before


def test_a_users_own_handler_comes_back_and_a_nested_one_too():
    own = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        with Interrupts() as outer:
            with Interrupts() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
            assert (inner.requested, outer.requested) == (True, False)
            os.kill(os.getpid(), signal.SIGTERM)
            assert outer.requested
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_installed_and_nothing_fails():
    before, seen = handlers(), []

    def work():
        with Interrupts() as interrupts:
            seen.append((handlers(), interrupts.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
