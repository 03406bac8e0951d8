"""Checks of the documents: what they train, how long they are, and how well they fill the rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.document_text import divided_text
from ..data.template import ChatEncoder
from ..display import DIVIDER
from ..errors import counted, first_of
from ..model.load import longrope_boundary
from ..training.setup import PlannedRun
from .report import Finding, error, ok, warning


def check_supervised_share(planned: PlannedRun) -> Finding:
    facts = planned.statistics
    text = f"{100 * facts['supervised_share']:.1f} % of {facts['tokens']:,} tokens are trained"
    if planned.spans.wrong_labels:
        return error(
            f"{planned.spans.wrong_labels:,} labels are not their own token's id; labels are unshifted here: each is "
            f"-100 or the id of the token at the same position"
        )
    if facts["supervised_share"] < 0.01:
        return warning(f"{text}: most of the computation goes into prompts; check train_on and the chats")
    return ok(text)


def preview_first_document(planned: PlannedRun) -> Finding:
    if planned.tokenizer is None:
        return ok("no tokenizer given: nothing to show")
    if len(planned.dataset) == 0:
        return ok("no document to show")
    ids, labels = planned.dataset.document(0)
    pieces = divided_text(ids, labels, planned.tokenizer, planned.dataset.end_of_turn_id)
    text = f"{planned.dataset.row_name(0)}, {len(ids)} tokens, divided by spaces and {DIVIDER}"
    return ok(f"{text}; the trained part is marked", tuple(pieces))


def check_end_of_turn(planned: PlannedRun) -> Finding:
    dataset, spans = planned.dataset, planned.spans
    name = _token_text(planned.tokenizer, dataset.end_of_turn_id)
    if planned.tokenizer is not None:
        expected = ChatEncoder(planned.tokenizer).end_of_turn_id
        if expected != dataset.end_of_turn_id:
            return error(
                f"the tokenizer's template ends a turn with {_token_text(planned.tokenizer, expected)}, the dataset's "
                f"with {name}: load the dataset with this tokenizer"
            )
    eos = dataset.pad_token_id if planned.tokenizer is None else planned.tokenizer.eos_token_id
    # With train_on="all", a span starts with its document, has its turns inside, and may end in the template's eos.
    ends = np.isin(spans.last_token, [dataset.end_of_turn_id, eos]) | ((spans.start == 0) & ~spans.cut)
    missing = ~ends & ~spans.cut
    turns = f"{counted(len(ends), 'trained turn')} of {counted(spans.documents, 'document')}"
    if missing.any():
        rows = first_of(spans.rows(dataset, missing))
        return error(f"{missing.sum():,} of {turns} do not train {name} (rows {rows}): the model would not stop")
    if not ends.any():
        return error(f"none of {turns} trains {name}, all are cut: the model would not stop; raise max_length")
    cut = int((~ends).sum())
    exception = f", except {cut:,} that max_length cuts before it" if cut else ""
    return ok(f"{name} is trained at the end of all {turns}{exception}")


def check_empty_answers(planned: PlannedRun) -> Finding:
    spans = planned.spans
    ends = spans.last_token == planned.dataset.end_of_turn_id
    empty = (spans.length == 1) & ends & (spans.start > 0)
    if empty.any():
        rows = first_of(spans.rows(planned.dataset, empty))
        count = counted(int(empty.sum()), "empty assistant answer")
        return warning(
            f"{count} (rows {rows}): {'this trains' if empty.sum() == 1 else 'they train'} the model to say nothing"
        )
    return ok("no assistant answer is empty")


def check_padding(planned: PlannedRun) -> Finding:
    tokenizer, pad, end_of_turn = planned.tokenizer, planned.dataset.pad_token_id, planned.dataset.end_of_turn_id
    if tokenizer is None:
        return ok(f"token {pad}; masks go by span, not by token")
    eos = tokenizer.eos_token_id
    names = (_token_text(tokenizer, token) for token in (pad, eos, end_of_turn))
    text = "pad {}, eos {}, end of turn {}".format(*names)
    if pad in (eos, end_of_turn):
        text += ": pad is one of the others, harmless here because masks go by span, not by token"
    return ok(text)


def check_lengths(planned: PlannedRun) -> Finding:
    facts, lengths = planned.statistics, planned.dataset.lengths
    p50, p90, p99 = (int(x) for x in np.percentile(lengths, [50, 90, 99], method="higher"))
    text = (
        f"{counted(len(lengths), 'document')} of {p50:,} | {p90:,} | {p99:,} | {facts['longest']:,} tokens "
        f"(50 | 90 | 99 | 100 %), max_length {facts['max_length']:,}, {facts['truncated']:,} truncated"
    )
    if facts["dropped"]:
        text += f", {counted(facts['dropped'], 'row')} dropped because truncation left nothing to train"
    if facts["dropped"] or facts["truncated"] >= 0.01 * len(lengths):
        return warning(f"{text}. Raise max_length, or load with overflow='split'")
    return ok(text)


def check_packing(planned: PlannedRun) -> Finding:
    steps, plan = planned.steps, planned.steps.plan
    micro_batches = [micro for step in steps.steps_of_epoch(0) for micro in step]
    lengths = plan.lengths
    rows = sum(map(len, micro_batches))
    capacity = sum(
        len(micro) * (plan.max_length if plan.packing else max(int(lengths[i]) for row in micro for i in row))
        for micro in micro_batches
    )
    fill = int(lengths.sum()) / capacity
    kind = f"packed to {plan.max_length:,} tokens" if plan.packing else "of one document, padded"
    per_epoch = -(-len(micro_batches) // planned.config.gradient_accumulation_steps)
    text = f"{counted(rows, 'row')} {kind}, {100 * fill:.1f} % full; "
    text += f"{counted(per_epoch, 'step')} an epoch, {steps.total:,} in all"
    if fill < (0.7 if plan.packing else 0.5) and rows > planned.config.per_device_train_batch_size:
        remedy = "choose a max_length that the documents fill better" if plan.packing else "set packing=True"
        return warning(f"{text}: the rest is padding; {remedy}")
    return ok(text)


def check_longrope(planned: PlannedRun) -> Finding:
    boundary = longrope_boundary(planned.model.config)
    if boundary is None:
        return ok("one set of rotary factors for all lengths")
    long = int((planned.dataset.lengths > boundary).sum())
    short = len(planned.dataset) - long
    if long and short:
        return warning(
            f"{short:,} documents of up to {boundary:,} tokens train the short rotary factors, {long:,} longer ones "
            f"the long ones (never in one batch): the adapter in effect serves two models; keep to one side if you can"
        )
    side, lengths = ("long", "over") if long else ("short", "up to")
    return ok(f"all documents are of {lengths} {boundary:,} tokens: the {side} rotary factors; use the adapter there")


def _token_text(tokenizer: Any, token_id: int | None) -> str:
    """Return a token for messages: ``<|end|> (32007)``, or ``token 32007`` without a tokenizer."""
    if token_id is None:
        return "none"
    return f"token {token_id}" if tokenizer is None else f"{tokenizer.convert_ids_to_tokens(token_id)} ({token_id})"
