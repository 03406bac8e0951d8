"""Activation checkpointing against the same forward and backward without it."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import adapted_model, packed_batch, random_documents
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.model.activations import HostInputs, activation_checkpointing

BATCH = packed_batch([random_documents(9, 5)], 16)


@pytest.fixture
def adapted() -> nn.Module:
    return adapted_model(lora_dropout=0.5).train()  # recomputing has to draw the same masks again


def switched_on(model: nn.Module) -> int:
    return sum(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def one_step(model: nn.Module, mode: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and adapter gradients."""
    with activation_checkpointing(model, mode):
        model.zero_grad()
        torch.manual_seed(1)
        loss, _ = p3.causal_lm_loss(model, BATCH)
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("mode", "mlps", "qkvs", "gate_ups"), [("selective", 2, 2, 4), ("full", 4, 4, 4), ("offload", 4, 4, 4)]
)
def test_recomputing_gives_the_same_loss_and_gradients(adapted, mode, mlps, qkvs, gate_ups):
    """And runs no more modules twice than the mode says; hooks on an mlp are outside what "selective" recomputes."""
    loss, gradients = one_step(adapted, "none")
    calls: list[str] = []
    for name, module in adapted.named_modules():
        if isinstance(module, Phi3MLP) or name.endswith(("qkv_proj", "gate_up_proj")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name.rpartition(".")[2]))
    again, recomputed = one_step(adapted, mode)
    assert torch.equal(again, loss)
    torch.testing.assert_close(recomputed, gradients)
    assert [calls.count(name) for name in ("mlp", "qkv_proj", "gate_up_proj")] == [mlps, qkvs, gate_ups]


# --- Inputs on the host


def test_inputs_go_to_the_host_whatever_torch_s_default_device_is(adapted):
    expected = one_step(adapted, "offload")[1]
    with torch.device("meta"):
        found = one_step(adapted, "offload")[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def three_layers(through) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    layer, h = nn.Linear(4, 4), torch.randn(3, 4)
    for _ in range(3):
        h = through(layer, lambda h: torch.tanh(layer(h)), h)
    return h.sum(), layer


def test_offloaded_inputs_serve_every_backward_and_go_with_the_graph():
    host = HostInputs()
    loss, layer = three_layers(host.checkpoint)
    loss.backward(retain_graph=True)
    loss.backward()
    plain, expected = three_layers(lambda _, function, x: function(x))
    plain.backward()
    torch.testing.assert_close(layer.weight.grad, 2 * expected.weight.grad)
    last = host._last
    loss, _ = three_layers(host.checkpoint)
    assert host._last is not last and host._last() is not None
    last = host._last
    del loss
    gc.collect()
    assert last() is None


def test_nothing_is_offloaded_without_gradients_or_trainable_parameters(adapted):
    host, frozen = HostInputs(), nn.Linear(2, 2).requires_grad_(False)
    with torch.no_grad():
        host.checkpoint(nn.Linear(2, 2), torch.sin, torch.zeros(2))
    assert torch.equal(host.checkpoint(frozen, lambda x: x + 1, torch.zeros(2)), torch.ones(2))
    assert host._last is None
    for path, parameter in adapted.named_parameters():  # adapters in the last layer alone
        parameter.requires_grad_("layers.1" in path and "lora_" in path)
    torch.testing.assert_close(one_step(adapted, "offload")[1], one_step(adapted, "none")[1])


# --- The switch


def test_the_model_is_left_as_it_was(adapted):
    mlp = adapted.model.layers[0].mlp
    mlp.forward = own = lambda x: x  # somebody has replaced it
    for mode in ("full", "offload", "selective"):
        with pytest.raises(KeyboardInterrupt), activation_checkpointing(adapted, mode):
            assert switched_on(adapted) > 0 or mlp.forward is not own
            raise KeyboardInterrupt
        assert switched_on(adapted) == 0 and mlp.forward is own
        assert all("forward" not in vars(layer.mlp) for layer in adapted.model.layers[1:])
    with activation_checkpointing(adapted, "full"):  # a model that recomputes already goes on doing so
        before = switched_on(adapted)
        with activation_checkpointing(adapted, "full"):
            assert switched_on(adapted) == before
        assert switched_on(adapted) == before


def test_the_embeddings_still_need_no_gradient(adapted):
    """With transformers' own switch they do, for good: the first layer then computes one that nobody uses."""
    with activation_checkpointing(adapted, "full"):
        inside = adapted.get_input_embeddings()(BATCH["input_ids"])
    assert not inside.requires_grad and not adapted.get_input_embeddings()(BATCH["input_ids"]).requires_grad


def test_an_unknown_mode_and_a_model_without_such_layers_are_errors():
    model = nn.Linear(2, 2)
    with activation_checkpointing(model, "none"):
        pass
    for mode, message in (("half", "'none', 'selective'"), ("full", "Linear has no layers")):
        with pytest.raises(ModelError, match=message), activation_checkpointing(model, mode):
            pass
