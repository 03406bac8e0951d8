"""doctor(): it notices an adapter that would not learn, leaves the model as it was, and prints a report."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    TEMPLATES,
    adapted_model,
    chat_dataset,
    longrope_model,
    make_tokenizer,
    randomize_adapters,
    token_documents,
)
from faulty import (
    LONG,
    chats_of,
    examine,
    fresh_model,
    healthy_config,
    with_base_gradient,
    with_disabled_layer,
    with_frozen_adapter,
)

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.checks.doctor import CHECKS, problems
from phi3lora.training.setup import PlannedRun


def test_a_healthy_run_has_no_error_and_no_warning(tmp_path):
    report = examine(tmp_path, try_steps=True)
    assert report.ok and {f.status for f in report} == {"ok"}, str(report)
    assert [f.name for f in report] == [*CHECKS, "gradient flow", "time"]
    assert str(report).endswith("no errors, no warnings")
    assert all("\n" not in f.text for f in report)


# --- Gradient flow


def with_a_dead_segment():
    """Attention that ignores v: no gradient reaches the third segment of qkv."""
    model = fresh_model()
    layer = model.model.layers[1].self_attn.qkv_proj
    whole, width = layer.forward, layer.segments[2]
    layer.forward = lambda x: torch.cat([(y := whole(x))[..., :-width], y[..., -width:].detach()], -1)
    return model


def with_scaled(weight, factor):
    model = fresh_model()
    model.get_parameter(weight).data.mul_(factor)
    return model


def with_nan():
    return with_scaled("model.layers.1.mlp.down_proj.weight", torch.nan)


def all_off():
    model = fresh_model()
    for module in model.modules():
        module.enabled = False
    return model


FLOW_FAULTS = {
    "frozen B": (with_frozen_adapter, "error", r"1 adapter mat.* step 1 of 2 \(model.layers.0.mlp.down_proj.lora_B\)"),
    "frozen A": (lambda: with_frozen_adapter("lora_A"), "error", r"1 adapter mat.* step 2 of 2 \(.*down_proj.lora_A\)"),
    "dead segment": (with_a_dead_segment, "error", r"1 .*step 1 of 2 \(.*1.self_attn.qkv_proj.lora_B of segment 2\)"),
    "NaN": (with_nan, "error", r"loss nan: it or its gradient is not finite"),
    "worse than guessing": (lambda: with_scaled("lm_head.weight", 500), "warning", r"worse than guessing \(6.24\)"),
    "all off": (all_off, "warning", r"not tried: fix the error of 'run' first"),
    "cannot run": (with_base_gradient, "warning", r"not tried: fix the error of 'run' first"),
    "an embedding": (lambda: fresh_model(target_modules=["embed_tokens", "qkv_proj"]), "ok", "every adapter moved"),
}


@pytest.mark.parametrize("fault", FLOW_FAULTS)
def test_an_adapter_that_would_not_learn_is_reported(tmp_path, fault):
    make, status, text = FLOW_FAULTS[fault]
    found = examine(tmp_path, make(), try_steps=True)["gradient flow"]
    assert found.status == status and re.search(text, found.text), found


@pytest.mark.parametrize("changes", [{"fp16": True}, {"bf16": True}, {"activation_checkpointing": "offload"}], ids=str)
def test_steps_are_tried_in_the_precision_and_mode_of_the_run(tmp_path, changes):
    assert examine(tmp_path, settings=changes, try_steps=True)["gradient flow"].status == "ok"


# --- Nothing changes


def with_history():
    """Adapters that have learned, leftover gradients, modules in mixed modes, dropout, another attention."""
    model = fresh_model(lora_dropout=0.1, bias="none")
    randomize_adapters(model)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    model.model.layers[0].train()
    model.set_attn_implementation("sdpa")
    return model


SET_BY_TRAINING = {"gradient_checkpointing", "long_inv_freq"}  # attributes that transformers adds and keeps


def state_of(model):
    """Everything that the doctor must leave alone."""
    state = {f"{n} at": (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    state.update({n: p.detach().clone() for n, p in model.named_parameters()})
    state.update({f"{n} gradient": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    state.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
    state.update({f"module {n}": (m.training, vars(m).keys() - SET_BY_TRAINING) for n, m in model.named_modules()})
    state["attention"] = model.config._attn_implementation
    state["torch"], state["python"] = torch.get_rng_state(), random.getstate()
    name, keys, *rest = np.random.get_state()
    state["numpy"] = (name, keys.tolist(), rest)
    state["gradients on"] = torch.is_grad_enabled()
    return state


def differences(before, after):
    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN equals NaN
        return type(a) is type(b) and a == b

    return [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))]


@pytest.mark.parametrize("make", [with_history, longrope_model, with_nan, with_disabled_layer])
def test_weights_gradients_modes_and_generators_are_restored_bit_for_bit(tmp_path, make):
    model = make()
    chats = token_documents([50, 60], max_length=64) if make is longrope_model else chat_dataset()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    random.gauss(0, 1), np.random.normal()  # both keep a second number for later
    before = state_of(model)
    for mode in ("none", "selective", "full"):
        examine(tmp_path, model, chats, settings={"activation_checkpointing": mode}, try_steps=True)
        assert differences(before, state_of(model)) == []
    assert list(tmp_path.iterdir()) == []


def test_everything_is_restored_when_a_step_fails(tmp_path, monkeypatch):
    model = with_history()
    before = state_of(model)

    def breaks(*args, **kwargs):
        raise p3.ModelError("the step broke")

    monkeypatch.setattr("phi3lora.training.step.causal_lm_loss", breaks)
    found = examine(tmp_path, model, try_steps=True)["gradient flow"]
    assert (found.status, found.text) == ("error", "the step broke")
    assert differences(before, state_of(model)) == []


def test_a_run_after_the_doctor_equals_the_run_without_it(tmp_path):
    def train(with_doctor):
        model, config = fresh_model(lora_dropout=0.2), healthy_config(tmp_path / f"{with_doctor}", max_steps=3)
        assert not with_doctor or p3.doctor(model, make_tokenizer(), chat_dataset(), config).ok
        p3.train(model, chat_dataset(), config)
        return p3.lora_state_dict(model)

    checked, unchecked = train(True), train(False)
    assert all(torch.equal(checked[name], unchecked[name]) for name in unchecked)


# --- What is printed


def test_the_preview_highlights_what_is_trained(tmp_path, monkeypatch):
    report = examine(tmp_path, dataset=chats_of("hello\x1b user"))
    assert "".join(text for text, trained in report["preview"].details if trained) == "he·llo·\\x1b user·<|end|>"
    plain, coloured = report.render(columns=110), report.render(colour=True, columns=110)
    assert "[[he·llo·\\x1b user·<|end|>]]" in plain
    assert "\x1b" not in plain
    assert "\x1b[32mhe·llo·\\x1b user·<|end|>\x1b[0m" in coloured
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "110")
    for no_color, expected in (("", coloured), ("1", plain)):
        monkeypatch.setenv("NO_COLOR", no_color)
        assert str(report) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text", [" a  b\n\nc ", "\u65e5\u672c \U0001f642\u200b\r", "<|end|>", "<|en d|></s>", "\ufffd x"], ids=repr
)
def test_the_preview_s_tokens_are_the_document(tmp_path, name, text):
    tokenizer = make_tokenizer(name)
    row = {"prompt": text, "completion": text}
    chats = p3.ChatDataset.load([row], tokenizer, max_length=256)
    preview = "".join(piece for piece, _ in examine(tmp_path, None, chats, tokenizer)["preview"].details)
    whole = tokenizer.decode(chats[0]["input_ids"], clean_up_tokenization_spaces=False)
    escaped = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in whole)
    assert preview.replace("·", "") == escaped
    marker = tokenizer.convert_ids_to_tokens(chats.end_of_turn_id)
    assert preview.count(marker) == chats[0]["input_ids"].count(chats.end_of_turn_id)  # a spelled one is divided


def test_a_preview_without_spaces_keeps_to_the_columns(tmp_path):
    report = examine(tmp_path, dataset=chats_of("0" * 50 + "|" * 50))
    assert max(map(len, report["preview"].lines(14, False, 80).splitlines())) <= 80


def test_rows_of_several_sources_are_named_with_their_source(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for path in paths:
        path.write_text("".join(f"{json.dumps({'prompt': 'Hi', 'completion': text})}\n" for text in ("yes", "")))
    report = examine(tmp_path, dataset=p3.ChatDataset.load(paths, make_tokenizer(), max_length=64))
    assert f"(rows 2 of '{paths[0]}', 2 of '{paths[1]}')" in report["empty answers"].text
    assert report["preview"].text.startswith(f"row 1 of '{paths[0]}', ")


def test_one_finding_prints_as_its_lines_of_the_report(tmp_path):
    report = examine(tmp_path)
    assert str(report["saving"]) == "ok       saving  checkpoints: none"
    head, *lines = str(report["preview"]).splitlines()
    indent = " " * len("ok       preview  ")
    assert head.startswith("ok       preview  row 1, ") and all(line.startswith(indent) for line in lines)
    assert any(line.startswith(f"{indent}<|") for line in lines)


@pytest.mark.parametrize("columns", [80, 110])
def test_long_lines_break_between_words_and_long_documents_are_shortened(tmp_path, columns):
    report = examine(tmp_path, dataset=chats_of(LONG * 3, max_length=512))
    whole, broken = report.render(), report.render(columns=columns)
    assert broken.split() == whole.split()
    for name in ("targets", "padding", "preview", "memory"):
        wide, narrow = report[name].lines(14, False), report[name].lines(14, False, columns)
        assert max(map(len, narrow.splitlines())) <= columns < max(map(len, wide.splitlines()))
    preview = "".join(text for text, _ in report["preview"].details)
    assert "[...]" in preview and len(preview) < 600


def test_the_tokenizer_is_optional(tmp_path):
    report = p3.doctor(fresh_model(), None, chat_dataset(), healthy_config(tmp_path / "run"), try_steps=False)
    assert report.ok
    assert "token " in report["end of turn"].text


def test_train_starts_with_one_line_a_problem(tmp_path, capsys):
    def printed(chats, log_level):
        config = healthy_config(tmp_path, max_steps=1, log_level=log_level)
        p3.train(fresh_model(), chats, config, tokenizer=make_tokenizer())
        return capsys.readouterr().out

    faulty = chats_of("yes", "", "no")
    assert re.fullmatch(r"warning  empty answers  1 empty .*\(rows 2\).*\n", printed(faulty, "warning"))
    assert "warning  empty answers" in printed(faulty, "info")
    assert printed(faulty, "error") == printed(chat_dataset(), "warning") == ""


def test_the_checks_of_train_take_no_time_for_more_documents(tmp_path):
    model, tokenizer, train_set, _ = p3.demo.load()
    p3.inject_lora(model)

    def count_calls(dataset):
        calls = itertools.count()
        sys.setprofile(lambda frame, event, argument: event == "call" and next(calls))
        try:
            assert problems(PlannedRun(model, dataset, healthy_config(tmp_path), tokenizer=tokenizer)) == []
        finally:
            sys.setprofile(None)
        return next(calls)

    part = train_set.select(range(150))
    count_calls(part)  # imports
    few, many = count_calls(part), count_calls(train_set)
    assert few < 200_000 and many < 1.1 * few, "a tenth of a second, whatever the number of documents"


@pytest.mark.parametrize(("answer", "status"), [("It is on its way.", 0), (LONG * 20, 1)])
def test_the_command_s_exit_status_says_whether_there_are_errors(tmp_path, monkeypatch, capsys, answer, status):
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "Where is it?", "completion": answer}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    command = ["doctor", "--model", str(p3.demo.BASE), "--data", "chats.jsonl", "--dtype", "float32"]
    assert main([*command, "--max-length", "64", "--set", "r=2", "max_steps=3"]) == status
    printed = capsys.readouterr().out
    assert "gradient flow  every adapter moved" in printed
    assert printed.splitlines()[-1].startswith("no errors" if status == 0 else "1 error")
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


@pytest.mark.gpu
def test_on_a_gpu_the_model_and_its_generator_are_restored(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = adapted_model(dtype=torch.bfloat16, head_scale=1.0, changes=sizes, lora_dropout=0.1).cuda()
    generator, before = torch.cuda.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    report = examine(tmp_path, model=model, try_steps=True)
    assert report["gradient flow"].status == "ok", report
    assert "layers fused" in report["memory"].text and "GiB predicted of " in report["memory"].text
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
