"""A run too small to learn from is named, before and after it; the bound holds for what AdamW does."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.lora.inject import lora_layers
from phi3lora.training import learning
from phi3lora.training.checkpoint import TrainingState
from phi3lora.training.learning import is_flat, learned_nothing, reach, too_small


def fresh(**lora):
    """Return the demo's model with adapters that do nothing yet."""
    model = p3.demo.load()[0]
    p3.inject_lora(model, p3.LoraConfig(**lora))
    return model


@pytest.mark.parametrize(
    ("steps", "settings", "named"),
    [
        (6, {"learning_rate": 5e-5}, True),
        (3, {"learning_rate": 5e-5, "lr_scheduler_type": "constant"}, True),
        (1, {}, True),
        (6, {"learning_rate": 5e-5, "lora_plus_lr_ratio": 16}, False),
        (60, {}, False),
        (70, {"learning_rate": 1e-3}, False),
        (300, {"learning_rate": 5e-5}, False),
        (6, {"learning_rate": 1e-3}, False),
        (6, {"learning_rate": 5e-5, "optim": "sgd"}, False),
    ],
)
def test_six_steps_at_5e_5_are_named_and_a_normal_run_is_not(steps, settings, named):
    config = p3.TrainingConfig("unused", max_steps=steps, **settings)
    found = too_small(fresh(), config, steps)
    assert (found is not None) == named
    if named:
        assert f"{steps} step" in found and f"at up to {config.learning_rate:g}" in found and "Raise" in found


@pytest.mark.parametrize("lora", [{}, {"r": 4}, {"r": 16, "use_rslora": True}, {"r": 8, "lora_alpha": 8}])
def test_the_reach_is_a_bound_on_what_a_real_run_does_to_a_layers_output(tmp_path, lora):
    model, _, chats, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(**lora))
    config = quiet_config(tmp_path, max_steps=5, learning_rate=2e-4)
    p3.train(model, chats, config)
    bound = reach(model, config, 5)
    rates = [1e-4 * 2 * 0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    scale = p3.LoraConfig(**lora).scaling * p3.LoraConfig(**lora).r
    assert bound == pytest.approx(scale * sum(rates) / math.sqrt(3))
    for layer in lora_layers(model).values():
        assert layer.lora_B.abs().max() <= 1.01 * sum(rates), "AdamW's steps are about the learning rate"
        x = torch.randn(64, layer.in_features).sign()
        change = layer(x) - torch.nn.functional.linear(x, layer.base_layer().weight)
        assert 0 < change.square().mean().sqrt() <= bound


def test_the_reach_of_a_long_run_adds_up_a_part_of_its_rates(monkeypatch):
    asked = []
    monkeypatch.setattr(learning, "schedule", lambda config, total: lambda step: asked.append(step) or 1e-4)
    model, config = fresh(), p3.TrainingConfig("unused")
    assert reach(model, config, 10**7) == pytest.approx(1000 * reach(model, config, 10**4))
    assert len(asked) == 2 * 10**4


def state_of(losses, first=None):
    history = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    return TrainingState(len(losses), len(losses), history=history, first_loss=losses[0] if first is None else first)


@pytest.mark.parametrize("losses", [[5.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.8], [2.5] + [1.0] * 39])
def test_a_loss_that_fell_is_not_flat_however_early(losses):
    noise = random.Random(0)
    assert not is_flat([loss + 0.05 * noise.gauss(0, 1) for loss in losses])
    assert not is_flat(losses)


def test_a_constant_loss_is_flat_and_too_few_lines_cannot_tell():
    assert is_flat([1.0] * 8) and not is_flat([1.0] * 7)


@pytest.mark.parametrize("slope", [0.0, 0.02])
def test_noise_alone_is_flat_and_a_loss_that_rises_too(slope):
    noise = random.Random(1)
    assert is_flat([1.5 + slope * i + 0.1 * noise.gauss(0, 1) for i in range(40)])
    text = learned_nothing(
        fresh(), p3.TrainingConfig("x"), state_of([1.5 + 0.1 * noise.gauss(0, 1) for _ in range(60)])
    )
    assert "did not fall by more than its noise" in text


def test_the_end_of_a_run_that_was_too_small_says_so_with_its_losses(tmp_path, capsys):
    model, tokenizer, chats, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig())
    settings = {"max_steps": 6, "learning_rate": 5e-5, "logging_steps": 10, "log_level": "warning"}
    result = p3.train(model, chats.select(range(60)), quiet_config(tmp_path, **settings), tokenizer=tokenizer)
    lines = capsys.readouterr().out.splitlines()
    before, after = [line for line in lines if "6 steps at up to 5e-05" in line]
    assert before.startswith("warning  amount") and after.startswith("warning  run")
    assert f"{result.history[-1]['loss']:.4g} at the end" in after and "loss 5." in after


def test_a_normal_run_says_nothing(tmp_path, capsys):
    model, tokenizer, chats, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig())
    config = quiet_config(tmp_path, max_steps=12, learning_rate=1e-3, log_level="warning")
    p3.train(model, chats, config, tokenizer=tokenizer)
    assert capsys.readouterr().out == ""


def test_the_first_steps_loss_is_kept_over_a_resume(tmp_path):
    states = []

    class Look(p3.Callback):
        def on_train_end(self, state):
            states.append(state)

    for steps in (2, 4):
        settings = {"max_steps": steps, "save_strategy": "steps", "resume_from_checkpoint": "auto"}
        config = quiet_config(tmp_path, **settings)
        result = p3.train(adapted_model(), chat_dataset(), config, callbacks=[Look()])
    assert states[0].first_loss == states[1].first_loss == result.history[0]["loss"]
