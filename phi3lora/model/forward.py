"""One packed batch through a causal language model: batch -> hidden states -> (sum of losses, count of tokens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import IGNORE_INDEX
from ..errors import ModelError
from ..kernels.decoder import fused_decoder
from ..lora.base_weight import compute_dtype
from .attention import packed_forward_kwargs, use_packed_attention
from .backend import PLAIN, Backend, use_backend
from .load import longrope_boundary
from .loss import linear_cross_entropy

BATCH_KEYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "max_seqlen")
"""Keys of the batches that :func:`phi3lora.batches` yields."""


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any], *, fused: bool = True) -> tuple[Tensor, int]:
    """Return the loss that ``train`` uses: ``(sum, count)`` over the batch's supervised tokens.

    Divide the sum by the count (of all micro-batches and ranks of a step) before ``backward``::

        for batch in p3.batches(chats, batch_size=4):
            loss_sum, count = p3.causal_lm_loss(model, batch)
            (loss_sum / count).backward()

    Args:
        model: a ``Phi3ForCausalLM`` (any transformers causal LM with a decoder and an output head).
        batch: what :func:`phi3lora.batches` yields; it is moved to the model's device.
        fused: let the fused kernels compute layers and loss where they can; False: transformers' own layers.

    Returns:
        The sum of cross-entropies, float32 () with gradient, and how many tokens it is over.

    Raises:
        ModelError: a batch that is not in the packed layout; an attention that cannot keep documents apart.
    """
    with use_backend(model, None if fused else PLAIN) as backend:
        hidden, labels = supervised_hidden_states(model, batch, backend)
        head = model.get_output_embeddings()  # type: ignore[operator]
        return linear_cross_entropy(hidden, head, labels, fused=backend.kind == "fused"), labels.numel()


def supervised_hidden_states(model: nn.Module, batch: Mapping[str, Any], backend: Backend) -> tuple[Tensor, Tensor]:
    """Return the decoder's output where a label follows, (N, H), and those labels, (N,).

    Only these positions reach the output head. ``labels[t]`` is token t's own id, as transformers has it, so the
    position that predicts it is t - 1; the first token of each document carries -100.

    Args:
        model, batch: as in :func:`causal_lm_loss`.
        backend: what :func:`use_backend` gave for the block that this is called in.
    """
    missing = [key for key in BATCH_KEYS if key not in batch]
    if missing or "attention_mask" in batch:
        raise ModelError(
            f"a packed batch has {', '.join(BATCH_KEYS)} and no attention_mask; this one has {', '.join(batch)}. "
            f"Make batches with phi3lora.batches(dataset, ...)."
        )
    use_packed_attention(model)
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    positions, labels = _supervised(batch["labels"], batch["position_ids"])
    _refuse_mixed_regimes(model, batch, positions)
    batch = batch_to(batch, weight.device)
    if backend.kind == "fused":
        hidden = fused_decoder(model, batch)  # (B*S, H)
    else:
        decoder = model.get_decoder()  # type: ignore[operator]
        kwargs = packed_forward_kwargs(model, batch, compute_dtype(weight, weight))
        output = decoder(input_ids=batch["input_ids"], **kwargs)
        hidden = output.last_hidden_state.flatten(0, 1)
    device = weight.device
    return hidden.index_select(0, _to_device(positions - 1, device)), _to_device(labels, device)


def _refuse_mixed_regimes(model: nn.Module, batch: Mapping[str, Any], positions: Tensor) -> None:
    """Raise where a batch mixes documents on both sides of a longrope model's boundary.

    Such a model chooses short or long rotary factors for all its tokens by the largest position in the batch.
    """
    boundary = longrope_boundary(model.config)
    if boundary is None or batch["position_ids"].max() < boundary:
        return
    edges = batch["cu_seqlens"].to(positions)
    documents = torch.bucketize(positions, edges[1:], right=True)
    shortest = int(edges.diff()[documents].min())
    if shortest <= boundary:
        longest = int(batch["position_ids"].max()) + 1
        raise ModelError(
            f"a batch holds documents of {shortest} and of {longest} tokens; this longrope "
            f"model rotates those up to {boundary} and longer ones differently: make batches with boundary={boundary}"
        )


def _supervised(labels: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat positions (N,) of the supervised tokens, and those tokens (N,). Cheap: labels are on the CPU.

    A document's first token is none of them, whatever its label: nothing precedes it.
    """
    flat = labels.flatten()
    positions = ((flat != IGNORE_INDEX) & (position_ids.flatten() > 0)).nonzero().squeeze(1)
    return positions, flat[positions]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; from the CPU to a GPU through pinned memory, without waiting for the copy."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def batch_to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return ``batch`` with its tensors on ``device``."""
    return {key: _to_device(value, device) if isinstance(value, Tensor) else value for key, value in batch.items()}


# --- Train and eval mode for the time of a block


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode inside the block; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients inside the block; afterwards every module has its own mode again.

    Layers that are compiled for training run eagerly here: other shapes would have them compiled again and again.
    """
    with train_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        yield
