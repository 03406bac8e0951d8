"""Activation checkpointing: keep a part of what a decoder layer computes, and recompute the rest in the backward.

none        everything is kept
selective   the feed-forward part is recomputed from its input: most of the memory for an eighth of the time
full        a layer keeps its input only
"""

from __future__ import annotations

import weakref
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
    host = HostInputs()
    selective = [(layer.mlp, vars(layer.mlp).get("forward")) for layer in layers if mode == "selective"]
    for layer in whole:
        layer.gradient_checkpointing = True
        offloads = partial(host.checkpoint, layer)
        layer._gradient_checkpointing_func = offloads if mode == "offload" else partial(checkpoint, use_reentrant=False)
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
        self._stream: Any = None
        self._last: weakref.ref[_HostInput] | None = None

    def checkpoint(
        self, module: nn.Module, function: Callable[..., Any], x: Tensor, *, preserve_rng_state: bool = True
    ) -> Any:
        """``function(x)``, the call of ``module``, recomputed in the backward from x's copy."""
        acting = (m for m in module.modules() if getattr(m, "enabled", True))  # an adapter may be switched off
        learns = x.requires_grad or any(p.requires_grad for m in acting for p in m.parameters(recurse=False))
        if not torch.is_grad_enabled() or not learns:
            return function(x)
        # The reentrant kind hands x to autograd alone. It wants an input with a gradient; the first layer's has none.
        dummy = torch.empty(0, device=x.device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, _given_back):
            options: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": preserve_rng_state}
            return checkpoint(lambda x, _: function(x), x, dummy, **options)

    def _keep(self, x: Tensor) -> _HostInput | Tensor:
        if x.numel() == 0:
            return x
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        kept = _HostInput(x, self._stream, self._last)
        self._last = weakref.ref(kept)
        return kept


class _HostInput:
    """One input on the host. The graph that it was saved for owns it: it goes when that goes."""

    def __init__(self, x: Tensor, stream: Any, before: weakref.ref[_HostInput] | None) -> None:
        self.stream, self.device, self.before = stream, x.device, before
        self.coming: tuple[Tensor, Any] | None = None
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if not x.is_cuda:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)

    def start(self) -> None:
        """Start the copy back, unless it is on its way."""
        if self.coming is not None:
            return
        if self.device.type != "cuda":
            self.coming = (self.host.clone(), None)
            return
        with torch.cuda.stream(self.stream):  # behind the copy out, on the same stream
            self.coming = (self.host.to(self.device, non_blocking=True), self.stream.record_event())

    def take(self) -> Tensor:
        """The input on its device; the one before it, which is wanted next, starts to come."""
        self.start()
        assert self.coming is not None
        (x, arrived), self.coming = self.coming, None
        if arrived is not None:
            here = torch.cuda.current_stream(x.device)
            here.wait_event(arrived)
            x.record_stream(here)
        before = self.before() if self.before is not None else None
        if before is not None:
            before.start()
        return x


def _given_back(kept: _HostInput | Tensor) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.take()


def recomputes_layer(layer: Any) -> bool:
    """Whether a decoder layer called now is recomputed as a whole in the backward (``"full"``, ``"offload"``)."""
    return bool(torch.is_grad_enabled() and layer.training and layer.gradient_checkpointing)


def recomputes_feed_forward(layer: Any) -> bool:
    """Whether ``"selective"`` is on for a decoder layer, around its feed-forward part's own forward."""
    forward = vars(layer.mlp).get("forward")
    if getattr(forward, "func", None) is not checkpoint:
        return False
    return getattr(forward.args[0], "__func__", None) is type(layer.mlp).forward  # type: ignore[union-attr]
