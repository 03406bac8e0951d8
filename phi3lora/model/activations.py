"""Activation checkpointing: keep each decoder layer's input only, and recompute the rest in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import ModelError


@contextmanager
def activation_checkpointing(model: nn.Module, mode: str) -> Iterator[None]:
    """``"none"`` or ``"full"`` for the time of the block; the model is left as it was."""
    if mode not in ("none", "full"):
        raise ModelError(f"activation_checkpointing={mode!r}; allowed: 'none', 'full'")
    before = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if mode == "none" or before:
        yield
        return
    _switch(model, "enable", use_reentrant=False)
    try:
        yield
    finally:
        _switch(model, "disable")


def _switch(model: nn.Module, verb: str, **kwargs: bool) -> None:
    """transformers renamed ``gradient_checkpointing_*`` to ``activation_checkpointing_*`` on the way."""
    for noun in ("activation", "gradient"):
        method = getattr(model, f"{noun}_checkpointing_{verb}", None)
        if method is not None:
            method(**({f"{noun}_checkpointing_kwargs": kwargs} if kwargs else {}))
            return
    raise ModelError(f"{type(model).__name__} has no activation checkpointing; allowed here: 'none'")
