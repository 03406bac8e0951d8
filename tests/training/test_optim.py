"""Schedules against transformers', parameter groups against what decays."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from conftest import adapted_model, quiet_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from phi3lora.training.optim import build_optimizer, learning_rate, parameter_groups, warmup_steps


def reference(kind, warmup, total):
    """transformers' factor of the peak learning rate, as a function of the step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    if kind == "linear":
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    elif kind == "cosine":
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    elif kind == "constant_with_warmup":
        schedule = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        schedule = transformers.get_constant_schedule(optimizer)
    return schedule.lr_lambdas[0]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@settings(max_examples=60, deadline=None)
@given(total=st.integers(1, 300), warmup=st.integers(0, 320), peak=st.floats(1e-6, 1.0))
def test_schedules_equal_transformers_step_by_step(kind, total, warmup, peak):
    config = quiet_config("unused", lr_scheduler_type=kind, learning_rate=peak, warmup_steps=warmup)
    factor = reference(kind, warmup, total)
    ours = [learning_rate(config, step, total) for step in range(total)]
    assert ours == pytest.approx([peak * factor(step) for step in range(total)], rel=1e-9, abs=1e-15)


@given(total=st.integers(1, 1000), ratio=st.floats(0.001, 0.999))
@settings(max_examples=60, deadline=None)
def test_a_share_of_warmup_is_rounded_up_under_either_name(total, ratio):
    steps = warmup_steps(quiet_config("unused", warmup_ratio=ratio), total)
    assert steps == warmup_steps(quiet_config("unused", warmup_steps=ratio), total) == math.ceil(total * ratio)


def test_warmup_steps_take_precedence_over_the_ratio():
    assert warmup_steps(quiet_config("unused", warmup_steps=7, warmup_ratio=0.5), 100) == 7
    assert warmup_steps(quiet_config("unused", warmup_steps=0.1, warmup_ratio=0.5), 100) == 10


def test_there_is_no_warmup_unless_asked_for():
    config = quiet_config("unused", learning_rate=0.5)
    assert warmup_steps(config, 100) == 0
    assert learning_rate(config, 0, 100) == 0.5


class Biased(nn.Module):
    """A trainable matrix and bias, a frozen matrix."""

    def __init__(self):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_weight_decay_is_for_trainable_matrices_alone():
    model = Biased()
    groups = {group["weight_decay"]: group["params"] for group in parameter_groups(model, 0.3)}
    assert [id(p) for p in groups[0.3]] == [id(model.matrix)]
    assert [id(p) for p in groups[0.0]] == [id(model.bias)]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adamw_8bit", "paged_adamw_32bit"])
def test_without_gradient_matrices_decay_and_biases_stay(optim):
    model = Biased()
    optimizer = build_optimizer(model, quiet_config("unused", optim=optim, learning_rate=0.1, weight_decay=0.5))
    for parameter in (model.matrix, model.bias):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.matrix.data, torch.full((3, 2), 1 - 0.1 * 0.5))
    assert torch.equal(model.bias.data, torch.ones(3))
    assert torch.equal(model.frozen.data, torch.ones(2, 2))


def test_a_lora_model_has_one_group_with_every_adapter_once():
    model = adapted_model()
    (group,) = parameter_groups(model, 0.1)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(group["params"]) == 2 * 2 * 4  # A and B, two layers, four projections


def test_adamw_gets_the_configured_betas_and_epsilon():
    config = quiet_config("unused", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, learning_rate=0.125)
    optimizer = build_optimizer(adapted_model(), config)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-5, 0.125)
    assert isinstance(build_optimizer(adapted_model(), quiet_config("unused", optim="sgd")), torch.optim.SGD)
