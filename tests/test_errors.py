"""The validators answer for every value, and messages show any value; the same for the JSON readers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from phi3lora.errors import (
    AdapterError,
    DataError,
    as_path,
    equals,
    error_line,
    is_int,
    is_number,
    is_one_of,
    is_path,
    is_text,
    short_repr,
)
from phi3lora.files import parse_json, read_json


class Hostile:
    """An object that raises whatever is asked of it."""

    def __repr__(self):
        raise RuntimeError

    def __eq__(self, other):
        raise RuntimeError

    __hash__ = None


def deep_list(depth=100_000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES = {
    "an integer of 5,000 digits": lambda: 10**5000,
    "a deep list": deep_list,
    "a hostile object": Hostile,
    "an array": lambda: np.arange(3),
    "a tensor": lambda: torch.ones(2),
    "no Unicode": lambda: "\ud800",
    "a long string": lambda: "x" * 1_000_000,
    "an endless iterator": itertools.count,
    "bytes": lambda: b"\xff",
}


@pytest.mark.parametrize("make", ODD_VALUES.values(), ids=ODD_VALUES)
def test_an_odd_value_is_shown_compared_and_refused(make):
    value = make()
    text = short_repr(value)
    assert 0 < len(text) <= 310 and text.encode()
    assert not equals(value, 1) and not equals("text", value) and not is_one_of(value, (None, True, "no", []))
    assert not is_number(value) and not is_int(value, 0) and not is_path(value)
    with pytest.raises(DataError, match="a dataset cannot be"):
        as_path(value, "a dataset", DataError)


def test_usual_values_are_shown_and_recognised():
    assert [short_repr(value) for value in ("a", 1.5, None, [1, "b"])] == ["'a'", "1.5", "None", "[1, 'b']"]
    assert is_number(0) and is_number(-1.5) and not is_number(True) and not is_number("1") and not is_number(None)
    assert not is_number(float("nan")) and not is_number(float("inf")) and not is_number(10**400)
    assert is_int(3, 3) and not is_int(2, 3) and not is_int(3.0, 0) and not is_int(True, 0)
    assert is_int(4, 0, 5) and not is_int(5, 0, 5)
    assert is_text("é") and not is_text("\ud800") and not is_text(b"a")
    assert is_path("a/b") and is_path(Path("a"))
    assert not is_path("a\0b") and not is_path("x" * 256) and not is_path(None)
    assert as_path("a/b", "a file", AdapterError) == Path("a/b")


def test_an_error_line_names_the_type_only_if_the_text_says_little():
    assert error_line(KeyError("state")) == "KeyError: 'state'"
    assert error_line(DataError("row 3: no text\nmore")) == "row 3: no text"
    assert error_line(ValueError("\ud800")) == "ValueError: \\ud800"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "", "{", b"\xff{}"])
def test_invalid_json_is_a_value_error(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError):
        read_json(path)


def test_valid_json_is_read_as_the_json_module_reads_it(tmp_path):
    value = {"a": [1, 2.5, None, "é"]}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert parse_json(json.dumps(value)) == value == read_json(tmp_path / "a.json")
