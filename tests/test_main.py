"""The command line against the functions it calls: chats with scripted input, an export, one-line errors."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import quiet_config

import phi3lora as p3
from phi3lora.__main__ import main

QUESTIONS = ["What is the price of the Fusgus scarf?", "Which colours are there?"]
CHAT = ["chat", "--max-new-tokens", "12", "--dtype", "float32", "--model", str(p3.demo.BASE)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of the demo's model, trained enough to answer differently."""
    folder = tmp_path_factory.mktemp("run")
    model, _, train_set, _ = p3.demo.load()
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(r=4))
    settings = {"save_strategy": "steps", "save_steps": 8, "max_steps": 8, "max_length": 256}
    p3.train(model, train_set.select(range(64)), quiet_config(folder, **settings))
    return folder / "checkpoint-8"


def chat(monkeypatch, capsys, lines, *options):
    """Return what is printed after each line typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    assert main([*CHAT, *options]) == 0
    welcome, *answers = capsys.readouterr().out.split("> ")
    assert "/clear" in welcome
    return [answer.strip() for answer in answers]


def answers_to(model, tokenizer, questions, system=None, **options):
    """Return ``generate``'s answers to a chat of these questions, turn by turn."""
    turns = [{"role": "system", "content": system}] if system else []
    for question in questions:
        turns.append({"role": "user", "content": question})
        answer = p3.generate(model, tokenizer, turns, max_new_tokens=12, **options)
        turns.append({"role": "assistant", "content": answer})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def test_a_chat_goes_on_until_an_empty_line_or_the_end_of_input_and_clear_starts_another(monkeypatch, capsys):
    model, tokenizer, _, _ = p3.demo.load()
    system = "You are kind."
    expected = answers_to(model, tokenizer, QUESTIONS, system)
    fresh = answers_to(model, tokenizer, [QUESTIONS[1]], system)
    assert chat(monkeypatch, capsys, [*QUESTIONS, "", "never read"], "--system", system) == [*expected, ""]
    printed = chat(monkeypatch, capsys, [*QUESTIONS, "/clear", QUESTIONS[1]], "--system", system)
    assert printed == [*expected, "", *fresh, ""]


def test_chat_and_export_accept_an_adapter_file_and_a_folder(monkeypatch, capsys, checkpoint, tmp_path):
    model, tokenizer, _, _ = p3.demo.load()
    before = answers_to(model, tokenizer, QUESTIONS)
    p3.load_adapter(model, checkpoint / "lora.safetensors")
    expected = answers_to(model, tokenizer, QUESTIONS)
    assert expected != before
    output = tmp_path / "output_dir_of_train"
    p3.save_adapter(model, output / "adapter.safetensors")
    for i, path in enumerate((checkpoint / "lora.safetensors", checkpoint, output)):
        assert chat(monkeypatch, capsys, QUESTIONS, "--adapter", str(path)) == [*expected, ""]
        folder = tmp_path / f"peft-{i}"
        assert main(["export", "--model", str(p3.demo.BASE), "--adapter", str(path), "--out", str(folder)]) == 0
        exported, _, _, _ = p3.demo.load()
        p3.import_peft(exported, folder)
        assert answers_to(exported, tokenizer, QUESTIONS) == expected


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


# --- The data of train and doctor

DOCTOR = ["doctor", "--dtype", "float32", "--max-length", "64", "--set", "r=2", "max_steps=1"]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two files with columns of their own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 6), ("b", 2)):
        rows = [{"question": f"Is it {name}{i}?", "reply": f"It is {i}.", "id": i} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


@pytest.fixture
def loaded(monkeypatch):
    """The data sets that the command line loads."""
    found, load = [], p3.ChatDataset.load

    def keep(*args, **kwargs):
        found.append(load(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(p3.ChatDataset, "load", keep)
    return found


COLUMNS = ["--columns", "prompt=question", "completion=reply"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (COLUMNS, {}),
        (["--columns", "prompt=question", "--columns", "completion=reply"], {}),
        ([*COLUMNS, "--format", "prompt_completion"], {}),
        ([*COLUMNS, "--train-on", "all"], {"train_on": "all"}),
        ([*COLUMNS, "--overflow", "split"], {"overflow": "split"}),
        ([*COLUMNS, "--split", "train[50%:]"], {"split": "train[50%:]"}),
    ],
    ids=str,
)
def test_the_options_of_the_data_are_those_of_load(data, loaded, options, expected):
    assert main([*DOCTOR, "--model", str(p3.demo.BASE), "--data", "a.jsonl", *options]) == 0
    _, tokenizer, _, _ = p3.demo.load()
    columns = {"prompt": "question", "completion": "reply"}
    alone = p3.ChatDataset.load("a.jsonl", tokenizer, max_length=64, columns=columns, **expected)
    assert loaded[0].fingerprint() == alone.fingerprint()


@pytest.mark.parametrize("options", [["--data", "a.jsonl", "b.jsonl"], ["--data", "a.jsonl", "--data", "b.jsonl"]])
def test_several_sources_are_joined_in_their_order(data, loaded, options):
    assert main([*DOCTOR, "--model", str(p3.demo.BASE), *options, *COLUMNS]) == 0
    _, tokenizer, _, _ = p3.demo.load()
    columns = {"prompt": "question", "completion": "reply"}
    each = [p3.ChatDataset.load(f"{n}.jsonl", tokenizer, max_length=64, columns=columns) for n in ("a", "b")]
    assert list(loaded[0]) == [document for chats in each for document in chats]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "a.jsonl", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "a.jsonl"], "row 1 has the keys 'question', 'reply', 'id'"),
        (["--data", "a.jsonl", "--columns", "promt=question"], "'promt' is not one of"),
        (["--data", "a.jsonl", "--columns", "prompt"], "--columns 'prompt'; allowed: OURS=YOURS"),
        (["--data", "a.jsonl", "--columns", "prompt=a", "prompt=b"], "--columns 'prompt=b'; allowed"),
        (["--data", "a.jsonl", "--columns", "prompt=question", "completion=answer"], "'answer'"),
        (["--data", "a.jsonl", "--split", "test", *COLUMNS], "no split 'test'"),
        (["--data", "a.jsonl", "--name", "main", *COLUMNS], "name='main' is for a dataset of the hub"),
        (["--data", "a.jsonl", "--format", "chats", *COLUMNS], "format='chats'; allowed"),
        (["--data", "a.jsonl", "--train-on", "answers", *COLUMNS], "train_on='answers'; allowed"),
        (["--data", "a.jsonl", "--overflow", "drop", *COLUMNS], "overflow='drop'; allowed"),
        (["--data", "a.jsonl", *COLUMNS, "--set", "r=0"], "r=0"),
    ],
    ids=str,
)
def test_wrong_data_is_one_line_before_the_weights_are_read(data, monkeypatch, capsys, options, message):
    monkeypatch.delattr("phi3lora.__main__.load_model")
    for command in ("train", "doctor"):
        assert main([command, "--model", str(p3.demo.BASE), *options]) == 1
        line = capsys.readouterr().err
        assert message in line and line.count("\n") == 1 and line.startswith("phi3lora: ")


@pytest.mark.parametrize("options", [["--data", "nowhere.jsonl"], ["--data", "a.jsonl", "--columns", "x=question"]])
def test_wrong_data_is_named_before_a_wrong_model(data, capsys, options):
    assert main(["train", "--model", "no/such/model", *options]) == 1
    assert "no/such/model" not in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_status_1(tmp_path, capsys):
    assert main([*CHAT, "--adapter", str(tmp_path)]) == 1
    assert "there is no adapter file" in capsys.readouterr().err


TRAIN = [
    "train", "--model", str(p3.demo.BASE), "--data", str(p3.demo.FOLDER / "eval.jsonl"), "--dtype", "float32",
    "--max-length", "256", "--set", "r=2", "per_device_train_batch_size=1", "log_level=error", "disable_tqdm=true",
]  # fmt: skip


def test_the_same_train_command_writes_the_same_bytes_and_another_seed_others(tmp_path, capsys):
    def digest(name, seed):
        torch.manual_seed(hash(name) % 1000)  # as left by whatever ran before
        settings = [f"output_dir={tmp_path / name}", f"seed={seed}", "max_steps=2", "save_strategy=no"]
        assert main([*TRAIN, *settings]) == 0
        return (tmp_path / name / "adapter.safetensors").read_bytes()

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_train_is_the_exit_status_and_leaves_no_adapter(tmp_path, number, status):
    settings = [f"output_dir={tmp_path / 'run'}", "max_steps=3000", "logging_steps=1"]
    command = [sys.executable, "-m", "phi3lora", *TRAIN, *settings]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    assert "interrupted after step" in errors and "resume_from_checkpoint=true" in errors
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["while training", "before training"])
def test_an_interrupt_ends_with_130_and_no_adapter(tmp_path, monkeypatch, capsys, how):
    real = p3.train

    class Interrupt(p3.Callback):
        def on_step_end(self, state):
            raise KeyboardInterrupt

    def train(*arguments, **options):
        if how == "before training":
            raise KeyboardInterrupt
        return real(*arguments, callbacks=[Interrupt()], **options)

    monkeypatch.setattr("phi3lora.__main__.train", train)
    assert main([*TRAIN, f"output_dir={tmp_path}", "max_steps=4"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "adapter.safetensors").exists()
