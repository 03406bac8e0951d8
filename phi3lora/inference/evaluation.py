"""``evaluate``: loss, perplexity and token accuracy of a model on a dataset, and ROUGE of its own answers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..data.dataset import ChatDataset
from ..data.loader import batches
from ..data.streaming import ChatStream
from ..errors import DataError
from ..model.forward_pass import supervised_hidden_states
from ..model.loading import longrope_boundary
from ..model.loss import token_losses
from .answers import answer_held_out, load_rouge
from .modes import eval_mode

METRICS = ("loss", "perplexity", "token_accuracy", "n_tokens")
"""What :func:`evaluate` always measures."""


def evaluate(
    model: nn.Module,
    dataset: ChatDataset | ChatStream,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    packing: bool = True,
    fused: bool = True,
    rouge: bool = False,
    tokenizer: Any = None,
    max_samples: int | None = 100,
    max_new_tokens: int = 256,
) -> dict[str, float]:
    """Mean loss over the dataset's supervised tokens, by teacher forcing; with ``rouge``, its own answers too.

    Args:
        model: a Phi-3 causal LM, adapted or not; its modes and weights are left as they are.
        dataset: tokenised documents; a stream is read once to its end.
        batch_size: rows at a time.
        max_length: tokens in a row; None: the dataset's.
        packing: several documents a row; the figures do not depend on it.
        fused: let the fused passes compute the layers where they can; False: always transformers' own layers.
        rouge: also let the model answer, greedily, and hold each answer against the chat's last trained turn
            (package ``rouge-score``, extra ``eval``; its words are ASCII letters and digits).
        tokenizer: the dataset's, for ``rouge``.
        max_samples: the first so many chats are answered; None: all.
        max_new_tokens: the longest answer, in tokens.

    Returns:
        ``loss`` (nats a token, the mean over all supervised tokens), ``perplexity`` (its exponential),
        ``token_accuracy`` (share of tokens whose argmax is right), ``n_tokens`` (how many). With ``rouge`` also
        ``rouge1``, ``rouge2``, ``rougeL`` (F-measures in [0, 1], means over the answers) and ``n_answers``.
        :func:`phi3lora.sample_answers` shows such answers.

    Raises:
        DataError: an empty dataset; ``rouge`` without tokenizer or with no chat that can be answered.
        Phi3LoRAError: ``rouge`` without the package.

    Example:
        >>> sorted(p3.evaluate(model, chats))
        ['loss', 'n_tokens', 'perplexity', 'token_accuracy']
    """
    if rouge and isinstance(dataset, ChatStream):
        raise DataError("rouge=True needs documents that are at hand; give stream.take(100), say")
    score = load_rouge() if rouge else None
    if rouge and tokenizer is None:
        raise DataError("rouge=True needs the tokenizer that the dataset was loaded with: tokenizer=...")
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
    found = {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count, "n_tokens": count}
    if score is not None:
        assert isinstance(dataset, ChatDataset)
        found.update(score(answer_held_out(model, tokenizer, dataset, max_samples, max_new_tokens, batch_size)))
    return found
