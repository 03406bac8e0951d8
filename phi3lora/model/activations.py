"""Activation checkpointing: keep a part of a decoder layer's activations and recompute the rest in the backward.

    none        keep everything
    selective   recompute the feed-forward part from its input: most of the memory for an eighth of the time
    full        keep a layer's input only
    offload     keep it in host memory

Both kinds of layers, transformers' and the fused ones (kernels/decoder.py), read the same switches: the layer's
``gradient_checkpointing`` and ``_gradient_checkpointing_func``, and for "selective" the ``forward`` of its ``mlp``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
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
    """Switch a mode on for the block and restore the model afterwards. ``"none"`` changes nothing.

    This sets the layers' own switches. ``model.gradient_checkpointing_enable()`` would also make the embeddings' output
    require a gradient permanently, and the first layer would compute one that nothing uses.

    Raises:
        ModelError: an unknown mode, or a model without layers that can be recomputed.
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
        offload = partial(host.checkpoint, layer)
        layer._gradient_checkpointing_func = offload if mode == "offload" else partial(checkpoint, use_reentrant=False)
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
            if own is not None:  # the user's own replacement
                mlp.forward = own


class HostInputs:
    """The inputs of recomputed layers, kept on the host between forward and backward.

    On a GPU both directions run on a separate stream, through pinned memory. The backward takes the layers in reverse
    order, so taking one input starts the copy of the one before it. One copy is under way at a time: the next waits for
    it on the device, and until then its tensor stays here. So a CUDA graph can record the copies, which it could not
    with ``record_stream``.
    """

    def __init__(self) -> None:
        self._stream: Any = None
        self._last: weakref.ref[_HostInput] | None = None
        self._moving: tuple[Tensor, Any, bool] | None = None
        """Copy under way: its tensor on the device, the event at its end, and whether a CUDA graph recorded it."""

    def checkpoint(
        self, module: nn.Module, function: Callable[..., Any], x: Tensor, *, preserve_rng_state: bool = True
    ) -> Any:
        """Return ``function(x)``, which computes ``module``; the backward recomputes it from the host's copy of x."""
        active = (m for m in module.modules() if getattr(m, "enabled", True))  # an adapter may be switched off
        learns = x.requires_grad or any(p.requires_grad for m in active for p in m.parameters(recurse=False))
        if not torch.is_grad_enabled() or not learns:
            return function(x)
        # The reentrant kind saves nothing but x. It needs an input with a gradient, which the first layer lacks.
        dummy = torch.empty(0, device=x.device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, _unpack):
            options: dict[str, Any] = {"use_reentrant": True, "preserve_rng_state": preserve_rng_state}
            return checkpoint(lambda x, _: function(x), x, dummy, **options)

    def _keep(self, x: Tensor) -> _HostInput | Tensor:
        if x.numel() == 0:
            return x
        kept = _HostInput(x, self, self._last)
        self._last = weakref.ref(kept)
        return kept

    def move(self, target: Tensor, source: Tensor) -> None:
        """Start a copy between the host and a GPU."""
        self.settle()
        x = source if source.is_cuda else target
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._moving = x, self._stream.record_event(), torch.cuda.is_current_stream_capturing()

    def settle(self) -> None:
        """Let the current stream wait for the copy that is under way."""
        if self._moving is not None:
            (x, done, was_recorded), self._moving = self._moving, None
            if was_recorded == torch.cuda.is_current_stream_capturing():  # else a recording failed, or begins after all
                torch.cuda.current_stream(x.device).wait_event(done)


class _HostInput:
    """One input on the host, owned by the graph that saved it and freed with it."""

    def __init__(self, x: Tensor, host_inputs: HostInputs, previous: weakref.ref[_HostInput] | None) -> None:
        self.host_inputs, self.device, self.previous = host_inputs, x.device, previous
        self.copy: Tensor | None = None
        self.host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        if x.is_cuda:
            host_inputs.move(self.host, x)
        else:
            self.host.copy_(x)

    def start(self) -> None:
        """Start the copy to the device, unless it has been started."""
        if self.copy is not None:
            return
        self.copy = torch.empty_like(self.host, device=self.device)
        if self.device.type == "cuda":
            self.host_inputs.move(self.copy, self.host)
        else:
            self.copy.copy_(self.host)

    def take(self) -> Tensor:
        """Return the input on its device, and start the copy of the previous layer's, which is needed next."""
        self.start()
        self.host_inputs.settle()
        x, self.copy = self.copy, None
        assert x is not None
        if self.previous is not None and (previous := self.previous()) is not None:
            previous.start()
        return x


def settle_copies(layers: Iterable[Any]) -> None:
    """Let the current stream wait for the inputs of these layers that are on their way to the host."""
    for layer in layers:
        switch = getattr(layer, "_gradient_checkpointing_func", None)
        host = getattr(getattr(switch, "func", None), "__self__", None)
        if isinstance(host, HostInputs):
            host.settle()


def _unpack(kept: _HostInput | Tensor) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.take()


def recomputes_layer(layer: Any) -> bool:
    """Return whether the backward would recompute a layer that is called now (``"full"``, ``"offload"``)."""
    return bool(torch.is_grad_enabled() and layer.training and layer.gradient_checkpointing)


def recomputes_feed_forward(layer: Any) -> bool:
    """Return whether ``"selective"`` is on for a decoder layer, around its ``mlp``'s original forward."""
    forward = vars(layer.mlp).get("forward")
    if getattr(forward, "func", None) is not checkpoint:
        return False
    return getattr(forward.args[0], "__func__", None) is type(layer.mlp).forward


def recompute(layer: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``function(x)``, recomputed in the backward, for a layer that :func:`recomputes_layer`.

    ``function`` draws no random numbers. Unless x goes to the host, this is torch's non-reentrant checkpoint even if
    the layer has the reentrant one of transformers, which needs an x with a gradient.
    """
    switch = layer._gradient_checkpointing_func
    if getattr(getattr(switch, "func", None), "__func__", None) is HostInputs.checkpoint:
        return switch(function, x, preserve_rng_state=False)  # type: ignore[no-any-return]
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
