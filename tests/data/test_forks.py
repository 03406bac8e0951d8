"""Rows that forks encode are those that one process encodes, errors and findings included."""

from __future__ import annotations

import os
import signal

import pytest
from conftest import chat_rows, make_tokenizer

from phi3lora.data import documents
from phi3lora.data.dataset import ChatDataset
from phi3lora.data.forks import cores, in_processes
from phi3lora.errors import DataError

ROWS = [{**row, "id": i} for i, row in enumerate(chat_rows(70))]
NO_ANSWER = {"messages": [{"role": "user", "content": "Hi"}]}
NOT_TRAINED = {"messages": [ROWS[0]["messages"][0], {"role": "assistant", "content": "Hello", "train": False}]}


@pytest.fixture
def forks(monkeypatch):
    """Make three processes work on 32 rows at a time, and count the parts that were worked on."""
    parts: list[int] = []

    def counted(work, items, count):
        parts.append(len(items))
        return in_processes(work, items, count)

    monkeypatch.setattr(documents, "_ROWS_TO_FORK", 32)
    monkeypatch.setattr(documents, "cores", lambda: 3)
    monkeypatch.setattr(documents, "in_processes", counted)
    return parts


def load(rows, **options):
    return ChatDataset.load(rows, make_tokenizer(), **{"max_length": 64, **options})


def facts(dataset):
    return dataset.fingerprint(), dataset.statistics(), dataset.bad_rows, [dataset.row_number(i) for i in range(9)]


def test_parts_are_worked_on_elsewhere_and_come_back_in_order():
    results = in_processes(lambda part: (os.getpid(), part), list(range(10)), 3)
    assert [part for _, part in results] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    processes = [process for process, _ in results]
    assert processes[0] == os.getpid() and len(set(processes)) == 3


def test_a_part_whose_process_was_killed_is_done_here():
    here = os.getpid()

    def work(part):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return part

    assert in_processes(work, [1, 2, 3], 3) == [[1], [2], [3]]


def test_a_program_that_ignores_its_children_s_ends_gets_its_results():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert in_processes(list, [1, 2], 2) == [[1], [2]]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_error_is_raised_as_by_one_process():
    def work(part):
        try:
            return 1 // part[0]
        except ZeroDivisionError as error:
            raise DataError(f"row {part[0]}") from error

    with pytest.raises(DataError, match="row 0") as raised:
        in_processes(work, [1, 2, 0], 3)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_forks_leave_the_environment_as_it_was(monkeypatch):
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        inside = in_processes(lambda part: os.environ.get("TOKENIZERS_PARALLELISM"), [1, 2], 2)
        assert inside[1] == "false" and os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_the_processes_of_a_job_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    found = []
    for size in ("1", "2", "9"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", size)
        found.append(cores())
    assert found == [6, 3, 1]


def test_forks_give_the_documents_and_findings_of_one_process(forks, monkeypatch):
    found = load(ROWS)
    assert forks == [32, 32, 6]
    monkeypatch.setattr(documents, "cores", lambda: 1)
    assert facts(found) == facts(load(ROWS))
    assert found.findings.unused == {"id": 70} and forks == [32, 32, 6]


def test_few_rows_are_not_worth_a_fork(forks):
    load(ROWS[:31])
    assert forks == []


def test_forks_skip_and_name_the_same_bad_rows(forks, monkeypatch, caplog):
    bad = {5: NO_ANSWER, 11: NOT_TRAINED, 30: "not a row", 40: NOT_TRAINED, 41: NO_ANSWER, 69: NOT_TRAINED}
    rows = [bad.get(i, row) for i, row in enumerate(ROWS)]
    found, message = load(rows, on_bad_row="skip"), caplog.text
    assert forks and found.bad_rows == (6, 12, 31, 41, 42, 70)
    caplog.clear()
    monkeypatch.setattr(documents, "cores", lambda: 1)
    assert facts(found) == facts(load(rows, on_bad_row="skip"))
    quoted = [line for line in message.splitlines() if "bad rows skipped" in line]
    assert quoted and quoted == [line for line in caplog.text.splitlines() if "bad rows skipped" in line]


@pytest.mark.parametrize("first", [3, 20, 28, 45, 68])
def test_the_first_bad_row_is_named_whoever_meets_it(forks, first):
    rows = [{0: NO_ANSWER, 1: "not a row"}.get(i - first, row) for i, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=f"row {first + 1}: a chat with no assistant turn"):
        load(rows)


def test_a_mapped_column_counts_wherever_it_stands(forks):
    pairs = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(70)]
    with pytest.raises(DataError, match=r"no row of .* has 'context'"):
        load(pairs, columns={"system": "context"})
    load(
        [{**pair, "context": "Be brief."} if i == 50 else pair for i, pair in enumerate(pairs)],
        columns={"system": "context"},
    )
