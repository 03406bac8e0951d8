"""Tests of values, values and errors in words, and the JSON readers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import phi3lora.errors
from phi3lora.errors import (
    AdapterError,
    DataError,
    Phi3LoRAError,
    as_path,
    did_you_mean,
    error_line,
    install_hint,
    is_int,
    is_number,
    is_path,
    printable,
    short_repr,
)
from phi3lora.files import parse_json, read_json


def test_numbers_and_paths_are_recognised():
    assert is_number(0) and is_number(-1.5)
    assert not any(map(is_number, (True, "1", None, float("nan"), float("inf"), 10**400)))
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


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("learning_rat", "learning_rate"),
        ("lr", "learning_rate"),  # not "r", which has more letters in common
        ("--lr", "--learning-rate"),
        ("q_prj", "q_proj"),
        ("x", None),
        ("colour", None),
    ],
)
def test_the_nearest_name_or_the_one_with_these_initials_is_proposed(name, close):
    dash = "--" if name.startswith("--") else ""
    names = [f"{dash}{each}" for each in ("r", "learning-rate" if dash else "learning_rate", "q_proj", "max_steps")]
    assert did_you_mean(name, names) == (f" Did you mean {close!r}?" if close else "")


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


def test_an_install_hint_in_a_clone_is_for_the_clone(tmp_path, monkeypatch):
    clone = Path(phi3lora.errors.__file__).parents[1]
    monkeypatch.chdir(clone)
    assert install_hint("plot") == 'pip install -e ".[plot]"'
    monkeypatch.chdir(tmp_path)
    assert install_hint("plot") == f'pip install -e ".[plot]" (in {clone})'


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, "pip install matplotlib 'bitsandbytes>=0.50'"),
        ({"url": "file:///somewhere", "dir_info": {}}, "pip install matplotlib 'bitsandbytes>=0.50'"),
        (
            {"url": "https://example.org/p.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}},
            'pip install "phi3lora[plot] @ git+https://example.org/p.git"',
        ),
        ("no metadata", "install the packages of the extra 'plot' in phi3lora's pyproject.toml"),
    ],
    ids=["wheel", "folder", "git", "copied"],
)
def test_an_install_hint_outside_a_clone_can_be_pasted(tmp_path, origin, expected):
    (tmp_path / "phi3lora").mkdir()
    (tmp_path / "phi3lora" / "__init__.py").touch()
    shutil.copy(phi3lora.errors.__file__, tmp_path / "phi3lora")
    if origin != "no metadata":
        info = tmp_path / "phi3lora-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.4\nName: phi3lora\nVersion: 0.1.0\nRequires-Dist: torch\n"
            "Requires-Dist: matplotlib; extra == 'plot'\nRequires-Dist: bitsandbytes>=0.50; extra == \"plot\"\n"
            "Requires-Dist: peft; extra == 'test'\n"
        )
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
    code = "import sys; sys.path[:0] = sys.argv[1:]; from phi3lora.errors import *; print(install_hint('plot'))"
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
