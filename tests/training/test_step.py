"""One optimizer step against plain torch: separate sequences, F.cross_entropy, torch.optim, clip_grad_norm_."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors

from phi3lora.data.batches import BatchPlan, collate
from phi3lora.errors import TrainingError
from phi3lora.training import step as step_module
from phi3lora.training.optim import build_optimizer
from phi3lora.training.step import OptimizerStep, resolve_precision

DATA = chat_dataset(12)
UNEQUAL = sorted(range(12), key=lambda i: (DATA.document(i)[1][1:] != -100).sum())  # few supervised tokens first


def make_step(model, *, optim="sgd", max_grad_norm=0.0, **settings):
    config = quiet_config("unused", optim=optim, max_grad_norm=max_grad_norm, **settings)
    precision = resolve_precision(config, model, torch.device("cpu"))
    return OptimizerStep(model.train(), build_optimizer(model, config), precision, config.max_grad_norm)


def micro_batches(sizes, documents=range(8), packing=False):
    """Return micro-batches of these numbers of rows; a row is one document."""
    rows, at = [(i,) for i in documents], 0
    parts = []
    for size in sizes:
        part = rows[at : at + size]
        width = 64 if packing else max(int(DATA.lengths[i]) for (i,) in part)
        parts.append(collate(DATA, part, width))
        at += size
    return parts


def document_loss(model, i):
    """Return the sum of cross-entropies of one document alone, and their number, from the model's own logits."""
    ids, labels = (torch.tensor(a).long() for a in DATA.document(i))
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return F.cross_entropy(logits, labels[1:], reduction="sum"), int((labels[1:] != -100).sum())


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def largest_difference(a, b):
    return max((x - y).abs().max().item() for x, y in zip(trainable(a), trainable(b), strict=True))


def state_of(optimizer):
    return copy.deepcopy(torch.optim.Optimizer.state_dict(optimizer)["state"])  # bitsandbytes has another one


def same_state(a, b):
    return a.keys() == b.keys() and all(same_values(a[key], b[key]) for key in a)


def same_values(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a
    )


@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [7, 1]])
def test_accumulation_equals_one_big_batch(sizes):
    documents = [*UNEQUAL[:4], *UNEQUAL[-4:]]
    whole, parts, start = adapted_model(), adapted_model(), adapted_model()
    make_step(whole)(micro_batches([8], documents), 1.0)
    make_step(parts)(micro_batches(sizes, documents), 1.0)
    moved = largest_difference(whole, start)
    assert moved > 1e-3
    assert largest_difference(whole, parts) < 1e-5 * max(1.0, moved)


def test_accumulation_is_not_the_mean_of_the_micro_batches_means():
    documents = [*UNEQUAL[:4], *UNEQUAL[-4:]]
    ours, mean_of_means, mean_of_all = adapted_model(), adapted_model().train(), adapted_model().train()
    make_step(ours)(micro_batches([4, 4], documents), 1.0)
    halves = [[document_loss(mean_of_means, i) for i in half] for half in (documents[:4], documents[4:])]
    sum((sum(s for s, _ in half) / sum(n for _, n in half)) / 2 for half in halves).backward()
    everything = [document_loss(mean_of_all, i) for i in documents]
    (sum(s for s, _ in everything) / sum(n for _, n in everything)).backward()
    for model in (mean_of_means, mean_of_all):
        torch.optim.SGD(trainable(model), lr=1.0).step()
    assert largest_difference(ours, mean_of_all) < 1e-5
    assert largest_difference(ours, mean_of_means) > 1e-3


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed width", "padded"])
def test_five_updates_equal_a_plain_torch_loop_on_separate_sequences(optim, packing):
    ours, plain = adapted_model(), adapted_model().train()
    step = make_step(ours, optim=optim, max_grad_norm=0.5, weight_decay=0.1, adam_epsilon=1e-5, adam_beta2=0.99)
    if optim == "sgd":
        optimizer = torch.optim.SGD(trainable(plain), lr=0.0, weight_decay=0.1, foreach=False, fused=False)
    else:
        settings = {"betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.1, "foreach": False, "fused": False}
        optimizer = torch.optim.AdamW(trainable(plain), lr=0.0, **settings)
    for turn in range(5):
        documents = [(turn * 5 + j) % 12 for j in range(6)]
        rate = 0.01 * (turn + 1)
        outcome = step(micro_batches([2, 4], documents, packing), rate)
        losses = [document_loss(plain, i) for i in documents]
        total, count = sum(s for s, _ in losses), sum(n for _, n in losses)
        optimizer.zero_grad()
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(plain), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert outcome.tolist() == pytest.approx([total.item(), norm.item(), 0.0], rel=1e-3)
    assert largest_difference(ours, adapted_model()) > 1e-2
    assert largest_difference(ours, plain) < 2e-4


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1e6, 0.0, -1.0])
def test_clipping_equals_clip_grad_norm_and_zero_or_less_means_none(max_norm):
    clipped, plain = adapted_model(), adapted_model()
    outcome = make_step(clipped, max_grad_norm=max_norm)(micro_batches([8]), 0.0)
    make_step(plain, max_grad_norm=0)(micro_batches([8]), 0.0)
    norm = torch.nn.utils.clip_grad_norm_(trainable(plain), max_norm if max_norm > 0 else 1e9)
    assert outcome[1] == pytest.approx(norm.item())
    for ours, reference in zip(trainable(clipped), trainable(plain), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


def bad_loss(model):
    weight = model.get_input_embeddings().weight
    before = weight.data.clone()
    weight.data.fill_(float("nan"))
    return lambda: weight.data.copy_(before)


def bad_gradient(value):
    def poison(model):
        parameter = trainable(model)[-1]  # one of many; the loss stays finite
        return parameter.register_hook(lambda g: g.index_put((torch.tensor(0),), torch.tensor(value))).remove

    return poison


POISONS = {"nan loss": bad_loss, "nan gradient": bad_gradient(float("nan")), "inf gradient": bad_gradient(float("inf"))}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adamw_8bit"])
def test_a_non_finite_step_changes_nothing_and_the_next_is_as_if_it_had_not_been(poison, optim):
    r = 128 if optim == "adamw_8bit" else 4  # 8 bits are for parameters of 4,096 numbers and more
    model, spared = adapted_model(r=r), adapted_model(r=r)
    settings = {"optim": optim, "max_grad_norm": 1.0, "weight_decay": 0.1}
    step, spared_step = make_step(model, **settings), make_step(spared, **settings)
    for _ in range(2):
        step(micro_batches([8]), 0.01)
        spared_step(micro_batches([8]), 0.01)
    adapters, moments = adapters_of(model), state_of(step.optimizer)
    cure = POISONS[poison](model)
    outcome = step(micro_batches([8]), 0.01)
    assert outcome[2] == 1
    assert not torch.isfinite(outcome[:2]).all()
    assert same_tensors(adapters_of(model), adapters)
    assert same_state(state_of(step.optimizer), moments)
    cure()
    assert step(micro_batches([4, 4]), 0.01)[2] == 0
    spared_step(micro_batches([4, 4]), 0.01)
    assert not same_tensors(adapters_of(model), adapters)
    assert same_tensors(adapters_of(model), adapters_of(spared))


def test_a_non_finite_first_step_leaves_adamw_as_if_it_had_not_been():
    model, spared = adapted_model(), adapted_model()
    step, spared_step = make_step(model, optim="adamw_torch"), make_step(spared, optim="adamw_torch")
    cure = bad_loss(model)
    step(micro_batches([8]), 0.01)
    cure()
    for _ in range(2):
        step(micro_batches([8]), 0.01)
        spared_step(micro_batches([8]), 0.01)
    assert same_tensors(adapters_of(model), adapters_of(spared))
    assert same_state(state_of(step.optimizer), state_of(spared_step.optimizer))


def test_frozen_weights_stay_bit_identical_and_get_no_gradient():
    model = adapted_model(lora_dropout=0.1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    step = make_step(model, optim="adamw_torch", weight_decay=0.5)
    before = adapters_of(model)
    for _ in range(3):
        step(micro_batches([4, 4]), 0.05)
    after = dict(model.named_parameters())
    assert len(frozen) > 5
    assert all(torch.equal(after[n], value) and after[n].grad is None for n, value in frozen.items())
    assert all(not torch.equal(after[n], value) for n, value in before.items())


def test_a_non_finite_loss_with_finite_gradients_is_skipped_too(monkeypatch):
    real = step_module.causal_lm_loss

    def loss(model, batch, **options):
        loss_sum, count = real(model, batch, **options)
        return loss_sum + torch.tensor(float("inf")), count

    monkeypatch.setattr(step_module, "causal_lm_loss", loss)
    model = adapted_model()
    before = adapters_of(model)
    values = make_step(model)(micro_batches([8]), 1.0)
    assert torch.isfinite(values[1])
    assert values[2] == 1
    assert same_tensors(adapters_of(model), before)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_rows_of_padding_that_fill_up_a_batch_change_nothing(packing):
    plain = BatchPlan(DATA, 8, 64, packing)
    filled = BatchPlan(DATA, 8, 64, packing, fixed_shape=True)
    rows = plain.micro_batches(0)[-1]
    assert len(rows) < 8
    assert filled.tensors(rows)["input_ids"].shape[0] == 8
    ours, reference = adapted_model(), adapted_model()
    found = make_step(ours)([filled.tensors(rows)], 1.0)
    expected = make_step(reference)([plain.tensors(rows)], 1.0)
    torch.testing.assert_close(found, expected)
    assert largest_difference(ours, reference) < 1e-5


def test_an_adapter_that_the_model_goes_around_is_an_error_in_the_first_step():
    model = adapted_model()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: F.linear(
        mlp.activation_fn(F.linear(x, mlp.gate_up_proj.weight)[..., :48]), mlp.down_proj.weight
    )
    with pytest.raises(TrainingError, match=r"no gradient reaches the adapters of model.layers.1.mlp.gate_up_proj, .*"):
        make_step(model)(micro_batches([4]), 1.0)
