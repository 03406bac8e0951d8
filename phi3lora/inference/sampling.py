"""How the next token is chosen from logits: the likeliest one, or a draw that depends on the prompt alone.

transformers' own sampling draws the rows of a batch from one generator, so they depend on one another. Here each prompt
has a generator, so its answer is the same whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of sampled answers are drawn; prompt ``i`` of a list draws with the seed ``first_seed + i``."""

    temperature: float
    top_p: float
    top_k: int
    first_seed: int

    def warpers(self) -> list[LogitsProcessor]:
        """Return what turns logits into the scores whose softmax is drawn from."""
        found: list[LogitsProcessor] = [Temperature(self.temperature)]
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        return found

    def processors(self, prompts: Sequence[int]) -> LogitsProcessorList:
        """Return what turns the logits of these prompts, by their numbers, into scores whose largest is the draw."""
        return LogitsProcessorList([*self.warpers(), Draw([self.first_seed + i for i in prompts])])


class Temperature(LogitsProcessor):
    """Divide scores by a temperature, the largest of a row at zero: no temperature makes scores infinite or NaN.

    Below 1e-30, distinct float32 scores are so far apart that only the largest is ever drawn; above 1e30 all are equal.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = min(max(temperature, 1e-30), 1e30)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        return (scores - scores.amax(-1, keepdim=True)) / self.temperature


class Draw(LogitsProcessor):
    """Add Gumbel noise to each row from a generator of its own; the largest sum is a sample of the row's softmax.

    ``-log E`` with E exponential is Gumbel's distribution (https://arxiv.org/abs/1611.01144, section 2).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        return add_gumbel_noise(scores, self.generators)


def add_gumbel_noise(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return scores (B, V) plus noise, each row's from its generator."""
    noise = torch.empty_like(scores)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return scores - noise.log()


class TokenChoice:
    """Chooses the next token of each row; a row serves one prompt after another.

    Args:
        sampling: how to draw; None: take the likeliest token.
        repetition_penalty: what divides the positive logits, and multiplies the negative ones, of tokens in the prompt
            or the answer.
        slots: the number of rows.
    """

    def __init__(self, sampling: Sampling | None, repetition_penalty: float, slots: int) -> None:
        self.sampling, self.penalty = sampling, repetition_penalty
        self.is_greedy = sampling is None and repetition_penalty == 1
        self._warpers = sampling.warpers() if sampling else []
        self._generators: dict[int | None, torch.Generator] = {}  # by the prompt's number; None: of idle rows
        self._numbers: list[int | None] = [None] * slots
        self._seen: Tensor | None = None  # (slots, V), with a penalty
        self._starting: dict[int, Sequence[int]] = {}

    def start(self, row: int, number: int, prompt: Sequence[int]) -> None:
        """Let a row serve another prompt, given its number in the list and its tokens."""
        self._numbers[row], self._starting[row] = number, prompt

    def stop(self, row: int) -> None:
        """Let a row serve no prompt; a prompt that starts again continues its draws."""
        self._numbers[row] = None

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let rows ``targets`` continue what rows ``sources`` serve."""
        for source, target in zip(sources, targets, strict=True):
            self._numbers[target], self._numbers[source] = self._numbers[source], None
        if self._seen is not None:
            self._seen[list(targets)] = self._seen[list(sources)]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the next tokens (B,) given logits (B, V) of these rows."""
        if self.is_greedy:
            return logits.argmax(-1)
        scores = logits.float()  # (B, V)
        self._begin(scores)
        if self._seen is not None:
            seen = self._seen[list(rows)]  # (B, V)
            scores = torch.where(seen, torch.where(scores < 0, scores * self.penalty, scores / self.penalty), scores)
        for warper in self._warpers:
            scores = warper(None, scores)  # warpers do not read the tokens
        if self.sampling is not None:
            scores = add_gumbel_noise(scores, [self._generator(self._numbers[row], scores.device) for row in rows])
        tokens = scores.argmax(-1)
        if self._seen is not None:
            self._seen[torch.tensor(list(rows), device=tokens.device), tokens] = True
        return tokens

    def _begin(self, scores: Tensor) -> None:
        """Note the tokens of the prompts that start."""
        if self.penalty != 1:
            if self._seen is None:
                shape = len(self._numbers), scores.shape[1]
                self._seen = torch.zeros(shape, dtype=torch.bool, device=scores.device)
            for row, prompt in self._starting.items():
                self._seen[row] = False
                self._seen[row, torch.tensor(list(prompt), device=scores.device)] = True
        self._starting.clear()

    def _generator(self, number: int | None, device: torch.device) -> torch.Generator:
        """Return a prompt's generator; rows without a prompt share one."""
        assert self.sampling is not None
        if number not in self._generators:
            seed = self.sampling.first_seed + (number or 0)
            self._generators[number] = torch.Generator(device).manual_seed(seed)
        return self._generators[number]
