"""Which adapters act: today, all or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..model.injection import lora_layers


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model, exactly, for the time of the block: every adapter is passed by, no weight is touched.

    Example:
        >>> with p3.disabled(model):
        ...     before = p3.evaluate(model, chats)
    """
    enabled = {layer: layer.enabled for layer in lora_layers(model).values()}
    for layer in enabled:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, state in enabled.items():
            layer.enabled = state
