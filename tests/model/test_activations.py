"""Activation checkpointing against the same pass without it."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import packed_batch, random_documents, randomize_adapters, tiny_model
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.model.activations import HostInputs, activation_checkpointing

BATCH = packed_batch([random_documents(9, 5)], 16)


@pytest.fixture
def adapted() -> nn.Module:
    """In training mode, with adapters that do something."""
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(r=2))
    randomize_adapters(model)
    return model.train()


def switched_on(model: nn.Module) -> int:
    return sum(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def one_step(model: nn.Module, mode: str) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Loss, adapter gradients, and how often an MLP was entered."""
    runs: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda *_: runs.append(1)) for m in model.modules() if isinstance(m, Phi3MLP)]
    with activation_checkpointing(model, mode):
        model.zero_grad()
        loss, _ = p3.causal_lm_loss(model, BATCH)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
    for hook in hooks:
        hook.remove()
    return loss.detach(), gradients, len(runs)


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_recomputing_gives_the_same_loss_and_gradients(adapted, mode):
    loss, gradients, runs = one_step(adapted, "none")
    again, recomputed, more_runs = one_step(adapted, mode)
    assert torch.equal(again, loss)
    for got, want in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(got, want)
    assert runs == 2
    assert more_runs == (
        2 if mode == "selective" else 4
    )  # hooks run around "selective"'s recomputed forward, not in it


def test_selective_recomputes_the_feed_forward_parts_alone(adapted):
    runs: list[str] = []
    for layer in adapted.model.layers:
        for module in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj):
            module.register_forward_pre_hook(lambda module, _: runs.append(str(module.out_features)))
    widths = [str(m.out_features) for m in (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj)]
    one_step(adapted, "selective")
    assert [runs.count(width) for width in widths] == [2, 4]


def test_selective_gives_back_a_forward_that_somebody_replaced(adapted):
    mlp = adapted.model.layers[0].mlp
    mlp.forward = own = lambda x: x
    with activation_checkpointing(adapted, "selective"):
        assert mlp.forward is not own
    assert mlp.forward is own
    assert all("forward" not in vars(layer.mlp) for layer in adapted.model.layers[1:])


def test_dropout_is_recomputed_with_the_same_mask():
    results = []
    for mode in ("none", "full", "offload"):
        model = tiny_model()
        p3.inject_lora(model, p3.LoraConfig(r=2, lora_dropout=0.5))
        randomize_adapters(model)
        torch.manual_seed(1)
        results.append(one_step(model.train(), mode))
    for recomputed in results[1:]:
        for got, want in zip(recomputed[1], results[0][1], strict=True):
            torch.testing.assert_close(got, want)


def three_layers(through) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    layer, h = nn.Linear(4, 4), torch.randn(3, 4)
    for _ in range(3):
        h = through(layer, lambda h: torch.tanh(layer(h)), h)
    return h.sum(), layer


def test_offloaded_inputs_come_back_as_often_as_they_are_asked_for():
    loss, layer = three_layers(HostInputs().checkpoint)
    loss.backward(retain_graph=True)
    loss.backward()
    plain, expected = three_layers(lambda _, function, x: function(x))
    plain.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * expected.weight.grad)


def test_an_input_on_the_host_goes_with_the_graph_that_wanted_it():
    host = HostInputs()
    loss, _ = three_layers(host.checkpoint)
    last = host._last
    assert last() is not None
    del loss
    gc.collect()
    assert last() is None


def test_without_gradients_or_anything_that_learns_nothing_is_offloaded(adapted):
    host, frozen = HostInputs(), nn.Linear(2, 2).requires_grad_(False)
    with torch.no_grad():
        host.checkpoint(nn.Linear(2, 2), torch.sin, torch.zeros(2))
    assert torch.equal(host.checkpoint(frozen, lambda x: x + 1, torch.zeros(2)), torch.ones(2))
    assert host._last is None
    for path, parameter in adapted.named_parameters():  # adapters in the last layer alone
        parameter.requires_grad_("layers.1" in path and "lora_" in path)
    _, kept, _ = one_step(adapted, "none")
    _, recomputed, _ = one_step(adapted, "offload")
    for got, want in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(got, want)


def test_the_model_is_left_as_it_was(adapted):
    with activation_checkpointing(adapted, "full"):
        assert switched_on(adapted) > 0
    assert switched_on(adapted) == 0
    with pytest.raises(KeyboardInterrupt), activation_checkpointing(adapted, "full"):
        raise KeyboardInterrupt
    assert switched_on(adapted) == 0


def test_the_embeddings_still_need_no_gradient(adapted):
    """transformers' own switch makes them, for good: the first layer then computes one that nobody uses."""
    with activation_checkpointing(adapted, "full"):
        assert not adapted.get_input_embeddings()(BATCH["input_ids"]).requires_grad
    assert not adapted.get_input_embeddings()(BATCH["input_ids"]).requires_grad


def test_a_model_that_checkpoints_already_goes_on_doing_so(adapted):
    with activation_checkpointing(adapted, "full"):
        before = switched_on(adapted)
        with activation_checkpointing(adapted, "full"):
            assert switched_on(adapted) == before
        assert switched_on(adapted) == before


def test_another_mode_is_refused(adapted):
    refused = pytest.raises(ModelError, match="'half'; allowed: 'none', 'selective', 'full', 'offload'")
    with refused, activation_checkpointing(adapted, "half"):
        pass


def test_a_model_without_checkpointing_is_refused_only_where_it_is_asked_for():
    model = nn.Linear(2, 2)
    with activation_checkpointing(model, "none"):
        pass
    refused = pytest.raises(ModelError, match="Linear has no layers that can be recomputed")
    with refused, activation_checkpointing(model, "full"):
        pass
