"""Bad rows deep in a dataset: an error with the row's number, or left out by choice, counted and named."""

from __future__ import annotations

import json
import logging

import pytest
from conftest import make_tokenizer

from phi3lora.data.dataset import ChatDataset
from phi3lora.errors import DataError

GOOD = {"prompt": "What is 2 + 2?", "completion": "4, as ever."}
BAD = {
    "not JSON": "{'prompt': 1}",
    "a list": "[1, 2]",
    "no completion": json.dumps({"prompt": "What?"}),
    "a number for text": json.dumps({"prompt": "What?", "completion": 7}),
    "nothing supervised": json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    ),
}


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def load(source, **options):
    return ChatDataset.load(source, make_tokenizer(), max_length=64, **options)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("at", [0, 3, 1005])
def test_a_bad_row_stops_with_its_number_or_is_left_out(tmp_path, bad, at):
    if "messages" in bad:
        good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    else:
        good = json.dumps(GOOD)
    lines = [good] * 1008
    lines[at] = bad
    path = write(tmp_path / "chats.jsonl", lines)
    with pytest.raises(DataError, match=rf"row {at + 1}\b"):
        load(path)
    chats = load(path, on_bad_row="skip")
    assert len(chats) == 1007 and chats.bad_rows == (at + 1,)
    assert [chats.row_number(i) for i in range(len(chats))] == [n for n in range(1, 1009) if n != at + 1]
    assert chats.statistics()["bad"] == 1 and "1 bad rows skipped" in repr(chats)
    whole = load(write(tmp_path / "good.jsonl", [line for i, line in enumerate(lines) if i != at]))
    assert whole.fingerprint() == chats.fingerprint()


def test_what_is_skipped_is_told_once_with_the_first_few(tmp_path, caplog):
    rows = [GOOD] + [{"prompt": "x"}] * 5
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert len(load(rows, on_bad_row="skip")) == 1
    (record,) = [r for r in caplog.records if "bad rows" in r.message]
    assert "5 bad rows skipped" in record.message and "row 2" in record.message and "2 more" in record.message


def test_a_row_too_long_is_a_bad_row_where_overflow_is_an_error():
    rows = [GOOD, {"prompt": "x" * 500, "completion": "y"}, GOOD]
    with pytest.raises(DataError, match=r"row 2: .* tokens"):
        load(rows, overflow="error")
    assert load(rows, overflow="error", on_bad_row="skip").bad_rows == (2,)


@pytest.mark.parametrize("rows", [[{"x": 1}] * 3, [GOOD | {"completion": 5}] * 2, [{"prompt": "x" * 500, **{}}]])
def test_nothing_usable_is_an_error_that_says_why(rows):
    with pytest.raises(DataError, match=r"usable.*row 1"):
        load(rows, on_bad_row="skip")


def test_another_choice_is_refused():
    with pytest.raises(DataError, match="on_bad_row='ignore'; allowed: 'error', 'skip'"):
        load([GOOD], on_bad_row="ignore")
