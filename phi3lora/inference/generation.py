"""``generate``: answers to chats, ended where the model was trained to stop."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from ..data.formats import Chat
from ..data.template import ChatEncoder
from ..data.turns import read_turns
from ..errors import DataError, is_int, plain_value, require
from ..lora.wrappers import unwrap
from ..model.forward import eval_mode, require_causal_lm
from ..model.load import longrope_boundary
from .decoding import decode, longest_answers, unsupported_reason
from .sampling import Draw as Draw
from .sampling import Sampling

logger = logging.getLogger("phi3lora")

Prompt = str | Sequence[Mapping[str, Any]]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    system: str | None = None,
    tools: Any = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    batch_size: int = 16,
    stream: bool = False,
) -> Any:
    """Answer a question, or several. The model's own ``generation_config`` has no effect.

    inference/decoding.py computes the answers of a Phi-3 on one device. In other cases (another architecture, a split
    base, hooks on the model; see ``decoding.unsupported_reason``) transformers' own loop gives the same answers.

    Args:
        model, tokenizer: the result of ``load_model``; the model's modes are restored.
        prompt: a question; a chat (a list of ``{"role", "content"}``, a user's or a tool's turn last); or a list of
            either. Messages are read as those of a training row, ``tool_calls`` and ``tool_call_id`` included.
        max_new_tokens: the longest answer, in tokens. An answer also ends where the model's context does.
        system: a system prompt before each question.
        tools: functions that the answers may call, as in a training row's ``tools``; None: none.
        temperature: 0 always takes the likeliest token (and so gives the same answer every time); above 0 samples.
        top_p: sample from the likeliest tokens with this total probability.
        top_k: sample from this many of the likeliest tokens; 0: from all.
        repetition_penalty: a value > 1 makes tokens less likely that are already in the prompt or the answer
            (https://arxiv.org/abs/1909.05858).
        seed: the seed of the sampling; None: a number from torch's global generator. Each prompt of a list has its own
            generator, which depends on the prompt's place in the list.
        batch_size: prompts that run together: when an answer ends, the next prompt takes its place. The answers do not
            depend on it except for rounding.
        stream: print the answer while it is generated (one prompt only).

    Returns:
        The answer, or a list of answers for a list of prompts, without the template's tokens. Tokens that a content may
        spell stay, even if they are flagged as special:
        ``<|tool_call|>[{"name": ..., "arguments": {}}]<|/tool_call|>``, ``<think>``.

    Raises:
        DataError: a prompt of another form, one that ends in an assistant turn or is longer than the model's context,
            no prompt, ``stream`` with several; a setting outside its range.
        ModelError: no memory for the keys and values of ``batch_size`` answers.

    Example:
        >>> p3.generate(model, tokenizer, "My invoice is wrong.", max_new_tokens=64)  # doctest: +SKIP
    """
    model = unwrap(model)
    require_causal_lm(model)
    encoder = ChatEncoder(tokenizer)
    chats, is_list = _as_chats(prompt, system)
    if stream and len(chats) > 1:
        raise DataError(f"stream=True with {len(chats)} prompts; allowed: one")
    temperature, top_p, top_k, repetition_penalty, seed = plain_value(
        (temperature, top_p, top_k, repetition_penalty, seed)
    )
    _check_sampling(temperature, top_p, top_k, repetition_penalty, seed)
    for name, value, default in (("top_p", top_p, 1), ("top_k", top_k, 0)):
        if temperature == 0 and value != default:
            logger.warning("generate: %s=%s has no effect: at temperature=0 the likeliest token is taken", name, value)
    prompts = [_prompt_ids(encoder, chat, tools, i) for i, chat in enumerate(chats, 1)]
    sampling = None
    if temperature > 0:
        generator = None if seed is None else torch.Generator("cpu").manual_seed(int(seed))
        first_seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
        sampling = Sampling(float(temperature), top_p, top_k, first_seed)
    answers = generate_answers(
        model, encoder, prompts, max_new_tokens, batch_size, sampling, repetition_penalty, stream
    )
    return answers if is_list else answers[0]


def _prompt_ids(encoder: ChatEncoder, chat: list[dict[str, Any]], tools: Any, number: int) -> list[int]:
    """Return the tokens of a prompt, read as a training row is."""
    try:
        messages = read_turns(chat, 0, "prompt")
        if messages and messages[-1]["role"] == "assistant":
            raise DataError("row 0 ends in an assistant turn; allowed: a user's or a tool's turn last")
        return encoder.prompt_ids(Chat(messages, tools))
    except DataError as error:
        raise DataError(str(error).replace("row 0", f"prompt {number}", 1)) from error


def generate_answers(
    model: nn.Module,
    encoder: ChatEncoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
    repetition_penalty: float = 1.0,
    stream: bool = False,
) -> list[str]:
    """Return the answer to each prompt of token ids; ``stream`` also prints that of the only one."""
    max_new_tokens, batch_size = plain_value((max_new_tokens, batch_size))
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        require(is_int(value, 1), name, value, "a whole number >= 1", DataError)
    model = unwrap(model)
    require_causal_lm(model)
    largest = max(map(max, prompts), default=0)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if largest >= vocabulary:
        raise DataError(
            f"a prompt has token id {largest}; the model's vocabulary has {vocabulary}. Use the model's own tokenizer; "
            f"for tokens that you added, call model.resize_token_embeddings(len(tokenizer)) before inject_lora"
        )
    context = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts, 1):
        if context is not None and len(prompt) > context:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens; the model allows {context}. Shorten it, or use a model "
                f"with a longer context"
            )
    streamer = AnswerStreamer(encoder) if stream else None
    with eval_mode(model):
        reason = unsupported_reason(model)
        if reason is None:
            put = None if streamer is None else lambda token: streamer.put(torch.tensor([token], device="cpu"))
            ids = decode(
                model, prompts, max_new_tokens=max_new_tokens, slots=batch_size, stops=_stop_token_ids(encoder),
                sampling=sampling, repetition_penalty=repetition_penalty, put=put,
            )  # fmt: skip
            if streamer is not None:
                streamer.end()  # type: ignore[no-untyped-call]
        else:
            logger.debug("generate: transformers' own loop (%s)", reason)
            ids = _generate_by_transformers(
                model, encoder, prompts, max_new_tokens, batch_size, sampling, repetition_penalty, streamer
            )
    return [encoder.decode(answer).strip() for answer in ids]


class AnswerStreamer(TextStreamer):
    """Prints an answer word by word, exactly as it is decoded in the end.

    transformers' own decodes each line alone, and Phi-3's tokenizer drops a space at the start of what it decodes: code
    would lose a space of each indentation. Here the last token of a line is decoded again with the next line.
    """

    def __init__(self, encoder: ChatEncoder) -> None:
        tokenizer: Any = encoder  # of a tokenizer, a streamer uses decode alone
        super().__init__(tokenizer)

    def put(self, value: Tensor) -> None:
        """Add a token, and print what is then certain."""
        line = self.token_cache  # which a new line replaces by an empty list
        super().put(value)  # type: ignore[no-untyped-call]
        if line and not self.token_cache:
            tails = (line[i:] for i in reversed(range(len(line))))
            self.token_cache = next(tail for tail in tails if self.tokenizer.decode(tail))
            self.print_len = len(self.tokenizer.decode(self.token_cache))


def _generate_by_transformers(
    model: Any, encoder: ChatEncoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int,
    sampling: Sampling | None, repetition_penalty: float, streamer: Any,
) -> list[list[int]]:  # fmt: skip
    """Return each prompt's new tokens from transformers' ``generate``, batch by batch."""
    model = _without_generation_config(model)
    answers: list[list[int]] = [[]] * len(prompts)
    options: dict[str, Any] = {} if repetition_penalty == 1 else {"repetition_penalty": float(repetition_penalty)}
    if streamer is not None:
        streamer.skip_prompt = True
        options["streamer"] = streamer
    lengths, boundary = [len(prompt) for prompt in prompts], longrope_boundary(model.config)
    equal_lengths = repetition_penalty != 1  # a penalty would count padding as repeated tokens
    limits = longest_answers(model, prompts, max_new_tokens)
    for group in _group_prompts(lengths, limits, batch_size, boundary, equal_lengths):
        more = {} if sampling is None else {"logits_processor": sampling.processors(group)}
        limit = limits[group[0]]
        new_ids = _generate_ids(model, encoder, [prompts[i] for i in group], limit, {**options, **more})
        for i, ids in zip(group, new_ids.tolist(), strict=True):
            answers[i] = ids
    return answers


def _without_generation_config(model: nn.Module) -> Any:
    """Return a view of the model with default generation settings.

    transformers takes every setting that a call leaves out from the model's own ``generation_config``.
    """
    view: Any = copy.copy(model)  # the same modules and parameters
    view.generation_config = GenerationConfig()
    return view


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the template's end of turn and eos (Phi-3: ``<|end|>, <|endoftext|>``)."""
    return _stop_token_ids(ChatEncoder(tokenizer))


def _stop_token_ids(encoder: ChatEncoder) -> list[int]:
    return list(dict.fromkeys([encoder.end_of_turn_id, encoder.tokenizer.eos_token_id]))


def _group_prompts(
    lengths: list[int], limits: list[int], batch_size: int, boundary: int | None, equal_lengths: bool
) -> list[list[int]]:
    """Group prompts that run together: of similar length for little padding, or of equal length for none; of one limit.

    The longest sequence in a batch decides a longrope model's rotary factors. So prompts that stay within the
    boundary, prompts beyond it, and each prompt that may cross it run separately.
    """
    groups: dict[object, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        regime: object = None
        if boundary is not None:
            crosses = lengths[i] <= boundary < lengths[i] + limits[i]
            regime = f"crosses: {i}" if crosses else lengths[i] > boundary
        groups.setdefault((regime, limits[i], lengths[i] if equal_lengths else None), []).append(i)
    return [group[k : k + batch_size] for group in groups.values() for k in range(0, len(group), batch_size)]


def _generate_ids(
    model: Any, encoder: ChatEncoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, options: dict[str, Any]
) -> Tensor:
    """Return new token ids (B, <= max_new_tokens) after the prompts, which are padded on the left."""
    width = max(map(len, prompts))
    stops, pad = _stop_token_ids(encoder), encoder.tokenizer.pad_token_id
    pad = stops[-1] if pad is None else pad
    input_ids = torch.full((len(prompts), width), pad, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt, device="cpu")
        attention_mask[i, width - len(prompt) :] = 1
    device = model.get_input_embeddings().weight.device
    output: Tensor = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
        **options,
    )
    return output[:, width:]


def _check_sampling(temperature: float, top_p: float, top_k: int, repetition_penalty: float, seed: int | None) -> None:
    rules: tuple[tuple[str, Any, Any, Callable[[Any], bool], str], ...] = (
        ("temperature", temperature, Real, lambda t: t >= 0, "0 (the likeliest token) or more"),
        ("top_p", top_p, Real, lambda p: 0 < p <= 1, "0 < p <= 1"),
        ("top_k", top_k, int, lambda k: k >= 0, "a whole number >= 0; 0: all tokens"),
        ("repetition_penalty", repetition_penalty, Real, lambda f: f > 0, "a number > 0; 1: none"),
        ("seed", 0 if seed is None else seed, Integral, lambda s: -(2**63) <= s < 2**63, "a 64-bit integer, or None"),
    )
    for name, value, kind, ok, allowed in rules:
        is_allowed = isinstance(value, kind) and not isinstance(value, bool) and ok(value)
        require(is_allowed, name, value, allowed, DataError)


def _as_chats(prompt: Any, system: str | None) -> tuple[list[list[dict[str, Any]]], bool]:
    """Return the prompts as chats, and whether ``prompt`` is a list of prompts."""
    is_chat = _is_list(prompt) and bool(prompt) and isinstance(prompt[0], Mapping)
    is_list = not isinstance(prompt, str) and not is_chat
    if is_list and not (_is_list(prompt) and prompt):
        raise DataError(f"prompt={prompt!r}; allowed: text, a chat (list of role/content dicts), or a list of these")
    chats = []
    for item in prompt if is_list else [prompt]:
        chat = [{"role": "user", "content": item}] if isinstance(item, str) else item
        if not _is_list(chat) or not all(isinstance(turn, Mapping) for turn in chat):
            raise DataError(f"a prompt is {str(item)[:60]!r}; allowed: text or a chat (list of role/content dicts)")
        start = [] if system is None else [{"role": "system", "content": system}]
        chats.append([*start, *(dict(turn) for turn in chat)])
    return chats, is_list


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
