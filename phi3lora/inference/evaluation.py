r"""Evaluation on held-out chats: ``evaluate`` (loss, accuracy, ROUGE) and ``sample_answers`` (answers to read).

Loss and accuracy come from teacher forcing. ROUGE, ``compute_metrics`` and the samples take the model's own answers to
each chat without its last trained turn. A dataset holds token ids, so a document's labels give prompt and reference:

    ids        <|user|> \n Hi <|end|> \n <|assistant|> \n Hello ! <|end|> \n <|endoftext|>
    trained        -    -  -   -      -       -        -   x   x    x     -       -
    prompt     ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
    reference                                              ^^^^^^^           the last trained span, without its end
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import regex
from torch import nn

from ..config import IGNORE_INDEX
from ..data.batches import batches
from ..data.dataset import ChatDataset, ChatStream, require_dataset
from ..data.template import ChatEncoder
from ..display import flat, html_table, one_line, text_facts
from ..errors import DataError, Phi3LoRAError, install_hint, is_int, is_number, plain_value, short_repr
from ..lora.wrappers import unwrap
from ..model.backend import PLAIN, use_backend
from ..model.forward import eval_mode, output_head, require_causal_lm, supervised_hidden_states
from ..model.load import longrope_boundary
from ..model.loss import token_losses
from ..model.sharding import sharded_base
from .generation import generate_answers

METRICS = ("loss", "perplexity", "token_accuracy", "n_tokens")
"""Metrics that :func:`evaluate` always returns."""
ROUGE = ("rouge1", "rouge2", "rougeL")
"""Metrics of the model's own answers that :func:`evaluate` returns with ``rouge=True``."""
_SHOWN = 200  # characters of a text in the printed form of answers

ComputeMetrics = Callable[["Answers"], Mapping[str, float]]
"""A function of the caller's: the model's answers beside their references -> name -> number."""


def evaluate(
    model: nn.Module,
    dataset: ChatDataset | ChatStream,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    packing: bool = True,
    fused: bool = True,
    rouge: bool = False,
    compute_metrics: ComputeMetrics | None = None,
    tokenizer: Any = None,
    max_samples: int | None = 100,
    max_new_tokens: int = 256,
    world: Any = None,
) -> dict[str, float]:
    """Return the mean loss over the dataset's supervised tokens; optionally, also score the model's own answers.

    Args:
        model: a Phi-3 causal LM, adapted or not; its modes and weights are left as they are.
        dataset: tokenised documents; a stream is read once to its end.
        batch_size: rows at a time.
        max_length: tokens in a row; None: the dataset's.
        packing: put several documents in a row; the results do not depend on it.
        fused: use the fused kernels where they are supported; False: always transformers' own layers.
        rouge: also let the model answer, greedily, and compare each answer with the chat's last trained turn
            (package ``rouge-score``, extra ``eval``). Words count; in scripts without spaces, characters do.
        compute_metrics: also let the model answer, and call this with the :class:`Answers`; it returns name -> number.
        tokenizer: the dataset's, for ``rouge`` and ``compute_metrics``.
        max_samples: the number of chats to answer, from the first; None: all.
        max_new_tokens: the longest answer, in tokens.
        world: the processes that evaluate together, from ``train``; None: this process alone, whatever started it.

    Returns:
        ``loss`` (nats per token, the mean over all supervised tokens), ``perplexity`` (its exponential),
        ``token_accuracy`` (share of tokens whose argmax is right), ``n_tokens`` (their number). With ``rouge`` also
        ``rouge1``, ``rouge2``, ``rougeL`` (F-measures in [0, 1], means over the answers); with ``compute_metrics`` also
        what it returns; with either also ``n_answers``. :func:`phi3lora.sample_answers` shows such answers.

    Raises:
        DataError: an empty dataset, documents that do not fit the model, as in ``train``; answers asked for without
            tokenizer or with no chat that can be answered; ``compute_metrics`` returns something else than numbers.
        Phi3LoRAError: ``rouge`` without the package.

    Example:
        >>> sorted(p3.evaluate(model, chats))
        ['loss', 'n_tokens', 'perplexity', 'token_accuracy']
    """
    batch_size, max_length, max_new_tokens, max_samples = plain_value(
        (batch_size, max_length, max_new_tokens, max_samples)
    )
    _check_number("batch_size", batch_size, 2**63)
    if max_length is not None:
        _check_number("max_length", max_length, 2**24 + 1)
    _check_number("max_new_tokens", max_new_tokens, 2**63)
    if max_samples is not None:
        _check_number("max_samples", max_samples, 2**63)
    require_dataset("dataset", dataset)
    asked_by = "rouge=True" if rouge else "compute_metrics" if compute_metrics is not None else None
    if asked_by and not dataset.known_length:
        raise DataError(f"{asked_by} needs a ChatDataset, not a stream; pass stream.take(100), for example")
    scorer = rouge_scorer() if rouge else None
    if asked_by and tokenizer is None:
        raise DataError(f"{asked_by} needs the tokenizer that the dataset was loaded with: tokenizer=...")
    model = unwrap(model)
    require_causal_lm(model)
    settings: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "packing": packing}
    sums = [0.0, 0.0, 0.0]  # of losses, right tokens, supervised tokens
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    seen, own = 0, 0
    with eval_mode(model), use_backend(model, None if fused else PLAIN) as backend:
        for seen, batch in enumerate(_batches(model, dataset, settings), 1):
            if (seen - 1) % size != rank:
                continue
            own += 1
            hidden, labels = supervised_hidden_states(model, batch, backend)
            losses, right = token_losses(hidden, output_head(model), labels)
            for i, value in enumerate((losses.double().sum().item(), right.sum().item(), labels.numel())):
                sums[i] += value
        split = sharded_base(model)
        if split is not None and own < -(-seen // size):  # other processes have a batch more
            split.idle(backward=False)
    loss_sum, correct, count = sums if world is None else world.sum(sums)
    loss = loss_sum / count
    perplexity = math.exp(loss) if loss < 700 else math.inf
    metrics = {"loss": loss, "perplexity": perplexity, "token_accuracy": correct / count, "n_tokens": int(count)}
    if asked_by:
        pairs = _answerable(dataset.first_window, max_samples)
        answers = _answers_together(model, tokenizer, pairs, max_new_tokens, batch_size, world)
        metrics |= _metrics_of_answers(answers, scorer, compute_metrics, tuple(metrics), world)
    return metrics


def _metrics_of_answers(
    answers: Answers, scorer: Any, compute_metrics: ComputeMetrics | None, taken: Sequence[str], world: Any
) -> dict[str, float]:
    """Return ROUGE if there is a scorer, what the caller's function returns if there is one, and ``n_answers``."""
    metrics: dict[str, float] = {}
    if scorer is not None:
        scores = [scorer.score(a.reference, a.answer) for a in answers]
        metrics |= {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}
    if compute_metrics is not None:
        own_metrics = partial(_own_metrics, compute_metrics, answers, (*taken, *metrics))
        metrics |= own_metrics() if world is None else world.from_main(own_metrics)
    return {**metrics, "n_answers": len(answers)}


def _own_metrics(compute_metrics: ComputeMetrics, answers: Answers, taken: Collection[str]) -> dict[str, float]:
    """Return what the caller's function makes of the answers, as plain numbers."""
    found = compute_metrics(answers)
    if not isinstance(found, Mapping):
        raise DataError(f"compute_metrics returned {short_repr(found)}; allowed: a dict of names to numbers")
    numbers: dict[str, float] = {}
    for name, given in found.items():
        try:
            value: Any = given.item() if hasattr(given, "item") else given
        except (ValueError, RuntimeError):  # an array of several numbers
            value = None
        if not isinstance(name, str) or not (is_number(value) or isinstance(value, float)):  # NaN is one, too
            raise DataError(f"compute_metrics returned {short_repr({name: given})}; allowed: names to numbers")
        numbers[name] = value
        if name.removeprefix("eval_") in (*taken, "n_answers"):
            raise DataError(
                f"compute_metrics returned {name!r}, a metric that evaluate has already; choose another name"
            )
    return numbers


def _batches(model: Any, dataset: ChatDataset | ChatStream, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the batches of a dataset, in its order, once it is checked; of a stream each window when it is read."""
    for _, window in dataset.windows(endless=False):
        check_documents(model, window, "the dataset", None)
        yield from batches(window, shuffle=False, boundary=longrope_boundary(model.config), **settings)


def _check_number(name: str, value: object, end: int) -> None:
    if not is_int(value, 1, end):
        raise DataError(f"{name}={short_repr(value)}; allowed: a whole number >= 1, below {end:,}")


def check_documents(model: nn.Module, dataset: ChatDataset, name: str, row_length: int | None) -> None:
    """Raise if documents do not fit the model, or the rows if their length is given."""
    model_config: Any = model.config
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: it has no documents")
    longest = int(dataset.lengths.max())
    if longest > model_config.max_position_embeddings:
        raise DataError(
            f"{name} has a document of {longest} tokens; the model allows "
            f"{model_config.max_position_embeddings}. Load the dataset with a smaller max_length"
        )
    if row_length is not None and longest > row_length:
        raise DataError(
            f"max_length={row_length}, but {name} (loaded with max_length={dataset.max_length}) has a "
            f"document of {longest} tokens; load it with the smaller max_length, or leave max_length out"
        )
    if dataset.largest_token_id() >= model_config.vocab_size:
        raise DataError(
            f"{name} has token id {dataset.largest_token_id()}; the model's vocabulary has "
            f"{model_config.vocab_size}. Tokenise with the model's own tokenizer; for tokens that you added, call "
            f"model.resize_token_embeddings(len(tokenizer)) before inject_lora"
        )


@dataclass(frozen=True)
class Answer:
    """A model's answer to one chat of a dataset, beside the chat's own."""

    prompt: str
    """Text that the model was given, with its control tokens."""
    reference: str
    """Text of the chat's last trained turn."""
    answer: str
    """Text that the model generated."""

    def __repr__(self) -> str:
        return one_line("Answer", [f"reference {flat(self.reference, 40)!r}", f"answer {flat(self.answer, 40)!r}"])

    def __str__(self) -> str:
        prompt, reference = flat(self.prompt, _SHOWN, keep_end=True), flat(self.reference, _SHOWN)
        return text_facts({"prompt": prompt, "reference": reference, "answer": flat(self.answer, _SHOWN)})


class Answers(list[Answer]):
    """A list of answers beside their references; ``print`` shows them one below the other, a notebook as a table."""

    def __repr__(self) -> str:
        return one_line("Answers", [f"{len(self)} answers", *(repr(flat(a.answer, 40)) for a in self)])

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return html_table([("prompt", "reference", "answer"), *((a.prompt, a.reference, a.answer) for a in self)])


def sample_answers(
    model: nn.Module,
    tokenizer: Any,
    dataset: ChatDataset,
    *,
    count: int | None = 4,
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> Answers:
    """Let the model answer chats of a dataset, greedily, from the text before their last trained turn.

    Args:
        model, tokenizer: the model, whose modes are restored, and the tokenizer that the dataset was loaded with.
        dataset: held-out chats. Chats whose last turn was cut by ``max_length`` are skipped.
        count: the number of chats to answer, from the first; None: all.
        max_new_tokens: the longest answer, in tokens.
        batch_size: chats at a time.

    Returns:
        A list of prompt, reference and answer; ``print`` shows it.

    Raises:
        DataError: no chat can be answered (``train_on="all"`` leaves no prompt); ``count`` is not a number >= 1.

    Example:
        >>> answers = p3.sample_answers(model, tokenizer, chats, count=2, max_new_tokens=16)
        >>> len(answers), answers[0].reference.startswith("Thanks for asking!")
        (2, True)
    """
    if not dataset.known_length:
        raise DataError("sample_answers needs a ChatDataset, not a stream; pass stream.take(100), for example")
    count = plain_value(count)
    if count is not None and not is_int(count, 1):
        raise DataError(f"count={count!r}; allowed: a whole number >= 1, or None for all")
    return _answers(model, tokenizer, _answerable(dataset, count), max_new_tokens, batch_size)


Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its reference."""


def _answerable(dataset: ChatDataset, count: int | None) -> list[Pair]:
    """Return the first chats that can be answered, at least one."""
    pairs = list(itertools.islice(_prompts_and_references(dataset), count))
    if not pairs:
        raise DataError(
            f"none of the {len(dataset)} documents can be answered: each has no prompt before its last trained turn "
            f"(train_on='all') or was cut within it (max_length={dataset.max_length})"
        )
    return pairs


def _answers_together(
    model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], max_new_tokens: int, batch_size: int, world: Any
) -> Answers:
    """Return all answers on every process, each of which makes its share; a split base computes only together."""
    if world is None or sharded_base(model) is not None:
        return _answers(model, tokenizer, pairs, max_new_tokens, batch_size)
    share = _answers(model, tokenizer, pairs[world.rank :: world.size], max_new_tokens, batch_size)
    shares = world.gather(list(share))
    return Answers(shares[i % world.size][i // world.size] for i in range(len(pairs)))


def _answers(model: nn.Module, tokenizer: Any, pairs: Sequence[Pair], max_new_tokens: int, batch_size: int) -> Answers:
    prompts = [prompt for prompt, _ in pairs]
    encoder = ChatEncoder(tokenizer)
    answers = generate_answers(model, encoder, prompts, max_new_tokens, batch_size)
    return Answers(
        Answer(tokenizer.decode(prompt), encoder.decode(reference).strip(), answer)
        for (prompt, reference), answer in zip(pairs, answers, strict=True)
    )


def _prompts_and_references(dataset: ChatDataset) -> Iterator[Pair]:
    """Yield the token ids of prompt and reference of each document that holds both completely."""
    rows: set[tuple[str, int]] = set()
    for i in range(len(dataset)):
        row = dataset.source(i), dataset.row_number(i)
        is_continued = row in rows  # a later part of a split row, whose prompt is in an earlier one
        rows.add(row)
        ids, labels = dataset.document(i)
        end = int(np.flatnonzero(labels != IGNORE_INDEX)[-1])
        before = np.flatnonzero(labels[:end] == IGNORE_INDEX)
        if not is_continued and len(before) and ids[end] == dataset.end_of_turn_id:
            start = int(before[-1]) + 1
            yield ids[:start].tolist(), ids[start:end].tolist()


def rouge_scorer() -> Any:
    """Return a scorer of ROUGE-1, -2 and -L (Lin 2004) for texts of all scripts."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise Phi3LoRAError(f"rouge=True needs a package ({error}): {install_hint('eval')}") from error
    return RougeScorer(list(ROUGE), tokenizer=RougeTokenizer())


class RougeTokenizer:
    """A tokenizer for rouge-score, whose own knows ASCII words only, so that a right answer in Russian scores 0.

    A token is a word in lower case; in scripts without spaces (Chinese, Japanese, Thai and others) a character with its
    marks; or a symbol beyond ASCII, such as an emoji. On ASCII text the tokens are rouge-score's own.
    """

    _SPACELESS = "".join(
        rf"\p{{Script={script}}}"
        for script in "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Javanese "
        "Balinese Tibetan".split()
    )
    _TOKEN = regex.compile(
        rf"[[\p{{L}}\p{{N}}]&&[{_SPACELESS}]]\p{{M}}*"
        rf"|[[\p{{L}}\p{{N}}]--[{_SPACELESS}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_SPACELESS}]]*"
        r"|[\p{S}--[\x00-\x7f]]",
        regex.V1,
    )

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        return list(self._TOKEN.findall(unicodedata.normalize("NFC", text.lower())))
