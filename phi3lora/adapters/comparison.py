"""``compare``: answers with the adapter off and on, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..display import flat, html_table, one_line, text_table
from ..errors import AdapterError, DataError, short_repr
from ..inference.generation import generate
from ..lora.inject import lora_layers
from .named import disabled

_HEAD = ("question", "adapter off", "adapter on")


@dataclass(frozen=True)
class ComparedAnswer:
    """Two answers to one question."""

    question: str
    """The question, or the last message of the chat."""
    off: str
    """Answer of the base alone."""
    on: str
    """Answer with the adapter."""

    def __repr__(self) -> str:
        facts = (("question", self.question), ("off", self.off), ("on", self.on))
        return one_line("ComparedAnswer", [f"{name} {flat(text, 24)!r}" for name, text in facts])


class Comparison(list[ComparedAnswer]):
    """Answers to questions with the adapter off and on; ``print`` and notebooks show them side by side."""

    def __repr__(self) -> str:
        changed = sum(answer.off != answer.on for answer in self)
        return one_line("Comparison", [f"{len(self)} questions", f"{changed} answers changed by the adapter"])

    def __str__(self) -> str:
        return text_table(self._table(), spaced=True)

    def _repr_html_(self) -> str:
        return html_table(self._table())

    def _table(self) -> list[tuple[str, str, str]]:
        return [_HEAD, *((a.question, a.off, a.on) for a in self)]


def compare(
    model: nn.Module,
    tokenizer: Any,
    questions: str | Sequence[Any],
    *,
    max_new_tokens: int = 256,
    **options: Any,
) -> Comparison:
    """Answer questions twice: by the base alone, and with the adapter.

    Args:
        model: a model with an adapter that is on.
        tokenizer: the model's tokenizer.
        questions: one question or several; each a text, or a list of messages that ends before the answer.
        max_new_tokens: the longest answer, in tokens.
        options: other arguments of :func:`phi3lora.generate`.

    Returns:
        A list of question and both answers; ``print`` shows them side by side.

    Raises:
        AdapterError: no adapter, or one that is off or merged.
        DataError: no question.

    Example:
        >>> compared = p3.compare(model, tokenizer, ["Hello!", "What is 2 plus 3?"], max_new_tokens=8)
        >>> len(compared)
        2
    """
    if not any(layer.enabled for layer in lora_layers(model).values()):
        raise AdapterError(
            "compare: the model has no adapter that is on; load one (load_adapter, inject_lora), and leave disabled() "
            "and merged() blocks first"
        )
    is_one = isinstance(questions, str) or (len(questions) > 0 and isinstance(questions[0], Mapping))
    prompts: list[Any] = [questions] if is_one else list(questions)
    if not prompts:
        raise DataError(f"compare: questions={short_repr(questions)}; allowed: a question, or a list of them")
    settings = {"max_new_tokens": max_new_tokens, **options}
    on = generate(model, tokenizer, prompts, **settings)
    with disabled(model):
        off = generate(model, tokenizer, prompts, **settings)
    shown = [prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) for prompt in prompts]
    return Comparison(ComparedAnswer(*texts) for texts in zip(shown, off, on, strict=True))
