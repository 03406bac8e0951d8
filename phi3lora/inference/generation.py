"""``generate``: chats in, answers out, stopping where the model was taught to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.template import ChatEncoder
from ..errors import DataError
from ..model.loading import longrope_boundary
from .evaluation import eval_mode

Prompt = str | Sequence[Mapping[str, Any]]


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Where an answer ends: the template's end of turn and the eos (Phi-3: ``<|end|>``, ``<|endoftext|>``)."""
    return list(dict.fromkeys([ChatEncoder(tokenizer).end_of_turn_id, tokenizer.eos_token_id]))


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 16,
    stream: bool = False,
) -> Any:
    """Answer a question, or several.

    Args:
        model, tokenizer: as ``load_model`` gives them; the model's modes are left as they are.
        prompt: a question; a chat (list of ``{"role", "content"}``, a user's turn last); or a list of either.
        max_new_tokens: the longest answer, in tokens.
        system: a system prompt before each question.
        temperature: 0 takes the likeliest token each time (the same answer every time); above, samples.
        top_p: sample from the likeliest tokens of this total probability.
        batch_size: how many prompts run together; the answers do not depend on it but for rounding.
        stream: print the answer as it comes (one prompt only).

    Returns:
        The answer, or a list of answers for a list of prompts, without special tokens.

    Raises:
        DataError: a prompt of another form, no prompts, ``stream`` with several.

    Example:
        >>> p3.generate(model, tokenizer, "My invoice is wrong.", max_new_tokens=64)  # doctest: +SKIP
    """
    chats, many = _as_chats(prompt, system)
    if stream and len(chats) > 1:
        raise DataError(f"stream=True with {len(chats)} prompts; allowed: one")
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p, top_k=0)
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    encoder = ChatEncoder(tokenizer)
    ids = [encoder.prompt_ids(chat) for chat in chats]
    answers = [""] * len(ids)
    boundary = longrope_boundary(model.config)
    with eval_mode(model):
        for part in _groups([len(prompt) for prompt in ids], batch_size, max_new_tokens, boundary):
            new = _generate_ids(model, tokenizer, [ids[i] for i in part], max_new_tokens, options)
            for i, text in zip(part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers if many else answers[0]


def _groups(lengths: list[int], batch_size: int, max_new_tokens: int, boundary: int | None) -> list[list[int]]:
    """Prompts that run together: of like length, for little padding.

    A longrope model chooses its rotary factors by the longest in the batch: prompts that stay within the boundary,
    those past it, and each that may cross it run apart.
    """
    kinds: dict[object, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        crosses = boundary is not None and lengths[i] <= boundary < lengths[i] + max_new_tokens
        kind = f"crosses {i}" if crosses else boundary is not None and lengths[i] > boundary
        kinds.setdefault(kind, []).append(i)
    return [group[k : k + batch_size] for group in kinds.values() for k in range(0, len(group), batch_size)]


def _generate_ids(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, options: dict[str, Any]
) -> torch.Tensor:
    """New token ids (B, <= max_new_tokens) after prompts that are padded on the left."""
    width = max(map(len, prompts))
    stops = stop_token_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[-1]
    input_ids = torch.full((len(prompts), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[i, width - len(prompt) :] = 1
    device = model.get_input_embeddings().weight.device
    output = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
        **options,
    )
    return output[:, width:]


def _as_chats(prompt: Any, system: str | None) -> tuple[list[list[dict[str, Any]]], bool]:
    """The prompts as chats, and whether a list of prompts was given."""
    one = isinstance(prompt, str) or (_is_list(prompt) and bool(prompt) and isinstance(prompt[0], Mapping))
    if not one and not (_is_list(prompt) and prompt):
        raise DataError(f"prompt={prompt!r}; allowed: text, a chat (list of role/content dicts), or a list of these")
    chats = []
    for item in [prompt] if one else prompt:
        chat = [{"role": "user", "content": item}] if isinstance(item, str) else item
        if not _is_list(chat) or not all(isinstance(turn, Mapping) for turn in chat):
            raise DataError(f"a prompt is {str(item)[:60]!r}; allowed: text or a chat (list of role/content dicts)")
        chat = [dict(turn) for turn in chat]
        if system is not None:
            chat.insert(0, {"role": "system", "content": system})
        chats.append(chat)
    return chats, not one


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
