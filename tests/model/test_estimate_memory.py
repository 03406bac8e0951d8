"""The prediction's structure on a CPU; its figures against measured peaks are GPU tests."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config, require_four_bit, tiny_model
from torch import nn

import phi3lora as p3
from phi3lora.lora.base_weight import Fp8Linear, quantize_base
from phi3lora.model.estimate import GIB, MemoryPlan, plan_memory


def test_less_is_kept_the_more_is_recomputed_and_all_grows_with_the_tokens():
    model = adapted_model(changes={"num_hidden_layers": 6})
    plan, twice = plan_memory(model, 10_000_000), plan_memory(model, 20_000_000)
    assert plan.peak_gib["none"] > plan.peak_gib["selective"] > plan.peak_gib["full"] > plan.peak_gib["offload"]
    assert all(twice.peak_gib[mode] > 1.9 * gib for mode, gib in plan.peak_gib.items())
    assert plan_memory(model, 10_000_000, "plain").peak_gib["none"] > plan.peak_gib["none"]


def test_without_tokens_it_is_the_weights_and_what_trains():
    model = adapted_model()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    for fixed in plan_memory(model, 0).peak_gib.values():
        assert fixed * GIB == pytest.approx(held + trained * (4 + 8 + 4), rel=1e-6)


@pytest.mark.parametrize(
    ("available", "mode"),
    [
        (100.0, "none"),
        (32.7, "none"),
        (32.5, "selective"),
        (15.0, "full"),
        (9.0, "offload"),
        (1.0, "offload"),
        (None, "none"),
    ],
)
def test_auto_takes_the_fastest_mode_that_fits(available, mode):
    plan = MemoryPlan({"none": 30.0, "selective": 20.0, "full": 10.0, "offload": 8.0}, available)
    assert plan.fastest_that_fits() == mode


def test_auto_on_a_cpu_recomputes_nothing(tmp_path):
    model = adapted_model()
    config = quiet_config(tmp_path, max_steps=1, activation_checkpointing="auto")
    assert p3.train(model, chat_dataset(), config).global_step == 1


@pytest.mark.parametrize(
    ("base_precision", "tokens", "rel"),
    [("fp8", 100, 1e-9), ("nf4", 0, 0.01)],  # nf4 has tables of a KiB a layer
)
def test_the_prediction_for_a_quantised_base_is_that_of_the_quantised_model(base_precision, tokens, rel):
    if base_precision == "nf4":
        require_four_bit()
    size = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 400}
    dense, quantised = tiny_model(**size), tiny_model(**size)
    if base_precision == "nf4":
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_the_prediction_is_within_a_tenth_of_the_measured_peak(mode):
    from conftest import packed_batch, random_documents, randomize_adapters, tiny_model

    from phi3lora.model.activations import activation_checkpointing

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
