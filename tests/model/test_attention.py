"""Packed rows against each document on its own, and the mask against a loop that spells it out."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ATTENTION_VARIANTS, lively_model, packed_batch, random_documents, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Phi3ForCausalLM

from phi3lora.model import attention
from phi3lora.model.attention import (
    _VARLEN_NAMES_GQA,
    NAME,
    _fixed_sizes,
    document_mask,
    packed_attention,
    packed_forward_kwargs,
    packed_layout,
    register,
    use_packed_attention,
)
from phi3lora.model.forward import batch_to

DOCUMENTS = random_documents(9, 5, 1, 7, 12)
ROWS = [DOCUMENTS[:3], DOCUMENTS[3:4], DOCUMENTS[4:]]  # of 15, 7 and 12 tokens


def separate_hidden_states(model: Phi3ForCausalLM, documents: list[list[int]]) -> list[Tensor]:
    """Run each document alone through transformers' own sdpa: (S_i, H) each."""
    model.set_attn_implementation("sdpa")
    device = model.device
    return [model.model(torch.tensor([ids], device=device), use_cache=False).last_hidden_state[0] for ids in documents]


def packed_hidden_states(model: Phi3ForCausalLM, implementation: str, rows: list, length: int) -> list[Tensor]:
    """Run the same documents in packed rows: (S_i, H) each. test_forward.py holds their losses and gradients."""
    register()
    model.set_attn_implementation(implementation)
    batch = batch_to(packed_batch(rows, length), model.device)
    kwargs = packed_forward_kwargs(model, batch, model.dtype)
    hidden = model.model(input_ids=batch["input_ids"], **kwargs).last_hidden_state
    found = []
    for row, documents in zip(hidden, rows, strict=True):
        parts = row.split([*map(len, documents), length - sum(map(len, documents))])
        found += parts[: len(documents)]
    return found


@pytest.mark.parametrize("implementation", [NAME, "sdpa", "eager"])
def test_packed_equals_separate_in_bf16(implementation):
    model = lively_model().to(torch.bfloat16)
    packed = packed_hidden_states(model, implementation, ROWS, 20)
    for got, want in zip(packed, separate_hidden_states(model, DOCUMENTS), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()


# --- The mask


@settings(max_examples=100, derandomize=True, database=None)
@given(st.permutations([1, 2, 3, 6]), st.permutations([1, 4, 7]), st.none() | st.integers(1, 13))
def test_the_mask_shows_each_query_its_own_document_up_to_itself(first, second, window):
    rows = [[(document, i) for document, n in enumerate(lengths) for i in range(n)] for lengths in (first, second)]
    mask = document_mask(torch.tensor([[i for _, i in row] for row in rows]), window)
    near = window or 99
    expected = [[[d == e and 0 <= i - j < near for e, j in row] for d, i in row] for row in rows]
    assert torch.equal(mask, torch.tensor(expected)[:, None])


# --- As an attention of transformers


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=["causal", "sliding-window"])
def test_generation_equals_sdpas(changes):
    model = lively_model(**changes)
    prompts = torch.full((2, 9), 3)
    prompts[0] = torch.tensor(DOCUMENTS[0])
    prompts[1, 4:] = torch.tensor(DOCUMENTS[1])
    attention_mask = torch.ones_like(prompts)
    attention_mask[1, :4] = 0  # padding on the left
    texts = []
    register()
    for implementation in ("sdpa", NAME):
        model.set_attn_implementation(implementation)
        output = model.generate(
            prompts, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
            use_cache=True, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        texts.append((output.sequences, torch.stack(output.logits)))
    assert torch.equal(texts[0][0], texts[1][0])
    torch.testing.assert_close(texts[0][1], texts[1][1])


@pytest.mark.parametrize(("chosen", "used"), [("sdpa", NAME), ("eager", "eager"), (NAME, NAME)])
def test_transformers_default_is_replaced_and_a_choice_kept(chosen, used):
    model = tiny_model()
    register()
    model.set_attn_implementation(chosen)
    use_packed_attention(model)
    assert model.config._attn_implementation == used
    assert packed_forward_kwargs(model, packed_batch(ROWS, 15), torch.float32)["use_cache"] is False


@pytest.mark.parametrize(("documents", "filled"), [(1, 1), (3, 4), (8, 8), (9, 16)])
def test_empty_documents_fill_up_to_a_power_of_two(documents, filled):
    edges = torch.arange(documents + 1, dtype=torch.int32)
    expected = torch.tensor([min(i, documents) for i in range(filled + 1)], dtype=torch.int32)
    torch.testing.assert_close(_fixed_sizes(edges, documents), expected)


# --- Without a mask in memory: a stand-in for torch's kernel on a CPU, the kernel itself on a GPU


def varlen_reference(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
    """``torch.nn.attention.varlen.varlen_attn`` document by document: (tokens, heads, head_dim) each."""
    assert q.dtype == k.dtype == v.dtype and cu_seqlens is cu_seqlens_k
    assert longest == longest_k == cu_seqlens.diff().max() and window_size[1] == 0
    assert enable_gqa == (_VARLEN_NAMES_GQA and q.shape[1] != k.shape[1])
    out = torch.empty_like(q)
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        window = None if window_size[0] == -1 else window_size[0] + 1
        mask = document_mask(torch.arange(stop - start)[None], window)
        one = (t[start:stop].transpose(0, 1)[None] for t in (q, k, v))
        attended = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)
        out[start:stop] = attended[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 4, 8])
def test_attention_over_packed_documents_is_that_under_the_mask(monkeypatch, kv_heads, window):
    """But for a document of window + 1 tokens, whose last position predicts nothing: plain causal, which is faster."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_reference)
    batch, generator = packed_batch([[DOCUMENTS[0]], random_documents(5, 4)], 9), torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)  # rotated in another dtype than v has
    k, v = (torch.randn(2, kv_heads, 9, 8, generator=generator) for _ in range(2))
    attention = lively_model(num_key_value_heads=kv_heads).model.layers[0].self_attn
    layout = {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": batch["max_seqlen"]}
    found, _ = packed_attention(attention, q, k, v, scaling=0.5, sliding_window=window, **layout)
    mask = document_mask(batch["position_ids"], None if window == 8 else window)
    expected, _ = packed_attention(attention, q.float(), k, v, mask, scaling=0.5)
    assert found.dtype == v.dtype and found.shape == (2, 9, 4, 8)
    torch.testing.assert_close(found, expected)
    causal = (
        packed_attention(attention, q.float(), k, v, scaling=0.5, **rows)[0] for rows in ({"full_rows": True}, {})
    )
    torch.testing.assert_close(*causal)  # rows of one document each


@pytest.mark.parametrize(
    ("tokens", "edges", "window", "full"),
    [
        (8, [0, 8, 16], None, True),
        (8, [0, 8, 16], 7, True),  # window + 1 tokens: the last position predicts nothing
        (8, [0, 8, 16], 6, False),
        (8, [0, 3, 8, 16], None, False),
        (16, [0, 7, 16], None, False),  # as many documents as rows, none of them full
    ],
)
def test_the_layout_on_a_gpu_is_full_rows_or_the_documents_edges(tokens, edges, window, full):
    position_ids = SimpleNamespace(is_cuda=True, shape=(2, tokens))
    edges = torch.tensor(edges, dtype=torch.int32)
    batch = {"position_ids": position_ids, "cu_seqlens": edges, "max_seqlen": int(edges.diff().max())}
    expected = {"full_rows": True} if full else {"cu_seq_lens_q": edges, "max_length_q": batch["max_seqlen"]}
    assert packed_layout(SimpleNamespace(sliding_window=window), batch) == expected


GPU_CONFIG = {"hidden_size": 128, "intermediate_size": 96}  # heads of 32
GPU_VARIANTS = {**ATTENTION_VARIANTS, "longrope": {}, "multi-query": {"num_key_value_heads": 1}}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", GPU_VARIANTS.values(), ids=GPU_VARIANTS)
def test_varlen_packed_equals_separate(changes, dtype):
    model = lively_model(**GPU_CONFIG, **changes).to("cuda", dtype)
    documents = random_documents(130, 61, 1, 7, 200)
    rows = [documents[:4], documents[4:]]
    packed = packed_hidden_states(model, NAME, rows, 210)
    for got, want in zip(packed, separate_hidden_states(model, documents), strict=True):
        assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.gpu
def test_varlen_is_what_runs_in_16_bits_and_no_mask_is_made():
    register()
    model = tiny_model(**GPU_CONFIG, attention_dropout=0.1).to("cuda")
    model.set_attn_implementation(NAME)
    batch = batch_to(packed_batch(ROWS, 15), model.device)
    fast = packed_forward_kwargs(model.eval(), batch, torch.bfloat16)
    assert fast["attention_mask"].numel() == 0
    assert torch.equal(fast["cu_seq_lens_q"].unique(), batch["cu_seqlens"])  # filled up with empty documents
    for slow in (
        packed_forward_kwargs(model.train(), batch, torch.bfloat16),  # attention dropout: the kernel has none
        packed_forward_kwargs(model.eval(), batch, torch.float32),
    ):
        assert slow["attention_mask"].shape == (3, 1, 15, 15)
        assert "cu_seq_lens_q" not in slow


@pytest.mark.gpu
@pytest.mark.parametrize("length", [63, 64, 65, 66, 100])
def test_varlen_keeps_the_window_wherever_a_label_can_see_it(length):
    """Through window + 1 tokens only the last position differs from plain causal, and it predicts nothing."""
    model = lively_model(**GPU_CONFIG, sliding_window=64).to("cuda", torch.bfloat16)
    documents = random_documents(length, 20)
    packed = packed_hidden_states(model, NAME, [documents], 128)
    for got, want in zip(packed, separate_hidden_states(model, documents), strict=True):
        assert (got[:-1] - want[:-1]).norm() < 0.03 * want.norm()


def test_the_attention_is_named_with_cudnn_where_it_computes_packed_documents(monkeypatch):
    model = tiny_model()
    attention.use_packed_attention(model)
    assert attention.attention_in_words(model, fused=True) == "phi3lora"
    monkeypatch.setattr(attention, "is_available", lambda device: True)
    assert attention.attention_in_words(model, fused=True) == "phi3lora (packed documents by cuDNN)"
    assert attention.attention_in_words(model, fused=False) == "phi3lora"
    model.set_attn_implementation("eager")
    assert attention.attention_in_words(model, fused=True) == "eager"
