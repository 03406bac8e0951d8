"""One layer's adapter as loralib's classes hold it and as PEFT does: the same numbers, only moved. Exact both ways.

PEFT knows one pair a module, and so does what reads its files: y += scaling * B (A x).

    Linear        A (r, in)     B (out, r)      the same
    Embedding     A (r, num)    B (dim, r)      the same, under the names lora_embedding_A and lora_embedding_B
    MergedLinear  A' (k r, in) = lora_A         B' (out, k r): lora_B's segments on the diagonal, zeros elsewhere

                  segments 2 | 1 | 1, enable_lora (True, False, True), r 1
                      lora_B  [1]      B'  [1 0]
                              [2]          [2 0]
                              [3]          [0 0]    the segment that is off
                                           [0 3]
    Conv2d        loralib's delta is B A of shape (out*n, in*n), read as (out, in, n, n) for a kernel of n x n. As a
                  matrix (out, in*n*n) it is B' A': n copies of lora_A on the diagonal,
                  and lora_B read as (out, n*r*n)

``facts`` are a layer's settings as ``files.adapter_facts`` gives them; the class and ``r`` are in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Facts = Mapping[str, Any]


class Pair(NamedTuple):
    """An adapter as PEFT has it: A (rank, ...), B (out, rank, ...)."""

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """PEFT's rank: k * r for a MergedLinear with k enabled segments."""
        return self.A.shape[0]

    def padded(self, rank: int) -> Pair:
        """The same product at a larger rank: rows of zeros below A, columns of zeros right of B."""
        more = rank - self.rank
        A = torch.cat([self.A, self.A.new_zeros((more, *self.A.shape[1:]))])
        B = torch.cat([self.B, self.B.new_zeros((self.B.shape[0], more, *self.B.shape[2:]))], dim=1)
        return Pair(A, B)

    def truncated(self, rank: int) -> Pair:
        """The inverse of :meth:`padded`."""
        return Pair(self.A[:rank], self.B[:, :rank])


def to_peft(facts: Facts, lora_A: Tensor, lora_B: Tensor) -> Pair:
    """loralib's tensors of one layer -> PEFT's pair."""
    if facts["class"] == "MergedLinear":
        return Pair(lora_A, _block_diagonal(facts, lora_B))
    if facts["class"] == "Conv2d":
        rows, columns = lora_A.shape  # r n, in n
        n = rows // facts["r"]
        A = torch.block_diag(*[lora_A] * n).view(n * rows, columns // n, n, n)
        return Pair(A, lora_B.reshape(-1, n * rows, 1, 1))
    return Pair(lora_A, lora_B)


def from_peft(facts: Facts, pair: Pair) -> tuple[Tensor, Tensor]:
    """PEFT's pair of a layer that :func:`to_peft` wrote (its padding may still be there) -> loralib's tensors."""
    r = facts["r"]
    if facts["class"] == "MergedLinear":
        pair = pair.truncated(r * sum(facts["enable_lora"]))
        blocks = [pair.B[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(_spans(facts))]
        return pair.A, torch.cat(blocks)
    if facts["class"] == "Conv2d":
        n = pair.A.shape[-1]
        rows, columns = r * n, pair.A.shape[1] * n
        A, B = pair.truncated(n * rows)
        return A.reshape(n * rows, n * columns)[:rows, :columns], B.reshape(-1, rows)
    pair = pair.truncated(r)
    return pair.A, pair.B


def conv_from_peft(pair: Pair) -> tuple[Tensor, Tensor]:
    """Any pair of PEFT's for a Conv2d, A (r, in, n, n) and B (out, r, 1, 1), -> loralib's tensors at the same rank."""
    r, channels, n, _ = pair.A.shape
    return pair.A.reshape(r * n, channels * n), torch.kron(pair.B[:, :, 0, 0], torch.eye(n))


def layer_pairs(
    path: str, facts: Facts, segments: Mapping[str, int] | None, lora_A: Tensor, lora_B: Tensor
) -> dict[str, Pair]:
    """One layer's tensors -> path -> pair of each module that it is in PEFT's file.

    Args:
        segments: name -> width: as the separate modules that a fused layer stands for; None: as the one module it is.
            A plain ``Linear`` on a fused matrix acts on all segments through one A: each gets a copy.
    """
    if segments is None:
        return {path: to_peft(facts, lora_A, lora_B)}
    names = _separate(path, facts, segments)
    widths = [segments[name] for name in names.values()]
    merged = facts["class"] == "MergedLinear"
    As = lora_A.split(facts["r"]) if merged else [lora_A] * len(names)
    return {at: Pair(A, B) for at, A, B in zip(names, As, lora_B.split(widths), strict=True)}


def layer_tensors(
    path: str, facts: Facts, segments: Mapping[str, int] | None, pairs: Mapping[str, Pair]
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`layer_pairs`; padding is cut off."""
    if segments is None:
        return from_peft(facts, pairs[path])
    parts = [pairs[at].truncated(facts["r"]) for at in _separate(path, facts, segments)]
    A = torch.cat([pair.A for pair in parts]) if facts["class"] == "MergedLinear" else parts[0].A
    return A, torch.cat([pair.B for pair in parts])


def _separate(path: str, facts: Facts, segments: Mapping[str, int]) -> dict[str, str]:
    """Path of each adapted segment as a module of its own -> its name."""
    parent = path[: path.rfind(".") + 1]
    enabled = facts["enable_lora"] if facts["class"] == "MergedLinear" else [True] * len(segments)
    return {parent + name: name for name, on in zip(segments, enabled, strict=True) if on}


def _spans(facts: Facts) -> list[tuple[int, int]]:
    """Output rows of the enabled segments, in order."""
    spans, start = [], 0
    for width, enabled in zip(facts["segments"], facts["enable_lora"], strict=True):
        if enabled:
            spans.append((start, start + width))
        start += width
    return spans


def _block_diagonal(facts: Facts, lora_B: Tensor) -> Tensor:
    """(sum of enabled widths, r) -> (out, k r)."""
    r, spans = facts["r"], _spans(facts)
    B = lora_B.new_zeros(sum(facts["segments"]), r * len(spans))
    blocks = lora_B.split([stop - start for start, stop in spans])
    for i, ((start, stop), block) in enumerate(zip(spans, blocks, strict=True)):
        B[start:stop, i * r : (i + 1) * r] = block
    return B
