"""One packed batch through a causal language model: batch -> hidden states -> (sum of losses, count of tokens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import Phi3ForCausalLM

from ..config import IGNORE_INDEX
from ..errors import ModelError
from ..kernels.decoder import fused_decoder
from ..lora.base_weight import compute_dtype
from ..lora.product import keep_factors
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
        model: a ``Phi3ForCausalLM``, or another causal LM of transformers: a decoder, an output head, and between head
            and logits nothing but a factor and a soft cap.
        batch: what :func:`phi3lora.batches` yields; it is moved to the model's device.
        fused: use the fused kernels where they are supported; False: always transformers' own layers.

    Returns:
        The sum of the cross-entropies, float32 () with gradient, and the number of supervised tokens.

    Raises:
        ModelError: a batch that is not in the packed layout; an attention that cannot keep documents apart; another
            kind of model, or one whose logits are computed in another way.
    """
    require_causal_lm(model)
    with use_backend(model, None if fused else PLAIN) as backend:
        hidden, labels = supervised_hidden_states(model, batch, backend)
        head = output_head(model)
        return linear_cross_entropy(hidden, head, labels, fused=backend.kind == "fused"), labels.numel()


def require_causal_lm(model: nn.Module) -> None:
    """Raise ModelError for a wrapper or another module that is not a causal language model of transformers."""
    if not all(hasattr(model, name) for name in ("config", "get_decoder", "get_output_embeddings")):
        raise ModelError(
            f"a {type(model).__name__} is not a causal language model of transformers; pass the model inside it "
            f"(a DataParallel's is model.module)"
        )


class _ScaledHead(nn.Module):
    """An output head followed by what some architectures do to its logits: a factor, then a soft cap."""

    def __init__(self, head: nn.Module, config: Any) -> None:
        super().__init__()
        self.head = head
        self.factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden) * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


_SAME_LOGITS: WeakSet[nn.Module] = WeakSet()
"""Models of other architectures whose own logits were compared with :func:`output_head`'s."""


def output_head(model: Any) -> nn.Module:
    """Return the module that maps the decoder's output to logits.

    Raises:
        ModelError: not a Phi-3, and the model's own logits differ from these; two tokens are compared, once a model.
    """
    head: nn.Module = model.get_output_embeddings()
    if isinstance(model, Phi3ForCausalLM):
        return head
    head = _ScaledHead(head, model.config)
    if model not in _SAME_LOGITS:
        with eval_mode(model):
            input_ids = torch.arange(1, 3, device=model.get_input_embeddings().weight.device)[None]  # (1, 2)
            logits = model(input_ids=input_ids, use_cache=False).logits.float()  # (1, 2, V)
            ours = head(model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state).float()
        if ours.shape != logits.shape or not (ours - logits).abs().max() <= 0.01 * logits.abs().max():
            raise ModelError(
                f"{type(model).__name__} computes its logits from the output head in a way that is not known here "
                f"(known: logit_scale, logits_scaling, final_logit_softcapping), so its loss would be another one"
            )
        _SAME_LOGITS.add(model)
    return head


def supervised_hidden_states(model: nn.Module, batch: Mapping[str, Any], backend: Backend) -> tuple[Tensor, Tensor]:
    """Return the decoder's output at the positions that predict supervised tokens, (N, H), and those tokens, (N,).

    Only these positions reach the output head. ``labels[t]`` is token t's own id, as in transformers; position t - 1
    predicts it. A document's first token is never supervised, whatever its label: nothing precedes it.

    Args:
        model, batch: as in :func:`causal_lm_loss`.
        backend: what the enclosing :func:`use_backend` yielded.
    """
    missing = [key for key in BATCH_KEYS if key not in batch]
    if missing or "attention_mask" in batch:
        raise ModelError(
            f"a packed batch has {', '.join(BATCH_KEYS)} and no attention_mask; this one has {', '.join(batch)}. "
            f"Make batches with phi3lora.batches(dataset, ...)."
        )
    use_packed_attention(model)
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    flat = batch["labels"].flatten()  # on the CPU, where counting needs no synchronisation
    positions = ((flat != IGNORE_INDEX) & (batch["position_ids"].flatten() > 0)).nonzero().squeeze(1)  # (N,)
    _refuse_mixed_windows(model, batch)
    _refuse_mixed_regimes(model, batch, positions)
    batch = batch_to(batch, weight.device)
    predicting, labels = (_to_device(t, weight.device) for t in (positions - 1, flat[positions]))
    if backend.kind == "fused":
        return fused_decoder(model, batch, predicting), labels
    decoder = model.get_decoder()  # type: ignore[operator]
    kwargs = packed_forward_kwargs(model, batch, compute_dtype(weight, weight))
    hidden = decoder(input_ids=batch["input_ids"], **kwargs).last_hidden_state.flatten(0, 1)  # (B*S, H)
    return hidden.index_select(0, predicting), labels


def _refuse_mixed_windows(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise if documents are longer than a sliding window that only some layers have: all layers get one mask."""
    config: Any = model.config
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if window is not None and kinds - {"sliding_attention"} and int(batch["max_seqlen"]) > window:
        raise ModelError(
            f"{type(model).__name__} has layers with a sliding window of {window} tokens and layers without, and a "
            f"batch has a document of {int(batch['max_seqlen'])} tokens; allowed there: documents of up to {window}"
        )


def _refuse_mixed_regimes(model: nn.Module, batch: Mapping[str, Any], positions: Tensor) -> None:
    """Raise if a batch holds documents on both sides of a longrope model's boundary.

    The largest position in a batch decides whether the model uses its short or its long rotary factors for all tokens.
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


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device``; from the CPU to a GPU through pinned memory, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def batch_to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return ``batch`` with its tensors on ``device``."""
    return {key: _to_device(value, device) if isinstance(value, Tensor) else value for key, value in batch.items()}


# --- Train and eval mode for the time of a block


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode for the block; a model that is in it already never leaves it, so threads can share one."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def train_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Put the model in train mode for the block; restore each module's mode afterwards."""
    return _mode(model, True)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients for the block; restore each module's mode afterwards.

    Layers that are compiled for training run eagerly here: evaluation's shapes would compile them again and again. A
    forward returns an object with names, also where ``model.config.return_dict`` is False.
    """
    config: Any = getattr(model, "config", None)
    return_dict = getattr(config, "return_dict", True)
    with _mode(model, False), torch.no_grad(), torch.compiler.set_stance("force_eager"), keep_factors(model):
        try:
            if not return_dict:
                config.return_dict = True
            yield
        finally:
            if not return_dict:
                config.return_dict = return_dict
