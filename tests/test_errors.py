"""Tests of values, values and errors in words, and the JSON readers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from phi3lora.errors import (
    AdapterError,
    DataError,
    Phi3LoRAError,
    as_path,
    error_line,
    is_int,
    is_number,
    is_path,
    printable,
    short_repr,
)
from phi3lora.files import parse_json, read_json


def test_numbers_and_paths_are_recognised():
    assert is_number(0) and is_number(-1.5)
    assert not any(map(is_number, (True, "1", None, float("nan"), float("inf"))))
    assert is_int(3, 3) and not is_int(2, 3) and not is_int(3.0, 0) and not is_int(True, 0)
    assert is_int(4, 0, 5) and not is_int(5, 0, 5)
    assert is_path("a/b") and is_path(Path("a"))
    assert not any(map(is_path, ("a\0b", "x" * 256, None, 5, b"a")))
    assert as_path("a/b", "a file", AdapterError) == Path("a/b")
    with pytest.raises(DataError, match=r"a dataset cannot be 5; allowed: a path"):
        as_path(5, "a dataset", DataError)


def test_values_and_errors_are_shown_on_one_short_line():
    assert [short_repr(value) for value in ("a", 1.5, None, [1, "b"])] == ["'a'", "1.5", "None", "[1, 'b']"]
    assert len(short_repr("x" * 1_000_000)) < 310
    assert error_line(KeyError("state")) == "KeyError: 'state'"
    assert error_line(DataError("row 3: no text\nmore")) == "row 3: no text"
    assert error_line(ValueError("\ud800")) == "ValueError: \\ud800"


STRANGE = "\x1b[31mred\x1b]0;title\x07\nphi3lora: a line \u202e\u2028\x9b\ufeff\ud800"


def test_what_a_terminal_would_obey_is_spelt_out():
    """Escapes, newlines, bidirectional controls and surrogates; letters and signs of any script stay."""
    spelt = r"\x1b[31mred\x1b]0;title\x07\nphi3lora: a line \u202e\u2028\x9b\ufeff\ud800"
    assert printable(STRANGE) == spelt and printable("Straße, 東京, 😀 \\n") == "Straße, 東京, 😀 \\n"
    for kind in (Phi3LoRAError, AdapterError, DataError):
        assert str(kind(f"no layer {STRANGE}")) == f"no layer {spelt}"
        assert str(pickle.loads(pickle.dumps(kind(STRANGE)))) == spelt
    assert error_line(KeyError(STRANGE)).isprintable() and error_line(OSError(STRANGE)).isprintable()
    assert error_line(DataError("\x1b[2J")) == r"\x1b[2J"


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
