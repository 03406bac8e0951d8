"""Attention by cuDNN against separate documents: rounding of sizes on a CPU, the numbers on a GPU."""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from phi3lora.model import cudnn_attention as cudnn_attention_file
from phi3lora.model.cudnn_attention import Documents, cudnn_attention, is_available


def test_documents_are_padded_with_empty_ones_and_sizes_to_powers_of_two():
    documents = Documents(torch.tensor([0, 3, 5, 300], dtype=torch.int32), longest=295)
    assert (documents.count, documents.longest) == (8, 512)
    assert documents.starts.tolist() == [0, 3, 5] + 6 * [300]
    assert documents.lengths.tolist() == [3, 2, 295] + 5 * [0]
    assert documents.offsets(8).tolist() == [8 * start for start in documents.starts.tolist()]
    assert documents.offsets(8) is documents.offsets(8) and documents.offsets(8).dtype == torch.int32


def test_what_cudnn_does_not_support_is_left_to_torch_with_one_warning(monkeypatch, caplog):
    def unsupported(*settings):
        raise RuntimeError("no engine")

    monkeypatch.setattr(cudnn_attention_file, "_Graph", unsupported)
    cudnn_attention_file._graphs.cache_clear()
    q = torch.zeros(5, 4, 512)
    documents = Documents(torch.tensor([0, 3, 5], dtype=torch.int32), 3)
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert cudnn_attention(q, q, q, documents, 0.1) is None
        assert cudnn_attention(q, q, q, documents, 0.1) is None
    cudnn_attention_file._graphs.cache_clear()
    assert (
        len(caplog.records) == 1
        and "no attention for 4 and 4 heads of 512, window None (RuntimeError: no engine)" in caplog.text
    )


def test_batches_of_other_sizes_share_few_graphs(monkeypatch):
    made = []
    monkeypatch.setattr(cudnn_attention_file, "_Graph", lambda backward, *settings: made.append(settings))
    monkeypatch.setattr(cudnn_attention_file._CudnnAttention, "apply", lambda q, *others: q)
    cudnn_attention_file._graphs.cache_clear()
    for tokens in range(2000, 8200, 7):  # as without packing, where a batch is as wide as its longest document
        q = torch.empty(tokens, 32, 96, device="meta")
        documents = Documents(torch.tensor([0, tokens // 2, tokens], dtype=torch.int32), tokens // 2)
        assert cudnn_attention(q, q, q, documents, 0.1) is q
    cudnn_attention_file._graphs.cache_clear()
    reserved = {settings[7] for settings in made}
    assert len(made) <= 2 * 12 and 8192 in reserved and max(reserved) < 1.3 * 8200


def test_prompts_of_one_to_three_tokens_have_a_graph_too(monkeypatch):
    made = []
    monkeypatch.setattr(cudnn_attention_file, "_Graph", lambda backward, *settings: made.append(settings[7]))
    monkeypatch.setattr(cudnn_attention_file._CudnnAttention, "apply", lambda q, *others: q)
    cudnn_attention_file._graphs.cache_clear()
    for tokens in (1, 2, 3):
        q = torch.empty(tokens, 32, 96, device="meta")
        documents = Documents(torch.tensor([0, tokens], dtype=torch.int32), tokens)
        assert cudnn_attention(q, q, q, documents, 0.1) is q
    cudnn_attention_file._graphs.cache_clear()
    assert set(made) == {1024}


@pytest.mark.parametrize("package", [types.ModuleType("cudnn"), None], ids=["another package", "none"])
def test_a_package_that_does_not_work_is_not_used(monkeypatch, caplog, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package if name == "cudnn" else find_spec(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    is_available.cache_clear()
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        assert not is_available(torch.device("cuda"))
    is_available.cache_clear()
    assert len(caplog.records) == (package is not None)
    assert package is None or "nvidia-cudnn-frontend cannot be used" in caplog.text


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
@pytest.mark.parametrize("lengths", [[100, 20, 300, 1, 91], [512], [7] * 30, [3]])
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
