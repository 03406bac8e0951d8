"""Cross-entropy of a language-model head, in chunks: the (tokens, vocabulary) logits never exist at once.

    loss = sum over tokens t of -log softmax(head(h_t))[label_t]

For Phi-3 (vocabulary 32,064) the float32 logits of 8,192 tokens take 1 GiB, and their gradient as much again. Here the
forward computes each chunk's gradient right after its loss. It keeps only the gradients of the hidden states and of the
head's trainable parameters. The result is a sum: the caller divides once, by the step's count of supervised tokens.

Shapes: N supervised tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 2048
"""Tokens whose logits are in memory at a time (Phi-3: 125 MiB in 16 bits; without the kernel also 250 in float32)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, chunk: int, fused: bool, *parameters: Tensor
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_parameters = [torch.zeros_like(p) for p in parameters]
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()  # (chunk, H)
                logits = head(h)  # (chunk, V)
                loss, d_logits = _loss_and_gradient(logits, labels[part], fused)
                d_h, *d_p = torch.autograd.grad(logits, [h, *parameters], d_logits, allow_unused=True)
            total += loss
            d_hidden[part] = d_h
            for accumulated, gradient in zip(d_parameters, d_p, strict=True):
                if gradient is not None:  # None where the head's adapter is switched off
                    accumulated += gradient
        ctx.save_for_backward(d_hidden, *d_parameters)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_parameters = ctx.saved_tensors
        d_hidden = (d_hidden.float() * scale).to(d_hidden.dtype)
        return d_hidden, None, None, None, None, *(d * scale for d in d_parameters)


def _loss_and_gradient(logits: Tensor, labels: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """Return the rows' summed cross-entropy, float32 (), and its gradient in the logits' dtype (n, V)."""
    if fused and logits.is_cuda and importlib.util.find_spec("triton") is not None:
        from ..kernels.cross_entropy import cross_entropy_

        d_logits = logits.detach().contiguous()  # the gradient overwrites them
        return cross_entropy_(d_logits, labels).sum(), d_logits
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf.float(), labels, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def linear_cross_entropy(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk_tokens: int = CHUNK_TOKENS, fused: bool = True
) -> Tensor:
    """Return the sum of the tokens' cross-entropies, float32 ().

    Args:
        hidden: (N, H), the decoder's output at the supervised positions only.
        head: maps (n, H) to logits (n, V); its trainable parameters (an adapter's, say) get their gradients.
        labels: (N,) int64, the token that follows each position.
        chunk_tokens: number of tokens whose logits are in memory at a time.
        fused: on a GPU, let a Triton kernel overwrite the logits with their gradient.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, labels, head, chunk_tokens, fused, *parameters)  # type: ignore[no-untyped-call]
        return loss
    return token_losses(hidden, head, labels, chunk_tokens)[0].sum()


@torch.no_grad()
def token_losses(
    hidden: Tensor, head: nn.Module, labels: Tensor, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy, float32 (N,), and whether its argmax is the label, bool (N,); no gradient."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = head(hidden[part]).float()  # (chunk, V)
        losses[part] = F.cross_entropy(logits, labels[part], reduction="none")
        correct[part] = logits.argmax(-1) == labels[part]
    return losses, correct
