"""Runs of several processes that split the base: the steps, metrics and checkpoints of one process with all of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import (
    adapted_model,
    adapters_of,
    chat_dataset,
    make_tokenizer,
    quiet_config,
    save_checkpoint,
    tiny_model,
)
from processes import in_processes
from test_distributed import DATA, HELD_OUT, After, assert_close, difference, plain_python, rank, stop  # noqa: F401
from torch import nn

import phi3lora as p3
from phi3lora.model.sharding import sharded_base
from phi3lora.training.loop import Callback


class Look(Callback):
    """Counts the frozen weights that are whole before the first step."""

    def __init__(self, model) -> None:
        self.model, self.whole = model, -1

    def on_train_begin(self, state) -> None:
        weights = [m.weight for m in self.model.model.layers.modules() if isinstance(m, nn.Linear)]
        self.whole = sum(w.untyped_storage().nbytes() > 0 for w in weights)


def run(folder, *callbacks, model=None, **settings):
    """Train in this process; return the adapters, the result, the weights that were whole, and a loss after the run."""
    model = model or adapted_model()
    sizes = {"max_steps": 20, "per_device_train_batch_size": 1, "eval_dataset": None}
    settings = {**sizes, **settings}
    eval_dataset, look = settings.pop("eval_dataset"), Look(model)
    result = p3.train(model, DATA, quiet_config(folder, **settings), eval_dataset=eval_dataset,
                      callbacks=[look, *callbacks])  # fmt: skip
    return adapters_of(model), result, look.whole, p3.evaluate(model, HELD_OUT)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_split_base_gives_the_same_adapters_and_metrics(tmp_path, mode):
    """A step has 4 micro-batches, the last of an epoch 3: with 4 processes one of them then has none."""
    settings = {"eval_dataset": HELD_OUT, "eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 2}
    settings["activation_checkpointing"] = mode
    expected, alone, whole, after = run(tmp_path / "1", gradient_accumulation_steps=4, parallel="fsdp", **settings)
    assert whole == 8  # one process keeps them all
    for processes in (2, 4):
        settings.update(gradient_accumulation_steps=4 // processes, parallel="fsdp")
        for adapters, result, whole, last in in_processes(
            processes, partial(run, tmp_path / str(processes), **settings)
        ):
            assert difference(adapters, expected) < 1e-6
            assert_close(result.history, alone.history)
            assert whole == 0
            assert last == pytest.approx(after, rel=1e-5)


def test_a_run_goes_from_a_split_base_to_whole_ones_and_to_one_process(tmp_path):
    def part(step, accumulation, **more):
        callbacks = [] if step is None else [After(step, stop)]
        return run(
            tmp_path / "run", *callbacks, save_strategy="steps", gradient_accumulation_steps=accumulation, **more
        )

    expected, alone, *_ = run(tmp_path / "uncut", gradient_accumulation_steps=4)
    in_processes(2, partial(part, 4, 2, parallel="fsdp"))
    in_processes(4, partial(part, 8, 1, parallel="ddp", resume_from_checkpoint=True))
    adapters, result, *_ = part(None, 4, resume_from_checkpoint=True)
    assert difference(adapters, expected) < 1e-6
    assert_close(result.history, alone.history)


def test_a_model_that_is_loaded_split_stays_split(tmp_path):
    folder = save_checkpoint(tiny_model(), tmp_path / "model")

    def loaded(**options):
        model, _ = p3.load_model(folder, dtype="float32", device="cpu", **options)
        torch.manual_seed(0)
        p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
        return model

    def work():
        model = loaded(parallel="fsdp")
        with pytest.raises(p3.TrainingError, match="parallel='ddp', but the model was loaded with parallel='fsdp'"):
            run(tmp_path / "refused", model=model, parallel="ddp")
        found = run(tmp_path / "split", model=model, gradient_accumulation_steps=2)
        assert sharded_base(model) is not None
        return found

    expected, _, _, after = run(tmp_path / "whole", model=loaded(), gradient_accumulation_steps=4)
    for adapters, _, whole, last in in_processes(2, work):
        assert difference(adapters, expected) < 1e-6
        assert whole <= 4  # the layer that the checkpoint's facts looked at last
        assert last == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("call", ["generate", "evaluate"])
def test_a_call_on_one_process_alone_is_refused_with_what_the_others_must_do(tmp_path, call):
    folder = save_checkpoint(tiny_model(), tmp_path / "model")

    def work():
        model, _ = p3.load_model(folder, dtype="float32", device="cpu", parallel="fsdp")
        if rank() == 1:
            return ""
        with pytest.raises(p3.ModelError) as error:
            p3.generate(model, make_tokenizer(), "Hi") if call == "generate" else p3.evaluate(model, HELD_OUT)
        return str(error.value)

    message, _ = in_processes(2, work)
    assert message.startswith("rank 0 of 2 lost contact with the other processes while it gathered the weights of")
    assert "every process must call generate, evaluate or the model equally often, not rank 0 alone" in message


class OtherWeight(nn.Parameter):
    """A parameter with a layout of its own."""


@pytest.mark.parametrize(
    ("parallel", "status", "text"),
    [
        ("fsdp", "warning", "not tried: the base is split over 2 processes, and only one of them checks the run"),
        (None, "ok", "every adapter moved in 2 steps"),
    ],
)
def test_doctor_tries_no_step_of_a_model_of_which_it_has_a_part(tmp_path, parallel, status, text):
    folder = save_checkpoint(tiny_model(), tmp_path / "model")

    def work():
        model, _ = p3.load_model(folder, dtype="float32", device="cpu", parallel=parallel)
        p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
        report = p3.doctor(model, make_tokenizer(), DATA, quiet_config(tmp_path / "run", parallel="fsdp"))
        return [(finding.name, finding.status, finding.text) for finding in report.findings]

    findings, nothing = in_processes(2, work)
    assert nothing == [] and "error" not in {status for _, status, _ in findings}
    (flow,) = (finding for finding in findings if finding[0] == "gradient flow")
    assert flow[1] == status and flow[2].startswith(text)


def test_what_cannot_be_split_is_refused_before_any_file_is_written(tmp_path):
    def work():
        with pytest.raises(p3.TrainingError, match="compile=True with parallel='fsdp'; allowed: None, False"):
            run(tmp_path / "run", parallel="fsdp", compile=True)
        model = adapted_model()
        projection = model.model.layers[1].mlp.down_proj
        projection.weight = OtherWeight(projection.weight.detach(), requires_grad=False)
        with pytest.raises(p3.ModelError, match=r"mlp\.down_proj\.weight is a OtherWeight, which cannot be split"):
            run(tmp_path / "run", model=model, parallel="fsdp")

    in_processes(2, work)
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_the_model_says_that_its_weights_are_gone(tmp_path):
    def work():
        model = adapted_model()
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", After(2, lambda state: 1 / 0), model=model, parallel="fsdp")
        with pytest.raises(p3.ModelError, match=r"split over 2 processes.*ZeroDivisionError; load the model again"):
            p3.evaluate(model, chat_dataset(4))

    in_processes(2, work)
