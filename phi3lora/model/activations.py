"""Activation checkpointing: keep a part of what a decoder layer computes, and recompute the rest in the backward.

none        everything is kept
selective   the feed-forward part is recomputed from its input: most of the memory for an eighth of the time
full        a layer keeps its input only
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ModelError

MODES = ("none", "selective", "full", "offload")


@contextmanager
def activation_checkpointing(model: nn.Module, mode: str) -> Iterator[None]:
    """A mode of the above for the time of the block; the model is left as it was. ``"none"`` changes nothing.

    The layers' own switch is used, not ``model.gradient_checkpointing_enable()``: that one also makes the embeddings'
    output require a gradient, for good, and the first layer then computes one that nobody needs.

    Raises:
        ModelError: another mode, or a model without layers that can be recomputed.
    """
    if mode not in MODES:
        raise ModelError(f"activation_checkpointing={mode!r}; allowed: {', '.join(map(repr, MODES))}")
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if mode == "selective":
        layers = [layer for layer in layers if isinstance(getattr(layer, "mlp", None), nn.Module)]
    if mode != "none" and not layers:
        raise ModelError(f"{type(model).__name__} has no layers that can be recomputed; allowed here: 'none'")
    whole = [layer for layer in layers if mode in ("full", "offload") and not layer.gradient_checkpointing]
    recompute = HostInputs().checkpoint if mode == "offload" else partial(checkpoint, use_reentrant=False)
    selective = [(layer.mlp, vars(layer.mlp).get("forward")) for layer in layers if mode == "selective"]
    for layer in whole:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute
    for mlp, _ in selective:
        mlp.forward = partial(checkpoint, mlp.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in whole:
            layer.gradient_checkpointing = False
            del layer._gradient_checkpointing_func
        for mlp, own in selective:
            del mlp.forward
            if own is not None:  # somebody had replaced it on this instance before
                mlp.forward = own


class HostInputs:
    """Inputs of recomputed layers, kept on the host between forward and backward.

    On a GPU both directions run on a stream of their own, through pinned memory; the backward asks for the layers in
    the opposite order of the forward, so each request starts the copy that the next one will want.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, torch.device]] = {}
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._count = 0
        self._stream: Any = None

    def checkpoint(self, layer: Callable[..., Any], x: Tensor) -> Any:
        """``layer(x)``, recomputed in the backward from x's copy."""
        if not torch.is_grad_enabled():
            return layer(x)
        # The reentrant kind hands x to autograd alone. It wants an input with a gradient; the first layer's has none.
        learns = torch.empty(0, device=x.device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, self._give_back):
            return checkpoint(lambda x, _: layer(x), x, learns, use_reentrant=True)

    def _keep(self, x: Tensor) -> int | Tensor:
        if x.numel() == 0:
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if not x.is_cuda:
            host.copy_(x)
        else:
            self._stream = self._stream or torch.cuda.Stream(x.device)
            self._stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(self._stream):
                host.copy_(x, non_blocking=True)
            x.record_stream(self._stream)
        self._count += 1
        self._kept[self._count] = (host, x.device)
        return self._count

    def _fetch(self, number: int) -> None:
        """Start the copy back of an input."""
        host, device = self._kept.pop(number)
        if device.type != "cuda":
            self._coming[number] = (host, None)
            return
        with torch.cuda.stream(self._stream):  # behind the copy out, on the same stream
            x = host.to(device, non_blocking=True)
            self._coming[number] = (x, self._stream.record_event())

    def _give_back(self, kept: int | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        for number in (kept, kept - 1):
            if number in self._kept:
                self._fetch(number)
        x, arrived = self._coming.pop(kept)
        if arrived is not None:
            here = torch.cuda.current_stream(x.device)
            here.wait_event(arrived)
            x.record_stream(here)
        return x


def recomputes_feed_forward(layer: Any) -> bool:
    """Whether ``"selective"`` is on for a decoder layer."""
    return getattr(vars(layer.mlp).get("forward"), "func", None) is checkpoint


def recompute_layer(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, recomputed in the backward in the way that is switched on for a decoder layer."""
    keeper = getattr(layer._gradient_checkpointing_func, "__self__", None)
    if isinstance(keeper, HostInputs):
        return keeper.checkpoint(function, x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
