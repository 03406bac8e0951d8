"""Ctrl-C and SIGTERM become requests to stop, and the earlier handlers come back."""

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
def test_the_first_signal_is_a_logged_request_and_ctrl_c_after_it_interrupts_at_once(number, caplog):
    with Interrupts() as interrupts, caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert not interrupts.requested
        os.kill(os.getpid(), number)
        assert interrupts.requested
        assert number.name in caplog.text and "checkpoint" in caplog.text
        os.kill(os.getpid(), signal.SIGTERM)  # a repeated SIGTERM is still one request
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_earlier_handlers_are_restored_even_after_an_error(error):
    own = lambda number, frame: None  # noqa: E731
    original = signal.signal(signal.SIGTERM, own)
    before = handlers()
    try:
        with Interrupts() as outer:
            assert handlers() != before
            with Interrupts() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
            assert (inner.requested, outer.requested) == (True, False)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    finally:
        after = handlers()
        signal.signal(signal.SIGTERM, original)
    assert after == before and after[1] is own


def test_outside_the_main_thread_no_handler_is_installed():
    before, seen = handlers(), []

    def work():
        with Interrupts() as interrupts:
            seen.append((handlers(), interrupts.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
