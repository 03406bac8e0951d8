"""On a GPU: compiled layers and the kernels for packed rows against the plain path: loss and each gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import packed_batch, random_documents, randomize_adapters, tiny_model
from torch.nn.functional import cosine_similarity

import phi3lora as p3
from phi3lora.model.attention import packed_forward_kwargs, use_packed_attention
from phi3lora.model.forward_pass import batch_to

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LAYOUTS = {"chats": [random_documents(100, 20), random_documents(64, 50, 10)], "full rows": [random_documents(128)] * 2}


def adapted(kv_heads: int):
    model = tiny_model(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads
    )
    p3.inject_lora(model.to("cuda", torch.bfloat16), p3.LoraConfig(r=8))
    randomize_adapters(model)
    return model.train()


def loss_and_gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, count = p3.causal_lm_loss(model, batch)
    (loss / count).backward()
    return loss.item(), {name: p.grad.flatten().double() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fast_path_has_the_plain_paths_loss_and_gradients(layout, kv_heads):
    batch = packed_batch(LAYOUTS[layout], 128)
    model = adapted(kv_heads)
    model.set_attn_implementation("eager")
    loss, gradients = loss_and_gradients(model, batch)
    model.set_attn_implementation("sdpa")  # which use_packed_attention replaces by ours
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    fast_loss, fast = loss_and_gradients(model, batch)
    assert fast_loss == pytest.approx(loss, rel=1e-3)
    for name, gradient in gradients.items():
        assert cosine_similarity(fast[name], gradient, dim=0) >= 0.999, name


def test_rows_of_one_full_document_take_the_dense_causal_kernel_and_others_do_not():
    model = adapted(4)
    use_packed_attention(model)
    taken = {}
    for layout, rows in LAYOUTS.items():
        batch = batch_to(packed_batch(rows, 128), torch.device("cuda"))
        taken[layout] = packed_forward_kwargs(model, batch, torch.bfloat16).get("full_rows", False)
    assert taken == {"chats": False, "full rows": True}
