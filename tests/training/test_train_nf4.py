"""Training adapters on a 4-bit base: quantise -> inject -> train -> save -> load, and the demo learnt as on float32."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import chat_dataset, lively_model, make_tokenizer, quiet_config, require_four_bit
from transformers import AutoModelForCausalLM

import phi3lora as p3
from phi3lora.demo.show import LORA, TRAINING, frozen_hash, score
from phi3lora.lora.base_weight import quantize_base

require_four_bit()

IDS = torch.arange(10, 30)[None]


def model_in(base_precision: str | None):
    """Return one fixed pretrained model, in float32 or nf4."""
    model = lively_model()
    if base_precision is not None:
        quantize_base(model, base_precision)
    return model


def trained(folder, **settings):
    """A 4-bit model after three steps, and its logits before."""
    model = model_in("nf4")
    before = model(IDS).logits
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
    p3.train(model, chat_dataset(), quiet_config(folder, max_steps=3, **settings), eval_dataset=chat_dataset(5))
    return model, before


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_adapter_trained_on_nf4_loads_into_nf4_and_into_float32(tmp_path, suffix):
    model, before = trained(tmp_path / "run", eval_strategy="steps", eval_steps=2)
    after = model(IDS).logits
    path = p3.save_adapter(model, tmp_path / f"adapter.{suffix}")
    fresh, dense = model_in("nf4"), model_in(None)
    untuned = dense(IDS).logits
    for other in (fresh, dense):
        p3.load_adapter(other, path)
    assert torch.equal(fresh(IDS).logits, after)
    assert p3.evaluate(fresh, chat_dataset(5)) == p3.evaluate(model, chat_dataset(5))
    learnt, expected = (dense(IDS).logits - untuned).flatten(), (after - before).flatten()
    # The bases differ by their rounding, and three steps on random weights make something of it: 0.84 on one CPU.
    assert torch.nn.functional.cosine_similarity(learnt, expected, dim=0) > 0.7


def test_merging_writes_the_4_bit_weights_out_or_takes_the_dense_ones(tmp_path):
    model, _ = trained(tmp_path)
    logits = model(IDS).logits
    with pytest.raises(p3.AdapterError, match="quantised weight"), p3.merged(model):
        pass
    lively_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    found = {}
    for name, base in (("own", None), ("dense", tmp_path / "base")):
        p3.save_merged(model, None, tmp_path / name, base=base)
        found[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(IDS).logits
    torch.testing.assert_close(found["own"], logits, rtol=1e-4, atol=1e-4)
    adapted = model_in(None)
    p3.load_adapter(adapted, p3.save_adapter(model, tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(found["dense"], adapted(IDS).logits, rtol=1e-4, atol=1e-4)


def test_training_leaves_the_packed_weights_as_they_were(tmp_path):
    untouched = frozen_hash(model_in("nf4"))
    assert frozen_hash(trained(tmp_path)[0]) == untouched


def test_a_resumed_run_is_the_uncut_one_and_must_be_on_the_same_base(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    uncut, _ = trained(tmp_path, **settings)
    resumed, _ = trained(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert all(torch.equal(a, b) for a, b in zip(uncut.parameters(), resumed.parameters(), strict=True))
    dense = model_in(None)
    p3.inject_lora(dense, p3.LoraConfig(r=4, lora_alpha=8))
    config = quiet_config(tmp_path, max_steps=3, resume_from_checkpoint=True, **settings)
    with pytest.raises(p3.CheckpointError, match=r"base weights torch\.float32 nf4 then, torch\.float32 now"):
        p3.train(dense, chat_dataset(), config)


@pytest.mark.slow
@pytest.mark.parametrize("base_precision", [None, "nf4"])
def test_every_held_out_answer_of_the_demo_is_right_on_either_base(tmp_path, base_precision):
    """``make demo`` with half its batch and fewer steps, the learning rate doubled, on every fourth question."""
    rows = [json.loads(line) for line in (p3.demo.FOLDER / "eval.jsonl").read_text().splitlines()][::4]
    model, tokenizer, train_set, _ = p3.demo.load()
    if base_precision is not None:
        quantize_base(model, base_precision)
    torch.manual_seed(0)
    p3.inject_lora(model, p3.LoraConfig(**LORA))
    settings = {**TRAINING, "per_device_train_batch_size": 2, "max_steps": 40, "learning_rate": 2e-3}
    p3.train(model, train_set, quiet_config(tmp_path, **settings))
    assert score(model, tokenizer, rows).exact == 1.0
