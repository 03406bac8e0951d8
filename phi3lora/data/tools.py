"""Function calling: where a chat's tools, calls and results go in its template.

A row holds them as values: ``tools`` beside the messages, ``tool_calls`` in an assistant's message, messages of the
role ``tool``. A template writes them as text. Three ways, tried in this order, for tools and for calls each:

1.  The template renders ``tools=`` or ``tool_calls`` itself (ChatML with tools, llama.cpp's template for Phi-4-mini).
    It is given the values in OpenAI's form, and the encoder makes what it writes for calls the content of their turn.
2.  Phi-4-mini's own convention. Its template renders the system message's ``tools``, JSON text, but no ``tool_calls``
    (here with line ends, of which the template writes none)::

        <|system|>Be brief.<|tool|>[{"name": "stock", "parameters": {"sku": {"type": "str"}}}]<|/tool|><|end|>
        <|user|>How many A7 are left?<|end|>
        <|assistant|><|tool_call|>[{"name": "stock", "arguments": {"sku": "A7"}}]<|/tool_call|><|end|>
        <|tool|>7<|end|>
        <|assistant|>Seven.<|end|>

3.  The row is refused: a call that nothing renders would train an empty answer.

The model card says where the tools go, that they are what ``json.dumps`` writes, without OpenAI's wrapper, and which
markers enclose calls; a call is a JSON list, as the model writes it. Microsoft does not say how a result is written.
Here it is what the template makes of the role ``tool``, which vLLM, Ollama and ``apply_chat_template`` send too;
llama.cpp's template has ``<|tool_response|>`` instead. Sources:

    https://huggingface.co/microsoft/Phi-4-mini-instruct#tool-enabled-function-calling-format
    https://github.com/microsoft/PhiCookBook (md/02.Application/07.FunctionCalling/Phi4)
    https://github.com/ShishirPatil/gorilla (berkeley-function-call-leaderboard, the handler of Phi-4-mini)
    https://github.com/ggml-org/llama.cpp/blob/master/models/templates/llama-cpp-microsoft-Phi-4-mini-instruct.jinja
    https://github.com/vllm-project/vllm/blob/main/examples/tool_chat_template_phi4_mini.jinja
    https://ollama.com/library/phi4-mini/blobs/813f53fdc6e5
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from ..errors import DataError, error_line, is_text, short_repr
from ..files import parse_json
from .formats import Chat, Message
from .tokens import one_of

CALL, CALL_END = "<|tool_call|>", "<|/tool_call|>"
"""Phi-4-mini's markers around the calls of an answer."""

_KEYS = frozenset({"tools", "tool_calls", "function_call"})
_PROBE = "probe_eborp"
_TOOL = {"name": _PROBE, "description": "", "parameters": {"type": "object", "properties": {}}}
_ARGUMENTS = {"key": "value"}
_PROBES = json.dumps([_TOOL, _ARGUMENTS])
_SYSTEM: Message = {"role": "system", "content": "system"}
_QUESTION: Message = {"role": "user", "content": "question"}
_ANSWER: Message = {"role": "assistant", "content": "answer"}


def has_tools(chat: Chat) -> bool:
    """Return whether a chat has tools, calls or results, and so needs :meth:`ToolStyle.place`."""
    return bool(chat.tools) or any(m["role"] == "tool" or not _KEYS.isdisjoint(m) for m in chat.messages)


class ToolStyle:
    """How one tokenizer's template takes tools, calls and results; found out by rendering a few chats, once.

    Args:
        render: ``render(messages, number, tools=None) -> str`` applies the template, or raises DataError for the row
            ``number``.
        added_tokens: the added tokens of the vocabulary.
        protected: those of them that no content can produce: the template's markers, bos, eos, pad.
    """

    def __init__(self, render: Callable[..., str], added_tokens: Collection[str], protected: Collection[str]) -> None:
        self._render = render
        tools, chat = _as_openai([_TOOL]), [_QUESTION, _ANSWER]
        with_tools = [self._try(chat, tools=tools), self._try([_SYSTEM, *chat], tools=tools)]
        with_own_tools = self._try([{**_SYSTEM, "tools": _to_json([_TOOL], "")}, *chat])
        self._takes_tools = [_PROBE in text for text in with_tools]  # without a system message, with one
        self._takes_own_tools = _PROBE in with_own_tools

        for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):  # some templates write arguments that are text already
            made = {"id": "call00001", "type": "function", "function": {"name": _PROBE, "arguments": arguments}}
            call: Message = {"role": "assistant", "content": "", "tool_calls": [made]}
            with_call = self._try([_QUESTION, call])
            self._takes_calls = _PROBE in with_call and repr(_ARGUMENTS) not in with_call
            self._arguments_as_text = isinstance(arguments, str)
            if self._takes_calls:
                break
        self._has_markers = CALL in added_tokens and CALL_END in added_tokens

        result: Message = {"role": "tool", "content": _PROBE}
        self._takes_results = _PROBE in self._try([_QUESTION, {**call, "content": "call"}, result, _ANSWER])

        # What values must not spell: what the template writes around them. A call becomes a content, which protects the
        # protected tokens itself.
        plain = self._try(chat) + self._try([_SYSTEM, *chat])

        def around(*texts: str) -> set[str]:
            return {token for token in added_tokens if token in "".join(texts) and token not in plain + _PROBES}

        self._not_in_tools = one_of({*protected, *around(*with_tools, with_own_tools)})
        self._not_in_calls = one_of({CALL, CALL_END, *around(with_call)} - {*protected})

    def _try(self, messages: list[Message], tools: Any = None) -> str:
        try:
            return self._render(messages, 0, tools=tools)
        except DataError:  # a template may refuse what it does not know
            return ""

    def place(self, chat: Chat, number: int) -> Chat:
        """Return the chat as the template takes it. Its ``tools`` are the template's argument of that name, or None.

        Calls are in OpenAI's form if the template renders them, else part of the content. A system message is put in
        front if the template renders tools there and the chat has none. The results of parallel calls come in the order
        of the calls.

        Raises:
            DataError: values of another form, or that the template has no place for, or that spell its markers.
        """
        messages = [_read_calls(m, f"row {number}: message {i}") for i, m in enumerate(chat.messages, 1)]
        order = _order(messages)
        messages = [self._place_calls(m, f"row {number}: message {i}") for i, m in enumerate(messages, 1)]
        results = [i for i, m in enumerate(messages, 1) if m["role"] == "tool"]
        if results and not self._takes_results:
            raise DataError(
                f"row {number}: message {results[0]}: the chat template does not render the role 'tool'; write the "
                f"result into a message of the user, or use a tokenizer whose template renders the role"
            )
        messages, tools = self._place_tools([messages[i] for i in order], chat.tools, number)
        shift = len(messages) - len(order) if chat.prompt_messages else 0
        return replace(chat, messages=messages, tools=tools, prompt_messages=chat.prompt_messages + shift)

    def _place_calls(self, message: Message, where: str) -> Message:
        if not self._takes_calls and "tool_call_id" in message:  # of use for the order of results only
            message = {k: v for k, v in message.items() if k != "tool_call_id"}
        if "tool_calls" not in message:
            return message
        text = _to_json([call["function"] for call in message["tool_calls"]], f"{where}: 'tool_calls'")
        if found := self._not_in_calls.search(message["content"] + text):
            raise DataError(
                f"{where}: its content or 'tool_calls' spell {found[0]!r}, a token that encloses calls; allowed: calls "
                f"in the content or in 'tool_calls', not in both"
            )
        if self._takes_calls:
            return _with_arguments_as_text(message) if self._arguments_as_text else message
        if self._has_markers:
            plain = {k: v for k, v in message.items() if k != "tool_calls"}
            return {**plain, "content": f"{message['content']}{CALL}{text}{CALL_END}"}
        raise DataError(
            f"{where}: 'tool_calls' or 'function_call', which the chat template does not render; write the call into "
            f"the content, or use a tokenizer whose template renders tool_calls or whose vocabulary has {CALL}"
        )

    def _place_tools(self, messages: list[Message], tools: Any, number: int) -> tuple[list[Message], Any]:
        """Return the messages, the system message with the tools or without, and the argument ``tools=``."""
        where = f"row {number}: 'tools'"
        holders = [m for m in messages if "tools" in m]
        has_system = bool(messages) and messages[0]["role"] == "system"
        if holders and (tools or holders[-1]["role"] != "system"):
            places = "the row and in a message" if tools else f"a message of the role {holders[-1]['role']!r}"
            raise DataError(f"{where} in {places}; allowed: in the row, or in its system message")
        given = holders[0]["tools"] if holders else tools
        as_written = bool(holders) and isinstance(given, str) and self._takes_own_tools
        definitions = [] if as_written else _read_tools(given, where)
        messages = [{k: v for k, v in m.items() if k != "tools"} if "tools" in m else m for m in messages]
        if not as_written and not definitions:
            return messages, None
        text = given if as_written else _to_json(definitions, where)
        if found := self._not_in_tools.search(text):
            raise DataError(f"{where} spell the token {found[0]!r}, which only the template may write; remove it")
        if self._takes_tools[has_system] and not as_written:
            return messages, _as_openai(definitions)
        if self._takes_own_tools:
            system = messages.pop(0) if has_system else {"role": "system", "content": ""}
            return [{**system, "tools": text}, *messages], None
        raise DataError(
            f"{where}, which the chat template does not render; describe them in the system message's content, or use "
            f"a tokenizer whose template renders tools"
        )


def _read_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Return definitions of functions without OpenAI's wrapper; of a list, its JSON text, or a list of JSON texts."""
    value = _from_json(value, where)
    definitions = []
    for i, item in enumerate(_as_list(value)):
        tool = _without_none(_from_json(item, f"{where}[{i}]"), where)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            raise DataError(
                f"{where}[{i}] is {short_repr(tool, 60)}; allowed: {{'name': ..., 'parameters': ...}}, bare or as "
                f"{{'type': 'function', 'function': ...}}"
            )
        definitions.append(function)
    return definitions


def _read_calls(message: Message, where: str) -> Message:
    """Return a message with a content, and with its calls in ``tool_calls``, in OpenAI's form, if it has any."""
    content = message.get("content")
    message = {**message, "content": "" if content is None else content}
    found = [key for key in ("tool_calls", "function_call") if key in message]
    if not found:
        return message
    if len(found) > 1 or message["role"] != "assistant":
        raise DataError(
            f"{where}, of the role {message['role']!r}, has {' and '.join(map(repr, found))}; allowed: one of "
            f"'tool_calls' and 'function_call', in a message of the assistant"
        )
    where += f": {found[0]!r}"
    calls = [
        _read_call(item, f"{where}[{i}]") for i, item in enumerate(_as_list(_from_json(message.pop(found[0]), where)))
    ]
    return {**message, "tool_calls": calls} if calls else message


def _read_call(value: Any, where: str) -> dict[str, Any]:
    call = _from_json(value, where)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not _is_name(function.get("name")):
        raise DataError(f"{where} is {short_repr(value, 60)}; allowed: {{'name': ..., 'arguments': {{...}}}}")
    unknown = [
        k for k, v in function.items() if v is not None and k not in ("name", "arguments", "id", "type", "index")
    ]
    arguments = function.get("arguments")
    for _ in range(2):  # some files hold the text of a text
        arguments = {} if arguments in (None, "") else _from_json(arguments, f"{where}: 'arguments'")
    if unknown or not isinstance(arguments, Mapping):
        what = f"the key {short_repr(unknown[0], 60)}" if unknown else f"arguments {short_repr(arguments, 60)}"
        raise DataError(f"{where} has {what}; allowed: 'name', and an object or its JSON text as 'arguments'")
    if not isinstance(function.get("arguments"), str):
        arguments = _without_none(arguments, where)
    own_id = {"id": call["id"]} if call.get("id") is not None else {}
    return {**own_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _with_arguments_as_text(message: Message) -> Message:
    calls = [
        {**call, "function": {**call["function"], "arguments": _to_json(call["function"]["arguments"], "")}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _order(messages: list[Message]) -> list[int]:
    """Return the order of the messages in which results follow their calls' order, by their ``tool_call_id``."""
    order = list(range(len(messages)))
    for i, message in enumerate(messages):
        ids = [call.get("id") for call in message.get("tool_calls", ())]
        stop = i + 1
        while stop < len(messages) and messages[stop]["role"] == "tool":
            stop += 1
        results = [m.get("tool_call_id") for m in messages[i + 1 : stop]]
        if None not in results and all(result in ids for result in results):
            order[i + 1 : stop] = sorted(order[i + 1 : stop], key=lambda k: ids.index(messages[k]["tool_call_id"]))
    return order


def _as_openai(definitions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function} for function in definitions]


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, Mapping):
        return [] if value is None else [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_name(value: Any) -> bool:
    return is_text(value) and value != ""


def _from_json(value: Any, where: str) -> Any:
    """Return the value that a text holds as JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{where} is text but not JSON ({error}): {short_repr(value, 60)}") from None


def _to_json(value: Any, where: str) -> str:
    """Return JSON as ``json.dumps`` and transformers' ``tojson`` write it, with every letter as itself."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{where} has no JSON form: {error_line(error)}") from None
    if not is_text(text):
        raise DataError(f"{where} has half of a surrogate pair; allowed: Unicode text")
    return text


def _without_none(value: Any, where: str) -> Any:
    """Return a value without the keys whose value is None: an Arrow table gives each row the keys of all others."""
    try:
        return _drop_none(value)
    except RecursionError:
        raise DataError(f"{where} is nested too deeply") from None


def _drop_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _drop_none(v) for k, v in value.items() if v is not None}
    return [_drop_none(v) for v in value] if isinstance(value, (list, tuple)) else value
