"""AdamW through bitsandbytes against bitsandbytes' own and torch's; skipped steps; checkpoints; pages."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors
from torch import nn

import phi3lora as p3
from phi3lora import training
from phi3lora.training.optim import build_optimizer, optimizer_bytes

bitsandbytes = pytest.importorskip("bitsandbytes")
from phi3lora.training import bnb_adamw  # noqa: E402
from phi3lora.training.bnb_adamw import AdamW8bit, PagedAdamW  # noqa: E402

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6}
SHAPES = [(16, 300), (512, 8), (40, 8), (30,)]  # two with moments of 8 bits; two too small for that
NAMES = ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


def parameters(device="cpu", shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def groups(tensors):
    return [{"params": tensors[:-1], "weight_decay": 0.1}, {"params": tensors[-1:], "weight_decay": 0.0}]


def give_gradients(tensors, step, poison=None):
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    if poison is not None:
        tensors[0].grad[3, 7] = poison


def update(optimizer, tensors, step, poison=None, found=None):
    give_gradients(tensors, step, poison)
    found = poison is not None if found is None else found
    optimizer.found_inf = torch.full((), float(found), device=tensors[0].device)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.01 * (1 + step)
    optimizer.step()


def snapshot(optimizer, tensors):
    return copy.deepcopy([[t.detach() for t in tensors], optimizer.state_dict()["state"]])


def identical(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


# Names


@pytest.mark.parametrize("optim", NAMES)
def test_a_name_gives_its_optimizer_and_on_the_cpu_a_paged_one_says_what_is_used_instead(optim, caplog):
    with caplog.at_level(logging.INFO, logger="phi3lora"):
        optimizer = build_optimizer(adapted_model(), quiet_config("unused", optim=optim))
    assert type(optimizer) is (AdamW8bit if "8bit" in optim else torch.optim.AdamW)
    used = "8-bit AdamW without pages" if "8bit" in optim else "torch's AdamW"
    said = [f"paged AdamW needs a CUDA GPU: using {used}"] if optim.startswith("paged") else []
    assert caplog.messages == said


@pytest.mark.parametrize("optim", NAMES)
def test_the_configured_rates_and_decays_arrive(optim):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5, "learning_rate": 0.125}
    optimizer = build_optimizer(adapted_model(), quiet_config("unused", optim=optim, weight_decay=0.25, **settings))
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.125, 0.25)


@pytest.fixture
def no_bitsandbytes(monkeypatch):
    monkeypatch.delattr(training, "bnb_adamw")
    monkeypatch.delitem(sys.modules, "phi3lora.training.bnb_adamw")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_one_line_says_what_to_install(optim, no_bitsandbytes):
    with pytest.raises(p3.Phi3LoRAError) as caught:
        build_optimizer(adapted_model(), quiet_config("unused", optim=optim))
    assert str(caught.value) == f"optim={optim!r} needs bitsandbytes: pip install 'phi3lora[qlora]'"


def test_paged_32_bit_adamw_trains_on_the_cpu_without_bitsandbytes_as_torchs_does(no_bitsandbytes, tmp_path):
    trained = []
    for optim in ("paged_adamw_32bit", "adamw_torch"):
        model = adapted_model()
        config = quiet_config(tmp_path / optim, optim=optim, max_steps=3, weight_decay=0.1)
        p3.train(model, chat_dataset(), config)
        trained.append(adapters_of(model))
    assert same_tensors(*trained)


def test_bytes_of_state_are_those_that_the_optimizers_hold():
    tensors = parameters(shapes=[(64, 256), (512, 16)])
    numbers = sum(t.numel() for t in tensors)
    for optim, optimizer in (
        ("adamw_8bit", AdamW8bit(groups(tensors), **SETTINGS)),
        ("paged_adamw_32bit", torch.optim.AdamW(groups(tensors), **SETTINGS, fused=True)),
    ):
        update(optimizer, tensors, 0)
        held = [v for s in optimizer.state.values() for n, v in s.items() if not n.startswith(("step", "qmap"))]
        assert sum(t.numel() * t.element_size() for t in held) == optimizer_bytes(optim) * numbers
    assert optimizer_bytes("paged_adamw_8bit") == optimizer_bytes("adamw_bnb_8bit") == optimizer_bytes("adamw_8bit")
    assert (optimizer_bytes("sgd"), optimizer_bytes("adamw_torch")) == (0, 8)


# Updates


def test_8_bit_updates_are_bitsandbytes_own_bit_for_bit():
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamW8bit(groups(ours), **SETTINGS), bitsandbytes.optim.AdamW8bit(groups(theirs), **SETTINGS)
    for step in range(5):
        update(optimizer, ours, step)
        update(reference, theirs, step)
        assert all(map(torch.equal, ours, theirs))
    assert [optimizer.state[p]["state1"].dtype for p in ours] == [torch.uint8] * 2 + [torch.float32] * 2
    assert [optimizer.state[p]["step"] for p in ours] == [5] * 4


def test_torchs_adamw_is_the_mathematics_of_bitsandbytes_paged_one():
    ours, theirs = parameters(), parameters()
    optimizer = torch.optim.AdamW(groups(ours), **SETTINGS, fused=True)
    with pytest.warns(UserWarning, match="not supported on CPU"):
        reference = bitsandbytes.optim.PagedAdamW32bit(groups(theirs), **SETTINGS)
        for step in range(5):
            update(optimizer, ours, step)
            update(reference, theirs, step)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_8_bit_moments_train_about_as_well_as_32_bit_ones(tmp_path):
    losses = {}
    for optim in ("adamw_torch", "adamw_8bit"):
        config = quiet_config(tmp_path / optim, optim=optim, max_steps=12)
        losses[optim] = [line["loss"] for line in p3.train(adapted_model(r=128), chat_dataset(), config).history]
    assert losses["adamw_torch"][-1] < 0.9 * losses["adamw_torch"][0]
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw_torch"][-1], rel=0.05)


# Steps called off


POISONS = [float("nan"), float("inf"), None]


def spared_and_struck(bad, poison=float("nan"), device="cpu", shapes=SHAPES, paged=False, steps=6):
    """Two optimizers: one that takes the good steps alone, one that is also called for the bad ones."""
    spared, struck = parameters(device, shapes), parameters(device, shapes)
    first, second = AdamW8bit(groups(spared), paged, **SETTINGS), AdamW8bit(groups(struck), paged, **SETTINGS)
    for step in range(steps):
        before = snapshot(second, struck)
        update(second, struck, step, poison if step in bad else None, found=step in bad)
        if step in bad:
            after = snapshot(second, struck)
            if before[1]:
                assert identical(before, after)
            else:  # the first step of all: there is a state now, of zeros
                assert identical(before[0], after[0])
                values = [v for s in after[1].values() for n, v in s.items() if not n.startswith("qmap")]
                assert not any(torch.as_tensor(v).any() for v in values)
        else:
            update(first, spared, step)
            assert identical([spared, first.state_dict()["state"]], [struck, second.state_dict()["state"]])
    return first, second


@pytest.mark.parametrize("poison", POISONS, ids=["nan", "inf", "loss alone"])
@pytest.mark.parametrize("bad", [{0}, {2}, {1, 2}, {0, 1, 4}, {5}], ids=str)
def test_a_step_called_off_changes_nothing_and_the_next_is_as_if_it_had_not_been(bad, poison):
    first, second = spared_and_struck(bad, poison)
    assert {s["step"] for s in first.state_dict()["state"].values()} == {6 - len(bad)}
    assert {s["step"] for s in second.state_dict()["state"].values()} == {6 - len(bad)}


@pytest.mark.parametrize("bad", [{0}, {2}, {1, 2}], ids=str)
def test_without_a_look_at_the_state_in_between_either(bad):
    spared, struck = parameters(), parameters()
    first, second = AdamW8bit(groups(spared), **SETTINGS), AdamW8bit(groups(struck), **SETTINGS)
    for step in range(5):
        update(second, struck, step, float("nan") if step in bad else None)
        if step not in bad:
            update(first, spared, step)
    assert identical([spared, first.state_dict()["state"]], [struck, second.state_dict()["state"]])


def test_only_parameters_that_the_skipped_step_updated_get_their_count_back():
    tensors = parameters()
    optimizer = AdamW8bit(groups(tensors), **SETTINGS)
    update(optimizer, tensors, 0)
    give_gradients(tensors, 1, float("nan"))
    tensors[1].grad = None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert [s["step"] for s in optimizer.state_dict()["state"].values()] == [1, 1, 1, 1]


def test_the_kernels_get_no_gradient_that_is_not_finite(monkeypatch):
    tensors, finite, real = parameters(), [], AdamW8bit.update_step

    def update_step(optimizer, group, p, g, i):
        finite.append(bool(p.grad.isfinite().all()))
        real(optimizer, group, p, g, i)

    monkeypatch.setattr(AdamW8bit, "update_step", update_step)
    update(AdamW8bit(groups(tensors), **SETTINGS), tensors, 0, float("nan"))
    assert finite == [True] * len(tensors)


def test_no_step_reads_its_own_flag(monkeypatch):
    tensors = parameters()
    optimizer = AdamW8bit(groups(tensors), **SETTINGS)
    added, real = [], bnb_adamw.LateValues.add
    monkeypatch.setattr(bnb_adamw.LateValues, "add", lambda late, v, note: (added.append(v), real(late, v, note)))
    for step in range(3):
        update(optimizer, tensors, step)
        assert len(added) == step + 1
        assert len(optimizer._skips._waiting) == 1, "read by the next step at the earliest"


def test_an_fp16_overflow_is_called_off_by_the_scaler_without_waiting(monkeypatch):
    tensors = parameters()
    optimizer = AdamW8bit(groups(tensors), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(scaler, "_maybe_opt_step", None)  # the way that reads the flag on the host
    for step, poison in enumerate((None, float("inf"), None)):
        before = snapshot(optimizer, tensors)
        scaler.scale(torch.zeros(()))
        give_gradients(tensors, step, poison)
        scaler.step(optimizer)
        scaler.update()
        assert identical(before, snapshot(optimizer, tensors)) is (poison is not None)
    assert {s["step"] for s in optimizer.state_dict()["state"].values()} == {2}


# Checkpoints


class CutAt(p3.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, state):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_with_8_bit_moments_resumes_to_the_uncut_one_bit_for_bit(tmp_path):
    def train(folder, seed=0, callbacks=(), **settings):
        model = adapted_model(seed=seed, r=128, lora_dropout=0.1)
        torch.manual_seed(1000 + seed)
        settings = {"optim": "paged_adamw_8bit", "max_steps": 6, "save_strategy": "steps", "save_steps": 6, **settings}
        p3.train(model, chat_dataset(), quiet_config(folder, weight_decay=0.1, **settings), callbacks=callbacks)
        return adapters_of(model), torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)

    with pytest.raises(FileNotFoundError):  # cut at 3, so there is no checkpoint-6 yet
        train(tmp_path / "cut", callbacks=[CutAt(3)])
    adapters, optimizer = train(tmp_path / "cut", seed=1, resume_from_checkpoint=True)
    expected_adapters, expected = train(tmp_path / "uncut")
    assert same_tensors(adapters, expected_adapters)
    assert identical(optimizer, expected)
    assert {v.dtype for s in expected["state"].values() for n, v in s.items() if n == "state1"} == {torch.uint8}
    assert {s["step"] for s in expected["state"].values()} == {6}


def test_a_state_saved_after_a_skipped_step_goes_on_as_the_optimizer_itself(tmp_path):
    tensors, others = parameters(), parameters()
    optimizer, loaded = AdamW8bit(groups(tensors), **SETTINGS), AdamW8bit(groups(others), **SETTINGS)
    update(optimizer, tensors, 0)
    update(optimizer, tensors, 1, float("nan"))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    update(loaded, others, 7, float("nan"))  # a past of its own, which loading ends
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for ours, theirs in zip(others, tensors, strict=True):
        ours.data.copy_(theirs.data)
    for step in (2, 3):
        update(optimizer, tensors, step)
        update(loaded, others, step)
    assert identical(snapshot(optimizer, tensors), snapshot(loaded, others))


# Pages: on the CPU with a stand-in for the memory, on a GPU with the memory itself


@pytest.fixture
def pages(monkeypatch):
    """What was moved into pages."""
    moved = []

    def in_pages(tensor):
        moved.append(tensor.clone())
        return moved[-1]

    monkeypatch.setattr(bnb_adamw, "in_pages", in_pages)
    return moved


def moments(optimizer, first="exp_avg", second="exp_avg_sq"):
    return [state[name] for state in optimizer.state.values() for name in (first, second)]


def all_in(tensors, places):
    return {t.data_ptr() for t in tensors} <= {t.data_ptr() for t in places}


def test_paged_adamw_equals_torchs_and_each_takes_the_others_checkpoint(pages):
    tensors, others = parameters(), parameters()
    optimizer = PagedAdamW(groups(tensors), **SETTINGS, fused=True)
    reference = torch.optim.AdamW(groups(others), **SETTINGS, fused=True)
    for step in range(6):
        poison = float("nan") if step in (0, 4) else None
        update(optimizer, tensors, step, poison)
        update(reference, others, step, poison)
        assert identical(snapshot(optimizer, tensors), snapshot(reference, others))
        assert all_in(moments(optimizer), pages)
        if step == 2:
            saved = copy.deepcopy((optimizer.state_dict(), reference.state_dict()))
            optimizer.load_state_dict(saved[1])
            reference.load_state_dict(saved[0])
            assert not all_in(moments(optimizer), pages)
    assert len(pages) == 2 * 2 * len(tensors)


def test_8_bit_moments_are_paged_where_asked_for_and_again_after_loading(pages):
    tensors, others = parameters(), parameters()
    optimizer, plain = AdamW8bit(groups(tensors), True, **SETTINGS), AdamW8bit(groups(others), **SETTINGS)
    for step in range(4):
        update(optimizer, tensors, step)
        update(plain, others, step)
        assert all_in(moments(optimizer, "state1", "state2"), pages)
        assert not any(all_in([t], pages) for t in moments(plain, "state1", "state2"))
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert identical(snapshot(optimizer, tensors), snapshot(plain, others))


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LARGE = [(400, 300), (512, 8), (30,)]  # the first is large enough for pages


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_pages_are_on_the_gpu_keep_their_values_and_take_no_memory_of_torchs(dtype):
    tensor = torch.randint(0, 255, (1000, 1000), device="cuda").to(dtype)
    allocated = torch.cuda.memory_allocated()
    pages = bnb_adamw.in_pages(tensor)
    assert (pages.device, pages.dtype, pages.shape) == (tensor.device, dtype, tensor.shape)
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(pages, tensor)
    pages.add_(1)
    assert torch.equal(pages.cpu(), tensor.add(1).cpu())


@pytest.mark.gpu
@on_gpu
def test_paged_adamw_on_a_gpu_equals_torchs_saves_plain_tensors_and_resumes(tmp_path):
    tensors, others = parameters("cuda", LARGE), parameters("cuda", LARGE)
    optimizer = PagedAdamW(groups(tensors), **SETTINGS, fused=True)
    reference = torch.optim.AdamW(groups(others), **SETTINGS, fused=True)
    for step in range(6):
        poison = float("nan") if step in (0, 4) else None
        update(optimizer, tensors, step, poison)
        update(reference, others, step, poison)
        assert identical(snapshot(optimizer, tensors), snapshot(reference, others))
        if step == 2:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            saved = torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(saved)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("bad", [{0}, {1, 2}], ids=str)
def test_8_bit_steps_on_a_gpu_are_called_off_there(bad, paged):
    spared_and_struck(bad, device="cuda", shapes=LARGE, paged=paged)


@pytest.mark.gpu
@on_gpu
def test_8_bit_updates_on_a_gpu_are_bitsandbytes_own_bit_for_bit():
    ours, theirs = parameters("cuda", LARGE), parameters("cuda", LARGE)
    optimizer = AdamW8bit(groups(ours), True, **SETTINGS)
    reference = bitsandbytes.optim.AdamW8bit(groups(theirs), **SETTINGS)
    for step in range(5):
        update(optimizer, ours, step)
        update(reference, theirs, step)
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("make", [PagedAdamW, AdamW8bit])
def test_a_step_on_a_gpu_does_not_wait_for_it(make):
    tensors = parameters("cuda", LARGE)
    optimizer = make(groups(tensors), **SETTINGS, **({"fused": True} if make is PagedAdamW else {"paged": True}))
    update(optimizer, tensors, 0)
    give_gradients(tensors, 1)
    optimizer.found_inf = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    after = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after.record()
    assert not after.query(), "the step was queued, not waited for"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("optim", NAMES)
def test_every_name_trains_on_a_gpu_and_resumes(optim, tmp_path):
    for max_steps in (3, 6):
        model = adapted_model(r=128).cuda()
        settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        config = quiet_config(
            tmp_path, optim=optim, max_steps=max_steps, resume_from_checkpoint="auto", compile=False, **settings
        )
        losses = [line["loss"] for line in p3.train(model, chat_dataset(), config).history]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
