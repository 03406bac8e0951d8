"""Schedules against transformers', parameter groups against what decays."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors, stop_at
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import phi3lora as p3
from phi3lora.errors import install_hint
from phi3lora.training.optim import (
    build_optimizer,
    check_optimizer_state,
    convert_optimizer_state,
    optimizer_bytes,
    parameter_groups,
    schedule,
    set_learning_rate,
    warmup_steps,
)

FORMULAS = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant_with_warmup": lambda progress: 1.0,
}
"""Factor of the peak after the warm-up, over the share of the remaining steps that is done."""


@pytest.mark.parametrize("kind", FORMULAS)
@settings(max_examples=60)
@given(total=st.integers(1, 300), warmup=st.integers(0, 320), peak=st.floats(1e-6, 1.0))
def test_schedules_are_their_formulas(kind, total, warmup, peak):
    rate = schedule(quiet_config("unused", lr_scheduler_type=kind, learning_rate=peak, warmup_steps=warmup), total)
    for step in range(total):
        factor = step / warmup if step < warmup else FORMULAS[kind]((step - warmup) / max(1, total - warmup))
        assert rate(step) == pytest.approx(peak * factor, rel=1e-12, abs=1.2e-16)


SCHEDULES = {
    "linear": {}, "cosine": {}, "constant": {}, "constant_with_warmup": {}, "polynomial": {"power": 2.0},
    "inverse_sqrt": {"timescale": 5}, "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr": 1e-4}, "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 7, "decay_type": "1-sqrt"},
}  # fmt: skip


def schedule_config(kind, **given):
    return quiet_config("unused", **{"lr_scheduler_type": kind, "learning_rate": 0.002, "warmup_steps": 4, **given})


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_schedule_is_transformers_scheduler_step_by_step_in_any_order(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.002)
    theirs = transformers.get_scheduler(kind, optimizer, 4, 30, SCHEDULES[kind])
    expected = []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    rate = schedule(schedule_config(kind, lr_scheduler_kwargs=SCHEDULES[kind]), 30)
    assert [rate(step) for step in range(30)] == expected
    assert [rate(step) for step in reversed(range(30))] == expected[::-1]
    assert len(set(expected)) > 1 or kind == "constant"


def test_the_default_schedule_loads_no_library_that_it_does_not_need():
    """transformers' schedules import peft and bitsandbytes where these are installed, which takes seconds."""
    code = "import sys; from phi3lora.training.optim import *; schedule(TrainingConfig('x'), 9)(1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers.optimization", "peft", "bitsandbytes"} & set(done.stdout.split())


def test_a_stable_phase_of_ones_own_length_gives_no_warning():
    arguments = {"num_decay_steps": 5, "num_stable_steps": 3}
    rate = schedule(schedule_config("warmup_stable_decay", lr_scheduler_kwargs=arguments), 30)
    assert [rate(step) == 0.002 for step in range(30)] == [4 <= step <= 7 for step in range(30)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_rate_of_zero_stays_zero(kind):
    rate = schedule(schedule_config(kind, learning_rate=0, lr_scheduler_kwargs=SCHEDULES[kind]), 30)
    assert {rate(step) for step in range(30)} == {0.0}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("cosine", {"min_lr": 1e-5}, "min_lr is not known; allowed: num_cycles"),
        ("constant", {"num_cycles": 2}, "num_cycles is not known; allowed: no arguments"),
        ("warmup_stable_decay", None, r"num_decay_steps is missing; allowed: num_decay_steps \(required\), num_stable"),
        ("cosine_with_min_lr", None, "allowed: num_cycles, min_lr, min_lr_rate"),
        ("polynomial", {"lr_end": 1.0}, "lr_end .* must be smaller than initial lr"),
        ("polynomial", {"power": "two"}, "power='two'|unsupported operand"),
        ("linear", {"optimizer": 1}, "optimizer is not known"),
        ("polynomial", {"power": None}, "unsupported operand"),
        ("inverse_sqrt", {"timescale": 0}, "division by zero"),
        ("inverse_sqrt", {"timescale": -5}, "allowed: timescale"),
        ("cosine_with_restarts", {"num_cycles": None}, "NoneType"),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_arguments_that_a_schedule_does_not_take_are_refused_before_anything_is_written(
    tmp_path, kind, arguments, message, warmup_steps
):
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": arguments, "warmup_steps": warmup_steps}
    config = quiet_config(tmp_path / "run", max_steps=20, **settings)
    with pytest.raises(p3.TrainingError, match=message) as caught:
        p3.train(adapted_model(), chat_dataset(), config)
    assert "\n" not in str(caught.value) and f"lr_scheduler_type={kind!r}" in str(caught.value)
    assert not (tmp_path / "run").exists()


@given(total=st.integers(1, 1000), ratio=st.floats(0.001, 0.999))
@settings(max_examples=60)
def test_a_share_of_warmup_is_rounded_up_under_either_name(total, ratio):
    steps = warmup_steps(quiet_config("unused", warmup_ratio=ratio), total)
    assert steps == warmup_steps(quiet_config("unused", warmup_steps=ratio), total) == math.ceil(total * ratio)


def test_warmup_steps_take_precedence_over_the_ratio():
    assert warmup_steps(quiet_config("unused", warmup_steps=7, warmup_ratio=0.5), 100) == 7
    assert warmup_steps(quiet_config("unused", warmup_steps=0.1, warmup_ratio=0.5), 100) == 10
    assert warmup_steps(quiet_config("unused", warmup_steps=7, lr_scheduler_type="constant"), 100) == 0


def test_the_default_warmup_is_5_percent_and_spends_no_step_of_a_short_run():
    assert [warmup_steps(quiet_config("unused"), total) for total in (1, 19, 20, 100, 999)] == [0, 0, 1, 5, 49]
    for none in ({"warmup_steps": 0}, {"warmup_ratio": 0}, {"warmup_steps": 0, "warmup_ratio": 0.0}):
        assert warmup_steps(quiet_config("unused", **none), 1000) == 0
    changed = dataclasses.replace(quiet_config("unused"), warmup_steps=0)
    assert warmup_steps(changed, 1000) == 0
    assert warmup_steps(dataclasses.replace(changed, warmup_ratio=0.1), 1000) == 100


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
    (group,) = parameter_groups(adapted_model(), 0.1)
    assert len({id(p) for p in group["params"]}) == 2 * 2 * 4  # A and B, two layers, four projections


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


ADAMW = ["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


@pytest.mark.parametrize("optim", ADAMW)
def test_adamw_gets_the_configured_settings(optim, caplog):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "learning_rate": 0.125}
    optimizer = build_optimizer(adapted_model(), quiet_config("unused", optim=optim, weight_decay=0.25, **settings))
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.125, 0.25)
    assert type(optimizer).__name__ == ("AdamW8bit" if "8bit" in optim else "AdamW")
    used = "8-bit AdamW without pages" if "8bit" in optim else "torch's AdamW"
    expected = [f"paged AdamW needs a CUDA GPU: using {used}"] if optim.startswith("paged") else []
    assert caplog.messages == expected


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_one_line_says_what_to_install(optim, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(p3.Phi3LoRAError) as caught:
        build_optimizer(adapted_model(), quiet_config("unused", optim=optim))
    assert str(caught.value) == f"optim={optim!r} needs bitsandbytes: {install_hint('qlora')}"


def test_paged_32_bit_adamw_on_the_cpu_is_torchs_and_needs_no_bitsandbytes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    trained = []
    for optim in ("paged_adamw_32bit", "adamw_torch"):
        model = adapted_model()
        p3.train(model, chat_dataset(), quiet_config(tmp_path / optim, optim=optim, max_steps=3, weight_decay=0.1))
        trained.append(adapters_of(model))
    assert same_tensors(*trained)


def updated(optimizer):
    """The optimizer after one step with gradients of 1."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_optimizer_bytes_are_those_that_the_optimizers_hold():
    pytest.importorskip("bitsandbytes")
    for optim in ("adamw_8bit", "paged_adamw_32bit"):
        model = nn.ModuleList([nn.Linear(64, 256, bias=False), nn.Linear(512, 16, bias=False)])
        optimizer = updated(build_optimizer(model, quiet_config("unused", optim=optim)))
        held = [v for s in optimizer.state.values() for n, v in s.items() if not n.startswith(("step", "qmap"))]
        numbers = sum(p.numel() for p in model.parameters())
        assert sum(t.numel() * t.element_size() for t in held) == optimizer_bytes(optim) * numbers
    assert optimizer_bytes("paged_adamw_8bit") == optimizer_bytes("adamw_bnb_8bit") == optimizer_bytes("adamw_8bit")
    assert (optimizer_bytes("sgd"), optimizer_bytes("adamw_torch")) == (0, 8)


def test_state_of_another_librarys_adamw_or_of_another_shape_is_refused():
    pytest.importorskip("bitsandbytes")
    configs = (quiet_config("unused", optim=optim) for optim in ("adamw_torch", "adamw_8bit"))
    ours, theirs = (updated(build_optimizer(Biased(), config)) for config in configs)
    states = [torch.optim.Optimizer.state_dict(optimizer) for optimizer in (ours, theirs)]
    for optimizer, good, bad, name in ((ours, *states, "exp_avg"), (theirs, *states[::-1], "state1")):
        check_optimizer_state(good, optimizer)
        with pytest.raises(ValueError, match=rf"{name} of parameter 0 is None; allowed: \(3, 2\)"):
            check_optimizer_state(bad, optimizer)
        good["state"][1] = {**good["state"][1], name: torch.zeros(2)}
        with pytest.raises(ValueError, match=rf"{name} of parameter 1 is \(2,\); allowed: \(3,\)"):
            check_optimizer_state(good, optimizer)


def test_moments_of_torchs_adamw_and_bitsandbytes_32_bit_one_are_converted():
    optim = pytest.importorskip("bitsandbytes").optim
    torchs = updated(build_optimizer(Biased(), quiet_config("unused")))
    theirs = optim.AdamW32bit([{"params": group["params"]} for group in torchs.param_groups])
    saved = torchs.state_dict()
    for optimizer in (theirs, torchs):  # there and back
        convert_optimizer_state(saved, optimizer)
        check_optimizer_state(saved, optimizer)
        assert saved["param_groups"] == optimizer.state_dict()["param_groups"]
    torchs_again = torchs.state_dict()["state"]
    for index, state in saved["state"].items():
        assert all(torch.equal(state[name], torchs_again[index][name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize(
    "optim",
    [
        "adamw_8bit",
        pytest.param("paged_adamw_8bit", marks=pytest.mark.gpu),
        pytest.param("paged_adamw_32bit", marks=pytest.mark.gpu),
    ],
)
def test_a_run_of_bitsandbytes_resumes_with_its_moments(tmp_path, optim):
    """On the CPU bit for bit. 128 is the rank from which these tensors have moments of 8 bits."""
    pytest.importorskip("bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(folder, seed=0, callbacks=(), **resume):
        model = adapted_model(seed=seed, r=128, lora_dropout=0.1).to(device)
        settings = {"optim": optim, "max_steps": 6, "save_strategy": "steps", "save_steps": 6, "weight_decay": 0.1}
        config = quiet_config(folder, compile=False, **settings, **resume)
        losses = [line["loss"] for line in p3.train(model, chat_dataset(), config, callbacks=callbacks).history]
        return adapters_of(model), losses

    expected, losses = run(tmp_path / "uncut")
    run(tmp_path / "cut", callbacks=[stop_at(3)])
    found, resumed_losses = run(tmp_path / "cut", seed=1, resume_from_checkpoint=True)
    assert losses[-1] < losses[0]
    if device == "cpu":
        assert same_tensors(found, expected)
    assert resumed_losses == pytest.approx(losses, rel=1e-2)
    states = [
        torch.load(tmp_path / name / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
        for name in ("cut", "uncut")
    ]
    assert all(s["step"] == 6 for state in states for s in state.values())
    assert {s["state1"].dtype for s in states[0].values()} == {torch.uint8 if "8bit" in optim else torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_moments_of_a_large_tensor_survive_a_checkpoint(tmp_path, optim):
    config = quiet_config("unused", optim=optim, learning_rate=1e-2)
    weights, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(512, 512, bias=False, device="cuda")
        weights.append(layer.weight)
        optimizers.append(updated(build_optimizer(layer, config)))
    torch.save(torch.optim.Optimizer.state_dict(optimizers[1]), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
    resumed = build_optimizer(layer, config)
    check_optimizer_state(saved, resumed)
    resumed.load_state_dict(saved)
    for optimizer in (optimizers[0], resumed):
        updated(optimizer)
    assert torch.equal(*weights)


# --- LoRA+


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_lora_plus_is_an_optimizer_with_two_groups_made_by_hand_bit_for_bit(tmp_path, optim):
    dataset, trained = chat_dataset(16), adapted_model(lora_dropout=0.1)
    settings = {"optim": optim, "max_grad_norm": 0, "num_train_epochs": 2, "seed": 3, "weight_decay": 0.1}
    rates = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "learning_rate": 0.002}
    config = quiet_config(tmp_path, lora_plus_lr_ratio=16.0, **settings, **rates)
    result = p3.train(trained, dataset, config)

    model = adapted_model(lora_dropout=0.1).train()
    torch.manual_seed(3)
    matrices = {kind: [p for n, p in model.named_parameters() if n.endswith(kind)] for kind in ("lora_A", "lora_B")}
    groups = [{"params": matrices["lora_A"], "lr": 0.002}, {"params": matrices["lora_B"], "lr": 0.032}]
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer = kind(groups, weight_decay=0.1, fused=True)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 2, result.global_step)
    rates = []
    for epoch in range(2):
        for batch in p3.batches(dataset, batch_size=4, seed=3, epoch=epoch):
            loss_sum, count = p3.causal_lm_loss(model, batch)
            (loss_sum / count).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
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
