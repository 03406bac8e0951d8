"""One process trains and several are refused; Ctrl-C and SIGTERM become requests to stop."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training.distributed import Interrupts, require_one_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_of_several_processes_is_refused_before_any_file_is_written(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    model, config = adapted_model(), quiet_config(tmp_path / "run")
    with pytest.raises(p3.Phi3LoRAError, match=r"WORLD_SIZE=2.*allowed: 1.*plain python or .*=1.*CUDA_VISIBLE_DEVICES"):
        p3.train(model, chat_dataset(), config)
    assert list(tmp_path.iterdir()) == []
    found = p3.doctor(model, None, chat_dataset(), config)["run"]
    assert found.status == "error" and found.text.startswith("WORLD_SIZE=2")


@pytest.mark.parametrize("size", [None, "", "1"])
def test_one_process_is_allowed(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    require_one_process()


@pytest.mark.slow
def test_torchruns_processes_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from phi3lora.training.distributed import require_one_process\nrequire_one_process()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "TrainingError: WORLD_SIZE=2" in done.stderr


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
