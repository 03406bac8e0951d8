"""What the documents teach, how long they are, and how they fill the rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from ..data.dataset import IGNORE
from ..data.template import ChatEncoder
from ..model.load import longrope_boundary
from .findings import Verdict, error, listed, ok, warning
from .planned_run import PlannedRun, token_text

_LONGEST_PIECE = 240  # characters of a stretch of one document that are shown


def supervised(planned: PlannedRun) -> Verdict:
    """How many tokens are trained."""
    facts = planned.statistics
    text = f"{100 * facts['supervised_share']:.1f} % of {facts['tokens']:,} tokens are trained"
    if planned.spans.other_labels:
        return error(
            f"{planned.spans.other_labels:,} labels are not their own token's id: labels are unshifted here, -100 or "
            f"the token at the same place"
        )
    if facts["supervised_share"] < 0.01:
        return warning(f"{text}: most of the computing goes into prompts; look at train_on and the chats")
    return ok(text)


def preview(planned: PlannedRun) -> Verdict:
    """The first document in words; what is trained stands out."""
    if planned.tokenizer is None:
        return ok("no tokenizer given: nothing to show")
    if len(planned.dataset) == 0:
        return ok("no document to show")
    ids, labels = planned.dataset.document(0)
    trained = labels != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1), len(ids)]
    pieces: list[tuple[str, bool]] = []
    for start, stop in pairwise(edges):
        text = planned.tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
        pieces.append((_shown(text), bool(trained[start])))
    return ok(f"row {planned.dataset.row_number(0)}, {len(ids)} tokens; what is trained is marked", tuple(pieces))


def _shown(text: str) -> str:
    """``text`` in one harmless piece: the middle left out, control characters spelt."""
    if len(text) > _LONGEST_PIECE:
        half = _LONGEST_PIECE // 2
        text = f"{text[:half]} [...] {text[-half:]}"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def end_of_turn(planned: PlannedRun) -> Verdict:
    """Every trained turn ends in the token that ends generation, and trains it."""
    dataset, spans, name = planned.dataset, planned.spans, planned.end_of_turn
    if planned.tokenizer is not None:
        expected = ChatEncoder(planned.tokenizer).end_of_turn_id
        if expected != dataset.end_of_turn_id:
            return error(
                f"the tokenizer's template ends a turn with {token_text(planned.tokenizer, expected)}, the dataset's "
                f"with {name}: load the dataset with this tokenizer"
            )
    ends = spans.last_token == dataset.end_of_turn_id
    missing = ~ends & ~spans.cut
    turns = f"{len(ends):,} trained turns of {spans.documents:,} documents"
    if missing.any():
        rows = listed(spans.rows(dataset, missing))
        return error(f"{missing.sum():,} of {turns} do not train {name} (rows {rows}): the model would not stop")
    if not ends.any():
        return error(f"none of {turns} trains {name}, all are cut: the model would not stop; raise max_length")
    cut = int((~ends).sum())
    return ok(f"{name} is trained at the end of all {turns}" + (f" but {cut:,} that are cut before it" if cut else ""))


def empty_answers(planned: PlannedRun) -> Verdict:
    """Answers of which only the end-of-turn token is left."""
    spans = planned.spans
    ends = spans.last_token == planned.dataset.end_of_turn_id
    empty = (spans.length == 1) & ends & (spans.start > 0)
    if empty.any():
        rows = listed(spans.rows(planned.dataset, empty))
        return warning(f"{empty.sum():,} empty assistant answers (rows {rows}): they train the model to say nothing")
    return ok("no assistant answer is empty")


def padding(planned: PlannedRun) -> Verdict:
    """Which token pads and which ends, and what that does here."""
    tokenizer, pad = planned.tokenizer, planned.dataset.pad_token_id
    if tokenizer is None:
        return ok(f"token {pad}; masks go by span, not by token")
    eos = tokenizer.eos_token_id
    text = f"pad {token_text(tokenizer, pad)}, eos {token_text(tokenizer, eos)}, end of turn {planned.end_of_turn}"
    if pad in (eos, planned.dataset.end_of_turn_id):
        return ok(f"{text}: pad is one of the others, harmless here because masks go by span, not by token")
    return ok(text)


def lengths(planned: PlannedRun) -> Verdict:
    """Documents against ``max_length``."""
    facts, found = planned.statistics, planned.dataset.lengths
    middle, most, nearly = (int(x) for x in np.percentile(found, [50, 90, 99], method="higher"))
    text = (
        f"{len(found):,} documents of {middle:,} | {most:,} | {nearly:,} | {facts['longest']:,} tokens "
        f"(50 | 90 | 99 | 100 %), max_length {facts['max_length']:,}, {facts['truncated']:,} truncated"
    )
    if facts["dropped"]:
        text += f", {facts['dropped']:,} rows dropped: cut there, nothing trained was left of them"
    if facts["dropped"] or facts["truncated"] >= 0.01 * len(found):
        return warning(f"{text}. Raise max_length, or load with overflow='split'")
    return ok(text)


def packing(planned: PlannedRun) -> Verdict:
    """How full the rows are, and how many steps there are."""
    steps, plan = planned.steps, planned.steps.plan
    micro_batches = plan.micro_batches(0)
    documents = plan.dataset.lengths
    widths = [
        plan.max_length if plan.packing else max(int(documents[i]) for row in micro for i in row)
        for micro in micro_batches
    ]
    rows = sum(map(len, micro_batches))
    fill = int(documents.sum()) / sum(width * len(micro) for width, micro in zip(widths, micro_batches, strict=True))
    kind = f"rows packed to {plan.max_length:,} tokens" if plan.packing else "rows of one document, padded"
    each = -(-len(micro_batches) // planned.config.gradient_accumulation_steps)
    text = f"{rows:,} {kind}, {100 * fill:.1f} % full; {each:,} steps an epoch, {steps.total:,} in all"
    if fill < (0.7 if plan.packing else 0.5) and rows > planned.config.per_device_train_batch_size:
        remedy = "choose a max_length that documents divide better" if plan.packing else "packing=True fills them"
        return warning(f"{text}: the rest is padding; {remedy}")
    return ok(text)


def longrope(planned: PlannedRun) -> Verdict:
    """Which rotary factors are trained."""
    config: Any = planned.model.config
    boundary = longrope_boundary(config)
    if boundary is None:
        return ok("one set of rotary factors for all lengths")
    long = int((planned.dataset.lengths > boundary).sum())
    short = len(planned.dataset) - long
    if long and short:
        return warning(
            f"{short:,} documents of up to {boundary:,} tokens train the short rotary factors, {long:,} longer ones "
            f"the long ones (never in one batch): one adapter for two models; keep to one side if you can"
        )
    side, lengths = ("long", "over") if long else ("short", "up to")
    return ok(f"all documents are of {lengths} {boundary:,} tokens: the {side} rotary factors; use the adapter there")
