"""Training on a stream: it resumes bit for bit from any window and step, and trains on what a dataset would."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from conftest import (
    LIMIT_S,
    adapted_model,
    adapters_of,
    chat_dataset,
    chat_rows,
    make_tokenizer,
    on,
    prefetch_threads,
    quiet_config,
    same_tensors,
    stop_at,
    until,
)

import phi3lora as p3
from phi3lora.data import prefetch
from phi3lora.training.loop import Callback
from phi3lora.training.setup import PlannedRun

ROWS = chat_rows(23)


def stream(buffer_size: int = 9, rows=ROWS) -> p3.ChatStream:
    return p3.ChatDataset.load(rows, make_tokenizer(), max_length=64, streaming=True, buffer_size=buffer_size)


def run(folder, data=None, callback: Callback | None = None, **settings):
    model = adapted_model(lora_dropout=0.1)
    settings = {"max_steps": 12, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **settings}
    config = quiet_config(folder, **settings)
    result = p3.train(model, data or stream(), config, callbacks=[callback] if callback else [])
    history = [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in result.history]
    return adapters_of(model), history, result


@pytest.mark.parametrize("step", [1, 3, 8])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, step):
    expected, history, _ = run(tmp_path / "uncut")
    settings = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "cut", callback=stop_at(step), **settings)
    found, again, result = run(tmp_path / "cut", resume_from_checkpoint=True, **settings)
    assert result.global_step == 12
    assert same_tensors(found, expected)
    assert again == history


def test_a_stream_of_one_window_is_a_dataset(tmp_path):
    """Its window and the dataset's first epoch are the same documents in the same order."""
    one, many = run(tmp_path / "a", stream(100), max_steps=3), run(tmp_path / "b", chat_dataset(23), max_steps=3)
    assert same_tensors(one[0], many[0])


class Cursors(Callback):
    """Notes the cursor after each step, and stops a run at one of them."""

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.seen, self.stop_at = [], stop_at

    def on_step_end(self, state) -> None:
        self.seen.append((state.epoch, state.step_in_epoch))
        state.should_stop = self.seen[-1] == self.stop_at


def test_every_window_is_trained_on_and_then_the_first_again(tmp_path):
    run(tmp_path, callback=(cursors := Cursors()), max_steps=30, gradient_accumulation_steps=1)
    windows = [window for window, _ in cursors.seen]
    assert windows == sorted(windows)
    assert set(windows) >= {0, 1, 2, 3, 4}  # three windows a pass


def test_resuming_with_other_data_or_another_buffer_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path, callback=stop_at(2), **settings)
    for data, said in ((stream(8), "buffer_size of the data 9 then, 8 now"), (stream(rows=ROWS[1:]), "fingerprint")):
        with pytest.raises(p3.CheckpointError, match=said):
            run(tmp_path, data, resume_from_checkpoint=True, **settings)


def mixed(weight: float = 1, **options):
    parts = [
        p3.ChatDataset.load(rows, make_tokenizer(), max_length=64, **options) for rows in (ROWS, chat_rows(40)[23:])
    ]
    return p3.ChatDataset.mix([(parts[0], 2), (parts[1], weight)])


@pytest.mark.parametrize("options", [{}, {"streaming": True, "buffer_size": 7}], ids=["dataset", "stream"])
def test_a_run_on_a_mix_resumes_bit_for_bit_and_with_other_weights_it_is_refused(tmp_path, options):
    expected, history, _ = run(tmp_path / "uncut", mixed(**options))
    settings = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path / "cut", mixed(**options), stop_at(7), **settings)
    with pytest.raises(p3.CheckpointError, match=r"weights|fingerprint"):
        run(tmp_path / "cut", mixed(1.5, **options), resume_from_checkpoint=True, **settings)
    found, again, _ = run(tmp_path / "cut", mixed(**options), resume_from_checkpoint=True, **settings)
    assert same_tensors(found, expected)
    assert again == history


def test_resuming_is_refused_if_the_window_of_the_cursor_changed(tmp_path, caplog):
    rows, settings = list(ROWS), {"save_strategy": "steps", "save_steps": 1, "max_steps": 40}
    run(tmp_path, stream(4, rows), cursors := Cursors((1, 1)), **settings)
    assert cursors.seen[-1] == (1, 1)
    rows[5] = rows[20]  # of window 1
    settings["resume_from_checkpoint"] = True
    with pytest.raises(p3.CheckpointError, match="window 1 of the stream is not what it was"):
        run(tmp_path, stream(4, rows), **settings)
    run(tmp_path, stream(4, rows), stop_at(len(cursors.seen) + 1), **settings, resume_with_changes=True)
    assert "window 1 of the stream is not what it was" in caplog.text


class Late:
    """Rows of which one calls ``arrive`` before it arrives."""

    def __init__(self, number: int, arrive) -> None:
        self.number, self.arrive, self.read = number, arrive, 0

    def __iter__(self):
        for i, row in enumerate(ROWS):
            if i == self.number:
                self.arrive()
            self.read += 1
            yield row


@pytest.mark.parametrize("comes", [True, False], ids=["a row comes", "no row comes"])
def test_ctrl_c_while_waiting_for_a_window_saves_and_ends(tmp_path, caplog, monkeypatch, comes):
    is_done, over = threading.Event(), threading.Event()
    if not comes:
        monkeypatch.setattr(prefetch, "_JOIN_TIMEOUT_S", 0.1)

    def arrive():
        assert is_done.wait(LIMIT_S)
        os.kill(os.getpid(), signal.SIGINT)
        assert until(lambda: "SIGINT: saving a checkpoint" in caplog.text) and (comes or over.wait(LIMIT_S))

    rows = Late(9, arrive)
    config = quiet_config(tmp_path, max_steps=30, per_device_train_batch_size=8, log_level="warning")
    result = p3.train(adapted_model(), stream(6, rows), config, callbacks=[on(lambda state: is_done.set())])
    assert result.interrupted and result.global_step == 1
    assert (tmp_path / "checkpoint-1").is_dir()
    assert rows.read == (10 if comes else 9)
    over.set()
    assert until(lambda: prefetch_threads() == [])


def test_a_finished_run_does_not_wait_for_the_next_window(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_JOIN_TIMEOUT_S", 0.1)
    over, came = threading.Event(), []
    rows = Late(6, lambda: came.append(over.wait(LIMIT_S)))
    p3.train(adapted_model(), stream(6, rows), quiet_config(tmp_path, max_steps=1))
    assert rows.read == 6 and came == []
    over.set()
    assert until(lambda: prefetch_threads() == [])


def test_memory_is_planned_for_the_longest_possible_document():
    model, config = adapted_model(), quiet_config("unused", packing=False, max_steps=1)
    plans = [PlannedRun(model, data, config).memory for data in (stream(), stream().first_window)]
    assert plans[0].peak_gib["none"] > plans[1].peak_gib["none"]


def test_a_stream_without_max_steps_or_as_eval_dataset_is_refused_before_the_run(tmp_path):
    model = adapted_model()
    with pytest.raises(p3.TrainingError, match="set max_steps"):
        p3.train(model, stream(), quiet_config(tmp_path / "a"))
    config = quiet_config(tmp_path / "b", max_steps=2, eval_strategy="steps", eval_steps=1)
    with pytest.raises(p3.TrainingError, match="eval_dataset is a stream"):
        p3.train(model, stream(), config, eval_dataset=stream())
    assert not list(tmp_path.iterdir())
    p3.train(model, stream().skip(5), config, eval_dataset=stream().take(5))


def test_a_later_window_that_does_not_fit_the_model_stops_the_run(tmp_path):

    data = stream()
    make = data._documents

    def window(*arguments):
        dataset = make(*arguments)
        if dataset.row_number(0) > 1:
            dataset._input_ids[3] = 5000
        return dataset

    data._documents = window
    with pytest.raises(p3.DataError, match="token id 5000; the model's vocabulary has 512"):
        run(tmp_path, data)


def test_evaluating_a_stream_evaluates_its_documents():
    model = adapted_model()
    found, expected = p3.evaluate(model, stream()), p3.evaluate(model, chat_dataset(23))
    assert found["n_tokens"] == expected["n_tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    with pytest.raises(p3.DataError, match=r"stream\.take"):
        p3.evaluate(model, stream(), rouge=True, tokenizer=make_tokenizer())


def test_the_doctor_looks_at_the_first_window(tmp_path):
    model = adapted_model()
    torch.manual_seed(1)
    config = quiet_config(tmp_path / "run", max_steps=4, learning_rate=1e-3)
    report = p3.doctor(model, make_tokenizer(), stream(), config)
    assert report["run"].text.endswith("only the stream's first window was checked")
    assert report["lengths"].text.startswith("9 documents")
    assert report["gradient flow"].status == "ok"
    assert p3.doctor(model, make_tokenizer(), stream(), quiet_config(tmp_path / "b"))["run"].status == "error"
