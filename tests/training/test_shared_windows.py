"""Several processes tokenise a part of each window of a stream, and all get what one process alone would make."""

from __future__ import annotations

import threading
import time

import datasets
import pytest
import torch
from conftest import chat_rows, make_tokenizer, same_tensors
from processes import in_processes
from test_distributed import After, difference, plain_python, rank, run, stop  # noqa: F401

import phi3lora as p3
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


class Sluggish:
    """Rows that arrive slowly in one of the processes, from some row on."""

    def __init__(self, slow_from: int) -> None:
        self.slow_from = slow_from

    def __iter__(self):
        for i, row in enumerate(ROWS):
            if i >= self.slow_from and rank() == 1:
                time.sleep(0.5)
            yield row


@pytest.mark.parametrize("steps", [{"max_steps": 2}, {"max_steps": 30, "callback": 2}], ids=["end", "stop"])
@pytest.mark.parametrize("slow_from", [9, 12, 99])
def test_processes_whose_threads_are_not_equally_far_end_together(tmp_path, slow_from, steps):
    settings = dict(steps)
    callback = After(settings.pop("callback"), stop) if "callback" in settings else None

    def work():
        started = time.perf_counter()
        adapters, result = run(tmp_path / "run", callback, data=stream(Sluggish(slow_from), 4), **settings)
        threads = [t.name for t in threading.enumerate() if t.name.startswith("phi3lora-prefetch")]
        return adapters, result.global_step, threads, time.perf_counter() - started

    first, second, third = in_processes(3, work)
    assert same_tensors(first[0], second[0]) and same_tensors(first[0], third[0])
    for _, step, threads, seconds in (first, second, third):
        assert step == 2 and threads == [] and seconds < 5
