"""The formula against torch's own counter over a real forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import random_documents, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import phi3lora as p3
from phi3lora.lora import layers
from phi3lora.model.estimate import flops_per_token, peak_flops


def in_plain_products(x, z, weight, bias, lora_B, widths, enable_lora, scaling):
    """``linear_plus_low_rank`` spelt out: torch's counter does not look inside an operator of ours."""
    y = F.linear(x, weight, bias)
    added = y.new_zeros(y.shape)
    for segment in layers.adapted_segments(widths, enable_lora, lora_B.shape[1]):
        added[..., segment.columns] = F.linear(z[..., segment.rows_of_A], lora_B[segment.rows_of_B]) * scaling
    return y + added


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_flops_per_token_are_what_torch_counts(monkeypatch, kv_heads, targets):
    monkeypatch.setattr(layers, "linear_plus_low_rank", in_plain_products)
    model = tiny_model(num_key_value_heads=kv_heads)
    p3.inject_lora(model, p3.LoraConfig(r=4, target_modules=targets))
    model.set_attn_implementation("eager")  # plain products over the whole row: as many keys as the row has tokens
    model.get_input_embeddings().weight.requires_grad = True  # so that the first layer's backward runs too
    ids = torch.tensor(random_documents(64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Exact in transformers 5.23; 5.17 makes its rotary angles by a matrix product, which is counted too.
    assert flops_per_token(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("Tesla T4", 65),
    ],
)
def test_a_gpus_peak_is_its_datasheets(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == tflops * 1e12


def test_an_unknown_device_has_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce GTX 1080")
    assert peak_flops(torch.device("cuda")) is None
    assert peak_flops(torch.device("cpu")) is None
