"""Several processes tokenise a part of each window of a stream, and all get what one process alone would make."""

from __future__ import annotations

import threading
from datetime import datetime
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from conftest import LIMIT_S, chat_rows, make_tokenizer, prefetch_threads, same_tensors, until
from processes import in_processes
from test_distributed import After, difference, plain_python, rank, run, stop  # noqa: F401

import phi3lora as p3
from phi3lora.data import prefetch
from phi3lora.data.template import ChatEncoder
from phi3lora.training import distributed

ROWS = chat_rows(23)
LONG = {"messages": [{"role": "user", "content": "why " * 90}, {"role": "assistant", "content": "No."}]}
PAIR = {"prompt": "What <|end|> is it?", "completion": "A word.", "id": 7}


def stream(rows=ROWS, buffer_size=9, **options) -> p3.ChatStream:
    return p3.ChatDataset.load(
        rows, make_tokenizer(), max_length=64, streaming=True, buffer_size=buffer_size, **options
    )


def facts(window):
    return window.fingerprint(), window.statistics(), window.bad_rows, [window.row_name(i) for i in range(len(window))]


def windows(chats, count, share=None):
    """Return the facts of the next windows, with their numbers."""
    made = chats.windows(share=share)
    return [(number, facts(window)) for number, window in (next(made) for _ in range(count))]


MIXED_UP = [*ROWS[:10], PAIR, {"messages": "none"}, LONG, *ROWS[10:], PAIR, "no row", LONG]
SOURCES = {
    "list": lambda **options: stream(**options),
    "rows of several kinds": lambda **options: stream(MIXED_UP, on_bad_row="skip", **options),
    "several sources": lambda **options: stream(
        [datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list([PAIR] * 7)], **options
    ),
    "a window of one row": lambda **options: stream(ROWS[:7], **{**options, "buffer_size": 3}),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_the_windows_are_those_of_one_process(kind, overflow):
    expected = windows(SOURCES[kind](overflow=overflow), 8)

    def work():
        encoded, original = [], ChatEncoder.encode

        def encode(self, chats, *rest):
            encoded.append(len(chats))
            return original(self, chats, *rest)

        ChatEncoder.encode = encode
        chats = SOURCES[kind](overflow=overflow)
        first = chats.first_window
        of_first = sum(encoded)
        with distributed.joined(torch.device("cpu"), shares_windows=True) as world:
            found = windows(chats, 8, world.share)
            world.share.end()
        assert first is not None
        return found, sum(encoded) - of_first

    results = in_processes(3, work)
    assert all(found == expected for found, _ in results)
    alone = sum(s["documents"] for number, (_, s, *_) in expected if s["documents"])
    assert max(own for _, own in results) < 0.6 * alone  # a third, and what is looked for one by one in bad rows


@pytest.mark.parametrize("at", [10, 13, 17])
def test_a_row_that_cannot_be_used_is_the_same_error_in_every_process(at):
    rows = [*ROWS[:at], {"messages": "none"}, *ROWS[at + 1 : 18], {"messages": 3}, *ROWS[19:]]
    with pytest.raises(p3.DataError) as alone:
        windows(stream(rows, 19 if at > 17 else 9), 2)

    def work():
        with distributed.joined(torch.device("cpu"), shares_windows=True) as world:
            with pytest.raises(p3.DataError) as error:
                windows(stream(rows), 2, world.share)
            return str(error.value)

    assert set(in_processes(3, work)) == {str(alone.value)}


def other_text(rows):
    return [*rows[:19], {"messages": [*rows[19]["messages"][:-1], {"role": "assistant", "content": "No."}]}, *rows[20:]]


DIFFERENT = {
    "a part of the rows": (lambda rows: [*rows[:9], *rows[9 + rank() :: 2]], 1, "SHA-256 of all columns"),
    "another order": (lambda rows: [*rows[:10], rows[11], rows[10], *rows[12:]] if rank() else rows, 1, "SHA-256"),
    "another text": (lambda rows: other_text(rows) if rank() else rows, 2, "SHA-256"),
    "an early end": (lambda rows: rows[: 9 if rank() else 23], 1, "row 10 of (list)', of rank 1 '9 rows from row 1 of"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_processes_that_read_different_rows_end_with_an_error_that_names_them(kind, tmp_path):
    choose, number, words = DIFFERENT[kind]

    def work():
        with pytest.raises(p3.TrainingError) as error:
            if kind == "another text":
                run(tmp_path / "run", data=stream(choose(ROWS)))
            with distributed.joined(torch.device("cpu"), shares_windows=True) as world:
                windows(stream(choose(ROWS)), 4, world.share)
        return str(error.value), until(lambda: prefetch_threads() == [])

    (message, has_ended), other = in_processes(2, work)
    assert (message, True) == other and has_ended
    assert f"different rows for window {number} of the stream" in message and words in message
    assert "(1 of 2 ranks differ: 1)" in message


def test_rows_of_any_values_are_the_same_in_every_process():
    """Some values have no JSON, and the text of others has their place in memory."""

    def work():
        extra = {"n": np.int64(3), "list": np.arange(3), "when": datetime(2026, 1, 1), "b": b"x", 7: object()}
        tags = set(range(16, -1, -8) if rank() else range(0, 17, 8))  # equal, in two orders
        rows = [{**row, **extra, "tags": tags, (1, 2): 0} for row in ROWS]
        with distributed.joined(torch.device("cpu"), shares_windows=True) as world:
            found = windows(stream(rows), 4, world.share)
            world.share.end()
        return [fingerprint for _, (fingerprint, *_) in found]

    assert in_processes(2, work) == [[fingerprint for _, (fingerprint, *_) in windows(stream(), 4)]] * 2


@pytest.mark.slow
def test_a_run_on_a_stream_goes_from_2_processes_to_4_and_to_1(tmp_path):
    settings = {"learning_rate": 1e-3, "save_strategy": "steps", "max_steps": 16}

    def part(step, accumulation, **more):
        callback = None if step is None else After(step, stop)
        more = {**settings, **more}
        return run(tmp_path / "run", callback, data=stream(), gradient_accumulation_steps=accumulation, **more)

    expected, _ = run(tmp_path / "uncut", data=stream(), gradient_accumulation_steps=4, **settings)
    in_processes(2, part, 5, 2)
    in_processes(4, lambda: part(11, 1, resume_from_checkpoint=True))
    adapters, _ = part(None, 4, resume_from_checkpoint=True)
    assert difference(adapters, expected) < 1e-6


def test_a_process_that_leaves_its_windows_ends_those_of_the_others():
    """A thread may be told to leave before it begins a turn that other threads wait in."""

    def work():
        with distributed.joined(torch.device("cpu"), shares_windows=True) as world:
            made = stream(buffer_size=4).windows(share=world.share)
            taken = [number for number, _ in islice(made, 3)]
            if rank() == 1:
                made.close()
            taken += [number for number, _ in made]
            world.share.end()
        return taken

    assert in_processes(3, work) == [[0, 1, 2]] * 3


class Late:
    """Rows that one of the processes gets late, or while ``over`` is not set never, from row 10 on."""

    def __init__(self, kind: str, over: threading.Event) -> None:
        self.kind, self.over, self.read = kind, over, 0

    def __iter__(self):
        for i, row in enumerate(ROWS):
            if i >= 9 and rank() == 1 and self.kind != "in time":
                came_first = self.over.wait(0.5 if self.kind == "late" else LIMIT_S)
                assert came_first or self.kind == "late", "the run waits for a row that it does not need"
            self.read += 1
            yield row


@pytest.mark.parametrize("steps", [{"max_steps": 2}, {"max_steps": 30, "callback": 2}], ids=["end", "stop"])
@pytest.mark.parametrize("kind", ["in time", "late", "never"])
def test_processes_whose_threads_are_not_equally_far_end_together(tmp_path, monkeypatch, kind, steps):
    """No thread is left, and none waits for another process, except for the read that hangs."""
    settings, over, warned = dict(steps), threading.Event(), []
    callback = After(settings.pop("callback"), stop) if "callback" in settings else None
    monkeypatch.setattr(prefetch, "_JOIN_TIMEOUT_S", 0.2 if kind == "never" else LIMIT_S)
    monkeypatch.setattr(prefetch.logger, "warning", lambda *text: warned.append(text))

    def work():
        rows = Late(kind, over)
        adapters, result = run(tmp_path / "run", callback, data=stream(rows, 4), **settings)
        read = rows.read
        over.set()
        assert until(lambda: prefetch_threads() == [])
        return adapters, result.global_step, read, warned

    found = in_processes(3, work, limit_s=2 * LIMIT_S)
    for adapters, step, _, warnings in found:
        assert same_tensors(adapters, found[0][0])
        assert step == 2 and (warnings == [] or kind == "never")
    assert kind != "never" or found[1][2] <= 9


def test_an_error_in_one_process_does_not_wait_for_the_threads_of_the_others(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(prefetch, "_JOIN_TIMEOUT_S", 20.0)
    monkeypatch.setattr(prefetch.logger, "warning", lambda *text: warned.append(text))

    def work():
        with pytest.raises((ZeroDivisionError, p3.TrainingError)) as error:
            run(tmp_path / "run", After(3, lambda state: 1 / 0, on_rank=1), data=stream(buffer_size=4))
        return error.type, warned

    types, warnings = zip(*in_processes(3, work), strict=True)
    assert types == (p3.TrainingError, ZeroDivisionError, p3.TrainingError)
    assert warnings[1] == []
