"""``evaluate`` against transformers' own loss and plain counting, document by document."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from conftest import (
    adapted_model,
    adapters_of,
    chat_dataset,
    chat_rows,
    longrope_model,
    make_tokenizer,
    same_tensors,
    tiny_model,
)

import phi3lora as p3
from phi3lora.model.forward import eval_mode

DATA = chat_dataset(16)


def brute_force(model, dataset=DATA):
    """Return the metrics from one forward for each document."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for document in dataset:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        targets, guesses = labels[0, 1:], output.logits[0, :-1].argmax(-1)
        trained = targets != -100
        loss += output.loss.item() * int(trained.sum())
        right += int((guesses[trained] == targets[trained]).sum())
        count += int(trained.sum())
    return {"loss": loss / count, "token_accuracy": right / count, "n_tokens": count}


def fitted():
    """A model that gets some tokens right."""
    model = adapted_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(20):
        for batch in p3.batches(DATA, batch_size=8):
            loss_sum, count = p3.causal_lm_loss(model, batch)
            (loss_sum / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def test_loss_and_accuracy_equal_brute_force():
    model = fitted()
    expected = brute_force(model)
    assert 0.2 < expected["token_accuracy"] < 0.99
    found = p3.evaluate(model, DATA)
    assert (found["n_tokens"], found["token_accuracy"]) == (expected["n_tokens"], expected["token_accuracy"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["perplexity"] == math.exp(found["loss"])
    base = tiny_model()
    assert p3.evaluate(base, DATA)["loss"] == pytest.approx(brute_force(base)["loss"], rel=1e-5)


@pytest.mark.parametrize("build", [adapted_model, longrope_model])
def test_packing_row_length_and_batch_size_do_not_change_the_result(build):
    """longrope: each document has its own rotary factors, short or long."""
    model = build()
    expected, plain = brute_force(model)["loss"], p3.evaluate(model, DATA)
    assert plain["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 < (DATA.lengths <= 40).sum() < len(DATA)
    for settings in ({"packing": False}, {"max_length": 150}, {"packing": False, "batch_size": 1}, {"batch_size": 5}):
        assert p3.evaluate(model, DATA, **settings) == pytest.approx(plain, rel=1e-6), settings


def test_modes_generators_weights_and_gradients_are_left_alone_and_dropout_is_off():
    model = adapted_model(lora_dropout=0.5).eval()
    expected = p3.evaluate(model, DATA)
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights, adapters = model.lm_head.weight.clone(), adapters_of(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    assert p3.evaluate(model, DATA) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    assert torch.equal(model.lm_head.weight, weights)
    assert same_tensors(adapters_of(model), adapters)
    assert all(p.grad is None for p in model.parameters())


def test_modes_and_gradients_are_restored_after_an_error():
    model = adapted_model().train()
    with pytest.raises(RuntimeError), eval_mode(model):
        assert not torch.is_grad_enabled() and not model.training
        raise RuntimeError
    assert torch.is_grad_enabled() and model.training


def test_a_model_in_eval_mode_never_leaves_it_so_that_threads_can_share_it():
    model, seen = adapted_model(lora_dropout=0.5).eval(), []
    layer = model.model.layers[0].self_attn.qkv_proj
    real = layer.train
    layer.train = lambda mode=True: seen.append(mode) or real(mode)
    with eval_mode(model):
        pass
    assert seen and True not in seen


def test_a_huge_loss_has_infinite_perplexity():
    model = adapted_model()
    model.lm_head.weight.data.mul_(1e5)
    found = p3.evaluate(model, DATA)
    assert found["loss"] > 700 and found["perplexity"] == math.inf


def test_an_empty_dataset_and_a_document_longer_than_the_row_are_errors():
    with pytest.raises(p3.DataError, match="empty"):
        p3.evaluate(adapted_model(), DATA.select([]))
    with pytest.raises(p3.DataError, match=r"max_length=40.*of \d+ tokens"):
        p3.evaluate(adapted_model(), DATA, max_length=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, r"token id \d+; the model's vocabulary has 200"),
        (
            {"max_position_embeddings": 40, "original_max_position_embeddings": 40},
            r"the dataset has a document of \d+ tokens; the model allows 40",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_train_refuses_for_a_model_evaluate_refuses_too(changes, message, streaming):
    data = p3.ChatDataset.load(chat_rows(16), make_tokenizer(), max_length=64, streaming=streaming)
    with pytest.raises(p3.DataError, match=message):
        p3.evaluate(adapted_model(changes=changes), data)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 2.5}, {"batch_size": True}, {"max_length": 0}, {"max_length": 2**25}]
)
def test_sizes_that_training_config_refuses_evaluate_refuses_too(options):
    [(name, value)] = options.items()
    with pytest.raises(p3.DataError, match=rf"{name}={value!r}; allowed: a whole number"):
        p3.evaluate(tiny_model(), DATA, **options)


def test_an_empty_dataset_is_refused():
    with pytest.raises(p3.DataError, match="empty"):
        p3.evaluate(tiny_model(), DATA.select([]))
