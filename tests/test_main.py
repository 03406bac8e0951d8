"""The command line: a chat with scripted input, against ``generate`` on the same turns."""

from __future__ import annotations

import io

import pytest
import torch
from conftest import quiet_config

import phi3lora as p3
from phi3lora.__main__ import main

QUESTIONS = ["What is the price of the Fusgus scarf?", "Which colours are there?"]
LIMIT = ["--max-new-tokens", "12", "--dtype", "float32", "--model", str(p3.demo.BASE)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a training checkpoint of the demo's model whose adapters act."""
    folder = tmp_path_factory.mktemp("run")
    model, _, train_set, _ = p3.demo.load()
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(r=4))
    settings = {"save_strategy": "steps", "save_steps": 8, "max_steps": 8, "max_length": 256}
    p3.train(model, train_set.select(range(64)), quiet_config(folder, **settings))
    return folder / "checkpoint-8"


def chat(monkeypatch, capsys, lines, *options):
    """What is printed after each line typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main(["chat", *LIMIT, *options]) == 0
    welcome, *answers = capsys.readouterr().out.split("> ")
    assert "/clear" in welcome
    return [answer.strip() for answer in answers]


def answers_to(model, tokenizer, questions, system=None, **options):
    """The same turn by turn."""
    turns = [{"role": "system", "content": system}] if system else []
    for question in questions:
        turns.append({"role": "user", "content": question})
        answer = p3.generate(model, tokenizer, turns, max_new_tokens=12, **options)
        turns.append({"role": "assistant", "content": answer})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def test_each_turn_is_answered_with_those_before_it_until_an_empty_line(monkeypatch, capsys):
    model, tokenizer, _, _ = p3.demo.load()
    expected = answers_to(model, tokenizer, QUESTIONS)
    assert chat(monkeypatch, capsys, [*QUESTIONS, "", "never read"]) == [*expected, ""]
    assert chat(monkeypatch, capsys, QUESTIONS) == [*expected, ""]  # the end of input ends it too


def test_clear_begins_anew_and_keeps_the_system_prompt(monkeypatch, capsys):
    model, tokenizer, _, _ = p3.demo.load()
    system = "You are kind."
    fresh = answers_to(model, tokenizer, [QUESTIONS[1]], system)[0]
    first, second = answers_to(model, tokenizer, QUESTIONS, system)
    said = chat(monkeypatch, capsys, [*QUESTIONS, "/clear", QUESTIONS[1]], "--system", system)
    assert said == [first, second, "", fresh, ""]


def test_an_adapter_may_be_a_file_or_a_checkpoints_folder(monkeypatch, capsys, checkpoint):
    model, tokenizer, _, _ = p3.demo.load()
    before = answers_to(model, tokenizer, QUESTIONS)
    p3.load_adapter(model, checkpoint / "lora.safetensors")
    expected = answers_to(model, tokenizer, QUESTIONS)
    assert expected != before
    for path in (checkpoint, checkpoint / "lora.safetensors"):
        assert chat(monkeypatch, capsys, QUESTIONS, "--adapter", str(path)) == [*expected, ""]


def test_temperature_and_top_p_reach_the_sampling(monkeypatch, capsys):
    model, tokenizer, _, _ = p3.demo.load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # where the command loads it
    sampled = []
    for seed in range(2):
        torch.manual_seed(seed)
        sampled.append(chat(monkeypatch, capsys, QUESTIONS, "--temperature", "3", "--top-p", "0.9"))
        torch.manual_seed(seed)
        assert sampled[-1] == [*answers_to(model, tokenizer, QUESTIONS, temperature=3.0, top_p=0.9), ""]
    assert sampled[0] != sampled[1]
    likeliest = chat(monkeypatch, capsys, QUESTIONS, "--temperature", "3", "--top-p", "1e-6")
    assert likeliest == [*answers_to(model, tokenizer, QUESTIONS), ""]


def test_what_cannot_be_done_is_one_line_and_status_one(tmp_path, capsys):
    for options, message in (
        (["--adapter", str(tmp_path)], "no such adapter file"),
        (["--adapter", str(tmp_path / "none.txt")], "allowed: *.safetensors, *.pt"),
    ):
        assert main(["chat", *LIMIT, *options]) == 1
        assert message in capsys.readouterr().err
