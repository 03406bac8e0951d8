"""The command line against the functions it calls: chats with scripted input, an export, one-line errors."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import interrupt, on, quiet_config
from safetensors.torch import load_file

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.cli.commands import find_adapter
from phi3lora.cli.options import build_parser
from phi3lora.run_file import read_run
from phi3lora.run_settings import setting_names
from phi3lora.training.loop import run_training

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


def test_a_turn_past_the_model_s_context_is_left_out_and_the_chat_goes_on(monkeypatch, capsys, caplog):
    model, tokenizer, _, _ = p3.demo.load()
    expected = answers_to(model, tokenizer, QUESTIONS)
    long = "word " * model.config.max_position_embeddings
    printed = chat(monkeypatch, capsys, [QUESTIONS[0], long, *QUESTIONS[1:]])
    assert printed == [expected[0], "", *expected[1:], ""]
    assert f"the model allows {model.config.max_position_embeddings}" in caplog.text
    assert "This turn is left out; /clear starts a new chat" in caplog.text


def test_every_command_accepts_an_adapter_in_any_form(monkeypatch, capsys, checkpoint, tmp_path):
    model, tokenizer, _, _ = p3.demo.load()
    before = answers_to(model, tokenizer, QUESTIONS)
    p3.load_adapter(model, checkpoint / "lora.safetensors")
    expected = answers_to(model, tokenizer, QUESTIONS)
    assert expected != before
    ended, renamed, peft = tmp_path / "ended", tmp_path / "renamed", tmp_path / "peft"
    p3.save_adapter(model, ended / "adapter.safetensors")
    p3.save_adapter(model, renamed / "support.safetensors")
    p3.export_peft(model, peft)
    own = checkpoint / "lora.safetensors"
    forms = {own: own, checkpoint: own, checkpoint.parent: own, peft: peft, peft / "adapter_model.safetensors": peft}
    forms |= {folder: next(folder.iterdir()) for folder in (ended, renamed)}
    for i, (form, found) in enumerate(forms.items()):
        assert find_adapter(str(form)) == found
        folder = tmp_path / f"peft-{i}"
        assert main(["export", "--model", "demo", "--adapter", str(form), "--out", str(folder)]) == 0
        exported, _, _, _ = p3.demo.load()
        p3.import_peft(exported, folder)
        assert answers_to(exported, tokenizer, QUESTIONS) == expected
    for form in (own, peft):  # the same function finds it
        assert chat(monkeypatch, capsys, QUESTIONS, "--adapter", str(form)) == [*expected, ""]


def test_a_folder_with_several_adapters_is_refused_with_their_names(checkpoint, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes((checkpoint / "lora.safetensors").read_bytes())
    assert main([*CHAT, "--adapter", str(tmp_path)]) == 1
    assert "it holds a.safetensors, b.safetensors: name one" in capsys.readouterr().err


def test_a_folder_of_several_runs_is_refused_with_their_names(tmp_path, capsys):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter.safetensors").touch()
    assert main([*CHAT, "--adapter", str(tmp_path)]) == 1
    assert "it holds first, second: name one" in capsys.readouterr().err


def test_ctrl_c_in_a_chat_ends_it_without_a_traceback(monkeypatch, capsys):
    for target in ("builtins.input", "phi3lora.cli.commands.generate"):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("Hello\n"))
            patch.setattr(target, interrupt)
            assert main(CHAT) == 130
            assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_chat_without_its_streams_is_refused_before_the_model_is_loaded(monkeypatch, capsys, name):
    monkeypatch.delattr("phi3lora.cli.commands.load_model")
    monkeypatch.setattr(sys, name, None)  # as after `<&-` and `>&-`
    assert main(CHAT) == 1
    assert f"{name} is closed" in capsys.readouterr().err


def test_a_chat_in_another_encoding_spells_out_answers_and_refuses_wrong_bytes(monkeypatch, capsys):
    monkeypatch.setattr("phi3lora.cli.commands.generate", lambda *_, **__: print("caf\u00e9") or "caf\u00e9")
    for typed, status in ((b"Hi\n", 0), (b"caf\xe9\n", 1)):
        if status:
            monkeypatch.undo()
        output = io.TextIOWrapper(io.BytesIO(), "ascii")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
            patch.setattr(sys, "stdout", output)
            assert main(CHAT) == status
        assert (b"caf\\xe9" in output.buffer.getvalue()) is (status == 0)
    assert "allowed: Unicode text" in capsys.readouterr().err


def test_temperature_and_top_p_reach_the_sampling(monkeypatch, capsys, caplog):
    model, tokenizer, _, _ = p3.demo.load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # where the command loads it
    sampled = []
    for seed in range(2):
        torch.manual_seed(seed)
        sampled.append(chat(monkeypatch, capsys, QUESTIONS, "--temperature", "3", "--top-p", "0.9"))
        torch.manual_seed(seed)
        assert sampled[-1] == [*answers_to(model, tokenizer, QUESTIONS, temperature=3.0, top_p=0.9), ""]
    assert sampled[0] != sampled[1]
    assert not caplog.records
    chat(monkeypatch, capsys, [""], "--top-p", "0.9")
    assert "--top-p 0.9 has no effect" in caplog.text
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
    monkeypatch.delattr("phi3lora.cli.commands.load_model")
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
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors
    assert "interrupted after step" in errors
    again = shlex.split(errors.strip().splitlines()[-1])  # the command that continues the run
    assert again[-4] == "train" and again[-2:] == ["--set", "resume_from_checkpoint=true"]
    assert read_run(again[-3], [("max_steps", "1")]).training.output_dir == str(tmp_path / "run")
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("how", ["while training", "before training"])
def test_an_interrupt_ends_with_130_and_no_adapter(tmp_path, monkeypatch, capsys, how):
    real = run_training

    def train(*arguments, **options):
        if how == "before training":
            raise KeyboardInterrupt
        return real(*arguments, callbacks=[on(interrupt)], **options)

    monkeypatch.setattr("phi3lora.cli.commands.run_training", train)
    assert main([*TRAIN, f"output_dir={tmp_path}", "max_steps=4"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "adapter.safetensors").exists()


# --- A run, its files, and what comes after it

SHORT = [
    "train", "--model", "demo", "--data", "demo", "--max-steps", "2", "--per-device-train-batch-size", "1",
    "--set", "log_level=error", "disable_tqdm=true", "save_strategy=no",
]  # fmt: skip


def tensors_of(path):
    return {name: tensor.tolist() for name, tensor in load_file(path).items()}


def test_the_command_after_a_run_can_be_pasted_from_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*SHORT, "output_dir=a-folder-of-a-rather-long-name/first"]) == 0
    told = capsys.readouterr().out.partition("talk to it  ")[2]
    assert max(map(len, told.splitlines())) <= 80 and "\n" in told.strip()
    assert shlex.split(told.replace("\\\n", ""))[-5:] == [
        "chat", "--model", "demo", "--adapter", "a-folder-of-a-rather-long-name/first/adapter.safetensors",
    ]  # fmt: skip


def test_two_mentions_of_set_both_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, "--set", "output_dir=one", "r=2", "--set", "seed=5", "--lora_alpha", "4"]) == 0
    run = read_run("one/run.yaml")
    assert (run.lora.r, run.lora.lora_alpha, run.training.seed, run.training.max_steps) == (2, 4, 5, 2)
    assert (run.model.name_or_path, run.data.source) == ("demo", "demo")


def test_a_run_writes_the_file_that_runs_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--columns", "prompt=question", "completion=answer", "--eval-data", "held.jsonl", "--r", "2"]
    rows = [{"question": f"Is it {i}?", "answer": f"It is {i}."} for i in range(12)]
    for name, part in (("own", rows[:8]), ("held", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    settings = [*SHORT, "max_length=64", "output_dir=one", "eval_strategy=epoch", "warmup_ratio=.1"]
    settings[settings.index("demo", 3)] = "own.jsonl"
    assert main([*settings, *options]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "../one/run.yaml", "--set", "output_dir=two"]) == 0
    assert tensors_of("../one/adapter.safetensors") == tensors_of("two/adapter.safetensors")
    one, two = (read_run(path) for path in ("../one/run.yaml", "two/run.yaml"))
    assert (one.model, one.data, one.lora) == (two.model, two.data, two.lora)
    assert one.data.eval_source == str(tmp_path / "held.jsonl")
    assert "transformers" in yaml.safe_load((tmp_path / "one" / "run.yaml").read_text())["versions"]


@pytest.mark.parametrize(("held_out", "stream"), [("demo", []), ("own.jsonl", []), ("own.jsonl", ["streaming=True"])])
def test_a_run_records_held_out_data_that_is_named_like_its_training_data(
    held_out, stream, tmp_path, monkeypatch, caplog
):
    stream = [*stream, "buffer_size=5", "eval_steps=1"] if stream else []
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]
    (tmp_path / "own.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 8)
    words = ["train", "--model", "demo", "--data", held_out, "--eval-data", held_out, "--r", "2"]
    assert main([*words, "--set", "max_steps=1", "per_device_train_batch_size=1", "output_dir=one", *stream]) == 0
    assert "buffer_size" not in caplog.text
    named = read_run("one/run.yaml").data.eval_source
    assert named == ("demo" if held_out == "demo" else str(tmp_path / held_out))
    assert main(["train", "one/run.yaml", "--set", "output_dir=two"]) == 0
    evaluations = [(tmp_path / run / "metrics.jsonl").read_text().count("eval_loss") for run in ("one", "two")]
    assert evaluations == [1, 1]


def test_a_run_from_python_records_what_is_known_and_names_the_rest(tmp_path):
    model, tokenizer, chats, _ = p3.demo.load()
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(r=2))
    config = {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no"}
    train_set, eval_set = chats.split(0.25, seed=3)
    p3.train(model, train_set, quiet_config(tmp_path / "a", **config), eval_dataset=eval_set, tokenizer=tokenizer)
    text = (tmp_path / "a" / "run.yaml").read_text()
    run = read_run(str(tmp_path / "a" / "run.yaml"))
    assert "not known" not in text
    assert (run.data.eval_share, run.data.split_seed, run.lora.r, run.model.dtype) == (0.25, 3, 2, "float32")
    p3.train(model, train_set.select(range(64)), quiet_config(tmp_path / "b", **config))
    text = (tmp_path / "b" / "run.yaml").read_text()
    assert "# data: not known" in text and "# adapter: not known" in text
    assert main(["train", str(tmp_path / "b" / "run.yaml")]) == 1


def test_a_run_file_in_the_output_folder_stays_and_the_record_goes_beside_it(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "one/run.yaml", "--model", "demo", "--data", "demo"]) == 0
    own = (tmp_path / "one" / "run.yaml").read_bytes()
    (tmp_path / "one" / "training.png").write_bytes(b"mine")
    more = ["--set", "output_dir=one", *SHORT[SHORT.index("--max-steps") :]]
    for _ in range(2):  # the record of the first run is replaced
        assert main(["train", "one/run.yaml", *more, "--overwrite"]) == 0
        assert (tmp_path / "one" / "run.yaml").read_bytes() == own
    assert caplog.text.count("run.yaml is yours and stays as it is") == 2
    assert read_run("one/run-1.yaml").training.output_dir == str(tmp_path / "one")
    assert not (tmp_path / "one" / "run-2.yaml").exists()
    assert (tmp_path / "one" / "training-1.png").read_bytes() == b"mine"


def test_train_goes_on_from_an_adapter_and_writes_another_file(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    still = [*SHORT, "learning_rate=0", "--adapter", str(checkpoint)]
    assert main([*still, "--out", "next.safetensors"]) == 0
    assert tensors_of("next.safetensors") == tensors_of(checkpoint / "lora.safetensors")
    before = (tmp_path / "next.safetensors").read_bytes()
    assert main([*SHORT, "output_dir=c", "--out", "next.safetensors"]) == 1
    assert "'next.safetensors' exists; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "next.safetensors").read_bytes() == before
    assert main([*SHORT, "output_dir=c", "--out", "next.safetensors", "--overwrite"]) == 0
    assert (tmp_path / "next.safetensors").read_bytes() != before
    assert read_run("phi3lora_output/run.yaml").model.adapter == str(checkpoint / "lora.safetensors")
    assert main(["train", "phi3lora_output/run.yaml", "--set", "output_dir=again"]) == 0
    assert tensors_of("again/adapter.safetensors") == tensors_of(checkpoint / "lora.safetensors")


def test_evaluate_measures_what_a_run_file_holds_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: demo\ndata: {source: demo, eval_share: 0.05, split_seed: 3}")
    assert main(["evaluate", "run.yaml"]) == 0
    printed = json.loads(capsys.readouterr().out)
    model, _, chats, _ = p3.demo.load()
    assert printed == pytest.approx(p3.evaluate(model, chats.split(0.05, seed=3)[1]))


def test_evaluate_measures_the_data_of_its_option_in_the_place_of_what_a_run_file_holds_out(data, capsys):
    (data / "run.yaml").write_text("model: demo\ndata: {source: demo, eval_share: 0.05}")
    (data / "none.yaml").write_text("model: demo\ndata: {source: demo, eval_source: none.jsonl}")
    columns = ["--columns", "prompt=question", "completion=reply"]
    found = []
    for words in (["run.yaml"], ["none.yaml"], ["--model", "demo"]):
        assert main(["evaluate", *words, "--data", "a.jsonl", *columns]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("asked", "is_said"), [([], True), (["--samples", "1"], False)])
def test_evaluate_says_that_a_limit_of_answers_has_no_effect_without_answers(data, capsys, caplog, asked, is_said):
    columns = ["--columns", "prompt=question", "completion=reply"]
    words = ["evaluate", "--model", "demo", "--data", "a.jsonl", *columns, "--max-new-tokens", "2"]
    assert main([*words, *asked]) == 0
    assert ("--max-new-tokens 2 has no effect" in caplog.text) == is_said


def test_evaluate_says_that_a_run_file_holds_nothing_out(data, capsys, caplog):
    (data / "run.yaml").write_text(
        "model: demo\ndata: {source: a.jsonl, columns: {prompt: question, completion: reply}}"
    )
    assert main(["evaluate", "run.yaml"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert "run.yaml holds no data out" in caplog.text and "a.jsonl, its training data" in caplog.text
    caplog.clear()
    assert main(["evaluate", "run.yaml", "--data", "a.jsonl"]) == 0
    assert json.loads(capsys.readouterr().out) == measured and "holds no data" not in caplog.text


def test_evaluate_says_that_it_leaves_out_the_adapter_that_the_run_wrote(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "model: demo\ndata: {source: demo, eval_share: 0.02}\ntraining: {output_dir: out}"
    )
    assert main(["evaluate", "run.yaml"]) == 0
    assert "what is measured" not in caplog.text  # nothing has been trained yet
    model, *_ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=2))
    p3.save_adapter(model, "out/adapter.safetensors")
    said = "demo without an adapter, not the adapter out/adapter.safetensors that the run wrote; --adapter out measures"
    for words, expected in (([], True), (["--adapter", "out"], False)):
        caplog.clear()
        assert main(["evaluate", "run.yaml", *words]) == 0
        assert (said in caplog.text) == expected
    (tmp_path / "more.yaml").write_text(
        (tmp_path / "run.yaml").read_text().replace("demo", "{adapter: out, name_or_path: demo}", 1)
    )
    assert main(["evaluate", "more.yaml"]) == 0
    assert "what is measured is the run's first adapter, out/adapter.safetensors, not" in caplog.text
    capsys.readouterr()


def test_the_revision_of_a_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (
        ["chat"],
        ["init"],
        ["evaluate", "--data", "demo"],
        ["train", "--data", "demo"],
        ["import", "nowhere"],
    ):
        out = ["--out", "a.pt"] if words[0] == "import" else []
        for name in ("demo", str(p3.demo.BASE)):
            assert main([*words, *out, "--model", name, "--model-revision", "main"]) == 1
            assert "revision='main' is for a model of the hub" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["train", "--data", "demo"], ["import", "nowhere"]], ids=lambda words: words[0])
def test_an_adapter_file_of_a_wrong_name_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("phi3lora.cli.commands.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main([*command, "--model", "demo", "--out", "adapter.bin"]) == 1
    assert "'adapter.bin'; allowed: *.safetensors, *.pt" in capsys.readouterr().err


def test_arguments_of_the_schedule_are_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("phi3lora.cli.commands.load_model")
    words = ["train", "--model", "demo", "--data", "demo", "--set", "lr_scheduler_type=cosine_with_min_lr"]
    for given in ('{"min_lr": "abc"}', '{"min_lr": "1e-5"}', '{"floor": 1}'):
        assert main([*words, "--set", f"lr_scheduler_kwargs={given}"]) == 1
        assert "allowed: num_cycles, min_lr, min_lr_rate" in capsys.readouterr().err


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_the_command_after_an_interruption_goes_through(tmp_path, monkeypatch, capsys, has_checkpoint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(b"")
    where = str(tmp_path) if has_checkpoint else None
    result = p3.TrainingResult(0, {}, [], None, interrupted=True, interrupted_by=2, checkpoint=where)
    monkeypatch.setattr("phi3lora.cli.commands.run_training", lambda *_, **__: result)
    words = ["train", "--model", "demo", "--data", "demo", "--set", "max_steps=1", "--out", "x.pt", "--overwrite"]
    (tmp_path / "phi3lora_output").mkdir()
    (tmp_path / "phi3lora_output" / "run.yaml").write_text("a user's")
    assert main(words) == 130
    again = capsys.readouterr().err.splitlines()[-1]
    assert " phi3lora_output/run-1.yaml " in again
    assert again.endswith(f"resume_from_checkpoint={'true' if has_checkpoint else 'auto'} --out x.pt --overwrite")


@pytest.mark.parametrize(("of_node", "torchrun"), [("2", "torchrun"), ("1", "torchrun --nnodes 2")])
def test_after_an_interruption_of_several_processes_one_names_the_command(
    tmp_path, monkeypatch, capsys, of_node, torchrun
):
    """A checkpoint of two processes is refused by one."""
    monkeypatch.chdir(tmp_path)
    result = p3.TrainingResult(3, {}, [], None, interrupted=True, interrupted_by=15, checkpoint=str(tmp_path))
    monkeypatch.setattr("phi3lora.cli.commands.run_training", lambda *_, **__: result)
    monkeypatch.setattr("phi3lora.cli.commands.rank_and_size", lambda: (int(os.environ["RANK"]), 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "--model", "demo", "--data", "demo", "--set", "output_dir=run", "max_steps=9"]) == 143
        said.append(capsys.readouterr().err)
    assert said[0].splitlines()[-1] == (
        f"{torchrun} --nproc-per-node {of_node} -m phi3lora train run/run.yaml --set resume_from_checkpoint=true"
    )
    assert "interrupted" not in said[1]


def run_buffered(words, **streams):
    """Run a command whose output waits in a buffer until its end, as in a pipe."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-m", "phi3lora", *words], env=environment, text=True, timeout=600, **streams
    )


def run_unread(words, stream):
    """Run a command that writes ``stream`` into a pipe without a reader; return its status and its other stream."""
    other = "stderr" if stream == "stdout" else "stdout"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run_buffered(words, **{stream: writer, other: subprocess.PIPE})
    finally:
        os.close(writer)
    return done.returncode, getattr(done, other)


def test_a_reader_that_leaves_ends_a_command_without_a_traceback(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert run_unread(["plot", str(tmp_path), "--out", str(tmp_path / "a")], "stdout") == (128 + signal.SIGPIPE, "")
    assert (tmp_path / "a").read_bytes().startswith(b"\x89PNG")  # the file that was named, not a.png


@pytest.mark.parametrize(
    ("words", "stream"),
    [(["--help"], "stdout"), (["--version"], "stdout"), ([], "stderr"), (["plot", "nowhere"], "stderr")],
    ids=str,
)
def test_help_and_messages_that_nobody_reads_end_without_a_second_message(words, stream):
    assert run_unread(words, stream) == (128 + signal.SIGPIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux' full device")
def test_output_that_cannot_be_written_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        done = run_buffered(["--version"], stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.startswith("phi3lora: the output cannot be written: ") and done.stderr.count("\n") == 1
        assert run_buffered(["--version"], stdout=full, stderr=full).returncode == 1


EMPTY = [
    "train --model demo --data demo --set output_dir=", "train --model demo --data demo --output-dir=",
    "train --model demo --data demo --adapter=", "train --model demo --data demo --set adapter=",
    "train --model demo --data demo --resume-from-checkpoint=", "train --model demo --data=",
    "train --model= --data demo", "train --model demo --data demo --eval-data=",
    "train --model demo --data demo --out=",
    "chat --model demo --adapter=", "chat --model=", "evaluate --model demo --data=", "demo --output-dir=",
    "merge --model demo --adapter a --out=", "export --model demo --adapter a --out b --base-model=",
]  # fmt: skip


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_path_is_refused_before_anything_is_loaded_or_written(tmp_path, monkeypatch, capsys, line):
    """It is what an unset variable of the shell leaves: --adapter "$ADAPTER" is not a wish for no adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("load_model", "run_demo"):
        monkeypatch.delattr(f"phi3lora.cli.commands.{name}")
    try:
        assert main(line.split()) == 1
    except SystemExit as ended:
        assert ended.code == 2
    message = capsys.readouterr().err
    assert ("''" in message or "an empty text" in message) and "allowed: " in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "new.safetensors"], "the file to write is --out"),
        (["--eval-strategy", "epoch"], "name it (--eval-data FILE)"),
        (["--predict-with-generate"], "predict_with_generate=True: there is no held-out data; name it (--eval-data"),
        (["--metric-for-best-model", "rouge1"], "metric_for_best_model='rouge1': there is no held-out data; name it"),
        (["--metric-for-best-model", "bleu"], "metric_for_best_model='bleu'; allowed: loss"),
        (["--output-dir", __file__], "cannot be written to: Not a directory"),
        (["--output-dir", f"{__file__}/run"], "cannot be written to: Not a directory"),
        (["--out", f"{__file__}/adapter.pt"], "cannot be written: Not a directory"),
        (["--streaming", "--max-steps", "-1"], "streaming=True needs max_steps > 0"),
        (["--dtype", "float8"], "dtype='float8'; allowed: 'bfloat16'"),
        (["--base-precision", "int4"], "base_precision='int4'; allowed: None, 'nf4', 'fp8'"),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--resume-from-checkpoint", "true"], "has no good checkpoint"),
        (["--report-to", "nothing"], "report_to"),
        (["--learning-rate", "fast"], "learning_rate='fast'; allowed: a number"),
        (["--learning-rat", "1"], "unrecognized arguments: --learning-rat. Did you mean '--learning-rate'?"),
        (["--lr=1"], "unrecognized arguments: --lr=1. Did you mean '--learning-rate'?"),
        (["--set", "wd=1"], "no setting 'wd'. Did you mean 'weight_decay'?"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_told_before_the_model_is_loaded(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr("phi3lora.cli.commands.load_model")
    words = ["train", "--model", "demo", "--data", "demo", *options]
    if "unrecognized" in message:
        with pytest.raises(SystemExit, match="2"):
            main(words)
    else:
        assert main(words) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage", "message"),
    [
        (["trian", "run.yaml"], "phi3lora [-h]", "no command 'trian'. Did you mean 'train'? Commands: demo, doctor,"),
        (["chat", "--adaptor", "a"], "phi3lora chat", "--adaptor a. Did you mean '--adapter'? `phi3lora chat --help`"),
        (["train", "a.yaml", "b.yaml"], "phi3lora train", "arguments: b.yaml. `phi3lora train --help-all` lists"),
    ],
)
def test_wrong_usage_shows_the_usage_of_the_command_and_the_nearest_name(words, usage, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    told = capsys.readouterr().err
    assert told.startswith(f"usage: {usage}") and message in told


def test_lora_settings_that_the_adapter_does_not_have_are_refused(checkpoint, tmp_path, capsys):
    words = [*SHORT, f"output_dir={tmp_path}", "--adapter", str(checkpoint)]
    assert main([*words, "--r", "8"]) == 1
    assert "r=8, but the adapter" in capsys.readouterr().err
    assert main([*words, "--r", "4"]) == 0


# --- Help, and the examples in it


def commands():
    parser = build_parser()
    return next(action.choices for action in parser._actions if hasattr(action, "choices") and action.choices)


@pytest.mark.parametrize("command", [None, *commands()])
def test_help_fits_80_columns_and_loads_no_library(command):
    words = [sys.executable, "-X", "importtime", "-m", "phi3lora", *([command] if command else []), "--help"]
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ("phi3lora" in done.stdout and "example:" in done.stdout) or command is None
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "loralib"}


def test_without_a_command_the_help_is_shown_and_the_status_is_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "exit status:" in capsys.readouterr().err


def test_every_setting_has_an_option(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    text = capsys.readouterr().out
    for section in ("model", "data", "lora", "training"):
        for name in setting_names(section):
            if name not in ("modules_to_save", "gradient_checkpointing"):
                assert name.replace("_", "-") in text or name in ("name_or_path", "source", "eval_source"), name
    for name in ("base-precision", "format", "columns", "train-on", "streaming", "eval-data", "parallel"):
        assert f"--{name}" in text


def test_version_names_what_the_numbers_depend_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    line = capsys.readouterr().out
    assert all(name in line for name in ("phi3lora", f"torch {torch.__version__}", "Python"))


def test_the_examples_of_the_help_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for name, command in commands().items():
        if name in ("demo", "push"):
            continue
        text = command.epilog.replace("\\\n", " ").replace("max_steps=70", "max_steps=2 disable_tqdm=true")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("phi3lora ")]
        assert lines
        for line in lines:
            words = shlex.split(line)[1:]
            if words[:2] == ["train", "run.yaml"]:
                words += ["max_steps=2", "output_dir=runs/second"]
            assert main(words) == 0, line
    assert {path.name for path in tmp_path.iterdir()} >= {"run.yaml", "try-peft", "try.safetensors", "try-merged"}
