"""A run interrupted at step k and resumed equals the uninterrupted run bit for bit: adapters, moments, losses."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import (
    adapted_model,
    adapters_of,
    chat_dataset,
    interrupt,
    make_tokenizer,
    on,
    quiet_config,
    same_tensors,
    stop,
)

import phi3lora as p3
from phi3lora.training import checkpoint
from phi3lora.training.logging import DeferredMetrics

# 26 documents in 22 rows of 64 tokens; 2 rows x 2 a step: 6 steps an epoch, the last of fewer micro-batches
RUN = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "warmup_steps": 2,
    "lr_scheduler_type": "cosine", "weight_decay": 0.1, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4,
    "eval_strategy": "steps", "eval_steps": 5,
}  # fmt: skip
FLAVOURS = {
    "float32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"bf16": True}),
    "fp16": (torch.float32, {"fp16": True}),
    "sgd": (torch.float32, {"optim": "sgd"}),
    "lora+": (torch.float32, {"lora_plus_lr_ratio": 8.0}),
    "unpacked": (torch.float32, {"packing": False, "per_device_train_batch_size": 3}),
    "logged every 3": (torch.float32, {"logging_steps": 3, "eval_strategy": "no"}),
    "logged an epoch": (torch.float32, {"logging_strategy": "epoch", "eval_strategy": "epoch"}),
}


def train(folder, flavour="float32", callbacks=(), seed=0, dropout=0.1, r=4, dataset=None, **changes):
    """Run once, or the rest of a run; the model's adapters and the random generators depend on ``seed``."""
    dtype, settings = FLAVOURS[flavour]
    model = adapted_model(seed=seed, dtype=dtype, lora_dropout=dropout, r=r)
    torch.manual_seed(1000 + seed)
    config = quiet_config(folder, **{**RUN, **settings, **changes})
    eval_dataset = chat_dataset(5) if config.eval_strategy != "no" else None
    callbacks = [callback(model) if isinstance(callback, type) else callback for callback in callbacks]
    result = p3.train(model, dataset or chat_dataset(26), config, eval_dataset=eval_dataset, callbacks=callbacks)
    return result, adapters_of(model)


def resumed(folder, flavour="float32", **changes):
    """Run the rest as another process would: with other adapters and generators to begin with."""
    return train(folder, flavour, seed=1, **{"resume_from_checkpoint": True, **changes})


@functools.cache
def uncut(flavour="float32"):
    """``(result, adapters, moments)`` of the uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        result, adapters = train(folder, flavour)
        return result, adapters, moments(folder, result.global_step)


def moments(folder, step):
    state = torch.load(Path(folder) / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)["state"]
    return {f"{i}.{n}": torch.as_tensor(v) for i, s in state.items() for n, v in s.items() if v is not None}


def columns(lines):
    """Everything in the lines but the speed: step, epoch, loss, grad_norm, learning_rate, tokens, eval_*."""
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def metrics_file(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_equals_uncut(folder, result, adapters, flavour="float32"):
    expected, expected_adapters, expected_moments = uncut(flavour)
    assert result.global_step == expected.global_step
    assert not result.interrupted
    assert columns(result.history) == columns(expected.history)
    assert columns(metrics_file(folder)) == columns(expected.history)
    assert same_tensors(adapters, expected_adapters)
    assert same_tensors(moments(folder, result.global_step), expected_moments)
    for name in ("train_loss", "tokens"):
        assert result.metrics[name] == expected.metrics[name]


def by_sigint(state):
    os.kill(os.getpid(), signal.SIGINT)


def by_sigterm(state):
    os.kill(os.getpid(), signal.SIGTERM)


def by_crash(state):
    raise MemoryError("crash")


def test_the_run_has_what_makes_resuming_hard():
    result, _, _ = uncut()
    epochs = [line["epoch"] for line in result.history if "loss" in line]
    assert result.global_step == 12
    assert epochs == [round(step / 6, 4) for step in range(1, 13)]
    assert [line["step"] for line in result.history if "eval_loss" in line] == [5, 10, 12]
    assert len({line["loss"] for line in result.history if "loss" in line}) == 12


INTERRUPTS = {1: interrupt, 3: by_sigterm, 6: interrupt, 7: by_sigterm, 11: interrupt, 12: by_sigterm}


@pytest.mark.parametrize(
    ("flavour", "k", "how"),
    [
        *[("float32", k, how) for k, how in INTERRUPTS.items()],
        ("bf16", 6, by_sigterm),
        *[(name, 5, by_sigint) for name in FLAVOURS if name not in ("float32", "bf16")],
        ("float32", 5, stop),
        ("logged every 3", 4, stop),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_run_interrupted_at_step_k_and_resumed_equals_the_uncut_run(tmp_path, flavour, k, how):
    first, _ = train(tmp_path, flavour, [on(how, k)])
    assert (first.interrupted, first.global_step) == (how is not stop, k)
    assert (tmp_path / f"checkpoint-{k}").is_dir()
    result, adapters = resumed(tmp_path, flavour)
    assert_equals_uncut(tmp_path, result, adapters, flavour)


@pytest.mark.parametrize("hook", ["on_log", "on_evaluate", "on_save"])
def test_an_interrupt_in_any_hook_loses_nothing(tmp_path, hook):
    k = {"on_log": 2, "on_evaluate": 5, "on_save": 4}[hook]
    first, _ = train(tmp_path, callbacks=[on(interrupt, k, hook)])
    assert (first.interrupted, first.global_step) == (True, k)
    result, adapters = resumed(tmp_path)
    assert_equals_uncut(tmp_path, result, adapters)


class Answering(p3.Callback):
    """Lets the model answer at each evaluation: samples, drawn answers of a seed, and ROUGE."""

    def __init__(self, model):
        self.model, self.data, self.seen = model, chat_dataset(5), []

    def on_evaluate(self, state, metrics):
        tokenizer, few = make_tokenizer(), {"max_new_tokens": 4, "batch_size": 2}
        self.seen.append(p3.sample_answers(self.model, tokenizer, self.data, count=3, **few))
        self.seen.append(p3.generate(self.model, tokenizer, ["Hi", "Why?"], temperature=1.0, seed=3, **few))
        self.seen.append(p3.evaluate(self.model, self.data, rouge=True, tokenizer=tokenizer, max_samples=2, **few))
        assert "rougeL" in self.seen[-1]


@pytest.mark.parametrize(("flavour", "k"), [("float32", None), ("float32", 5), ("bf16", 10)])
def test_answers_at_evaluations_change_no_bit_of_a_run_cut_or_not(tmp_path, k, flavour):
    pytest.importorskip("rouge_score")
    if k is not None:  # in the step of an evaluation
        first, _ = train(tmp_path, flavour, [Answering, on(by_sigterm, k)])
        assert first.interrupted
    result, adapters = (train if k is None else resumed)(tmp_path, flavour, callbacks=[Answering])
    assert_equals_uncut(tmp_path, result, adapters, flavour)


@pytest.mark.parametrize("k", [5, 8])
def test_a_crash_between_checkpoints_repeats_the_lost_steps_exactly(tmp_path, k):
    with pytest.raises(MemoryError):
        train(tmp_path, callbacks=[on(by_crash, k)])
    assert len(metrics_file(tmp_path)) > 5
    result, adapters = resumed(tmp_path)
    assert_equals_uncut(tmp_path, result, adapters)


def test_a_run_cut_again_and_again_equals_the_uncut_run(tmp_path):
    train(tmp_path, callbacks=[on(interrupt, 1)])
    for k in (2, 6, 7):
        first, _ = train(tmp_path, callbacks=[on(interrupt, k)], seed=k, resume_from_checkpoint="auto")
        assert first.global_step == k
    result, adapters = resumed(tmp_path)
    assert_equals_uncut(tmp_path, result, adapters)


def test_lines_that_a_callback_adds_to_the_history_survive_a_resume(tmp_path):
    class Notes(p3.Callback):
        def on_step_end(self, state):
            if state.global_step == 3:
                state.history += [{"note": "half of it"}, {"step": 3, "sure": True}]
            state.should_stop = state.global_step == 4

    train(tmp_path, callbacks=[Notes()])
    result, adapters = resumed(tmp_path)
    assert [line for line in result.history if "note" in line or "sure" in line] == [
        {"note": "half of it"}, {"step": 3, "sure": True},
    ]  # fmt: skip
    assert same_tensors(adapters, uncut()[1])


def test_resuming_a_finished_run_trains_nothing_and_restores_its_adapters(tmp_path):
    settings = {"eval_strategy": "no"}
    first, adapters = train(tmp_path, **settings)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")}
    again, adapters_again = resumed(tmp_path, **settings)
    assert again.global_step == first.global_step
    assert same_tensors(adapters_again, adapters)
    assert again.history == first.history == metrics_file(tmp_path)
    assert again.metrics["train_loss"] == first.metrics["train_loss"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("checkpoint-*/*")} == files


def test_resuming_a_finished_run_with_evaluations_evaluates_no_step_twice(tmp_path):
    first, _ = train(tmp_path, eval_steps=4)
    again, _ = resumed(tmp_path, eval_steps=4)
    assert columns(again.history) == columns(first.history)
    assert again.metrics["eval_loss"] == first.metrics["eval_loss"]


def test_true_without_a_checkpoint_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(p3.CheckpointError, match=r"has no good checkpoint.*'auto'"):
        train(tmp_path / "new", resume_from_checkpoint=True)
    assert not (tmp_path / "new").exists()


def test_a_path_chooses_the_checkpoint_and_may_be_a_path_object(tmp_path):
    train(tmp_path)
    steps = []
    watch = on(lambda state: steps.append(state.global_step))
    result, adapters = train(tmp_path, seed=1, callbacks=[watch], resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert steps == [5, 6, 7, 8, 9, 10, 11, 12]
    assert_equals_uncut(tmp_path, result, adapters)


def test_a_moved_checkpoint_continues_in_another_output_dir(tmp_path):
    train(tmp_path / "old", callbacks=[on(interrupt, 6)])
    shutil.move(tmp_path / "old" / "checkpoint-6", tmp_path / "moved")
    result, adapters = resumed(tmp_path / "new", resume_from_checkpoint=str(tmp_path / "moved"))
    assert_equals_uncut(tmp_path / "new", result, adapters)


def test_the_best_checkpoint_of_a_run_that_moved_is_still_found_at_the_end(tmp_path):
    settings = {"load_best_model_at_end": True, "learning_rate": 0.0, "save_steps": 5}  # so the first is the best
    train(tmp_path / "old", callbacks=[on(interrupt, 6)], **settings)
    where = str(tmp_path / "old" / "checkpoint-6")
    result, adapters = resumed(tmp_path / "new", resume_from_checkpoint=where, **settings)
    assert Path(result.best_checkpoint).is_dir()
    p3.load_adapter(model := adapted_model(lora_dropout=0.1), Path(result.best_checkpoint) / "lora.safetensors")
    assert same_tensors(adapters, adapters_of(model))


OTHER_RUNS = {
    "learning_rate": ({"learning_rate": 0.5}, r"learning_rate 0.01 then, 0.5 now"),
    "data_seed": ({"data_seed": 7}, r"data_seed None then, 7 now"),
    "optimizer": ({"optim": "sgd"}, r"optim 'adamw_torch' then, 'sgd' now"),
    "precision": ({"bf16": True}, r"bf16 False then, True now"),
    "packing": ({"packing": False}, r"packing True then, False now"),
    "row length": ({"max_length": 80}, r"row_length of the data 64 then, 80 now"),
    "dropout": ({"dropout": 0.2}, r"lora_dropout 0.1 then, 0.2 now"),
    "r": ({"r": 2}, r"adapters of 8 layers, .*'r': 4.* then, .*'r': 2.* now"),
    "base": ({"dtype": torch.bfloat16}, r"base weights torch.float32 then, torch.bfloat16 now"),
    "lora+": ({"lora_plus_lr_ratio": 16.0}, r"lora_plus_lr_ratio None then, 16.0 now"),
    "data": ({"dataset": chat_dataset(20)}, r"documents of the data 26 then, 20 now"),
    "masks": ({"dataset": chat_dataset(26, train_on="last")}, r"fingerprint of the data '\w+' then, '\w+' now"),
}


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    train(folder, callbacks=[on(interrupt, 2)])
    return folder


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_another_runs_checkpoint_is_refused_and_the_difference_is_named(cut_run, what):
    changes, message = OTHER_RUNS[what]
    changes = dict(changes)
    lora = {"lora_dropout": changes.pop("dropout", 0.1), "r": changes.pop("r", 4)}
    model = adapted_model(dtype=changes.pop("dtype", torch.float32), **lora)
    dataset = changes.pop("dataset", None) or chat_dataset(26)
    settings = {**RUN, **changes, "resume_from_checkpoint": True}
    before, files = adapters_of(model), sorted(cut_run.rglob("*"))
    with pytest.raises(p3.CheckpointError, match=message) as caught:
        p3.train(model, dataset, quiet_config(cut_run, **settings), eval_dataset=chat_dataset(5))
    assert "another run" in str(caught.value)
    assert same_tensors(adapters_of(model), before)
    assert sorted(cut_run.rglob("*")) == files


@pytest.mark.parametrize("what", ["learning_rate", "dropout", "data", "optimizer", "r"])
def test_resume_with_changes_logs_the_differences_and_continues(cut_run, tmp_path, caplog, what):
    changes, message = OTHER_RUNS[what]
    folder = shutil.copytree(cut_run, tmp_path / "run")
    if what in ("optimizer", "r"):  # one optimizer cannot use another's state
        with pytest.raises(p3.CheckpointError, match=message):
            resumed(folder, resume_with_changes=True, **changes)
        return
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result, _ = resumed(folder, resume_with_changes=True, **changes)
    assert result.global_step > 2 and not result.interrupted
    (record,) = [r for r in caplog.records if "belongs to another run" in r.message]
    assert re.search(message, record.message)


def test_another_version_is_a_change_and_another_build_is_not(cut_run, tmp_path, monkeypatch):
    folder = shutil.copytree(cut_run, tmp_path / "run")
    here = checkpoint._versions()
    monkeypatch.setattr(checkpoint, "_versions", lambda: {**here, "torch": here["torch"].partition("+")[0] + "+cu999"})
    resumed(shutil.copytree(cut_run, tmp_path / "build"))
    monkeypatch.setattr(checkpoint, "_versions", lambda: {**here, "transformers": "9.9.9"})
    with pytest.raises(p3.CheckpointError, match=r"transformers .* then, 9\.9\.9 now.*resume_with_changes=True"):
        resumed(folder)
    resumed(folder, resume_with_changes=True)


def test_the_number_of_steps_may_change_and_a_longer_run_equals_one_that_was_long_from_the_start(tmp_path):
    settings = {"lr_scheduler_type": "constant", "eval_strategy": "no"}
    straight, adapters = train(tmp_path / "straight", max_steps=8, **settings)
    train(tmp_path / "longer", max_steps=3, **settings)
    longer, longer_adapters = resumed(tmp_path / "longer", max_steps=8, **settings)
    assert same_tensors(adapters, longer_adapters)
    assert columns(longer.history) == columns(straight.history)


def test_settings_of_evaluation_saving_and_logging_may_change(tmp_path):
    train(tmp_path, callbacks=[on(interrupt, 4)])
    changes = {"eval_strategy": "no", "save_strategy": "epoch", "logging_steps": 5, "report_to": "tensorboard"}
    result, adapters = resumed(tmp_path, **changes, activation_checkpointing="full")
    assert result.global_step == 12
    assert same_tensors(adapters, uncut()[1])


def test_metrics_that_arrive_late_are_in_the_checkpoint_and_the_history(tmp_path, monkeypatch):
    real = DeferredMetrics.ready  # as on a busy GPU, where values are ready only when waited for
    monkeypatch.setattr(DeferredMetrics, "ready", lambda metrics, wait=False: real(metrics, wait) if wait else [])
    with pytest.raises(MemoryError):
        train(tmp_path, callbacks=[on(by_crash, 7)])
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["state"]
    assert [line["step"] for line in state["history"]] == [1, 2, 3, 4]
    result, adapters = resumed(tmp_path)
    assert_equals_uncut(tmp_path, result, adapters)


@pytest.mark.gpu
def test_a_cpu_checkpoint_continues_on_a_gpu_to_rounding(tmp_path):
    def run(folder, device, **changes):
        model = adapted_model().to(device)  # float32: no rounding but of the order of sums
        settings = {**RUN, "eval_strategy": "no", "max_steps": 8, **changes}
        p3.train(model, chat_dataset(26), quiet_config(folder, **settings))
        return {name: tensor.cpu() for name, tensor in adapters_of(model).items()}

    expected = run(tmp_path / "run", "cpu")
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    found = run(tmp_path / "run", "cuda", resume_from_checkpoint=True)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-4)
