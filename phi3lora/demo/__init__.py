"""The embedded demo: a tiny pretrained Phi-3, its tokenizer, and a support bot's chats to tune it on.

``base/`` was made by ``examples/demo_model/build.py``; ``train.jsonl`` and ``eval.jsonl`` by the same script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
"""Checkpoint folder of the tiny model, for ``load_model(demo.BASE)``."""

MAX_LENGTH = 256
"""Longest document, in tokens."""


def load(*, random_init: bool = False) -> tuple[Any, Any, Any, Any]:
    """Return ``(model, tokenizer, train_set, eval_set)``: float32 on the CPU, documents of up to 256 tokens.

    Args:
        random_init: replace the pretrained weights by random ones, as a control that shows how much of the result is
            the base's knowledge.

    Example:
        >>> model, tokenizer, train_set, eval_set = p3.demo.load()
        >>> type(model).__name__, eval_set.format
        ('Phi3ForCausalLM', 'messages')
    """
    from ..data.dataset import ChatDataset
    from ..model.load import load_model
    from ..run_settings import DEMO

    model, tokenizer = load_model(BASE, dtype="float32", device="cpu")
    model.origin["name_or_path"] = DEMO  # which the command line knows
    if random_init:
        model = type(model)(model.config).eval()
    train_set, eval_set = (
        ChatDataset.load(FOLDER / f"{name}.jsonl", tokenizer, max_length=MAX_LENGTH) for name in ("train", "eval")
    )
    return model, tokenizer, train_set, eval_set
