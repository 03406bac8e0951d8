"""The chunked cross-entropy against ``F.cross_entropy`` on all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize_adapters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import phi3lora as p3
from phi3lora.model.loss import linear_cross_entropy, token_losses


def heads() -> dict[str, nn.Module]:
    """Output heads of 7 hidden and 11 tokens: frozen, trainable with bias, with an adapter."""
    torch.manual_seed(0)
    frozen, trainable, adapted = nn.Linear(7, 11, bias=False), nn.Linear(7, 11), p3.Linear(7, 11, r=2, lora_alpha=4)
    frozen.weight.requires_grad = adapted.bias.requires_grad = False
    randomize_adapters(adapted, std=1)
    return {"frozen": frozen, "trainable": trainable, "adapted": adapted}


def data(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, 7, generator=generator), torch.randint(11, (tokens,), generator=generator)


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in (hidden, *head.parameters()) if t.requires_grad]))


@settings(max_examples=60, derandomize=True, database=None)
@given(st.integers(1, 20), st.integers(1, 25), st.sampled_from(sorted(heads())), st.booleans())
@example(0, 4, "adapted", True)  # no supervised tokens
def test_any_chunk_size_gives_cross_entropys_sum_and_gradients(tokens, chunk, name, trains):
    head, (hidden, labels) = heads()[name], data(tokens)
    hidden.requires_grad = trains or name == "frozen"  # else the decoder is frozen and the head trains
    loss = linear_cross_entropy(hidden, head, labels, chunk)
    want = F.cross_entropy(head(hidden), labels, reduction="sum")
    with torch.no_grad():
        without_gradient = linear_cross_entropy(hidden, head, labels, chunk)
    assert loss.dtype == torch.float32 and not without_gradient.requires_grad
    torch.testing.assert_close((loss, without_gradient), (want, want.detach()))
    ours, reference = gradients(-3 * loss, hidden, head), gradients(-3 * want, hidden, head)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_a_head_whose_adapter_is_switched_off_still_trains_the_decoder():
    head, (hidden, labels) = heads()["adapted"], data(9)
    hidden.requires_grad = True
    with p3.disabled(head):
        loss = linear_cross_entropy(hidden, head, labels, 4)
        loss.backward()
        want = F.cross_entropy(F.linear(hidden, head.weight, head.bias), labels, reduction="sum")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(want, hidden)[0])
    assert head.lora_A.grad is None or not head.lora_A.grad.any()


def test_bf16_logits_are_summed_in_float32():
    head = heads()["frozen"].to(torch.bfloat16)
    hidden, labels = data(2000)
    hidden = hidden.to(torch.bfloat16).requires_grad_()
    loss = linear_cross_entropy(hidden, head, labels, 7)
    want = F.cross_entropy(head(hidden).float(), labels, reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # a bf16 sum would be off by 1 % and more
    torch.testing.assert_close(torch.autograd.grad(loss, hidden), torch.autograd.grad(want, hidden))  # in bf16


@pytest.mark.parametrize("name", ["trainable", "adapted"])
def test_within_autocast_chunks_give_the_gradients_of_one_chunk(name):
    head, (hidden, labels) = heads()[name], data(9)
    hidden.requires_grad = True
    results = []
    for chunk in (2, 9):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, head, labels, chunk)
        results.append([loss, *gradients(loss, hidden, head)])
    assert len(results[0]) == 4  # the loss, d hidden, and the head's own two
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_logits_than_a_chunk_exist_at_once(grad):
    head, (hidden, labels) = heads()["frozen"], data(10)
    sizes: list[int] = []
    head.register_forward_hook(lambda module, args, logits: sizes.append(logits.shape[0]))
    with torch.set_grad_enabled(grad):
        linear_cross_entropy(hidden.requires_grad_(), head, labels, 4)
    assert sizes == [4, 4, 2]


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_token_losses_are_cross_entropys_and_say_which_argmax_is_right(chunk):
    head, (hidden, labels) = heads()["adapted"], data(13)
    logits = head(hidden)
    labels[::2] = logits.argmax(-1)[::2]
    losses, correct = token_losses(hidden, head, labels, chunk)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none").detach())
    assert torch.equal(correct, logits.argmax(-1) == labels)
    assert 7 <= correct.sum() < 13
    assert not losses.requires_grad
