"""``evaluate``: loss, perplexity and token accuracy of a model on a dataset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..data.dataset import ChatDataset
from ..data.loader import batches
from ..model.forward_pass import supervised_hidden_states
from ..model.loading import longrope_boundary
from ..model.loss import token_losses

METRICS = ("loss", "perplexity", "token_accuracy", "n_tokens")
"""What :func:`evaluate` measures."""


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` without gradients, and every module's own mode back afterwards.

    Layers that are compiled for training run as they are: other shapes would have them compiled again and again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def evaluate(
    model: nn.Module,
    dataset: ChatDataset,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    packing: bool = True,
    fused: bool = True,
) -> dict[str, float]:
    """Mean loss over the dataset's supervised tokens, by teacher forcing.

    Args:
        model: a Phi-3 causal LM, adapted or not; its modes and weights are left as they are.
        dataset: tokenised documents.
        batch_size: rows at a time.
        max_length: tokens in a row; None: the dataset's.
        packing: several documents a row; the figures do not depend on it.
        fused: let the fused passes compute the layers where they can; False: always transformers' own layers.

    Returns:
        ``loss`` (nats a token, the mean over all supervised tokens), ``perplexity`` (its exponential),
        ``token_accuracy`` (share of tokens whose argmax is right), ``n_tokens`` (how many).

    Raises:
        DataError: an empty dataset.

    Example:
        >>> sorted(p3.evaluate(model, chats))
        ['loss', 'n_tokens', 'perplexity', 'token_accuracy']
    """
    loss_sum, correct, count = 0.0, 0, 0
    with eval_mode(model):
        for batch in batches(
            dataset,
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
            shuffle=False,
            boundary=longrope_boundary(model.config),
        ):
            hidden, labels = supervised_hidden_states(model, batch, fused=fused)
            losses, right = token_losses(hidden, model.get_output_embeddings(), labels)  # type: ignore[operator]
            loss_sum += losses.double().sum().item()
            correct += int(right.sum())
            count += labels.numel()
    loss = loss_sum / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count, "n_tokens": count}
