"""``evaluate``: loss, perplexity and token accuracy of a model on a dataset, and ROUGE of its own answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from ..config import IGNORE_INDEX
from ..data.batches import batches
from ..data.dataset import ChatDataset, ChatStream
from ..errors import DataError, Phi3LoRAError
from ..model.backend import PLAIN, use_backend
from ..model.forward import supervised_hidden_states
from ..model.load import longrope_boundary
from ..model.loss import token_losses
from .generation import answers_to, eval_mode

METRICS = ("loss", "perplexity", "token_accuracy", "n_tokens")
"""What :func:`evaluate` always measures."""


def evaluate(
    model: nn.Module,
    dataset: ChatDataset | ChatStream,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    packing: bool = True,
    fused: bool = True,
    rouge: bool = False,
    tokenizer: Any = None,
    max_samples: int | None = 100,
    max_new_tokens: int = 256,
) -> dict[str, float]:
    """Mean loss over the dataset's supervised tokens, by teacher forcing; with ``rouge``, its own answers too.

    Args:
        model: a Phi-3 causal LM, adapted or not; its modes and weights are left as they are.
        dataset: tokenised documents; a stream is read once to its end.
        batch_size: rows at a time.
        max_length: tokens in a row; None: the dataset's.
        packing: several documents a row; the figures do not depend on it.
        fused: let the fused kernels compute the layers where they can; False: always transformers' own layers.
        rouge: also let the model answer, greedily, and hold each answer against the chat's last trained turn
            (package ``rouge-score``, extra ``eval``; its words are ASCII letters and digits).
        tokenizer: the dataset's, for ``rouge``.
        max_samples: the first so many chats are answered; None: all.
        max_new_tokens: the longest answer, in tokens.

    Returns:
        ``loss`` (nats a token, the mean over all supervised tokens), ``perplexity`` (its exponential),
        ``token_accuracy`` (share of tokens whose argmax is right), ``n_tokens`` (how many). With ``rouge`` also
        ``rouge1``, ``rouge2``, ``rougeL`` (F-measures in [0, 1], means over the answers) and ``n_answers``.
        :func:`phi3lora.sample_answers` shows such answers.

    Raises:
        DataError: an empty dataset; ``rouge`` without tokenizer or with no chat that can be answered.
        Phi3LoRAError: ``rouge`` without the package.

    Example:
        >>> sorted(p3.evaluate(model, chats))
        ['loss', 'n_tokens', 'perplexity', 'token_accuracy']
    """
    if rouge and not dataset.known_length:
        raise DataError("rouge=True needs a ChatDataset, not a stream; pass stream.take(100), for example")
    score = load_rouge() if rouge else None
    if rouge and tokenizer is None:
        raise DataError("rouge=True needs the tokenizer that the dataset was loaded with: tokenizer=...")
    loss_sum, correct, count = 0.0, 0, 0
    with eval_mode(model), use_backend(model, None if fused else PLAIN) as backend:
        for batch in batches(
            dataset,
            batch_size=batch_size,
            max_length=max_length,
            packing=packing,
            shuffle=False,
            boundary=longrope_boundary(model.config),
        ):
            hidden, labels = supervised_hidden_states(model, batch, backend)
            losses, right = token_losses(hidden, model.get_output_embeddings(), labels)  # type: ignore[operator]
            loss_sum += losses.double().sum().item()
            correct += int(right.sum())
            count += labels.numel()
    loss = loss_sum / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    found = {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count, "n_tokens": count}
    if score is not None:
        found.update(
            score(answer_held_out(model, tokenizer, dataset.first_window, max_samples, max_new_tokens, batch_size))
        )
    return found


# ----------------------------------------------------------------------------------------------------
# Held-out chats answered by the model itself: beside the reference, and scored by ROUGE.
#
# A dataset holds token ids, so prompt and reference come from a document's labels:
#
#     ids        <|user|> \n Hi <|end|> \n <|assistant|> \n Hello ! <|end|> \n <|endoftext|>
#     labels         -    -  -   -      -       -        -   x   x    x     -       -
#     prompt     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
#     reference                                              ^^^^^^^                     the last stretch that is
# trained

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class Answer:
    """One chat of a dataset, answered."""

    prompt: str
    """What the model was given, with its control tokens."""
    reference: str
    """The chat's own last trained turn."""
    answer: str
    """The model's."""


class Answers(list[Answer]):
    """Answers beside their references; ``print`` shows them one under the other."""

    def __str__(self) -> str:
        return "\n\n".join(
            f"prompt     {_line(a.prompt, last=True)}\nreference  {_line(a.reference)}\nanswer     {_line(a.answer)}"
            for a in self
        )


def sample_answers(
    model: nn.Module,
    tokenizer: Any,
    dataset: ChatDataset,
    *,
    count: int = 4,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> Answers:
    """Let the model answer some chats of a dataset, greedily, from what stands before their last trained turn.

    Args:
        model, tokenizer: the model, left as it is, and the tokenizer that the dataset was loaded with.
        dataset: held-out chats. Those whose last turn was cut off by ``max_length`` are passed over.
        count: the first so many.
        max_new_tokens: the longest answer, in tokens.
        batch_size: chats at a time.

    Returns:
        A list of prompt, reference and answer; ``print`` shows it.

    Raises:
        DataError: no chat that can be answered (``train_on="all"`` leaves no prompt).

    Example:
        >>> answers = p3.sample_answers(model, tokenizer, chats, count=2, max_new_tokens=16)
        >>> len(answers), answers[0].reference.startswith("Thanks for asking!")
        (2, True)
    """
    return answer_held_out(model, tokenizer, dataset, count, max_new_tokens, batch_size)


def answer_held_out(
    model: nn.Module,
    tokenizer: Any,
    dataset: ChatDataset,
    count: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> Answers:
    """As :func:`sample_answers`; None counts all."""
    if count is not None and not (isinstance(count, int) and count >= 1):
        raise DataError(f"{count!r} answers; allowed: a whole number >= 1, or None for all")
    chosen = list(itertools.islice(_split_documents(dataset), count))
    if not chosen:
        raise DataError(
            f"none of the {len(dataset)} documents can be answered: each has no prompt before its last trained turn "
            f"(train_on='all') or was cut within it (max_length={dataset.max_length})"
        )
    found = answers_to(model, tokenizer, [ids for ids, _ in chosen], max_new_tokens, batch_size, {"do_sample": False})
    texts = (
        (tokenizer.decode(prompt), tokenizer.decode(reference, skip_special_tokens=True).strip())
        for prompt, reference in chosen
    )
    return Answers(Answer(*pair, answer) for pair, answer in zip(texts, found, strict=True))


def _split_documents(dataset: ChatDataset) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of ``(prompt, reference)`` of each document that has both whole, the end of turn left off."""
    rows: set[int] = set()
    for i in range(len(dataset)):
        continued = dataset.row_number(i) in rows  # a later part of a long row: its prompt is in the parts before
        rows.add(dataset.row_number(i))
        ids, labels = dataset.document(i)
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        end = int(trained[-1])
        before = np.flatnonzero(labels[:end] == IGNORE_INDEX)
        if not continued and len(before) and ids[end] == dataset.end_of_turn_id:
            start = int(before[-1]) + 1
            yield ids[:start].tolist(), ids[start:end].tolist()


def load_rouge() -> Callable[[Sequence[Answer]], dict[str, float]]:
    """A function of answers: mean F-measures of ROUGE-1, -2 and -L (Lin 2004), and how many answers there were.

    Raises:
        Phi3LoRAError: ``rouge-score`` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise Phi3LoRAError(f"rouge=True needs a package ({error}): pip install 'phi3lora[eval]'") from error
    scorer = RougeScorer(list(ROUGE))

    def score(answers: Sequence[Answer]) -> dict[str, float]:
        scores = [scorer.score(a.reference, a.answer) for a in answers]
        means = {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
        return {**means, "n_answers": len(scores)}

    return score


def _line(text: str, last: bool = False, width: int = 200) -> str:
    """On one line, cut to its first (``last``: last) ``width`` characters."""
    flat = " ".join(text.split())
    if len(flat) <= width:
        return flat
    return "..." + flat[3 - width :] if last else flat[: width - 3] + "..."
