"""``generate``: chats in, answers out, stopping where the model was taught to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..data.template import ChatEncoder
from ..errors import DataError
from ..model.load import longrope_boundary, model_device

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
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
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
        top_k: sample from so many of the likeliest tokens; 0: from all.
        repetition_penalty: > 1 makes tokens that prompt or answer already have less likely
            (https://arxiv.org/abs/1909.05858).
        seed: of the sampling; the generators outside are left as they were. None: they are drawn from.
        batch_size: how many prompts run together; the answers do not depend on it but for rounding.
        stream: print the answer as it comes (one prompt only).

    Returns:
        The answer, or a list of answers for a list of prompts, without special tokens.

    Raises:
        DataError: a prompt of another form, no prompts, ``stream`` with several; a setting outside its range.

    Example:
        >>> p3.generate(model, tokenizer, "My invoice is wrong.", max_new_tokens=64)  # doctest: +SKIP
    """
    chats, many = _as_chats(prompt, system)
    if stream and len(chats) > 1:
        raise DataError(f"stream=True with {len(chats)} prompts; allowed: one")
    options = _sampling(temperature, top_p, top_k, repetition_penalty)
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    encoder = ChatEncoder(tokenizer)
    ids = [encoder.prompt_ids(chat) for chat in chats]
    with _seeded(model, seed):
        answers = answers_to(model, tokenizer, ids, max_new_tokens, batch_size, options)
    return answers if many else answers[0]


def answers_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    options: dict[str, Any],
) -> list[str]:
    """The answer to each prompt of token ids; ``options`` are ``model.generate``'s, of how tokens are chosen."""
    answers = [""] * len(prompts)
    lengths, boundary = [len(prompt) for prompt in prompts], longrope_boundary(model.config)
    alike = "repetition_penalty" in options  # which would take padding for a repetition
    with eval_mode(model):
        for part in _groups(lengths, batch_size, max_new_tokens, boundary, alike):
            new = _generate_ids(model, tokenizer, [prompts[i] for i in part], max_new_tokens, options)
            for i, text in zip(part, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text.strip()
    return answers


def _sampling(temperature: float, top_p: float, top_k: int, repetition_penalty: float) -> dict[str, Any]:
    """How tokens are chosen, as ``model.generate`` wants it said."""
    for name, value, ok, allowed in (
        ("temperature", temperature, temperature >= 0, "0 (the likeliest token) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "0 < p <= 1"),
        ("top_k", top_k, isinstance(top_k, int) and top_k >= 0, "a whole number >= 0; 0: all tokens"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "a number > 0; 1: none"),
    ):
        if not ok:
            raise DataError(f"{name}={value!r}; allowed: {allowed}")
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p, top_k=top_k)
    if repetition_penalty != 1:
        options["repetition_penalty"] = repetition_penalty
    return options


@contextmanager
def _seeded(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Torch's generators start at ``seed`` inside, and are as before afterwards; None: nothing happens."""
    if seed is None:
        yield
        return
    device = model_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _groups(
    lengths: list[int], batch_size: int, max_new_tokens: int, boundary: int | None, alike: bool = False
) -> list[list[int]]:
    """Prompts that run together: of like length, for little padding; ``alike``: of one length, for none.

    A longrope model chooses its rotary factors by the longest in the batch: prompts that stay within the boundary,
    those past it, and each that may cross it run apart.
    """
    kinds: dict[object, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        crosses = boundary is not None and lengths[i] <= boundary < lengths[i] + max_new_tokens
        regime = f"crosses {i}" if crosses else boundary is not None and lengths[i] > boundary
        kind = (regime, lengths[i] if alike else None)
        kinds.setdefault(kind, []).append(i)
    return [group[k : k + batch_size] for group in kinds.values() for k in range(0, len(group), batch_size)]


def _generate_ids(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, options: dict[str, Any]
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


# ----------------------------------------------------------------------------------------------------
# A model in eval mode for a while.


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` without gradients, and every module's own mode back afterwards.

    Layers that are compiled for training run as they are: other shapes would have them compiled again and again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
