"""What ``engines.py`` prints: the rows of its table, their sum, and why a server ended. No engine runs here."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import phi3lora as p3

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def test_the_rows_add_up_to_a_table_and_a_case_that_must_be_right_fails(tmp_path, capsys):
    from engine_rows import Report
    from engine_servers import Refused

    def refuse():
        raise Refused(f"{tmp_path}/folder has\n  a pattern")

    def ours():
        raise p3.Phi3LoRAError("no")

    report = Report("an engine", tmp_path)
    for largest, agreed in ((1e-5, 4), (4e-5, 4)):
        report.row(("m", "all", "uniform"), lambda found=(largest, agreed, 4): found)
    report.row(("m", "all", "pattern"), refuse, may_refuse=True)
    report.row(("m", "all", "bare"), lambda: (7.4, 0, 4), may_differ=True)
    report.row(("m", "all", "q8_0"), lambda: (0.25, 3, 4), is_rounded=True)
    assert not report.failed and "refused: folder has a pattern" in capsys.readouterr().out
    assert report.summary().splitlines()[2:] == [
        "| uniform | right in 2 of 2, largest difference 4.0e-5 |",
        "| pattern | refused in 1 of 1 |",
        "| bare | wrong in 1 of 1, 7.4 to 7.4 |",
        "| q8_0 | largest difference 0.25, likeliest token the same in 3 of 4 |",
    ]
    report.row(("m", "far", "uniform"), lambda: (1e-3, 4, 4))
    report.row(("m", "token", "uniform"), lambda: (1e-5, 3, 4))
    report.row(("m", "none", "uniform"), ours)
    report.count("answers", 49, 50, "answers")
    report.count("known", 195, 200, "chats", may_differ=True)
    assert report.failed == ["m far uniform", "m token uniform", "m none uniform", "answers"]
    assert "WRONG in 2 of 5, 1e-05 to 0.001; refused in 1 of 5" in report.summary()


def test_a_server_s_end_names_the_first_cause():
    from engine_servers import why_ended

    log = (
        "WARNING: this can cause errors like OSError: [Errno 24]\nERROR worker failed\n"
        "(Worker pid=1) ERROR ValueError: Available memory is less\nRuntimeError: Engine core failed. See above\n"
    )
    assert why_ended(log, 1) == "ValueError: Available memory is less"
    assert why_ended("0.00 E load: failed to load\n0.01 E exiting due to an error", 1) == "0.00 E load: failed to load"
    assert "another processor" in why_ended("loading", -signal.SIGILL)
    assert why_ended("loading", 3) == "the server ended with status 3"
    assert why_ended("loading", None) == "the server did not start in 300 s"


def test_an_engine_that_is_not_there_is_one_line():
    from engine_rows import heading

    with pytest.raises(SystemExit, match=r"cannot run the engine: .*no-such-command.*--bin"):
        heading("an engine", ["no-such-command", "--version"])
