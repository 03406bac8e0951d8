"""The prediction's structure on a CPU; its figures against measured peaks are GPU tests."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
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
