"""Cross-entropy of rows of logits, and its gradient, which overwrites the logits.

    loss_t = log sum_v exp(l_tv) - l_t[label_t]          d loss_t / d l_tv = softmax(l_t)_v - (v == label_t)

One program a row: a first loop over the vocabulary keeps a running maximum and sum, a second writes the gradient.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _loss_and_gradient(logits_ptr, labels_ptr, losses_ptr, V: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    at = logits_ptr + row * V
    highest = tl.full([BN], float("-inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, V, BN):
        col = start + tl.arange(0, BN)
        logit = tl.load(at + col, mask=col < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(tl.maximum(highest, logit), -1e30)
        total = total * tl.exp(highest - new) + tl.exp(logit - new)
        highest = new
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    known = (label >= 0) & (label < V)  # another label's loss is NaN, never another row's number
    chosen = tl.load(at + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, log_sum - chosen)
    tl.debug_barrier()
    for start in range(0, V, BN):
        col = start + tl.arange(0, BN)
        logit = tl.load(at + col, mask=col < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(logit - log_sum) - tl.where(col == label, 1.0, 0.0)
        tl.store(at + col, gradient.to(logits_ptr.dtype.element_ty), mask=col < V)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each row's loss, float32 (N,), and overwrite ``logits`` (N, V), contiguous, with the sum's gradient."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    launch(
        _loss_and_gradient, [{"BN": 4096, "num_warps": 8}], lambda block: (logits.shape[0],),
        logits, labels, losses, V=logits.shape[1],
    )  # fmt: skip
    return losses
