"""Schedules against transformers', parameter groups against what decays."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import phi3lora as p3
from phi3lora.training.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate, warmup_steps


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


# --- LoRA+


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_lora_plus_is_an_optimizer_with_two_groups_made_by_hand_bit_for_bit(tmp_path, optim):
    dataset, trained = chat_dataset(16), adapted_model(lora_dropout=0.1)
    settings = {"optim": optim, "max_grad_norm": 0, "num_train_epochs": 2, "seed": 3, "weight_decay": 0.1}
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "learning_rate": 0.002}
    config = quiet_config(tmp_path, lora_plus_lr_ratio=16.0, **settings, **schedule)
    result = p3.train(trained, dataset, config)

    model = adapted_model(lora_dropout=0.1).train()
    torch.manual_seed(3)
    matrices = {kind: [p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("lora_A", "lora_B")}
    groups = [{"params": matrices["lora_A"], "lr": 0.002}, {"params": matrices["lora_B"], "lr": 0.032}]
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = kind(groups, weight_decay=0.1, fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, result.global_step)
    rates = []
    for epoch in range(2):
        for batch in p3.batches(dataset, batch_size=4, seed=3, epoch=epoch):
            loss_sum, count = p3.causal_lm_loss(model, batch)
            (loss_sum / count).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert [line["learning_rate"] for line in result.history] == pytest.approx(rates)
    for name, value in adapters_of(model).items():
        assert torch.equal(adapters_of(trained)[name], value), name
    plain = adapted_model(lora_dropout=0.1)
    p3.train(plain, dataset, quiet_config(tmp_path / "plain", **settings, learning_rate=0.002))
    assert not same_tensors(adapters_of(plain), adapters_of(trained))


def test_lora_plus_has_pefts_groups():
    """Rates and decay of every parameter, an adapted embedding and trained biases included."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"words": nn.Embedding(9, 4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["words", "up"], bias="lora_only"))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    ours = base()
    p3.inject_lora(ours, p3.LoraConfig(r=2, target_modules=["words", "up"], bias="lora_only"))
    config = quiet_config("unused", learning_rate=1e-3, lora_plus_lr_ratio=8.0, weight_decay=0.1)

    def table(model, optimizer):
        names = {id(p): n for n, p in model.named_parameters()}
        found = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names[id(p)].removeprefix("base_model.model.").replace("embedding_", "").replace(".default", "")
                name = name.removesuffix(".weight").replace("base_layer.", "")
                found[name] = (pytest.approx(group["lr"]), group["weight_decay"])
        return found

    assert table(ours, build_optimizer(ours, config)) == table(theirs, optimizer)


def test_the_schedule_scales_every_group_alike():
    model = adapted_model()
    optimizer = build_optimizer(model, quiet_config("unused", learning_rate=1e-3, lora_plus_lr_ratio=16))
    set_learning_rate(optimizer, 5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 8e-3]


def test_without_lora_plus_the_groups_have_nothing_new():
    (group,) = build_optimizer(adapted_model(), quiet_config("unused")).param_groups
    assert "lr_factor" not in group
