"""How objects look: one line in repr, lines that fit the terminal in print, HTML that is well formed and escaped."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
from conftest import adapted_model, chat_dataset, chat_rows, make_tokenizer, quiet_config, tiny_model
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

import phi3lora as p3
from phi3lora.display import (
    hanging,
    html_marked,
    html_table,
    one_line,
    quiet_libraries,
    shell_lines,
    shown_path,
    svg_curves,
    text_facts,
    text_table,
    use_colour,
    width_of,
    wrap,
)

SCRIPT = '<script>alert("&")</script>'
VOID = {"br", "img"}


class Reader(HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = [], set(), []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """One of each public object, with ``<script>`` in the texts that a user gives."""
    folder = tmp_path_factory.mktemp("objects")
    tokenizer, model = make_tokenizer(), adapted_model()
    rows = [*chat_rows(8), {"messages": [{"role": r, "content": SCRIPT * 3} for r in ("user", "assistant")]}]
    chats = p3.ChatDataset.load(rows, tokenizer, max_length=400)
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    config = quiet_config(folder / "run", **settings, run_name=SCRIPT)
    result = p3.train(model, chats, config, eval_dataset=chats, tokenizer=tokenizer)
    stream = p3.ChatDataset.load(rows, tokenizer, max_length=400, streaming=True)
    doctor = p3.doctor(model, tokenizer, chats.select([8]), config, try_steps=False)
    report = p3.inject_lora(tiny_model(), p3.LoraConfig(r=2))
    answers = p3.sample_answers(model, tokenizer, chats.select([8]), max_new_tokens=3)
    compared = p3.compare(model, tokenizer, [SCRIPT, "Why? " * 40], max_new_tokens=3)
    return {
        "ChatDataset": chats,
        "ChatStream": stream,
        "DocumentText": chats.show(8),
        "LoraConfig": p3.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]),
        "TrainingConfig": config,
        "InjectionReport": report,
        "TrainingResult": result,
        "DoctorReport": doctor,
        "Finding": doctor["preview"],
        "Answers": answers,
        "Comparison": compared,
        "MergeReport": p3.save_merged(model, tokenizer, folder / "merged"),
        "PeftExport": p3.export_peft(model, folder / "peft", tokenizer=tokenizer, base_model="owner/name"),
        "RunsPlot": p3.plot(result, folder / "run"),
    }


NAMES = (
    "ChatDataset", "ChatStream", "DocumentText", "LoraConfig", "TrainingConfig", "InjectionReport", "TrainingResult",
    "DoctorReport", "Finding", "Answers", "Comparison", "MergeReport", "PeftExport", "RunsPlot",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_is_one_short_line_that_begins_with_the_class(objects, name):
    thing = objects[name]
    parts = [thing, *thing] if name in ("Answers", "Comparison", "InjectionReport", "DoctorReport") else [thing]
    for part in parts:
        text = repr(part)
        assert "\n" not in text and len(text) <= 120
        assert text.startswith(f"{type(part).__name__}(") and text.endswith(")")


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("name", NAMES)
def test_printed_lines_fit_the_terminal_without_colour(objects, monkeypatch, name, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(objects[name]).splitlines()
    too_wide = [line for line in lines if width_of(line) > columns]
    if name == "PeftExport":  # a path is one word, and a line of a Modelfile cannot be broken
        too_wide = [line for line in too_wide if "ADAPTER" not in line and "from_pretrained" not in line]
    assert too_wide == []
    assert "\x1b" not in "".join(lines) and lines


@pytest.mark.parametrize("name", NAMES)
def test_html_is_well_formed_and_escapes_every_text(objects, name):
    text = objects[name]._repr_html_()
    reader = Reader(text)
    assert "script" not in reader.tags and "<script" not in text.lower()
    shows_it = {"ChatDataset": False, "DocumentText": True, "TrainingConfig": True, "Comparison": True, "Answers": True}
    if shows_it.get(name):
        assert "alert(" in "".join(reader.texts)


def test_a_result_has_its_curves_and_its_table_and_a_plot_its_picture(objects):
    assert {"svg", "polyline", "table"} <= Reader(objects["TrainingResult"]._repr_html_()).tags
    assert {"img", "table"} <= Reader(objects["RunsPlot"]._repr_html_()).tags


def test_a_configuration_shows_what_differs_from_the_defaults():
    assert repr(p3.LoraConfig()) == "LoraConfig()"
    assert repr(p3.TrainingConfig(max_steps=3, seed=42)) == "TrainingConfig(max_steps=3)"
    assert p3.TrainingConfig(max_steps=3, seed=42).given == {"max_steps", "seed"}


# --- A document


def test_show_marks_the_trained_tokens_and_gives_the_whole_text(monkeypatch):
    tokenizer = make_tokenizer()
    chats = chat_dataset(6)
    for i in range(len(chats)):
        shown, ids = chats.show(i), chats[i]
        assert "".join(text for text, _ in shown.pieces) == tokenizer.decode(ids["input_ids"])
        trained = [[]]
        for token, label in zip(ids["input_ids"], ids["labels"], strict=True):
            trained[-1].append(token) if label != -100 else trained.append([])
        expected = [tokenizer.decode(part).strip() for part in trained if part]
        assert [text.strip() for text, is_trained in shown.pieces if is_trained] == expected
        assert str(shown).count("[[") == len(expected)
    monkeypatch.setattr("sys.stdout", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32m" in str(chats.show(0)) and "[[" not in str(chats.show(0))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in str(chats.show(0))


def test_a_dataset_without_a_tokenizer_asks_for_one():
    chats = chat_dataset(3).select([1])
    chats.tokenizer = None
    with pytest.raises(p3.DataError, match=r"show\(i, tokenizer\)"):
        chats.show(0)
    assert str(chats.show(0, make_tokenizer())) == str(chat_dataset(3).show(1))
    assert "<mark" not in chats._repr_html_() and "<mark" in chat_dataset(3)._repr_html_()


# --- Text


def test_one_line_is_cut_and_never_has_a_line_break():
    assert one_line("A", ["b", "c\nd"]) == "A(b, c\\nd)"
    assert len(one_line("Name", ["x" * 300])) == 120


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_and_facts_keep_every_word_within_the_columns(columns):
    rows = [
        ("name", "a longer head", "text"),
        ("model.layers.*.self_attn.qkv_proj", "12", "word " * 60),
        ("\u65e5" * 90,) * 3,
    ]
    table = text_table(rows, columns)
    assert max(map(width_of, table.splitlines())) <= columns
    assert table.count("word") == 60 and table.count("\u65e5") == 270
    facts = text_facts({"one": "word " * 60, "two": "/tmp/" + "x" * 70}, columns)
    assert max(map(width_of, facts.splitlines())) <= columns
    assert facts.split() == ["one", *["word"] * 60, "two", "/tmp/" + "x" * 70]
    assert text_table([("a", "b"), ("1", "2\n3")], columns) == "a  b\n----\n1  2\n   3"


def test_a_path_is_shown_whole_where_the_working_directory_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(str(tmp_path / "runs")) == "runs"
    tmp_path.rmdir()
    assert shown_path("/runs/a") == "/runs/a"


def test_control_characters_of_a_text_do_not_reach_the_terminal():
    text = "a\x1b[2J\r\tb\nc\u00a0d"
    assert text_table([("x",), (text,)]).splitlines()[2:] == ["a\\x1b[2J", "    b", "c\u00a0d"]
    assert "\x1b" not in text_facts({"x": text})


def test_without_a_terminal_lines_stay_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert wrap("word " * 60, None) == ["word " * 60]
    assert text_facts({"name": "word " * 60}).count("\n") == 0
    assert hanging("head  ", "a\nb", None) == "head  a\n      b"


@pytest.mark.parametrize(
    "line", ["vllm serve 'a b' --x=1 " + "--option value " * 12 + "--last 'c d'", "python " + "x" * 99]
)
def test_a_broken_shell_command_is_the_same_command(line):
    lines = shell_lines(line, 60)
    command = "\n".join(lines).replace("vllm serve", "echo").replace("python ", "echo ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    whole = subprocess.run(["bash", "-c", " ".join(command.split("\\\n"))], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == whole.stdout
    assert all(len(part) <= 60 or " " not in part.strip() for part in lines[1:])
    assert shell_lines(line, None) == [line] and shell_lines("ADAPTER " + "a b " * 40, 60) == ["ADAPTER " + "a b " * 40]


def test_curves_leave_out_what_is_not_finite_and_need_two_points():
    assert svg_curves("step", {"loss": [(1, 2.0)]}) == "" == svg_curves("step", {})
    picture = svg_curves("step", {SCRIPT: [(1, 2.0), (2, float("nan")), (3, 1.0), (4, float("inf"))]})
    assert Reader(picture).tags >= {"svg", "polyline"} and "nan" not in picture and "inf" not in picture
    assert "<script" not in picture
    assert Reader(html_table([("a", SCRIPT), (SCRIPT, 1)])).texts == ["a", SCRIPT, SCRIPT, "1"]
    assert html_marked(()) == ""


# --- Other libraries


def test_bars_of_other_libraries_are_hidden_inside_the_block_and_back_after_it(monkeypatch):
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)

    def shown():
        bars = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
        return *bars, not are_progress_bars_disabled()

    assert shown() == (True, True, True)
    with quiet_libraries():
        assert shown() == (False, False, True), "downloads keep their bars"
        with quiet_libraries():
            assert shown() == (False, False, True)
        assert shown() == (False, False, True)
    assert shown() == (True, True, True)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with quiet_libraries():
        pass
    assert shown() == (False, False, False)
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.INFO)
    with quiet_libraries():
        assert shown()[0], "asked for"
    transformers_logging.set_verbosity(level)


LIBRARY = """
import logging, sys
import datasets
import phi3lora as p3
model, tokenizer = p3.load_model(p3.demo.BASE, dtype="float32")
datasets.Dataset.from_list([{"prompt": "Hi " * 200, "completion": "Yes " * 9}] * 400).to_parquet("rows.parquet")
sys.stderr.write("=== from here on\\n")
chats = p3.ChatDataset.load("rows.parquet", tokenizer, max_length=64, overflow="split")
p3.inject_lora(model)
p3.save_merged(model, tokenizer, "merged")
p3.load_model("merged")
p3.generate(model, tokenizer, "Hi " * 40, max_new_tokens=2)
p3.evaluate(model, chats.select(range(4)))
"""


@pytest.mark.slow
def test_nothing_of_other_libraries_is_printed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(p3.__file__).parents[1]), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARY], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.partition("=== from here on\n")[2] == ""
    assert "Loading weights" not in done.stderr


def test_a_process_without_standard_streams_shows_plain_text(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert use_colour() is False
