"""Each check of the doctor reports its fault and is silent without it."""

from __future__ import annotations

import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, chat_dataset, longrope_model, make_tokenizer, tiny_model, token_documents
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
from torch import nn

import phi3lora as p3
from phi3lora.checks import settings
from phi3lora.checks.settings import check_memory
from phi3lora.checks.spans import trained_spans
from phi3lora.training.setup import PlannedRun


def relabelled(change, source=None):
    """A dataset whose ids and labels went through ``change(ids, labels)``."""
    source = source or chat_dataset()
    pairs = [change(*(part.copy() for part in source.document(i))) for i in range(len(source))]
    ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
    starts = np.cumsum([0, *(len(pair[0]) for pair in pairs)])
    return p3.ChatDataset(
        ids, labels, starts, max_length=source.max_length, pad_token_id=source.pad_token_id,
        end_of_turn_id=source.end_of_turn_id, format="messages", rows=np.arange(1, len(pairs) + 1),
        truncated=np.zeros(len(pairs), dtype=bool),
    )  # fmt: skip


# --- Faults, each with the finding that reports it


def with_undeclared_bias():
    model = fresh_model()
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.bias = nn.Parameter(torch.zeros(o_proj.out_features))
    return model


def mask_first_end_of_turn(ids, labels):
    labels[np.flatnonzero((ids == chat_dataset().end_of_turn_id) & (labels != -100))[:1]] = -100
    return ids, labels


def mask_almost_everything(ids, labels):
    ids, labels = np.tile(ids, 40), np.tile(labels, 40)
    labels[: -len(ids) // 40] = -100
    return ids, labels


def dtype_model(dtype):
    model = tiny_model().to(dtype)
    p3.inject_lora(model)
    return model


CASES = {  # name -> (arguments of examine or functions that make them, finding, status, text)
    "no adapters": ({"model": tiny_model}, "targets", "error", r"no layer is adapted"),
    "only two of Llama's names match": (
        {"model": lambda: fresh_model(target_modules=["o_proj", "down_proj"])}, "targets", "warning",
        r"o_proj, down_proj in 4 layers, 33 %.*not adapted: qkv_proj, gate_up_proj.*all-linear",
    ),
    "a part of the stack": (
        {"model": lambda: fresh_model(target_modules=["qkv_proj", "0.self_attn.o_proj"])}, "targets", "warning",
        r"not in others \(model.layers.0.mlp",
    ),
    "base weight trains": (
        {"model": with_base_gradient}, "frozen", "error", r"1 base param.*layers.1.mlp.down_proj.weight",
    ),
    "base weight, in train's words": ({"model": with_base_gradient}, "run", "error", r"only adapters may be trainable"),
    "undeclared bias": ({"model": with_undeclared_bias}, "frozen", "error", r"o_proj.bias.*bias='none'"),
    "frozen adapter": ({"model": with_frozen_adapter}, "frozen", "error", r"1 adapter param.*down_proj.lora_B"),
    "adapter off": ({"model": with_disabled_layer}, "frozen", "warning", r"1 of 8 adapters are switched off.*1.self_a"),
    "unusual alpha": ({"model": lambda: fresh_model(lora_alpha=400)}, "scaling", "warning", r"by 100.*lora_alpha=400"),
    "some ends of turn masked": (
        {"dataset": lambda: relabelled(mask_first_end_of_turn)}, "end of turn", "error",
        r"24 of 32 trained turns of 24 documents do not train <\|end\|>.*rows 1, 2, 3, 4, 5 and 19 more",
    ),
    "another tokenizer": (
        {"tokenizer": lambda: p3.demo.load()[1]}, "end of turn", "error",
        r"the tokenizer's template ends a turn with <\|end\|> \(6\)",
    ),
    "all cut": (
        {"dataset": lambda: chats_of(LONG, LONG, max_length=32)}, "lengths", "warning", r"32 \| 32 tok.*2 truncated",
    ),
    "all cut, so it would not stop": (
        {"dataset": lambda: chats_of(LONG, LONG, max_length=32)}, "end of turn", "error", r"none of 2 .*max_length",
    ),
    "some cut, which is fine": (
        {"dataset": lambda: chats_of(LONG, "yes", "no", max_length=32)}, "end of turn", "ok", r"except 1 that max_",
    ),
    "rows dropped": (
        {"dataset": lambda: p3.ChatDataset.load(
            [{"prompt": text, "completion": "yes"} for text in (LONG, "Hi")], make_tokenizer(), max_length=32
        )},
        "lengths", "warning", r"1 row dropped",
    ),
    "empty answers": (
        {"dataset": lambda: chats_of("yes", "", "no", "")}, "empty answers", "warning", r"2 empty .*\(rows 2, 4\)",
    ),
    "labels shifted": (
        {"dataset": lambda: relabelled(lambda ids, labels: (ids, np.roll(labels, -1)))}, "supervised", "error",
        r"not their own token's",
    ),
    "hardly anything trained": (
        {"dataset": lambda: relabelled(mask_almost_everything, chats_of("ok", "no"))}, "supervised", "warning",
        r"^0\.\d % of",
    ),
    "steps of evaluations that do not happen": (
        {"settings": {"eval_steps": 5}}, "settings", "warning",
        r"^eval_steps=5 has no effect without eval_strategy='steps'$",
    ),
    "checkpoints that are not saved": (
        {"settings": {"save_strategy": "no", "save_steps": 5, "save_total_limit": 2}}, "settings", "warning",
        r"save_steps=5 .*save_strategy='steps'; save_total_limit=2 .*'steps' or 'epoch'$",
    ),
    "answers that are not asked for": (
        {"settings": {"eval_strategy": "steps", "eval_steps": 2, "eval_max_new_tokens": 9, "num_train_epochs": 1},
         "eval_dataset": chat_dataset},
        "settings", "warning", r"^num_train_epochs=1 .*max_steps=-1; eval_max_new_tokens=9 .*with_generate=True\)$",
    ),
    "a metric that chooses nothing": (
        {"settings": {"metric_for_best_model": "perplexity", "early_stopping_threshold": 0.1}}, "settings",
        "warning", r"^metric_for_best_model='perplexity' .*; early_stopping_threshold=0.1 .* early_stopping_patience$",
    ),
    "a metric that chooses among checkpoints": (
        {"settings": {"metric_for_best_model": "perplexity", "eval_strategy": "steps", "save_strategy": "steps"},
         "eval_dataset": chat_dataset},
        "settings", "ok", r"^no setting waits for another one$",
    ),
    "padding": (
        {}, "padding", "ok",
        r"pad <\|endoftext\|> \(3\), eos <\|endoftext\|> \(3\), end of turn <\|end\|> \(.*masks go by span",
    ),
    "documents just over half a row": (
        {"dataset": lambda: token_documents([33] * 20, max_length=64)}, "packing", "warning",
        r"20 rows packed.*51.6 % full",
    ),
    "padded rows": (  # 290 tokens in 10 x 100 + 10 x 10
        {"dataset": lambda: token_documents([10] * 19 + [100]),
         "settings": {"packing": False, "per_device_train_batch_size": 10}},
        "packing", "warning", r"26.4 % full.*packing=True",
    ),
    **{
        f"longrope, {lengths}": (
            {"model": longrope_model, "dataset": lambda n=lengths: token_documents(n, max_length=64)},
            "longrope", status, text,
        )
        for lengths, status, text in (
            ([20, 30], "ok", "up to 40 tokens: the short"),
            ([50, 60], "ok", "over 40 tokens: the long"),
            ([20, 60, 30], "warning", "2 documents of up to 40 tokens train the short rotary factors, 1 longer"),
        )
    },
    "rate of full tuning": ({"settings": {"learning_rate": 2e-6}}, "learning rate", "warning", r"2e-06 is a rate for "),
    "no rate": ({"settings": {"learning_rate": 0}}, "learning rate", "warning", r"nothing will change"),
    "huge rate": ({"settings": {"learning_rate": 0.5}}, "learning rate", "warning", r"far above"),
    "all warm-up": ({"settings": {"warmup_steps": 9}}, "schedule", "warning", r"9 warm-up steps of 4: the run ends"),
    "long and unsaved": ({"settings": {"max_steps": 501}}, "saving", "warning", r"'no' in a run of 501 steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_reported(tmp_path, case):
    arguments, name, status, text = CASES[case]
    found = examine(tmp_path, **{k: make() if callable(make) else make for k, make in arguments.items()})[name]
    assert found.status == status and re.search(text, found.text), found


@pytest.mark.parametrize("packing", [True, False])
def test_a_dataset_without_documents_is_an_error_and_no_exception(tmp_path, packing):
    report = examine(tmp_path, dataset=chat_dataset().select([]), settings={"packing": packing}, try_steps=True)
    assert report["gradient flow"].text == "not tried: fix the error of 'run' first"
    assert {f.name for f in report if f.status == "error"} >= {"run", "supervised", "packing", "time"}
    assert {f.name for f in report if f.status == "ok"} >= {"targets", "layers", "precision", "memory"}


@pytest.mark.parametrize(
    ("dtype", "settings", "instructions", "text"),
    [
        (torch.bfloat16, {"fp16": True}, ("fp16",), "overflow in float16; set bf16=True"),
        (torch.float16, {"bf16": True}, ("bf16",), "lose 3 of their bits"),
        (torch.float32, {"bf16": True}, ("fp16",), "no instructions for bf16.*dtype='float32', without bf16=True"),
        (torch.float32, {"fp16": True}, ("bf16",), "no instructions for fp16.*dtype='float32', without fp16=True"),
        (torch.float32, {"fp16": True}, ("fp16",), None),
        (torch.bfloat16, {}, ("bf16",), None),
    ],
)
def test_a_precision_that_the_weights_or_the_cpu_do_not_suit_is_reported(
    tmp_path, monkeypatch, dtype, settings, instructions, text
):
    monkeypatch.setattr("phi3lora.checks.model.has_instructions", lambda name: name in instructions)
    found = examine(tmp_path, dtype_model(dtype), settings=settings)["precision"]
    assert found.status == ("ok" if text is None else "warning")
    assert re.search(text or "", found.text), found.text
    if "instructions" in found.text:
        planned_for_a_gpu = examine(tmp_path, dtype_model(dtype), settings=settings, device_memory_gib=80)
        assert planned_for_a_gpu["precision"].status == "ok"


@pytest.mark.parametrize("options", [{"overflow": "split"}, {"train_on": "all"}, {"train_on": "last"}], ids=str)
def test_split_documents_and_other_masks_have_their_ends_of_turn_and_no_empty_answers(tmp_path, options):
    words = " ".join("abcdefghij"[i % 10] for i in range(150))
    for size in range(100, 112):  # at some size, a part ends just before or after the end of turn
        chats = chats_of(*(words[: size + i] for i in range(4)), max_length=40, **options)
        report = examine(tmp_path, dataset=chats)
        assert report["empty answers"].status == "ok"
        assert "do not train" not in report["end of turn"].text


@pytest.mark.parametrize("name", TEMPLATES)
def test_documents_that_are_trained_whole_have_their_ends(tmp_path, name):
    tokenizer = make_tokenizer(name)
    for rows in (
        [{"prompt": "Hi", "completion": "yes"}] * 4,
        [{"messages": [{"role": "user", "content": "Hi", "train": False}, {"role": "assistant", "content": "yes"}]}]
        * 4,
    ):
        chats = p3.ChatDataset.load(rows, tokenizer, max_length=64, train_on="all")
        assert examine(tmp_path, dataset=chats, tokenizer=tokenizer)["end of turn"].status == "ok"


def test_trained_spans_equal_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr("phi3lora.checks.spans._CHUNK", 3)
    dataset = token_documents([7, 1, 12, 3, 9, 1, 30], seed=3)
    expected = []
    for i in range(len(dataset)):
        labels = enumerate(dataset.document(i)[1].tolist())
        for trained, group in itertools.groupby(labels, key=lambda pair: pair[1] != -100):
            span = list(group)
            expected += [(i, span[0][0], len(span), span[-1][1])] if trained else []
    found = trained_spans(dataset)
    assert list(zip(found.document, found.start, found.length, found.last_token, strict=True)) == expected
    some = trained_spans(dataset, sample=3)
    assert (some.documents, set(some.document)) == (3, {0, 3, 6})


# --- Memory, disk, time


def test_memory_counts_the_cache_of_answers_only_where_a_setting_asks_for_them(tmp_path):
    model, chats = fresh_model(), chat_dataset(8)
    context, model.config.max_position_embeddings = model.config.max_position_embeddings, 2**21
    settings = {"eval_strategy": "epoch", "eval_max_new_tokens": 2**20, "per_device_eval_batch_size": 4}

    def planned(eval_dataset=chats, compute_metrics=None, **changes):
        config = healthy_config(tmp_path, **{**settings, **changes})
        return PlannedRun(model, chats, config, eval_dataset, compute_metrics=compute_metrics)

    plain, rouge = planned(), planned(predict_with_generate=True)
    assert rouge.answer_cache_tokens == 4 * (chats.max_document_tokens + 2**20)
    assert (
        planned(predict_with_generate=True, eval_max_samples=3).answer_cache_tokens * 4 == rouge.answer_cache_tokens * 3
    )
    asked = [planned(metric_for_best_model="rougeL"), planned(compute_metrics=len), rouge]
    for run in asked:
        assert "answers: " in check_memory(run).text
        assert run.memory.peak_gib["none"] > 2 * plain.memory.peak_gib["none"]
    for run in (
        plain,
        planned(None, predict_with_generate=True),
        planned(predict_with_generate=True, eval_strategy="no"),
    ):
        assert run.answer_cache_tokens == 0
        assert "answers" not in check_memory(run).text
        assert run.memory == plain.memory
    model.config.max_position_embeddings = context  # where an answer ends
    assert planned(predict_with_generate=True).answer_cache_tokens == 4 * (context + 1)
    assert planned(predict_with_generate=True, eval_max_new_tokens=5).answer_cache_tokens == 4 * (
        chats.max_document_tokens + 5
    )


def test_memory_is_compared_with_the_card_that_is_asked_about(tmp_path):
    model = fresh_model()
    plan = PlannedRun(model, chat_dataset(), healthy_config(tmp_path)).memory
    none, full = plan.peak_gib["none"], plan.peak_gib["full"]

    def memory(gib, **changes):
        return examine(tmp_path, model, settings=changes, device_memory_gib=gib)["memory"]

    assert memory(None).status == "ok" and "no GPU here" in memory(None).text
    assert (memory(2 * none).status, memory(none).status) == ("ok", "warning")  # the second is over 92 %
    between = (none + full / 0.92) / 2
    tight = memory(between)
    assert tight.status == "error"
    assert re.search(r"does not fit; activation_checkpointing='(selective|full|offload)' fits", tight.text)
    assert {memory(between, activation_checkpointing=mode).status for mode in ("full", "auto")} == {"ok"}
    assert "smaller batches" in memory(1e-9).text
    head, *rows = tight.details[0][0].splitlines()
    assert head.split() == ["GiB", "none", "selective", "full", "offload"] and "x" in rows[0]
    assert [row[:10].strip() for row in rows[:3]] == ["as loaded", "fp8", "nf4"]
    for wrong in (0, float("nan"), float("inf"), True, "80"):
        with pytest.raises(p3.TrainingError, match=rf"device_memory_gib={wrong!r}; allowed"):
            memory(wrong)


def test_the_prediction_for_another_card_assumes_the_fused_kernels(tmp_path):
    model = dtype_model(torch.bfloat16)
    here, there = (
        PlannedRun(model, chat_dataset(), healthy_config(tmp_path), device_memory_gib=gib) for gib in (None, 80)
    )
    assert (here.memory_backend.kind, there.memory_backend.kind) == ("plain", "fused")
    assert there.memory.peak_gib["none"] < here.memory.peak_gib["none"]


def test_an_output_folder_that_cannot_be_used_is_reported_and_left_alone(tmp_path):
    kept = tmp_path / "run" / "checkpoint-3" / "file"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for folder, text in (("run", "the newest is checkpoint-3"), ("run/checkpoint-3/file/x", "to: Not a directory")):
        found = examine(tmp_path, settings={"output_dir": str(tmp_path / folder)})["output"]
        assert found.status == "error" and text in found.text
    assert examine(tmp_path, settings={"overwrite_output_dir": True})["output"].status == "ok"
    assert kept.exists()


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    each = settings.checkpoint_bytes(PlannedRun(fresh_model(), chat_dataset(), healthy_config(tmp_path)))
    for share, status in ((0.5, "error"), (1.1, "warning"), (3, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=int(share * each): SimpleNamespace(free=free))
        assert examine(tmp_path)["disk"].status == status


@pytest.mark.parametrize(
    "changes",
    [
        {"save_steps": 2},
        {"save_steps": 2, "save_total_limit": 1},
        {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
        {"save_steps": 0.5, "optim": "sgd"},
    ],
    ids=str,
)
def test_the_checkpoints_take_the_predicted_space(tmp_path, changes):
    model, chats = fresh_model(r=16), chat_dataset()
    config = healthy_config(tmp_path, **{"max_steps": 7, "save_strategy": "steps", **changes})
    planned = PlannedRun(model, chats, config)
    count, each = settings.checkpoints_at_once(planned), settings.checkpoint_bytes(planned)
    p3.train(model, chats, config)
    left = list(tmp_path.glob("checkpoint-*"))
    assert count == len(left) + (config.save_total_limit is not None)  # an old one is deleted after the new one
    largest = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in left)
    assert each == pytest.approx(largest, rel=0.25)


def test_the_time_grows_with_the_steps_and_is_unknown_without_a_trial(tmp_path):
    assert "time unknown" in examine(tmp_path)["time"].text
    for steps, text in (
        (4, r"about \d+ s for 4 steps"),
        (10**7, r"about [\d.]+ h for 10,000,000 steps, [\d,]+ tokens"),
    ):
        assert re.match(text, examine(tmp_path, settings={"max_steps": steps}, try_steps=True)["time"].text)
