"""doctor(): each check reports its fault and is silent without it; the model stays the same, bit for bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    adapted_model,
    chat_dataset,
    longrope_model,
    make_tokenizer,
    quiet_config,
    randomize_adapters,
    tiny_model,
    token_documents,
)
from torch import nn

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.checks import settings
from phi3lora.checks.doctor import CHECKS, problems
from phi3lora.checks.planned_run import PlannedRun
from phi3lora.checks.spans import trained_spans

LONG = "hello " * 60


def fresh_model(**lora):
    """A tiny model as inject_lora leaves it."""
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora}))
    return model


def healthy_config(folder, **changes):
    return quiet_config(folder, **{"learning_rate": 1e-3, "max_steps": 4, **changes})


def examine(tmp_path, model=None, dataset=None, tokenizer=None, settings=None, **options):
    """Return the report, by default without optimizer steps."""
    options.setdefault("try_steps", False)
    changes = dict(settings or {})
    config = healthy_config(changes.pop("output_dir", tmp_path / "run"), **changes)
    chats = chat_dataset() if dataset is None else dataset
    return p3.doctor(model or fresh_model(), tokenizer or make_tokenizer(), chats, config, **options)


def chats_of(*answers, max_length=128, **options):
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in answers]
    rows = [{"messages": chat} for chat in turns]
    return p3.ChatDataset.load(rows, make_tokenizer(), max_length=max_length, **options)


def relabelled(change, source=None):
    """A dataset whose ids and labels went through ``change(ids, labels)``."""
    source = source or chat_dataset()
    pairs = [change(*(part.copy() for part in source.document(i))) for i in range(len(source))]
    ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    starts = np.concatenate([[0], np.cumsum([len(pair[0]) for pair in pairs])])
    return p3.ChatDataset(
        ids, labels, starts, max_length=source.max_length, pad_token_id=source.pad_token_id,
        end_of_turn_id=source.end_of_turn_id, format="messages", rows=np.arange(1, len(pairs) + 1),
        truncated=np.zeros(len(pairs), dtype=bool),
    )  # fmt: skip


# --- Faults, each with the finding that reports it


def with_base_gradient():
    model = fresh_model()
    model.model.layers[1].mlp.down_proj.weight.requires_grad = True
    return model


def with_undeclared_bias():
    model = fresh_model()
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.bias = nn.Parameter(torch.zeros(o_proj.out_features))
    return model


def with_frozen_adapter(name="lora_B"):
    model = fresh_model()
    getattr(model.model.layers[0].mlp.down_proj, name).requires_grad = False
    return model


def with_disabled_layer():
    model = fresh_model()
    model.model.layers[1].self_attn.qkv_proj.enabled = False
    return model


def mask_end_of_turn(ids, labels):
    labels[ids == chat_dataset().end_of_turn_id] = -100
    return ids, labels


def mask_first_end_of_turn(ids, labels):
    labels[np.flatnonzero((ids == chat_dataset().end_of_turn_id) & (labels != -100))[:1]] = -100
    return ids, labels


def shift_labels(ids, labels):
    return ids, np.concatenate([labels[1:], [-100]]).astype(np.int32)


def mask_almost_everything(ids, labels):
    ids, labels = np.tile(ids, 40), np.tile(labels, 40)
    labels[: -len(ids) // 40] = -100
    return ids, labels


def dropped_rows():
    rows = [{"prompt": LONG, "completion": "yes"}, {"prompt": "Hi", "completion": "yes"}]
    return p3.ChatDataset.load(rows, make_tokenizer(), max_length=32)


def dtype_model(dtype):
    model = tiny_model().to(dtype)
    p3.inject_lora(model)
    return model


MODEL_FAULTS = {
    "no adapters": (tiny_model, "targets", "error", r"no layer is adapted"),
    "only Llama's names that match": (
        lambda: fresh_model(target_modules=["o_proj", "down_proj"]),
        "targets", "warning", r"o_proj, down_proj in 4 layers, 33 %.*not adapted: qkv_proj, gate_up_proj.*all-linear",
    ),
    "a part of the stack": (
        lambda: fresh_model(target_modules=["qkv_proj", "0.self_attn.o_proj"]),
        "targets", "warning", r"not in others \(model.layers.0.mlp",
    ),
    "base weight trains": (with_base_gradient, "frozen", "error", r"1 base param.*layers.1.mlp.down_proj.weight"),
    "base weight, in train's words": (with_base_gradient, "run", "error", r"only adapters may be trainable"),
    "undeclared bias": (with_undeclared_bias, "frozen", "error", r"o_proj.bias.*bias='none'"),
    "frozen adapter": (with_frozen_adapter, "frozen", "error", r"1 adapter param.*down_proj.lora_B"),
    "adapter off": (with_disabled_layer, "frozen", "warning", r"1 of 8 adapters are switched off.*1.self_attn"),
    "alpha too large": (lambda: fresh_model(lora_alpha=400), "scaling", "warning", r"by 100.*lora_alpha=400"),
    "alpha too small": (lambda: fresh_model(r=64, lora_alpha=1), "scaling", "warning", r"r=64"),
    "small vocabulary": (
        lambda: adapted_model(changes={"vocab_size": 200}), "run", "error", r"the model's vocabulary has 200",
    ),
}  # fmt: skip
DATA_FAULTS = {
    "end of turn masked": (
        lambda: relabelled(mask_end_of_turn), "end of turn", "error",
        r"32 of 32 trained turns of 24 documents do not train <\|end\|>.*rows 1, 2, 3, 4, 5 and 19 more",
    ),
    "some ends of turn masked": (
        lambda: relabelled(mask_first_end_of_turn), "end of turn", "error", r"24 of 32 trained turns",
    ),
    "empty answers": (
        lambda: chats_of("yes", "", "no", ""), "empty answers", "warning", r"2 empty .*\(rows 2, 4\)",
    ),
    "all cut": (lambda: chats_of(LONG, LONG, max_length=32), "lengths", "warning", r"32 \| 32 tokens.*2 truncated"),
    "all cut, so it would not stop": (
        lambda: chats_of(LONG, LONG, max_length=32), "end of turn", "error", r"none of 2 trained turns.*max_length",
    ),
    "some cut, which is fine": (
        lambda: chats_of(LONG, "yes", "no", max_length=32), "end of turn", "ok", r"except 1 that max_length cuts",
    ),
    "rows dropped": (dropped_rows, "lengths", "warning", r"1 rows dropped"),
    "labels shifted": (lambda: relabelled(shift_labels), "supervised", "error", r"labels are not their own"),
    "hardly anything trained": (
        lambda: relabelled(mask_almost_everything, chats_of("ok", "no")), "supervised", "warning", r"^0\.\d % of",
    ),
    "documents just over half a row": (
        lambda: token_documents([33] * 20, max_length=64), "packing", "warning", r"20 rows packed.*51.6 % full",
    ),
    "empty": (lambda: chat_dataset().select([]), "run", "error", r"train_dataset is empty"),
}  # fmt: skip
SETTING_FAULTS = {
    "rate of full tuning": ({"learning_rate": 2e-6}, "learning rate", r"2e-06 is a rate for full fine-tuning"),
    "no rate": ({"learning_rate": 0}, "learning rate", r"nothing will change"),
    "huge rate": ({"learning_rate": 0.5}, "learning rate", r"far above"),
    "all warm-up": ({"warmup_steps": 9}, "schedule", r"9 warm-up steps of 4: the run ends before"),
    "long and unsaved": ({"max_steps": 501}, "saving", r"'no' in a run of 501 steps"),
}
FAULTS = {
    **{name: ({"model": make}, *rest) for name, (make, *rest) in MODEL_FAULTS.items()},
    **{name: ({"dataset": make}, *rest) for name, (make, *rest) in DATA_FAULTS.items()},
    **{name: ({"settings": lambda s=s: s}, f, "warning", text) for name, (s, f, text) in SETTING_FAULTS.items()},
    # 290 tokens in 10 x 100 + 10 x 10
    "padded rows": (
        {"dataset": lambda: token_documents([10] * 19 + [100]),
         "settings": lambda: {"packing": False, "per_device_train_batch_size": 10}},
        "packing", "warning", r"26.4 % full.*packing=True",
    ),
    "another tokenizer": (
        {"tokenizer": lambda: p3.demo.load()[1]}, "end of turn", "error",
        r"the tokenizer's template ends a turn with <\|end\|> \(6\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(tmp_path, fault):
    makers, name, status, text = FAULTS[fault]
    found = examine(tmp_path, **{argument: make() for argument, make in makers.items()})[name]
    assert found.status == status
    assert re.search(text, found.text), found.text


def test_a_healthy_run_has_no_error_and_no_warning(tmp_path):
    report = examine(tmp_path, try_steps=True)
    assert report.ok
    assert {f.status for f in report} == {"ok"}, str(report)
    assert [f.name for f in report] == [*CHECKS, "gradient flow", "time"]
    assert str(report).endswith("no errors, no warnings")
    assert all("\n" not in f.text for f in report)


@pytest.mark.parametrize("packing", [True, False])
def test_a_dataset_without_documents_is_an_error_and_no_exception(tmp_path, packing):
    report = examine(tmp_path, dataset=chat_dataset().select([]), settings={"packing": packing}, try_steps=True)
    assert not report.ok
    assert report["gradient flow"].text == "not tried: fix the error of 'run' first"


@pytest.mark.parametrize(
    ("dtype", "options", "status"),
    [
        (torch.bfloat16, {"fp16": True}, "warning"),
        (torch.float16, {"bf16": True}, "warning"),
        (torch.bfloat16, {}, "ok"),
        (torch.float32, {"fp16": True}, "ok"),
    ],
)
def test_a_precision_that_the_weights_do_not_suit_is_reported(tmp_path, monkeypatch, dtype, options, status):
    monkeypatch.setattr("phi3lora.checks.model.has_instructions", lambda name: True)
    assert examine(tmp_path, dtype_model(dtype), settings=options)["precision"].status == status


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_without_instructions_for_it_is_reported(tmp_path, monkeypatch, name):
    monkeypatch.setattr("phi3lora.checks.model.has_instructions", lambda n: False)
    found = examine(tmp_path, settings={name: True})["precision"]
    assert found.status == "warning"
    assert f"no instructions for {name}" in found.text and f"dtype='float32', without {name}=True" in found.text
    assert examine(tmp_path)["precision"].status == "ok"  # float32
    assert examine(tmp_path, settings={name: True}, device_memory_gib=80)["precision"].status == "ok"  # for a GPU
    monkeypatch.setattr("phi3lora.checks.model.has_instructions", lambda n: n == name)
    assert examine(tmp_path, settings={name: True})["precision"].status == "ok"


@pytest.mark.parametrize("options", [{"overflow": "split"}, {"train_on": "all"}, {"train_on": "last"}], ids=str)
def test_split_documents_and_other_masks_have_their_ends_of_turn_and_no_empty_answers(tmp_path, options):
    words = " ".join("abcdefghij"[i % 10] for i in range(150))
    for size in range(100, 112):  # at some size, a part ends just before or after the end of turn
        chats = chats_of(*(words[: size + i] for i in range(4)), max_length=40, **options)
        report = examine(tmp_path, dataset=chats)
        assert report["empty answers"].status == "ok"
        assert "do not train" not in report["end of turn"].text


def test_the_padding_token_is_named_and_harmless(tmp_path):
    text = examine(tmp_path)["padding"].text
    assert text.startswith("pad <|endoftext|> (3), eos <|endoftext|> (3), end of turn <|end|> (")
    assert "masks go by span" in text


@pytest.mark.parametrize(
    ("lengths", "status", "text"),
    [
        ([20, 30], "ok", "up to 40 tokens: the short"),
        ([50, 60], "ok", "over 40 tokens: the long"),
        ([20, 60, 30], "warning", "2 documents of up to 40 tokens train the short rotary factors, 1 longer"),
    ],
)
def test_documents_on_both_sides_of_the_longrope_boundary_are_reported(tmp_path, lengths, status, text):
    found = examine(tmp_path, longrope_model(40), token_documents(lengths, max_length=64))["longrope"]
    assert found.status == status
    assert text in found.text


def test_trained_spans_equal_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("phi3lora.checks.spans._CHUNK", 3)
    dataset = token_documents([7, 1, 12, 3, 9, 1, 30], seed=3)
    expected = []
    for i in range(len(dataset)):
        labels = [int(label) for label in dataset.document(i)[1]]
        at = 0
        while at < len(labels):
            stop = at
            while stop < len(labels) and labels[stop] != -100:
                stop += 1
            if stop > at:
                expected.append((i, at, stop - at, labels[stop - 1]))
            at = max(stop, at + 1)
    found = trained_spans(dataset)
    assert list(zip(found.document, found.start, found.length, found.last_token, strict=True)) == expected
    some = trained_spans(dataset, sample=3)
    assert some.documents == 3
    assert set(some.document) == {0, 3, 6}


# --- Memory, disk, time


def test_memory_is_compared_with_the_card_that_is_asked_about(tmp_path):
    model = fresh_model()
    plan = PlannedRun(model, None, chat_dataset(), healthy_config(tmp_path)).memory()
    none, full = plan.peak_gib["none"], plan.peak_gib["full"]
    assert full < none

    def memory(gib, **changes):
        return examine(tmp_path, model, settings=changes, device_memory_gib=gib)["memory"]

    assert memory(None).status == memory(2 * none).status == "ok"
    assert "no GPU here" in memory(None).text
    assert memory(none).status == "warning"  # over 92 %
    between = (none + full / 0.92) / 2
    tight = memory(between)
    assert tight.status == "error"
    assert re.search(r"does not fit; activation_checkpointing='(selective|full|offload)' fits", tight.text)
    for mode in ("full", "auto"):
        assert memory(between, activation_checkpointing=mode).status == "ok"
    assert memory(1e-9).text.endswith("use smaller batches or base_precision='nf4'")
    lines = tight.details[0][0].splitlines()
    assert lines[0].split() == ["GiB", "none", "selective", "full", "offload"]
    assert [line[:10].strip() for line in lines[1:4]] == ["as loaded", "fp8", "nf4"]
    assert "x" in lines[1]
    with pytest.raises(p3.TrainingError, match=r"device_memory_gib=0; allowed"):
        memory(0)


def test_the_prediction_for_another_card_assumes_the_fused_kernels(tmp_path):
    model = dtype_model(torch.bfloat16)
    here, there = (
        PlannedRun(model, None, chat_dataset(), healthy_config(tmp_path), device_memory_gib=gib) for gib in (None, 80)
    )
    assert (here.memory_backend.kind, there.memory_backend.kind) == ("plain", "fused")
    assert there.memory().peak_gib["none"] < here.memory().peak_gib["none"]


def test_an_output_folder_that_is_not_writable_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    found = examine(tmp_path, settings={"output_dir": str(tmp_path / "file" / "run")})["output"]
    assert found.status == "error"
    assert "cannot be written to: Not a directory" in found.text


def test_another_run_s_checkpoints_are_reported_and_kept(tmp_path):
    kept = tmp_path / "run" / "checkpoint-3" / "file"
    kept.parent.mkdir(parents=True)
    kept.write_text("another run's")
    found = examine(tmp_path)["output"]
    assert found.status == "error"
    assert "the newest is checkpoint-3" in found.text
    assert examine(tmp_path, settings={"overwrite_output_dir": True})["output"].status == "ok"
    assert kept.exists()


@pytest.mark.parametrize(("share", "status"), [(0.5, "error"), (1.1, "warning"), (3, "ok")])
def test_a_full_disk_is_reported(tmp_path, monkeypatch, share, status):
    planned = PlannedRun(fresh_model(), None, chat_dataset(), healthy_config(tmp_path))
    each = settings.checkpoint_bytes(planned)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(share * each)))
    assert examine(tmp_path)["disk"].status == status


@pytest.mark.parametrize(
    "changes",
    [
        {"save_strategy": "steps", "save_steps": 2},
        {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"save_strategy": "steps", "save_steps": 0.5, "optim": "sgd"},
    ],
    ids=str,
)
def test_the_checkpoints_take_the_predicted_space(tmp_path, changes):
    model, chats = fresh_model(r=16), chat_dataset()
    config = healthy_config(tmp_path, **{"max_steps": 7, **changes})
    planned = PlannedRun(model, None, chats, config)
    count, each = settings.checkpoints_at_once(planned), settings.checkpoint_bytes(planned)
    p3.train(model, chats, config)
    left = list(tmp_path.glob("checkpoint-*"))
    assert count == len(left) + (config.save_total_limit is not None)  # an old one is deleted after the new one
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in left]
    assert each == pytest.approx(max(sizes), rel=0.25)


def test_the_time_grows_with_the_steps_and_is_unknown_without_a_trial(tmp_path):
    assert "time unknown" in examine(tmp_path)["time"].text
    assert re.match(r"about \d+ s for 4 steps", examine(tmp_path, try_steps=True)["time"].text)
    found = examine(tmp_path, settings={"max_steps": 10**7}, try_steps=True)["time"]
    assert re.match(r"about [\d.]+ h for 10,000,000 steps, [\d,]+ tokens", found.text)


# --- Gradient flow


def with_detached_layer():
    model = fresh_model()
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)
    return model


def with_a_dead_segment():
    """Attention that ignores v: no gradient reaches the third segment of qkv."""
    model = fresh_model()
    layer = model.model.layers[1].self_attn.qkv_proj
    whole, width = layer.forward, layer.segments[2]
    layer.forward = lambda x: torch.cat([(y := whole(x))[..., :-width], y[..., -width:].detach()], -1)
    return model


def with_nan():
    model = fresh_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    return model


def with_large_head():
    model = fresh_model()
    model.lm_head.weight.data.mul_(500)
    return model


def all_off():
    model = fresh_model()
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    return model


FLOW_FAULTS = {
    "frozen B": (with_frozen_adapter, "error", r"1 adapter mat.* step 1 of 2 \(model.layers.0.mlp.down_proj.lora_B\)"),
    "frozen A": (lambda: with_frozen_adapter("lora_A"), "error", r"1 adapter mat.* step 2 of 2 \(.*down_proj.lora_A\)"),
    "disabled": (with_disabled_layer, "error", r"3 .* step 1 of 2 \(.*layers.1.self_attn.qkv_proj.lora_B of segment 0"),
    "detached": (with_detached_layer, "error", r"1 .* step 1 of 2 \(.*layers.0.mlp.down_proj.lora_B\)"),
    "dead segment": (with_a_dead_segment, "error", r"1 .*step 1 of 2 \(.*1.self_attn.qkv_proj.lora_B of segment 2\)"),
    "NaN": (with_nan, "error", r"loss nan: it or its gradient is not finite"),
    "worse than guessing": (with_large_head, "warning", r"worse than guessing \(6.24\)"),
    "all off": (all_off, "error", r"every adapter is switched off"),
    "cannot run": (with_base_gradient, "warning", r"not tried: fix the error of 'run' first"),
    "an embedding": (lambda: fresh_model(target_modules=["embed_tokens", "qkv_proj"]), "ok", "every adapter moved"),
}


@pytest.mark.parametrize("fault", FLOW_FAULTS)
def test_an_adapter_that_would_not_learn_is_reported(tmp_path, fault):
    make, status, text = FLOW_FAULTS[fault]
    found = examine(tmp_path, make(), try_steps=True)["gradient flow"]
    assert found.status == status
    assert re.search(text, found.text), found.text


@pytest.mark.parametrize("changes", [{"fp16": True}, {"bf16": True}, {"activation_checkpointing": "offload"}], ids=str)
def test_steps_are_tried_in_the_precision_and_mode_of_the_run(tmp_path, changes):
    found = examine(tmp_path, settings=changes, try_steps=True)["gradient flow"]
    assert found.status == "ok", found.text


# --- Nothing changes


def with_history():
    """Adapters that have learned, leftover gradients, modules in mixed modes, dropout."""
    model = fresh_model(lora_dropout=0.1, bias="none")
    randomize_adapters(model)
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    model.model.layers[0].train()
    return model


def in_sdpa():
    model = fresh_model()
    model.set_attn_implementation("sdpa")
    return model


SET_BY_TRAINING = {"gradient_checkpointing", "long_inv_freq"}  # attributes that transformers adds and keeps


def state_of(model):
    """Everything that the doctor must leave alone."""
    state = {f"{n} at": (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    state.update({n: p.detach().clone() for n, p in model.named_parameters()})
    state.update({f"{n} gradient": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    state.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
    state.update({f"mode {n}": m.training for n, m in model.named_modules()})
    state.update({f"attributes {n}": sorted(vars(m).keys() - SET_BY_TRAINING) for n, m in model.named_modules()})
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


@pytest.mark.parametrize("make", [with_history, in_sdpa, longrope_model, with_nan, with_disabled_layer])
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
        model = fresh_model(lora_dropout=0.2)
        config = healthy_config(tmp_path / f"{with_doctor}", max_steps=3)
        if with_doctor:
            assert p3.doctor(model, make_tokenizer(), chat_dataset(), config).ok
        p3.train(model, chat_dataset(), config)
        return p3.lora_state_dict(model)

    checked, unchecked = train(True), train(False)
    assert all(torch.equal(checked[name], unchecked[name]) for name in unchecked)


# --- What is printed


def test_the_preview_highlights_what_is_trained(tmp_path, monkeypatch):
    report = examine(tmp_path, dataset=chats_of("Hello\x1b[31m you!"))
    assert "".join(text for text, trained in report["preview"].details if trained) == "Hello\\x1b[31m you!<|end|>"
    plain, coloured = report.render(columns=110), report.render(colour=True, columns=110)
    assert "[[Hello\\x1b[31m you!<|end|>]]" in plain
    assert "\x1b" not in plain
    assert "\x1b[32mHello\\x1b[31m you!<|end|>\x1b[0m" in coloured
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "110")
    assert str(report) == coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(report) == plain


def test_one_finding_prints_as_its_lines_of_the_report(tmp_path):
    report = examine(tmp_path)
    assert str(report["saving"]) == "ok       saving  checkpoints: none"
    head, *lines = str(report["preview"]).splitlines()
    assert head.startswith("ok       preview  row 1, ")
    assert lines[0].startswith(" " * len("ok       preview  ") + "<|") and "[[" in "".join(lines)


@pytest.mark.parametrize("columns", [80, 110])
def test_long_lines_break_between_words_and_long_documents_are_shortened(tmp_path, columns):
    report = examine(tmp_path, dataset=chats_of(LONG * 3, max_length=512))
    whole, broken = report.render(), report.render(columns=columns)
    assert broken.split() == whole.split()
    for name in ("targets", "padding", "preview", "memory"):
        assert max(map(len, report[name].lines(14, False).splitlines())) > columns
        assert max(map(len, report[name].lines(14, False, columns).splitlines())) <= columns
    preview = "".join(text for text, _ in report["preview"].details)
    assert "[...]" in preview and len(preview) < 600


def test_the_tokenizer_is_optional(tmp_path):
    report = p3.doctor(fresh_model(), None, chat_dataset(), healthy_config(tmp_path / "run"), try_steps=False)
    assert report.ok
    assert "token " in report["end of turn"].text


def test_train_starts_with_one_line_a_problem(tmp_path, capsys):
    def printed(chats, **changes):
        config = healthy_config(tmp_path, max_steps=1, **changes)
        p3.train(fresh_model(), chats, config, tokenizer=make_tokenizer())
        return capsys.readouterr().out

    faulty = chats_of("yes", "", "no")
    assert re.fullmatch(
        r"warning  empty answers  1 empty assistant answers \(rows 2\).*\n", printed(faulty, log_level="warning")
    )
    assert "warning  empty answers" in printed(faulty, log_level="info")
    assert printed(faulty, log_level="error") == ""
    assert printed(chat_dataset(), log_level="warning") == ""


def test_the_checks_of_train_take_no_time(tmp_path):
    model, tokenizer, train_set, _ = p3.demo.load()
    p3.inject_lora(model)
    started = time.process_time()
    assert problems(PlannedRun(model, tokenizer, train_set, healthy_config(tmp_path))) == []
    assert time.process_time() - started < 0.5


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_model_and_its_generator_are_restored(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = adapted_model(dtype=torch.bfloat16, changes=sizes, lora_dropout=0.1).cuda()
    generator, before = torch.cuda.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    report = examine(tmp_path, model=model, try_steps=True)
    assert report["gradient flow"].status == "ok", report
    assert "layers fused" in report["memory"].text and "GiB predicted of " in report["memory"].text
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
