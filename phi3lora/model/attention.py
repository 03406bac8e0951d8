"""Causal attention over packed rows, plugged into transformers through its attention interface.

Why. A row holds many chats end to end; each must see itself alone. transformers infers the documents from restarting
``position_ids``, but only with ``attention_mask=None`` and ``use_cache=False``: leave the cache on, pass an all-ones
mask, or pass ``cu_seq_lens`` to sdpa, and they silently see each other. Here the layout is given, not inferred.

Layout. A batch (B, S) is B*S tokens end to end; document i is the tokens cu_seqlens[i] .. cu_seqlens[i+1]-1.

      B=1, S=6, documents of 3 and 2 tokens, 1 of padding (position 0, a document without labels)
        position_ids  0 1 2 | 0 1 | 0          cu_seqlens  0 3 5 6          max_seqlen  3

Four ways to compute it, equal to rounding:

* CUDA, 16-bit: ``torch.nn.attention.varlen.varlen_attn`` on the (B*S, heads, head_dim) tokens, no mask in memory.
* Hopper and later, with nvidia-cudnn-frontend installed: the same by cuDNN (cudnn_attention.py).
* CUDA, 16-bit, every row one full document: plain causal attention by cuDNN, the fastest kernel for that.
* elsewhere: scaled_dot_product_attention with the dense (B, 1, S, S) mask of :func:`document_mask`.

All keep the checkpoint's sliding window, in which a token sees itself and the ``sliding_window - 1`` before it.
Source: https://huggingface.co/docs/transformers/attention_interface, https://docs.pytorch.org/docs/stable/nn.attention.html

Shapes: B rows, S tokens a row, H heads, H_kv key/value heads, D head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import ModelError
from .cudnn_attention import Documents, cudnn_attention, is_available

NAME = "phi3lora"
"""Name of this attention in ``model.config._attn_implementation``."""

PLAIN_OUTPUT = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Arguments of a forward that returns what is used here and keeps nothing else, whatever ``model.config`` says."""

_SUPPORTED = (NAME, "sdpa", "eager")
_FULL_ROWS_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# torch 2.13 needs an argument for grouped-query heads; 2.11 has no such argument and needs none.
_VARLEN_NAMES_GQA = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def register() -> None:
    """Register ``attn_implementation="phi3lora"`` with transformers. Harmless to repeat."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # generation and plain forwards: exactly sdpa's masks


def use_packed_attention(model: nn.Module) -> None:
    """Switch ``model`` from transformers' default (sdpa) to this attention; keep any other choice of the user."""
    register()
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)  # type: ignore[operator]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    full_rows: bool = False,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers calls it: query (B, H, S, D), key and value (B, H_kv, S, D) -> (B, S, H, D).

    ``cu_seq_lens_q`` (n_documents + 1,) int32 says where the documents of packed rows end, ``documents`` says it for
    cuDNN, and ``full_rows`` says that every row is one document. None of them needs a mask. Without any, this is sdpa.
    """
    if full_rows:
        grouped = key.shape[1] != query.shape[1]
        with sdpa_kernel(_FULL_ROWS_KERNELS, set_priority=True):
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2), None
    if cu_seq_lens_q is None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return attended
    assert max_length_q is not None
    B, H, S, D = query.shape
    # In training the last position of a document has no label: through window + 1 tokens plain causal is exact.
    window = sliding_window if sliding_window is not None and max_length_q > sliding_window + 1 else None
    q, k, v = (t.transpose(1, 2).reshape(B * S, -1, D).to(value.dtype) for t in (query, key, value))
    if documents is not None:
        by_cudnn = cudnn_attention(q, k, v, documents, D**-0.5 if scaling is None else scaling, window)
        if by_cudnn is not None:
            return by_cudnn.view(B, S, H, D), None
    gqa: dict[str, Any] = {"enable_gqa": True} if _VARLEN_NAMES_GQA and k.shape[1] != H else {}
    packed = varlen.varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0), **gqa,
    )  # fmt: skip
    assert isinstance(packed, Tensor)
    return packed.view(B, S, H, D), None


def packed_forward_kwargs(model: nn.Module, batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments with which transformers' decoder computes a packed batch.

    Args:
        model: a causal LM of transformers.
        batch: ``position_ids`` (B, S), ``cu_seqlens`` (n_documents + 1,) int32, ``max_seqlen``, on the model's device.
        dtype: the dtype that attention computes in.

    Raises:
        ModelError: an attention implementation other than this one, sdpa and eager.
    """
    config: Any = model.config
    implementation = config._attn_implementation
    if implementation not in _SUPPORTED:
        raise ModelError(
            f"attention implementation {implementation!r} cannot keep packed documents apart here; allowed: "
            f"{', '.join(_SUPPORTED)}. Load the model with attn_implementation='sdpa'."
        )
    position_ids = batch["position_ids"]
    kwargs: dict[str, Any] = {"position_ids": position_ids, "use_cache": False, **PLAIN_OUTPUT}
    varlen = position_ids.is_cuda and dtype in (torch.bfloat16, torch.float16)
    if implementation == NAME and varlen and not (model.training and config.attention_dropout):
        # transformers passes a 4-D mask on unchanged. Any attention but ours would raise an error at an empty one.
        kwargs["attention_mask"] = torch.empty(0, 0, 0, 0, device=position_ids.device)
        layout = packed_layout(config, batch, few_sizes=True)
        if "full_rows" in layout:
            return {**kwargs, **layout}
        kwargs["cu_seq_lens_q"] = kwargs["cu_seq_lens_k"] = layout["cu_seq_lens_q"]
        kwargs["max_length_q"] = kwargs["max_length_k"] = layout["max_length_q"]
        return kwargs
    mask = document_mask(position_ids, getattr(config, "sliding_window", None))
    if implementation == "eager":  # adds its mask to the scores
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    return {**kwargs, "attention_mask": mask}


def packed_layout(config: Any, batch: Mapping[str, Any], few_sizes: bool = False) -> dict[str, Any]:
    """Return the arguments of :func:`packed_attention` that describe the documents in a batch's rows.

    With ``few_sizes`` they differ little from batch to batch, so that compiled or recorded layers need few graphs.
    """
    rows, tokens = batch["position_ids"].shape
    window = getattr(config, "sliding_window", None)
    if not batch["position_ids"].is_cuda:
        return {"attention_mask": document_mask(batch["position_ids"], window)}
    full_rows = batch["max_seqlen"] == tokens and batch["cu_seqlens"].numel() == rows + 1
    if full_rows and (window is None or tokens <= window + 1):
        return {"full_rows": True}
    if few_sizes:
        return {"cu_seq_lens_q": _fixed_sizes(batch["cu_seqlens"], rows * tokens), "max_length_q": tokens}
    layout = {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": batch["max_seqlen"]}
    if is_available(batch["cu_seqlens"].device):
        layout["documents"] = Documents(batch["cu_seqlens"], int(batch["max_seqlen"]))
    return layout


def attention_in_words(model: nn.Module, fused: bool) -> str:
    """Return the attention's name, and that cuDNN computes it for packed documents where it does in fused layers."""
    config: Any = model.config
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    by_cudnn = fused and config._attn_implementation == NAME and is_available(device)
    return f"{config._attn_implementation}{' (packed documents by cuDNN)' if by_cudnn else ''}"


def _fixed_sizes(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Append empty documents to ``cu_seqlens`` until their number is a power of two: few sizes, so few graphs.

    One size for all batches would be slower, since the attention kernel launches blocks for empty documents too.
    """
    documents = cu_seqlens.numel() - 1
    return torch.nn.functional.pad(cu_seqlens, (0, (1 << (documents - 1).bit_length()) - documents), value=tokens)


def document_mask(position_ids: Tensor, sliding_window: int | None = None) -> Tensor:
    """Return bool (B, 1, S, S), True where query i may see key j: same document, j <= i, within the window.

    A document starts wherever ``position_ids`` (B, S) is 0: ``[0 1 2 0 1]`` is a document of 3 and one of 2.
    """
    document = (position_ids == 0).cumsum(-1)  # (B, S)
    index = torch.arange(position_ids.shape[-1], device=position_ids.device)
    distance = index[:, None] - index[None, :]  # (S, S), query - key
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return (visible & (document[:, :, None] == document[:, None, :]))[:, None]
