"""Attention by cuDNN against separate documents: rounding of sizes on a CPU, the numbers on a GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from phi3lora.model.cudnn_attention import Documents, cudnn_attention, is_available, is_supported


def test_documents_are_padded_with_empty_ones_and_sizes_to_powers_of_two():
    documents = Documents(torch.tensor([0, 3, 5, 300], dtype=torch.int32), longest=295)
    assert (documents.count, documents.longest) == (8, 512)
    assert documents.starts.tolist() == [0, 3, 5] + 6 * [300]
    assert documents.lengths.tolist() == [3, 2, 295] + 5 * [0]
    assert documents.offsets(8).tolist() == [8 * start for start in documents.starts.tolist()]
    assert documents.offsets(8) is documents.offsets(8) and documents.offsets(8).dtype == torch.int32


@pytest.mark.parametrize(("head_dim", "supported"), [(96, True), (128, True), (160, False), (60, False)])
def test_heads_that_are_not_supported_are_left_to_torch(head_dim, supported):
    assert is_supported(torch.empty(2, 4, 16, head_dim, device="meta")) == supported


def test_it_is_not_used_without_a_gpu():
    assert not is_available(torch.device("cpu"))


def separate(q, k, v, cu_seqlens, scale, window):
    """Attention document by document, with a dense mask, in the tensors' dtype."""
    outputs = []
    for start, stop in pairwise(cu_seqlens):
        parts = [t[start:stop].transpose(0, 1)[None] for t in (q, k, v)]
        distance = torch.arange(stop - start, device=q.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < (window or 10**9))
        out = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 96), (4, 2, 128), (8, 2, 64)])
@pytest.mark.parametrize("lengths", [[100, 20, 300, 1, 91], [512], [7] * 30])
def test_packed_equals_separate(lengths, heads, kv_heads, head_dim, window):
    device = torch.device("cuda")
    if not is_available(device):
        pytest.skip("needs nvidia-cudnn-frontend and a Hopper GPU")
    torch.manual_seed(0)
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    # rows wider than a tensor's own, as in the fused qkv product
    qkv = torch.randn(edges[-1], heads + 2 * kv_heads, head_dim, device=device)
    exact = [t.clone().requires_grad_() for t in qkv.split([heads, kv_heads, kv_heads], 1)]
    own = [t.detach().requires_grad_() for t in qkv.bfloat16().split([heads, kv_heads, kv_heads], 1)]
    dout = torch.randn(edges[-1], heads, head_dim, device=device)
    expected = separate(*exact, edges, 0.1, window)
    documents = Documents(torch.tensor(edges, dtype=torch.int32, device=device), max(lengths))
    found = cudnn_attention(*own, documents, 0.1, window)
    found.backward(dout.bfloat16())
    expected.backward(dout)
    for ours, theirs in ((found, expected), *((a.grad, b.grad) for a, b in zip(own, exact, strict=True))):
        assert (ours.float() - theirs).norm() / theirs.norm() < 0.01
