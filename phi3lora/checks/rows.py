"""Checks of the rows: what loading found in them, and what it did not use. See ``data/findings.py``."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from ..data.dataset import ChatDataset
from ..errors import counted, first_of, short_repr
from ..lora.inject import lora_layers
from ..training.setup import PlannedRun
from .report import Finding, ok, warning

_CONTEXT = frozenset(
    """
    article background context contexts cot document documents evidence history instruction instructions knowledge
    passage passages persona rationale reasoning system thinking thought thoughts
    """.split()
)
"""Words in names of columns that a model should probably see. Most other columns say where a row is from."""
_WORD = r"[A-Z]+(?![a-z])|[^\W\d_][^\W\d_A-Z]*"  # of snake_case, camelCase or plain text
_CHUNK = 2048  # documents examined at once


def check_forms(planned: PlannedRun) -> Finding:
    found = planned.dataset.findings
    text = f"read as {_counted(found.rows_by_form) or f'format {planned.dataset.format!r}'}"
    if found.turns_switched_off:
        text += f"; {counted(found.turns_switched_off, 'assistant turn')} switched off"
    if found.unanswered_last_turns:
        text += f"; {counted(found.unanswered_last_turns, 'last turn')} without an answer, not trained"
    return ok(text)


def check_columns(planned: PlannedRun) -> Finding:
    """Name the columns and keys of messages that are left out, and warn of those that look like context."""
    unused = planned.dataset.findings.unused
    if not unused:
        return ok("no column and no key of a message is left out")
    text = f"not used: {_counted(unused)}"
    telling = [short_repr(name, 40) for name in unused if _CONTEXT & {word.lower() for word in re.findall(_WORD, name)}]
    if telling:
        return warning(f"{text}: the model sees nothing of {first_of(telling)}; map it with columns=, or leave it out")
    return ok(text)


def check_kept_as_text(planned: PlannedRun) -> Finding:
    kept = planned.dataset.findings.kept_as_text
    if not kept:
        return ok("no content spells a control token")
    return warning(
        f"contents spell {_counted(kept)}, which become ordinary text and control nothing; if they are markers of "
        f"rows that a template has already rendered, take them out"
    )


def check_added_tokens(planned: PlannedRun) -> Finding:
    """Check that tokens which the checkpoint does not know have rows of the embedding that train."""
    spelled = planned.dataset.findings.added_tokens
    text = f"contents hold {_counted(spelled)}, each one id" if spelled else "no content holds an added token"
    new = _new_tokens(planned)
    if not new:
        return ok(text)
    met, written = _met(planned.dataset, np.array(list(new)))
    if not met:
        return ok(text)
    text += f"; new to the checkpoint: {first_of([f'{new[token_id]} ({token_id})' for token_id in met])}"
    embedding, head = planned.model.get_input_embeddings(), planned.model.get_output_embeddings()
    trained = [*lora_layers(planned.model).values()]
    trained += [layer for layer in (embedding, head) if layer.weight.requires_grad]
    if any(layer is embedding for layer in trained):
        if written and not any(layer is head for layer in trained):
            text += "; 'lm_head', with the rows that write them, is frozen; add it to target_modules to train these too"
        return ok(text)
    if head.weight is embedding.weight:
        remedy = "this model's embedding is tied to its head and takes no adapter: spell them with tokens that it knows"
    else:
        remedy = "add 'embed_tokens' and 'lm_head' to target_modules, or spell them with tokens that it knows"
    return warning(f"{text}, whose embedding rows are untrained and frozen; {remedy}")


def _new_tokens(planned: PlannedRun) -> dict[int, str]:
    """Return the added tokens, by id, that the checkpoint's own tokenizer does not have.

    ``load_model`` notes those it has; without this note, those of the tokenizer's own files count; without either,
    those that are special or look like the family's markers. Rows that the model was resized by are always new.
    """
    tokenizer, model = planned.tokenizer, planned.model
    if tokenizer is None:
        return {}
    added = {token_id: t for token_id, t in tokenizer.added_tokens_decoder.items() if token_id >= tokenizer.vocab_size}
    known = getattr(model, "checkpoint_tokens", None)
    if known is None:
        in_files = tokenizer.init_kwargs.get("added_tokens_decoder")
        of_the_family = [t for t in added.values() if t.special or re.match(r"<\||</?think>", str(t))]
        known = set(map(str, in_files.values() if in_files else of_the_family))
    rows = getattr(model.get_decoder(), "vocab_size", model.config.vocab_size)  # before model.resize_token_embeddings
    return {
        token_id: short_repr(str(t), 40) for token_id, t in added.items() if token_id >= rows or str(t) not in known
    }


def _met(dataset: ChatDataset, token_ids: np.ndarray) -> tuple[list[int], list[int]]:
    """Return which of ``token_ids`` (n,) the documents hold, and which of them are trained somewhere."""
    held, trained = np.zeros(len(token_ids), bool), np.zeros(len(token_ids), bool)
    for start in range(0, len(dataset), _CHUNK):
        pairs = [dataset.document(i) for i in range(start, min(start + _CHUNK, len(dataset)))]
        ids, labels = (np.concatenate(column) for column in zip(*pairs, strict=True))
        held |= np.isin(token_ids, ids)
        trained |= np.isin(token_ids, labels)
    return token_ids[held].tolist(), token_ids[trained].tolist()


def check_advice(planned: PlannedRun) -> Finding:
    advice = planned.dataset.findings.advice
    if not advice:
        return ok("no row is doubtful")
    by_count = sorted(advice.items(), key=lambda item: (-item[1], item[0]))
    return warning("; ".join(f"{counted(n, 'row')}: {sentence}" for sentence, n in by_count))


def _counted(counts: Counter[str]) -> str:
    """Return the most frequent names, which may hold any character, with their counts."""
    return first_of([f"{short_repr(name, 40)} ({count:,})" for name, count in counts.most_common()], 8)
