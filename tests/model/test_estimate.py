"""The predicted memory against its table, and the counted operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    adapted_model,
    chat_dataset,
    packed_batch,
    quiet_config,
    random_documents,
    randomize_adapters,
    require_four_bit,
    tiny_model,
)  # fmt: skip
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import phi3lora as p3
from phi3lora.lora import layers
from phi3lora.lora.base_weight import Fp8Linear, quantize_base
from phi3lora.model import estimate
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.estimate import (
    FACTORS,
    GIB,
    MemoryPlan,
    cache_bytes_per_token,
    flops_per_token,
    peak_flops,
    plan_memory,
)

# --- Memory


@pytest.mark.parametrize("kind", FACTORS)
def test_a_layer_keeps_what_the_table_says(kind):
    """Compare two models that differ by a layer with the table at the top of estimate.py, in float32."""
    N, D, Q, KV, I, r = 10_000_000, 32, 32, 16, 48, 4  # noqa: E741

    def bytes_of_tokens(n_layers: int) -> dict[str, float]:
        model = adapted_model(changes={"num_hidden_layers": n_layers})
        with_tokens, without = plan_memory(model, N, kind).peak_gib, plan_memory(model, 0, kind).peak_gib
        return {mode: (with_tokens[mode] - without[mode]) * GIB for mode in with_tokens}

    z = 2 * (3 + 1 + 2 + 1) * r  # low-rank activations of seven segments, forward and backward
    attention = 4 * ((Q + 2 * KV) + Q + z) + 4 * (4 + 2)  # 4 heads' log-sum-exp and 2 norms in float32
    numbers = {"none": 4 * (2 * D + 2 * I) + attention, "selective": 4 * 3 * D + attention, "full": 4 * D, "offload": 0}
    three, two = bytes_of_tokens(3), bytes_of_tokens(2)
    for mode, kept in numbers.items():
        assert (three[mode] - two[mode]) / N == pytest.approx(FACTORS[kind] * kept, rel=1e-6, abs=1e-6), mode


def test_without_tokens_it_is_the_weights_and_what_trains():
    model = adapted_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    for fixed in plan_memory(model, 0).peak_gib.values():
        assert fixed * GIB == pytest.approx(held + trained * (4 + 8 + 4), rel=1e-6)


def test_recorded_layers_take_more(monkeypatch):
    """Their gradients are kept, and their memory serves no answers."""
    model = adapted_model()
    cache = 4 * cache_bytes_per_token(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recorded, with_cache = (plan_memory(model, 4096, cache_tokens=n).peak_gib for n in (0, 4))
    monkeypatch.setattr(estimate, "MOST_TOKENS", 4095)
    launched = plan_memory(model, 4096, cache_tokens=4).peak_gib
    for mode in launched:
        assert (recorded[mode] - launched[mode]) * GIB == pytest.approx(4 * trained, rel=1e-6)
        assert (with_cache[mode] - recorded[mode]) * GIB == pytest.approx(cache, rel=1e-6)


def test_answers_take_the_bytes_of_their_cache_in_place_of_a_steps(monkeypatch):
    monkeypatch.setattr(estimate, "MOST_TOKENS", 0)  # nothing is recorded
    model, ids = adapted_model(), torch.ones(3, 7, dtype=torch.long)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    stored = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert stored == 3 * 7 * cache_bytes_per_token(model)
    without = plan_memory(model, 100).peak_gib
    for mode, fixed in plan_memory(model, 0).peak_gib.items():
        assert plan_memory(model, 100, cache_tokens=21).peak_gib[mode] == without[mode]  # less than a step takes
        large = plan_memory(model, 100, cache_tokens=10**6).peak_gib[mode]
        assert (large - fixed) * GIB == pytest.approx(10**6 * cache_bytes_per_token(model), rel=1e-6)


@pytest.mark.parametrize("base_precision", [None, "nf4"])
def test_a_split_base_takes_its_part_of_every_layer_and_two_whole_layers(base_precision):
    model = adapted_model(changes={"num_hidden_layers": 8})
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    each = sum(w.nbytes for w in weights) / 8 * (1 if base_precision is None else (4 + 8 / 64 + 32 / 64 / 256) / 32)
    whole, split = (plan_memory(model, 100, base_precision=base_precision, parts=parts).peak_gib for parts in (1, 4))
    for mode in whole:
        assert (whole[mode] - split[mode]) * GIB == pytest.approx(8 * each * 3 / 4 - 2 * each, rel=1e-6)


@pytest.mark.parametrize(
    ("available", "mode"),
    [(100.0, "none"), (32.7, "none"), (32.5, "selective"), (15.0, "full"), (9.0, "offload"), (1.0, "offload"),
     (None, "none")],
)  # fmt: skip
def test_auto_takes_the_fastest_mode_that_fits(available, mode):
    plan = MemoryPlan({"none": 30.0, "selective": 20.0, "full": 10.0, "offload": 8.0}, available)
    assert plan.fastest_that_fits() == mode


def test_auto_on_a_cpu_recomputes_nothing(tmp_path):
    config = quiet_config(tmp_path, max_steps=1, activation_checkpointing="auto")
    assert p3.train(adapted_model(), chat_dataset(), config).global_step == 1


@pytest.mark.parametrize(
    ("base_precision", "tokens", "rel"),
    [("fp8", 100, 1e-9), ("nf4", 0, 0.01)],  # nf4 has tables of a KiB a layer
)
def test_the_prediction_for_a_quantised_base_is_that_of_the_quantised_model(base_precision, tokens, rel):
    size = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 400}
    dense, quantised = tiny_model(**size), tiny_model(**size)
    if base_precision == "nf4":
        require_four_bit()
        quantize_base(quantised, "nf4")
    else:
        for path, layer in [(p, m) for p, m in quantised.model.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, name = path.rpartition(".")
            setattr(quantised.model.get_submodule(parent), name, Fp8Linear.from_linear(layer))
    for model in (dense, quantised):
        p3.inject_lora(model)
    predicted, true = plan_memory(dense, tokens, base_precision=base_precision), plan_memory(quantised, tokens)
    assert predicted.peak_gib == pytest.approx(true.peak_gib, rel=rel)
    if base_precision == "nf4":
        as_fp8 = plan_memory(quantised, 0, base_precision="fp8")
        assert as_fp8.peak_gib == pytest.approx(plan_memory(dense, 0, base_precision="fp8").peak_gib)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_the_prediction_is_within_a_tenth_of_the_measured_peak(mode):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    model = tiny_model(**shape, num_key_value_heads=16, max_position_embeddings=4096, vocab_size=32064)
    model.to("cuda", torch.bfloat16)
    p3.inject_lora(model, p3.LoraConfig(r=16))
    randomize_adapters(model)
    batch = packed_batch([random_documents(4096)] * 4, 4096)
    torch.cuda.reset_peak_memory_stats()
    with activation_checkpointing(model.train(), mode):
        loss, count = p3.causal_lm_loss(model, batch)
        (loss / count).backward()
    predicted = plan_memory(model, 4 * 4096, optimizer_bytes=0).peak_gib[mode]
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() / GIB, rel=0.1)


# --- Operations


def in_plain_products(x, z, weight, bias, lora_B, widths, enable_lora, scaling):
    """Compute ``linear_plus_low_rank`` in plain products: torch's counter does not look inside our operator."""
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
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A10G", 70),
     ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", 181),
     ("NVIDIA GeForce GTX 1080", None)],
)  # fmt: skip
def test_a_gpus_peak_is_its_datasheets(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None
