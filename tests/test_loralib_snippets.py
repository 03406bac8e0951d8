"""The save and load snippets of loralib's README work on our layers and on loralib's, in every combination."""

from __future__ import annotations

import loralib as lora
import pytest
import torch
from conftest import lively_model, randomize_adapters
from torch import nn

import phi3lora as p3

IDS = torch.arange(10, 30)[None]
R, ALPHA = 2, 4
SEGMENTS = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 2, "down_proj": 1}


def ours(seed: int) -> nn.Module:
    """A model adapted by phi3lora; multi-head, so that q, k and v are equal segments, which loralib supports."""
    model = lively_model(num_key_value_heads=4)
    p3.inject_lora(model, p3.LoraConfig(r=R, lora_alpha=ALPHA))
    randomize_adapters(model, seed)
    return model


def loralibs(seed: int) -> nn.Module:
    """The same model with its layers replaced by loralib's."""
    model = lively_model(num_key_value_heads=4)
    settings = {"r": R, "lora_alpha": ALPHA, "merge_weights": False, "bias": False}
    for path, base in [(p, m) for p, m in model.named_modules() if p.rpartition(".")[2] in SEGMENTS]:
        parent, _, name = path.rpartition(".")
        kind = {} if SEGMENTS[name] == 1 else {"enable_lora": [True] * SEGMENTS[name]}
        new = (lora.MergedLinear if kind else lora.Linear)(base.in_features, base.out_features, **kind, **settings)
        new.load_state_dict(base.state_dict(), strict=False)
        setattr(model.get_submodule(parent), name, new)
    lora.mark_only_lora_as_trainable(model)
    randomize_adapters(model, seed)
    return model


@pytest.mark.parametrize("build", [ours, loralibs])
@pytest.mark.parametrize("build_other", [ours, loralibs])
def test_a_checkpoint_loads_into_either_kind_of_model(build, build_other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build(seed=0)
    want = model(IDS).logits
    torch.save(lora.lora_state_dict(model), "ckpt_lora.pt")
    model = build_other(seed=1)
    assert not torch.allclose(model(IDS).logits, want, atol=0.1)
    model.load_state_dict(torch.load("ckpt_lora.pt"), strict=False)
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_the_pretrained_weights_load_first_and_the_lora_checkpoint_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(lively_model(num_key_value_heads=4).state_dict(), "ckpt_pretrained.pt")
    tuned = ours(seed=0)
    torch.save(lora.lora_state_dict(tuned), "ckpt_lora.pt")

    model = ours(seed=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    # Load the pretrained checkpoint first
    model.load_state_dict(torch.load("ckpt_pretrained.pt"), strict=False)
    # Then load the LoRA checkpoint
    model.load_state_dict(torch.load("ckpt_lora.pt"), strict=False)

    assert torch.equal(model(IDS).logits, tuned(IDS).logits)


def test_mark_only_lora_as_trainable_agrees_with_the_injection():
    model = ours(seed=0)
    injected = [name for name, p in model.named_parameters() if p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad = True
    lora.mark_only_lora_as_trainable(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == injected
    assert injected == [name for name, p in loralibs(seed=0).named_parameters() if p.requires_grad]
    assert len(injected) == 2 * 4 * 2


def test_one_training_step_equals_loralib_s():
    start, steps = lora.lora_state_dict(ours(seed=0)), []
    for build in (ours, loralibs):
        model = build(seed=0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        steps.append(lora.lora_state_dict(model))
    for key in start:
        moved, reference = steps[0][key] - start[key], steps[1][key] - start[key]
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(moved, reference, rtol=1e-3, atol=1e-6)
