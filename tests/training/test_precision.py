"""Precision of a run, and float16 with its gradient scaler, on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors, stop_at, tiny_model

import phi3lora as p3
from phi3lora.training.step import has_instructions, resolve_precision

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize(
    ("given", "model_dtype", "expected"),
    [
        ({}, torch.float32, "fp32"),
        ({}, torch.bfloat16, "bf16"),
        ({}, torch.float16, "fp16"),
        ({}, torch.float64, "fp32"),
        ({"bf16": True}, torch.float32, "bf16"),
        ({"bf16": True}, torch.float16, "bf16"),
        ({"fp16": True}, torch.float32, "fp16"),
        ({"fp16": True}, torch.bfloat16, "fp16"),
    ],
)
def test_precision_is_the_configured_one_or_the_models(given, model_dtype, expected):
    precision = resolve_precision(quiet_config("unused", **given), tiny_model().to(model_dtype), CPU)
    assert precision.name == expected
    assert precision.scaler.is_enabled() == (expected == "fp16")
    with precision.autocast():
        assert torch.is_autocast_enabled("cpu") == (expected != "fp32")
        if expected != "fp32":
            assert torch.get_autocast_dtype("cpu") == DTYPES[expected]
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_on_a_gpu_without_it_is_an_error_that_names_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Old GPU")
    with pytest.raises(p3.TrainingError, match=r"Old GPU has no bfloat16; set fp16=True"):
        resolve_precision(quiet_config("unused", bf16=True), tiny_model(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [({"bf16": True}, torch.float32), ({"fp16": True}, torch.bfloat16), ({}, torch.float16), ({}, torch.float32)],
)
def test_adapters_and_moments_stay_float32_and_the_loss_falls_in_every_precision(tmp_path, settings, dtype):
    model = adapted_model(dtype=dtype)
    result = p3.train(model, chat_dataset(8), quiet_config(tmp_path, max_steps=8, save_strategy="steps", **settings))
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < losses[0] - 0.2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.lm_head.weight.dtype == dtype
    moments = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
    assert {m[name].dtype for m in moments.values() for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("settings", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_half_precision_steps_are_float32s_to_half_precision(tmp_path, settings):
    """Loss, gradient norm and clipped update: the scaler's factor is removed before they are used."""

    class Stop(p3.Callback):
        def on_step_end(self, state):
            state.should_stop = state.run_loss_count > 0  # the first steps in float16 overflow and are skipped

    def run(name, **settings):
        model = adapted_model()
        start = adapters_of(model)
        one_batch = {"packing": False, "per_device_train_batch_size": 8, "max_steps": 20}
        constant = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05}
        config = quiet_config(tmp_path / name, **one_batch, **constant, **settings)
        line = p3.train(model, chat_dataset(8), config, callbacks=[Stop()]).history[-1]
        return line, torch.cat([(v - start[n]).flatten() for n, v in adapters_of(model).items()])

    (line, update), (half_line, half_update) = run("full"), run("half", **settings)
    assert line["grad_norm"] > 0.1
    for name in ("loss", "grad_norm"):
        assert half_line[name] == pytest.approx(line[name], rel=0.02)
    assert (half_update - update).norm() < 0.05 * update.norm()


def overflowing_model():
    """A model whose float16 gradients overflow at the scaler's first scales (2**16, ...) and not at smaller ones."""
    return adapted_model(head_scale=2000.0, lora_dropout=0.1)


def scale_in(checkpoint):
    return torch.load(checkpoint / "scheduler.pt", weights_only=True)["scaler"]["scale"]


def test_a_float16_overflow_lowers_the_scale_is_no_nonfinite_step_and_updates_nothing(tmp_path):
    model = overflowing_model()
    before, seen = adapters_of(model), []

    class Watch(p3.Callback):
        def on_step_end(self, state):
            seen.append((state.nonfinite_total, same_tensors(adapters_of(model), before)))

    settings = {"fp16": True, "max_steps": 12, "save_strategy": "steps", "save_steps": 1, "max_nonfinite_steps": 1}
    settings["lr_scheduler_type"] = "linear"
    result = p3.train(model, chat_dataset(8), quiet_config(tmp_path, **settings), callbacks=[Watch()])
    scales = [scale_in(tmp_path / f"checkpoint-{step}") for step in range(1, 13)]
    overflows = sum(1 for old, new in zip([2.0**16, *scales], scales, strict=False) if new < old)
    assert 1 <= overflows < 11
    assert [same for _, same in seen[:overflows]] == [True] * overflows  # nothing was updated
    assert not seen[overflows][1]
    assert {total for total, _ in seen} == {0}
    assert sum("loss" in line for line in result.history) == 12 - overflows


def test_the_scalers_state_survives_a_resume(tmp_path):
    def settings(folder):
        return quiet_config(folder, fp16=True, max_steps=9, save_strategy="steps", resume_from_checkpoint="auto")

    straight, resumed = overflowing_model(), overflowing_model()
    p3.train(straight, chat_dataset(), settings(tmp_path / "a"))
    p3.train(resumed, chat_dataset(), settings(tmp_path / "b"), callbacks=[stop_at(4)])
    assert scale_in(tmp_path / "b" / "checkpoint-4") < 2**16  # else the scale would say nothing
    again = overflowing_model()
    p3.train(again, chat_dataset(), settings(tmp_path / "b"))
    assert same_tensors(adapters_of(again), adapters_of(straight))
    states = [torch.load(tmp_path / run / "checkpoint-9" / "scheduler.pt", weights_only=True) for run in "ab"]
    assert states[0]["scaler"] == states[1]["scaler"]


def test_float16_gradients_that_never_become_finite_stop_the_run_too(tmp_path):
    """The loss is finite, so each step looks like an overflow; at a scale far below 1 it cannot be one."""
    model = adapted_model()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(p3.TrainingError, match="in a row"):
        p3.train(model, chat_dataset(8), quiet_config(tmp_path, fp16=True, max_steps=60, max_nonfinite_steps=5))


@pytest.mark.parametrize("settings", [{"bf16": True}, {}], ids=["bf16", "fp32"])
def test_evaluations_run_in_the_precision_of_the_training(tmp_path, settings):
    model = adapted_model()
    config = quiet_config(tmp_path, max_steps=1, eval_strategy="epoch", **settings)
    result = p3.train(model, chat_dataset(8), config, eval_dataset=chat_dataset(8))
    full = p3.evaluate(model, chat_dataset(8))["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = p3.evaluate(model, chat_dataset(8))["loss"]
    assert half != full
    assert result.metrics["eval_loss"] == (half if settings else full)


@pytest.mark.parametrize(
    ("capability", "known", "quick"),
    [
        ("AVX2", {"avx2": True, "avx512_f": False}, set()),
        ("AVX512", {"avx512_f": True}, {"bf16"}),
        ("AVX512", {"avx512_f": True, "avx512_fp16": True}, {"bf16", "fp16"}),
        ("AVX2", {"avx_ne_convert": True}, {"bf16", "fp16"}),
        ("DEFAULT", {"neon": True, "bf16": True}, {"bf16"}),
        ("DEFAULT", {"neon": True, "fp16_arith": True}, {"fp16"}),
        ("AVX2", None, set()),
        ("AVX512", None, {"bf16"}),
    ],
)
def test_has_instructions_knows_what_a_cpu_computes_quickly(monkeypatch, capability, known, quick):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    if known is None:  # a torch without it
        monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    else:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
    assert {name for name in ("bf16", "fp16") if has_instructions(name)} == quick
