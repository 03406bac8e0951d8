"""A training loop of ten lines on p3.batches and p3.causal_lm_loss equals p3.train."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors

import phi3lora as p3


def parameters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_a_ten_line_loop_equals_train_bit_for_bit(tmp_path, optim, packing):
    dataset, trained = chat_dataset(16), adapted_model(lora_dropout=0.1)
    settings = {"optim": optim, "packing": packing, "max_grad_norm": 0, "num_train_epochs": 2, "seed": 3}
    config = quiet_config(tmp_path, lr_scheduler_type="constant", learning_rate=0.01, **settings)
    result = p3.train(trained, dataset, config)

    model = adapted_model(lora_dropout=0.1).train()
    torch.manual_seed(3)
    kind = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[optim]
    optimizer, losses = kind(parameters_of(model), lr=0.01, weight_decay=0.0, fused=True), []
    for epoch in range(2):
        for batch in p3.batches(dataset, batch_size=4, packing=packing, seed=3, epoch=epoch):
            loss_sum, count = p3.causal_lm_loss(model, batch)
            (loss_sum / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_sum.item() / count)

    assert [line["loss"] for line in result.history] == losses
    assert same_tensors(adapters_of(trained), adapters_of(model))
    assert not same_tensors(adapters_of(trained), adapters_of(adapted_model()))


def test_a_loop_that_accumulates_equals_train_to_rounding(tmp_path):
    dataset, trained, model = chat_dataset(16), adapted_model(), adapted_model().train()
    settings = {"optim": "sgd", "max_grad_norm": 0, "num_train_epochs": 1, "gradient_accumulation_steps": 2}
    p3.train(trained, dataset, quiet_config(tmp_path, lr_scheduler_type="constant", learning_rate=0.5, **settings))
    optimizer = torch.optim.SGD(parameters_of(model), lr=0.5)
    batches = list(p3.batches(dataset, batch_size=4, seed=42))
    for start in range(0, len(batches), 2):
        sums = [p3.causal_lm_loss(model, batch) for batch in batches[start : start + 2]]
        (sum(s for s, _ in sums) / sum(n for _, n in sums)).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapters_of(trained)
    for name, value in adapters_of(model).items():
        torch.testing.assert_close(expected[name], value, atol=1e-6, rtol=1e-4)
