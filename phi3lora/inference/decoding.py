"""Decoding with continuous batching: a fixed number of rows, which finished answers leave and waiting prompts enter.

    rows    time ->                                         a: prompt a is prefilled, then its answer's tokens
     0      a  a1 a2 a3 a4 a5 a6 a7 a8 a9
     1      b  b1 b2 | d  d1 d2 d3 d4 | f  f1 ...            b ended, so d entered
     2      c  c1 c2 c3 c4 | e  e1 e2 ...

Row i owns slot i of the cache: (H_kv, L, C) keys and values for each layer, allocated once. Each row has a position of
its own, so no row waits for or computes another's padding. Two ways to compute:

* On a GPU where the fused kernels can run: kernels/token_step.py, a step recorded in one CUDA graph for a number of
  rows. The host reads a step's tokens while the next step runs, so a row whose answer ended runs one step too many,
  whose token is dropped.
* Elsewhere: transformers' own layers with our cache and a mask that hides what lies beyond each row's position.

A longrope model rotates by its short factors up to a boundary, and past it rotates all of a text by its long ones. So
prompts on both sides run apart. An answer that reaches the boundary stops there; prompt and answer enter again
as a longer prompt.

Shapes: M rows, L positions in the cache, H_kv key/value heads, C head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache, Phi3ForCausalLM, Phi3Model

from ..errors import ModelError
from ..kernels.recording import recorded
from ..model.attention import NAME, PLAIN_OUTPUT
from ..model.backend import choose_backend
from ..model.load import longrope_boundary
from ..model.sharding import sharded_base
from .sampling import Sampling, TokenChoice

_PREFILL_TOKENS = 16384
"""Tokens of the prompts that are computed together, unless one prompt has more."""
_LENGTH_STEP = 64
"""Granularity of the cache's length."""

_LOADED: set[object] = set()
"""Steps that ran once, which loads their kernels; only then a graph can record them."""


class Request(NamedTuple):
    """A prompt's place in the list, its tokens, and the longest answer to it."""

    number: int
    prompt: Sequence[int]
    limit: int


def unsupported_reason(model: Any) -> str | None:
    """Return why this model's answers must come from transformers' own ``generate``; None: they need not."""
    if type(model) is not Phi3ForCausalLM or type(model.get_decoder()) is not Phi3Model:
        return f"a {type(model).__name__}"
    if sharded_base(model) is not None:
        return "its layers are split over several processes"
    if model.config._attn_implementation not in (NAME, "sdpa", "eager"):
        return f"attention {model.config._attn_implementation!r}"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "a hook on all modules"
    for module in (model, model.get_decoder()):
        replaced = [name for name in ("forward", "generate") if name in vars(module)]
        if replaced or module._forward_hooks or module._forward_pre_hooks:
            return f"a hook on the {type(module).__name__}, or its {' or '.join(replaced or ['forward'])} was replaced"
    if len({parameter.device for parameter in model.parameters()}) != 1:
        return "its parameters are on several devices"
    return None


def decode(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, slots: int, stops: Sequence[int],
    sampling: Sampling | None = None, repetition_penalty: float = 1.0, put: Callable[[int], object] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Return the tokens of an answer to each prompt, the one that ended it included.

    Args:
        model: a Phi-3 without :func:`unsupported_reason`, in eval mode, without gradients.
        prompts: token ids.
        max_new_tokens: the longest answer, in tokens; see also :func:`longest_answers`.
        slots: the number of rows; memory for their keys and values is allocated, and freed at the end.
        stops: tokens that end an answer.
        sampling, repetition_penalty: how tokens are chosen.
        put: called with each token of each answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    limits = longest_answers(model, prompts, max_new_tokens)
    slots = min(slots, len(prompts))
    device, boundary = model.get_input_embeddings().weight.device, longrope_boundary(model.config)
    make_steps = KernelSteps if _kernels_can_run(model) else PlainSteps
    choice = TokenChoice(sampling, repetition_penalty, slots)

    def run(requests: Sequence[Request]) -> None:
        for run, length in _runs(requests):
            # No name for the steps: one run's cache is freed before the next is allocated.
            Stream(make_steps(model, min(slots, len(run)), length), run, frozenset(stops), choice, answers, put).run()

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if boundary is None:
            run([Request(i, prompt, limits[i]) for i, prompt in enumerate(prompts)])
            return answers
        short = [i for i, prompt in enumerate(prompts) if len(prompt) <= boundary]
        run([Request(i, prompts[i], min(limits[i], boundary + 1 - len(prompts[i]))) for i in short])
        ended = {i for i in short if answers[i][-1] in stops or len(answers[i]) == limits[i]}
        run([
            Request(i, [*prompt, *answers[i]], limits[i] - len(answers[i]))
            for i, prompt in enumerate(prompts) if i not in ended
        ])  # fmt: skip
    return answers


def longest_answers(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """Return the longest answer to each prompt, in tokens, which ends where the model's context does.

    The model reads no answer's last token, so that one may lie past the context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return [max_new_tokens] * len(prompts)
    return [min(max_new_tokens, max(context + 1 - len(prompt), 1)) for prompt in prompts]


def _kernels_can_run(model: Any) -> bool:
    """Return whether the kernels compute what the model's modules do; they do not call the layers."""
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.get_decoder().layers)
    return choose_backend(model).kind == "fused" and not hooked


def _runs(requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
    """Yield prompts that share a cache, with its length, which is at most about twice what each of them needs."""
    runs: dict[int, list[Request]] = {}
    for request in sorted(requests, key=lambda request: len(request.prompt)):
        runs.setdefault((len(request.prompt) + request.limit).bit_length(), []).append(request)
    for run in runs.values():
        longest = max(len(request.prompt) + request.limit for request in run)
        yield run, -(-longest // _LENGTH_STEP) * _LENGTH_STEP


class _Issued(NamedTuple):
    """Tokens on their way to the host: those of each row, and the prompts that the rows served."""

    served: list[tuple[int, int]]  # (row, number)
    tokens: Tensor
    ready: Any  # a CUDA event, or None


class Stream:
    """Answers to the prompts of one run, as they pass through the rows.

    Args:
        steps: what computes them.
        requests: the prompts.
        stops: tokens that end an answer.
        choice: what chooses tokens.
        answers: receives each answer's tokens, by the prompt's number.
        put: called with each token.
    """

    def __init__(
        self, steps: PlainSteps | KernelSteps, requests: Sequence[Request], stops: frozenset[int], choice: TokenChoice,
        answers: list[list[int]], put: Callable[[int], object] | None,
    ) -> None:  # fmt: skip
        self.steps, self.stops, self.choice = steps, stops, choice
        self.answers, self.put = answers, put
        self.waiting = deque(requests)
        self.served: dict[int, int] = {}  # row -> number
        self.left: dict[int, int] = {}  # number -> tokens that its answer may still get
        self.ended: set[int] = set()
        self.on_their_way: deque[_Issued] = deque()
        device = steps.device
        self.tokens = torch.zeros(steps.slots, dtype=torch.long, device=device)
        self.positions = torch.zeros(steps.slots, dtype=torch.long, device=device)
        self.lengths = [0] * steps.slots  # the host's copy of the positions
        self.graphs: dict[int, tuple[Any, Tensor]] = {}

    def run(self) -> None:
        """Compute until every prompt has its answer."""
        while self.waiting or self.served:
            self._admit()
            self._step()
            self._collect(self.steps.lag)
            self._compact()
        self._collect(0)

    def _admit(self) -> None:
        """Prefill waiting prompts into free rows, several at a time, which costs little more than one."""
        free = [row for row in range(self.steps.slots) if row not in self.served]
        if not self.waiting or (self.served and len(free) < min(len(self.waiting), -(-self.steps.slots // 4))):
            return
        while free and self.waiting:
            rows: list[int] = []
            requests: list[Request] = []
            tokens = 0
            while free and self.waiting and (not rows or tokens + len(self.waiting[0].prompt) <= _PREFILL_TOKENS):
                rows.append(free.pop(0))
                requests.append(self.waiting.popleft())
                tokens += len(requests[-1].prompt)
            self._prefill(rows, requests)

    def _prefill(self, rows: list[int], requests: list[Request]) -> None:
        for row, request in zip(rows, requests, strict=True):
            self.served[row], self.left[request.number] = request.number, request.limit
            self.lengths[row] = len(request.prompt)
            self.choice.start(row, request.number, request.prompt)
        logits = self.steps.prefill(rows, [request.prompt for request in requests])  # (rows, V)
        at = torch.tensor(rows, device=self.tokens.device)
        self.tokens[at] = self.choice(logits, rows)
        self.positions[at] = torch.tensor([self.lengths[row] for row in rows], device=at.device)
        self._issue(rows)
        self._collect(self.steps.lag)

    def _step(self) -> None:
        """Compute one token for every row that serves a prompt, and for the rows between them."""
        if not self.served:
            return
        rows = self.steps.bucket(max(self.served) + 1)
        logits = self._advance(rows)
        if not self.choice.is_greedy:
            self.tokens[:rows] = self.choice(logits, range(rows))
        for row in self.served:
            self.lengths[row] += 1
        self._issue(list(self.served))

    def _advance(self, rows: int) -> Tensor:
        """Compute the logits (rows, V) after the present tokens, and what of the next step the device decides alone."""
        if rows in self.graphs:
            graph, logits = self.graphs[rows]
            graph.replay()
            return logits
        kernels = self.steps.kernels(rows), self.choice.is_greedy
        if kernels in _LOADED:
            with recorded(self.steps.device) as graph:
                self.graphs[rows] = graph, self._compute(rows)
            return self._advance(rows)
        if self.steps.uses_graphs:
            _LOADED.add(kernels)
        return self._compute(rows)

    def _compute(self, rows: int) -> Tensor:
        longest = max((self.lengths[row] for row in self.served), default=0) + 1
        logits = self.steps.decode(self.tokens[:rows], self.positions[:rows], longest)
        if self.choice.is_greedy:
            self.tokens[:rows] = self.choice(logits, range(rows))
        self.positions[:rows].add_(1).clamp_(max=self.steps.length - 1)  # rows without a prompt count on
        return logits

    def _issue(self, rows: list[int]) -> None:
        """Send the tokens of these rows to the host, and free the rows whose answers are as long as allowed."""
        served = [(row, self.served[row]) for row in rows]
        tokens, ready = self.tokens, None
        if tokens.is_cuda:
            host = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
            tokens = host.copy_(tokens, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self.on_their_way.append(_Issued(served, tokens, ready))
        for row, number in served:
            self.left[number] -= 1
            if self.left[number] == 0:
                self._free(row)

    def _collect(self, lag: int) -> None:
        """Read the tokens of all steps but the last ``lag``; end answers and free their rows."""
        while len(self.on_their_way) > lag:
            served, tokens, ready = self.on_their_way.popleft()
            if ready is not None:
                ready.synchronize()
            values = tokens.tolist()
            for row, number in served:
                if number in self.ended:
                    continue
                self.answers[number].append(values[row])
                if self.put is not None:
                    self.put(values[row])
                if self._ends(number):
                    self.ended.add(number)
                    for present in [r for r, served in self.served.items() if served == number]:  # it may have moved
                        self._free(present)

    def _ends(self, number: int) -> bool:
        return self.answers[number][-1] in self.stops

    def _free(self, row: int) -> None:
        del self.served[row]
        self.choice.stop(row)
        self.positions[row].zero_()  # a row without a prompt attends to little

    def _compact(self) -> None:
        """Move the last rows into free ones when that lets the next steps compute fewer rows."""
        rows = self.steps.bucket(len(self.served))
        sources = sorted(row for row in self.served if row >= rows)
        if not sources or (self.waiting and self.steps.lag):
            return
        targets = [row for row in range(rows) if row not in self.served][: len(sources)]
        at, to = (torch.tensor(indices, device=self.tokens.device) for indices in (sources, targets))
        self.steps.move(at, to, max(self.lengths[row] for row in sources))
        for tensor in (self.tokens, self.positions):
            tensor[to] = tensor[at]
        self.choice.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self.served[target], self.lengths[target] = self.served.pop(source), self.lengths[source]


# --- What computes prompts and tokens


class _Steps:
    """A cache (2, layers, slots, H_kv, L, C) of keys and values."""

    uses_graphs = False
    lag = 0
    """Steps whose tokens the host has not read yet when the next one starts."""

    def __init__(self, model: Any, slots: int, length: int) -> None:
        self.model, self.slots, self.length = model, slots, length
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.device = model.get_input_embeddings().weight.device
        self.cache: Tensor | None = None

    def _allocate(self, dtype: torch.dtype) -> Tensor:
        attention = self.decoder.layers[0].self_attn
        heads, head_dim = attention.config.num_key_value_heads, attention.head_dim
        shape = (2, len(self.decoder.layers), self.slots, heads, self.length, head_dim)
        try:
            return torch.zeros(shape, dtype=dtype, device=self.device)  # what a mask hides must be finite
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or self.device.type == "cpu"):
                raise
            raise ModelError(
                f"no memory on {self.device} for the keys and values of {self.slots} answers at a time: "
                f"{math.prod(shape) * dtype.itemsize / 2**30:.1f} GiB, for prompt and answer of up to {self.length} "
                f"tokens together. Lower batch_size or max_new_tokens; in a run, per_device_eval_batch_size or "
                f"eval_max_new_tokens"
            ) from error

    def kernels(self, rows: int) -> object:
        """Return a value that is equal for two steps that need the same kernels."""
        return None

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first ``length`` positions of some slots into others."""
        assert self.cache is not None
        self.cache[:, :, targets, :, :length] = self.cache[:, :, sources, :, :length]


class PlainSteps(_Steps):
    """transformers' own layers, on any device."""

    def bucket(self, rows: int) -> int:
        """Return the number of rows that a step computes, at least ``rows``."""
        return rows

    def prefill(self, rows: list[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (M, V) after the prompts, padded on the right, whose keys and values go to these slots."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = int(lengths.max())
        input_ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        cache: Any = DynamicCache()
        kwargs = {"past_key_values": cache, "use_cache": True, **PLAIN_OUTPUT}
        hidden = self.decoder(input_ids=input_ids, **kwargs).last_hidden_state
        if self.cache is None:
            self.cache = self._allocate(cache.layers[0].keys.dtype)
        at = torch.tensor(rows, device=self.device)
        for i, layer in enumerate(cache.layers):
            for cached, new in zip(self.cache[:, i], (layer.keys, layer.values), strict=True):
                cached[at, :, :width] = new.to(cached.dtype)  # autocast may give keys and values of two dtypes
        last = hidden[torch.arange(len(rows), device=self.device), lengths - 1]  # (M, D)
        logits: Tensor = self.head(last)
        return logits

    def decode(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Return the logits (M, V) after tokens (M,) at positions (M,), all below ``longest``."""
        self._rows, self._positions, self._longest = torch.arange(len(tokens), device=self.device), positions, longest
        mask = self._mask(positions, longest)
        hidden = self.decoder(
            input_ids=tokens[:, None], position_ids=positions[:, None], attention_mask=mask, past_key_values=self,
            use_cache=True, **PLAIN_OUTPUT,
        ).last_hidden_state  # fmt: skip
        logits: Tensor = self.head(hidden[:, 0])
        return logits

    def _mask(self, positions: Tensor, longest: int) -> Tensor:
        """Return (M, 1, 1, longest), which shows each row its keys: True, or 0 where eager attention adds it."""
        distance = positions[:, None] - torch.arange(longest, device=self.device)
        visible = distance >= 0
        window = getattr(self.model.config, "sliding_window", None)
        if window is not None:
            visible &= distance < window
        visible = visible[:, None, None]
        if self.model.config._attn_implementation != "eager":
            return visible
        assert self.cache is not None
        hidden = torch.finfo(self.cache.dtype).min
        return torch.zeros(visible.shape, dtype=self.cache.dtype, device=self.device).masked_fill_(~visible, hidden)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store a token's keys and values (M, H_kv, 1, C) and return those of all tokens, as a Cache does."""
        assert self.cache is not None
        for cached, new in zip(self.cache[:, layer_idx], (key, value), strict=True):
            cached[self._rows, :, self._positions] = new[:, :, 0].to(cached.dtype)
        keys, values = self.cache[:, layer_idx, : len(key), :, : self._longest]
        return keys, values


class KernelSteps(_Steps):
    """The fused kernels, with a CUDA graph for each number of rows."""

    lag = 1

    def __init__(self, model: Any, slots: int, length: int) -> None:
        from ..kernels.token_step import TokenStep

        super().__init__(model, slots, length)
        self.uses_graphs = self.device.type == "cuda"
        cos, sin = self._rotary_factors()
        self.cache = self._allocate(cos.dtype)
        self.token_step = TokenStep(model, self.cache[0].unbind(), self.cache[1].unbind(), cos, sin)
        if self.uses_graphs:
            self.token_step.compile(self.bucket(slots))

    def _rotary_factors(self) -> tuple[Tensor, Tensor]:
        """Return cos and sin (L, n) of each position; a longrope model's long factors past its boundary."""
        weight = self.model.get_input_embeddings().weight
        boundary = min(longrope_boundary(self.model.config) or self.length, self.length)
        parts = []
        for first, last in ((0, boundary), (boundary, self.length)):
            if first < last:
                position_ids = torch.arange(first, last, device=self.device)[None]
                parts.append(self.decoder.rotary_emb(weight, position_ids=position_ids))
        cos, sin = (torch.cat([part[i][0] for part in parts]).contiguous() for i in (0, 1))
        return cos, sin

    def kernels(self, rows: int) -> object:
        return self.token_step.kernels(rows)

    def bucket(self, rows: int) -> int:
        """Return the number of rows that a step computes: few numbers, since each has a graph."""
        return next((size for size in (1, 4, 16, 64) if rows <= size <= self.slots), self.slots)

    def prefill(self, rows: list[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (M, V) after the prompts, packed, whose keys and values go to these slots."""
        lengths = [len(prompt) for prompt in prompts]
        tokens = [token for prompt in prompts for token in prompt]
        positions = torch.cat([torch.arange(length, device="cpu") for length in lengths]).to(self.device)
        edges = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        batch = {
            "input_ids": torch.tensor([tokens], device=self.device),
            "position_ids": positions[None],
            "cu_seqlens": edges.to(self.device, torch.int32),
            "max_seqlen": max(lengths),
        }
        slots = torch.tensor(
            [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)], device="cpu"
        )
        return self.token_step.prefill(batch, slots.to(self.device), (edges[1:] - 1).to(self.device))

    def decode(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Return the logits (M, V) after tokens (M,) at positions (M,)."""
        return self.token_step(tokens, positions)
