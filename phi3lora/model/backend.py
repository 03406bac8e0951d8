"""The code that computes the decoder layers: chosen once a run, installed by a ``with`` statement.

    fused       each layer's ``forward`` is replaced by the fused Triton kernels (kernels/decoder.py)
    compiled    transformers' layers, each through ``torch.compile``
    plain       transformers' layers as they are

``train`` chooses before its first step and installs the choice for the whole run. ``causal_lm_loss`` and ``evaluate``
use what is installed. In your own loop nothing is installed, so they choose at each call and see every change of the
model. While fused layers are installed, they choose again when an adapter was replaced or a hook registered; other
changes of the modules go unnoticed until the layers are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..kernels.decoder import decoder_projections, fused_layers, unsupported_reason
from ..lora.weight_formats import has_triton
from .attention import use_packed_attention


@dataclass(frozen=True)
class Backend:
    """The code that computes the decoder layers."""

    kind: Literal["fused", "compiled", "plain"]
    """Fused kernels, compiled layers or transformers' plain layers."""
    reason: str = ""
    """Reason for a kind other than ``"fused"``, else empty."""

    def __str__(self) -> str:
        """Return the kind and the reason: ``plain (not on a CUDA device)``."""
        return self.kind + (f" ({self.reason})" if self.reason else "")


PLAIN = Backend("plain", "fused=False")
"""Backend for ``fused=False``."""


def choose_backend(
    model: nn.Module, *, compile: bool | None = None, offload: bool = False, training: bool | None = None
) -> Backend:
    """Choose how to compute the layers of ``model`` in its present state, under the present autocast.

    First replace transformers' default attention (sdpa) with the packed one, as every packed forward does.

    Args:
        model: a causal LM of transformers.
        compile: True: compiled layers. False: plain ones. None: the kernels where they can run, else plain layers.
        offload: whether inputs of recomputed layers go to the host, which ``torch.compile`` cannot trace.
        training: whether dropout will be on; None: as the modules' modes say.
    """
    use_packed_attention(model)
    if compile and offload:
        return Backend("plain", "offload cannot be compiled")
    if compile is not None:
        return Backend("compiled" if compile else "plain", f"compile={compile}")
    reason = unsupported_reason(model, training)
    if reason is None:
        return Backend("fused")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    if not offload and reason != "compiled layers" and _compiles_on(device):
        reason += "; compile=True is faster than plain"
    return Backend("plain", reason)


def _compiles_on(device: torch.device) -> bool:
    """Return whether ``torch.compile`` supports this device."""
    return device.type == "cuda" and has_triton() and torch.cuda.get_device_capability(device) >= (7, 0)


_INSTALLED: WeakKeyDictionary[nn.Module, tuple[Backend, object]] = WeakKeyDictionary()
"""By decoder, the backend in use and, in a block of fused layers, the model's fingerprint when it was chosen."""


@contextmanager
def use_backend(model: nn.Module, backend: Backend | None = None) -> Iterator[Backend]:
    """Compute the layers of ``model`` with a backend for the block; they are restored afterwards.

    Args:
        model: a causal LM of transformers.
        backend: what :func:`choose_backend` returned; None: the one that is installed, else a new choice.

    Yields:
        The backend that computes the layers.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    outer = _INSTALLED.get(decoder)
    if backend is None and outer is not None:
        backend, fingerprint = outer
        if fingerprint is not None and fingerprint != _fingerprint(decoder):
            backend = choose_backend(model)
            _INSTALLED[decoder] = backend, _fingerprint(decoder)
        yield backend
        return
    backend = backend or choose_backend(model)
    _INSTALLED[decoder] = backend, _fingerprint(decoder) if backend.kind == "fused" else None
    install: dict[str, Callable[[nn.Module], Any]] = {"fused": fused_layers, "compiled": _compiled_layers}
    try:
        with install.get(backend.kind, nullcontext)(model):
            yield backend
    finally:
        if outer is None:
            del _INSTALLED[decoder]
        else:
            _INSTALLED[decoder] = outer


def _fingerprint(decoder: Any) -> object:
    """Return a value that changes when any hook is registered or an adapter replaced. It costs microseconds."""
    return RemovableHandle.next_id, decoder_projections(decoder)


@contextmanager
def _compiled_layers(model: nn.Module) -> Iterator[None]:
    """Call each decoder layer through ``torch.compile`` for the block."""
    layers = list(model.get_decoder().layers)  # type: ignore[operator]
    before = [layer._compiled_call_impl for layer in layers]
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer, compiled in zip(layers, before, strict=True):
            layer._compiled_call_impl = compiled
