"""Tools, calls and results in a chat, placed by the template or by Phi-4-mini's convention, or refused."""

import functools
import itertools
import json

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from phi3lora.data.dataset import ChatDataset
from phi3lora.data.formats import Chat
from phi3lora.data.template import ChatEncoder
from phi3lora.data.tools import ToolStyle, has_tools
from phi3lora.errors import DataError

# Phi-4's markers, and everything for function calling, as ChatML models have it.
CHATML = (
    "{% if tools %}{{ '<|im_start|>system<|im_sep|>' }}{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\n' }}{% endif %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '</tools><|im_end|>' }}{% endif %}{% for message in messages %}"
    "{% if not (tools and message['role'] == 'system') %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}{% if message['tool_calls'] %}"
    "{% for call in message['tool_calls'] %}{{ '\n<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
MARKERS = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]
NAMES = ["phi-3.5", "phi-4", "phi-4-mini", "chatml"]

STOCK = {"name": "stock", "description": "Units in stock", "parameters": {"sku": {"type": "str"}}}
WRAPPED = {"type": "function", "function": STOCK}
ASK, CALLED, SAID = (
    {"role": "user", "content": "How many?"},
    {"role": "assistant"},
    {"role": "assistant", "content": "7."},
)
A7, B8 = ({"name": "stock", "arguments": {"sku": sku}} for sku in ("A7", "B8"))


def tokenizer_of(name, special=False, template=CHATML):
    """A member's tokenizer, its markers for tools flagged as special or not; "chatml" is Phi-4's with ``template``."""
    tokenizer = make_tokenizer("phi-4" if name == "chatml" else name)
    if name == "chatml":
        tokenizer.chat_template = template
    elif special:
        tokenizer.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKERS], special_tokens=True)
    return tokenizer


@functools.cache
def style(name):
    tokenizer = tokenizer_of(name)

    def render(messages, number, tools=None):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, tools=tools)
        except Exception as error:
            raise DataError(f"row {number}: {error}") from error

    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return ToolStyle(render, added, added - {*MARKERS, "<unk>"}), render


def rendered(name, messages, tools=None, prompt_messages=0):
    """The text that a template makes of values that ``ToolStyle`` placed."""
    how, render = style(name)
    chat = how.place(Chat(messages, tools, prompt_messages), 5)
    return render(chat.messages, 5, tools=chat.tools)


@functools.cache
def encoder(name, **flags):
    return ChatEncoder(tokenizer_of(name, **flags))


def trained(name, messages, tools=None, **flags):
    """The trained spans of a chat, as text, and all of its text."""
    how = encoder(name, **flags)
    (chat,) = how.encode([Chat(messages, tools)], [5])
    decode = functools.partial(how.tokenizer.decode, skip_special_tokens=False)
    marks = zip(chat.trained, chat.input_ids, strict=True)
    spans = [[token for _, token in run] for on, run in itertools.groupby(marks, lambda mark: mark[0]) if on]
    return [decode(span) for span in spans], decode(chat.input_ids)


@pytest.mark.parametrize("tools", [[STOCK], [WRAPPED], json.dumps([STOCK]), json.dumps([WRAPPED]), [json.dumps(STOCK)]])
@pytest.mark.parametrize("start", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_of_a_row_are_in_phi4_minis_system_message(tools, start):
    text = rendered("phi-4-mini", [*start, ASK, SAID], tools)
    brief = start[0]["content"] if start else ""
    assert text.startswith(f"<|system|>{brief}<|tool|>{json.dumps([STOCK])}<|/tool|><|end|><|user|>How many?<|end|>")


@pytest.mark.parametrize("tools", [[STOCK], [WRAPPED]])
def test_tools_of_a_system_message_may_be_a_list(tools):
    system = {"role": "system", "content": "Be brief.", "tools": tools}
    assert rendered("phi-4-mini", [system, ASK, SAID]) == rendered(
        "phi-4-mini", [{**system, "tools": json.dumps([STOCK])}, ASK, SAID]
    )


def test_text_in_tools_of_a_system_message_is_rendered_as_it_is():
    system = {
        "role": "system",
        "content": "",
        "tools": "[{'name':'stock'}]",
    }  # the cookbook's notebook has Python's repr
    assert "<|tool|>[{'name':'stock'}]<|/tool|>" in rendered("phi-4-mini", [system, ASK, SAID])


@pytest.mark.parametrize("tools", [[STOCK], [WRAPPED], json.dumps([STOCK])])
@pytest.mark.parametrize("start", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_template_that_renders_tools_gets_openais_form(tools, start):
    text = rendered("chatml", [*start, ASK, SAID], tools)
    assert f"<tools>{json.dumps(WRAPPED)}</tools><|im_end|>" in text and ("Be brief." in text) == bool(start)


CALLS = {
    "openai": {"tool_calls": [{"id": "1", "type": "function", "function": {**A7, "arguments": '{"sku":"A7"}'}}]},
    "object": {"tool_calls": [{"type": "function", "function": A7}]},
    "text of a text": {
        "tool_calls": [{"id": "1", "function": {**A7, "arguments": json.dumps(json.dumps(A7["arguments"]))}}]
    },
    "bare": {"tool_calls": [A7]},
    "text": {"tool_calls": json.dumps([A7])},
    "legacy": {"function_call": {**A7, "arguments": json.dumps(A7["arguments"])}},
    "sharegpt": {"function_call": json.dumps(A7)},
    "arrow": {"tool_calls": [{"id": None, "function": {**A7, "arguments": {"sku": "A7", "city": None}}}]},
}


@pytest.mark.parametrize("content", [None, "", "Let me see."])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_is_in_the_content_in_whatever_form_the_row_has_it(call, content):
    chat = [ASK, {**CALLED, "content": content, **call}, {"role": "tool", "content": "7"}, SAID]
    written = json.dumps(A7)
    text = rendered("phi-4-mini", chat)
    assert f"<|assistant|>{content or ''}<|tool_call|>[{written}]<|/tool_call|><|end|><|tool|>7<|end|>" in text
    text = rendered("chatml", chat)
    assert f"assistant<|im_sep|>{content or ''}\n<tool_call>{written}</tool_call><|im_end|>" in text


@pytest.mark.parametrize("arguments", [{}, "{}", "", None])
def test_a_call_without_arguments_has_an_empty_object(arguments):
    text = rendered(
        "phi-4-mini", [ASK, {**CALLED, "content": None, "tool_calls": [{"name": "now", "arguments": arguments}]}]
    )
    assert '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>' in text


def test_an_explicit_null_in_the_text_of_arguments_stays():
    call = {"name": "stock", "arguments": '{"sku": null}'}
    assert '{"sku": null}' in rendered("phi-4-mini", [ASK, {**CALLED, "tool_calls": [call]}])


@pytest.mark.parametrize("name", ["phi-4-mini", "chatml"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_results_of_parallel_calls_are_in_the_order_of_the_calls(name, order):
    calls = [{"id": f"id-{i}", "type": "function", "function": call} for i, call in enumerate((A7, B8))]
    results = [{"role": "tool", "tool_call_id": f"id-{i}", "content": f"result {i}"} for i in order]
    text = rendered(name, [ASK, {**CALLED, "content": None, "tool_calls": calls}, *results, SAID])
    assert text.index("A7") < text.index("B8") < text.index("result 0") < text.index("result 1")


@pytest.mark.parametrize("ids", [{}, {"tool_call_id": "unknown"}, {"tool_call_id": ["no", "text"]}])
def test_results_that_name_no_call_stay_where_they_are(ids):
    results = [{"role": "tool", "content": content, **ids} for content in "21"]
    text = rendered("phi-4-mini", [ASK, {**CALLED, "tool_calls": [{**A7, "id": "1"}, B8]}, *results, SAID])
    assert "<|tool|>2<|end|><|tool|>1<|end|>" in text


def test_messages_of_a_prompt_are_counted_with_the_system_message_put_in_front():
    how, _ = style("phi-4-mini")
    assert how.place(Chat([ASK, SAID], [STOCK], prompt_messages=1), 5).prompt_messages == 2
    assert how.place(Chat([ASK, SAID], [STOCK]), 5).prompt_messages == 0


def test_the_row_is_not_changed():
    messages = [ASK, {**CALLED, "content": None, "tool_calls": [A7]}, {"role": "tool", "content": "7"}, SAID]
    before = json.dumps(messages)
    rendered("phi-4-mini", messages, [WRAPPED])
    assert json.dumps(messages) == before


def test_only_chats_with_tools_need_placing():
    assert not has_tools(Chat([{"role": "system", "content": "x"}, ASK, {**SAID, "train": False, "name": "bot"}]))
    assert has_tools(Chat([ASK, SAID], [STOCK])) and has_tools(Chat([ASK, {**SAID, "function_call": A7}]))
    assert has_tools(Chat([ASK, SAID, {"role": "tool", "content": "7"}, SAID]))
    assert has_tools(Chat([{"role": "system", "content": "x", "tools": "[]"}, ASK, SAID]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, derandomize=True)
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=3))
def test_what_is_written_of_a_call_reads_back_as_the_call(arguments):
    text = rendered("phi-4-mini", [ASK, {**CALLED, "tool_calls": [{"name": "f", "arguments": json.dumps(arguments)}]}])
    written = text.partition("<|tool_call|>")[2].partition("<|/tool_call|>")[0]
    assert json.loads(written) == [{"name": "f", "arguments": arguments}]


RESULT = {"role": "tool", "content": "7"}


def call(arguments, **more):
    return [ASK, {**CALLED, "content": "", "tool_calls": [{"name": "f", "arguments": arguments, **more}]}]


def own(tools):
    return [{"role": "system", "content": "x", "tools": tools}, ASK, SAID]


PLAIN, BOTH, ANY = "phi-3.5 phi-4", "phi-4-mini chatml", [ASK, SAID]  # templates that know no tools, and that do
REFUSED = [
    (PLAIN, ANY, [STOCK], r"row 5: 'tools', which .* does not render; .*system message"),
    (PLAIN, own(json.dumps([STOCK])), None, "row 5: 'tools', which .* does not render"),
    (PLAIN, [*call({}), RESULT, SAID], None, "row 5: message 2: 'tool_calls' .*write the call into"),
    (PLAIN, [*ANY, RESULT, SAID], None, "row 5: message 3: .* role 'tool'; write"),
    (BOTH, own([STOCK]), [STOCK], "row 5: 'tools' in the row and in a message"),
    (BOTH, [{**ASK, "tools": [STOCK]}, SAID], None, "row 5: 'tools' in a message of the role 'user'"),
    (BOTH, [{**ASK, "tool_calls": [A7]}, SAID], None, "row 5: message 1, of the role 'user', has 'tool_calls'"),
    (BOTH, [ASK, {**CALLED, "tool_calls": [A7], "function_call": A7}], None, "'tool_calls' and 'function_call'"),
    (BOTH, ANY, "stock(sku)", "row 5: 'tools' is text but not JSON"),
    (BOTH, ANY, [{"type": "web_search"}], r"row 5: 'tools'\[0\] is .*allowed: \{'name'"),
    (BOTH, ANY, 3, r"row 5: 'tools'\[0\] is 3; allowed"),
    (BOTH, call({}, name=None), None, r"row 5: message 2: 'tool_calls'\[0\] is .*allowed: \{'name'"),
    (BOTH, call("sku=A7"), None, r"row 5: message 2: 'tool_calls'\[0\]: 'arguments' is text but not JSON"),
    (BOTH, call([1]), None, r"arguments \[1\]; allowed: 'name', and an object"),
    (BOTH, call({}, parameters={"a": 1}), None, "the key 'parameters'; allowed: 'name'"),
    (BOTH, call({"x": float("inf")}), None, "row 5: message 2: 'tool_calls' has no JSON form"),
    (BOTH, call({"x": {1}}), None, "row 5: message 2: 'tool_calls' has no JSON form"),
    (BOTH, call('{"x": "\\ud800"}'), None, "surrogate"),
    ("phi-4-mini", ANY, [{**STOCK, "description": "a <|/tool|> b"}], r"row 5: 'tools' spell .*<\|/tool\|>"),
    ("phi-4-mini", ANY, [{**STOCK, "description": "<|end|>"}], r"row 5: 'tools' spell .*<\|end\|>"),
    ("phi-4-mini", own("<|end|>"), None, r"row 5: 'tools' spell .*<\|end\|>"),
    ("phi-4-mini", call({"x": "<|/tool_call|>"}), None, r"row 5: message 2: .*spell '<\|/tool_call\|>'"),
    ("phi-4-mini", [ASK, {**CALLED, "content": "<|tool_call|>[]", "tool_calls": [A7]}], None, "not in both"),
]


@pytest.mark.parametrize("names, messages, tools, message", REFUSED)
def test_what_has_no_place_or_no_one_meaning_is_refused_by_name(names, messages, tools, message):
    for name in names.split():
        with pytest.raises(DataError, match=message) as refusal:
            rendered(name, messages, tools)
        assert "\n" not in str(refusal.value)


def test_deep_values_are_refused():
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for arguments in (deep, '{"a":' * 100_000 + "1" + "}" * 100_000):
        with pytest.raises(DataError, match=r"row 5: .*nested too deeply"):
            rendered("phi-4-mini", call(arguments))


@pytest.mark.parametrize("empty", [[], "[]", None])
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_list_of_tools_is_no_tools(name, empty):
    assert rendered(name, [ASK, SAID], empty) == rendered(name, [ASK, SAID])
    system = {"role": "system", "content": "x"}
    if name != "phi-4-mini":  # whose template renders any text
        assert rendered(name, [{**system, "tools": "[]"}, ASK, SAID]) == rendered(name, [system, ASK, SAID])


# --- In the encoder: what is trained of them


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("content", [None, "Let me see."])
def test_calls_are_trained_with_their_markers_and_end_of_turn(content, special):
    messages = [ASK, {**CALLED, "content": content, "tool_calls": [A7, B8]}, RESULT, RESULT, SAID]
    call = f"{content or ''}<|tool_call|>{json.dumps([A7, B8])}<|/tool_call|><|end|>"
    spans, text = trained("phi-4-mini", messages, [WRAPPED], special=special)
    assert spans == [call, "7.<|end|>"]
    prompt = f"<|system|><|tool|>{json.dumps([STOCK])}<|/tool|><|end|><|user|>How many?<|end|><|assistant|>"
    assert text == f"{prompt}{call}<|tool|>7<|end|><|tool|>7<|end|><|assistant|>7.<|end|><|endoftext|>"


@pytest.mark.parametrize("special", [False, True])
def test_each_marker_is_one_token(special):
    tokenizer = tokenizer_of("phi-4-mini", special)
    messages = [ASK, {**CALLED, "content": None, "tool_calls": [A7]}, RESULT, SAID]
    ((ids, _),) = [
        (c.input_ids, c.trained) for c in encoder("phi-4-mini", special=special).encode([Chat(messages, [STOCK])], [5])
    ]
    counts = {"<|tool|>": 2, "<|/tool|>": 1, "<|tool_call|>": 1, "<|/tool_call|>": 1}
    assert {marker: list(ids).count(tokenizer.convert_tokens_to_ids(marker)) for marker in counts} == counts


def test_tools_and_a_call_that_are_written_as_text_are_rendered_as_they_stand_with_markers_of_one_token():
    tools = '[{"name":"stock","parameters":{"sku":{"type":"str"}}}]'
    called = '<|tool_call|>[{"name":"stock","arguments":{"sku":"A7"}}]<|/tool_call|>'
    messages = [{"role": "system", "content": "Use tools.", "tools": tools}, ASK, {**CALLED, "content": called}]
    spans, text = trained("phi-4-mini", messages)
    assert spans == [f"{called}<|end|>"]
    assert text.startswith(f"<|system|>Use tools.<|tool|>{tools}<|/tool|><|end|><|user|>")
    tokenizer = tokenizer_of("phi-4-mini")
    (document,) = ChatDataset.load([{"messages": messages}], tokenizer, max_length=512)
    assert document["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert all(document["input_ids"].count(tokenizer.convert_tokens_to_ids(marker)) == 1 for marker in MARKERS[:4])


@pytest.mark.parametrize("key", ["a column", "a system message's", "calls"])
def test_a_row_whose_tools_the_template_does_not_render_is_refused_with_its_number(key):
    row = {
        "a column": {"messages": [ASK, SAID], "tools": [WRAPPED]},
        "a system message's": {
            "messages": [{"role": "system", "content": "x", "tools": json.dumps([STOCK])}, ASK, SAID]
        },
        "calls": {"messages": [ASK, {**CALLED, "content": None, "tool_calls": [A7]}]},
    }[key]
    with pytest.raises(DataError, match=r"row 2\b.*'tool(s|_calls)'.*\b(use|write|describe|allowed)\b"):
        ChatDataset.load([{"messages": [ASK, SAID]}, row], make_tokenizer(), max_length=64)


def test_calls_that_a_template_renders_are_trained_as_it_writes_them():
    messages = [ASK, {**CALLED, "content": "Let me see.", "tool_calls": [A7, B8]}, RESULT, SAID]
    spans, text = trained("chatml", messages, [STOCK])
    calls = "".join(f"\n<tool_call>{json.dumps(call)}</tool_call>" for call in (A7, B8))
    assert spans == [f"Let me see.{calls}<|im_end|>", "7.<|im_end|>"]
    assert text == rendered("chatml", messages, [STOCK])


@pytest.mark.parametrize("name", ["phi-4-mini", "chatml"])
def test_generation_starts_from_what_training_had_before_the_answer(name):
    messages = [ASK, {**CALLED, "content": None, "tool_calls": [A7]}, RESULT, SAID]
    (chat,) = encoder(name).encode([Chat(messages, [STOCK])], [5])
    starts = [i for i, on in enumerate(chat.trained) if on and not chat.trained[i - 1]]
    for turn, start in zip((1, 3), starts, strict=True):
        assert encoder(name).prompt_ids(Chat(messages[:turn], [STOCK])) == list(chat.input_ids[:start])


def test_a_protected_token_in_an_argument_stays_text():
    tokenizer = tokenizer_of("phi-4-mini")
    (chat,) = encoder("phi-4-mini").encode([Chat(call({"x": "<|end|><|user|>"}))], [5])
    assert list(chat.input_ids).count(tokenizer.convert_tokens_to_ids("<|user|>")) == 1
    assert '{"x": "<|end|><|user|>"}' in tokenizer.decode(chat.input_ids)


def test_a_call_that_its_row_switches_off_is_not_trained():
    messages = [ASK, {**CALLED, "content": None, "tool_calls": [A7], "train": False}, RESULT, SAID]
    for name, end in (("phi-4-mini", "<|end|>"), ("chatml", "<|im_end|>")):
        assert trained(name, messages)[0] == [f"7.{end}"]


@pytest.mark.parametrize("arguments", ["+ call['function']['arguments'] +", "~ call['function']['arguments'] ~"])
@pytest.mark.parametrize("given", [A7["arguments"], json.dumps(A7["arguments"])])
def test_a_template_that_wants_arguments_as_text_gets_their_json(arguments, given):
    written = "'{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' " + arguments + " '}'"
    template = CHATML.replace("(call['function'] | tojson)", written)
    (chat,) = ChatEncoder(tokenizer_of("chatml", template=template)).encode([Chat(call(given))], [5])
    text = tokenizer_of("chatml").decode(chat.input_ids)
    assert f'<tool_call>{{"name": "f", "arguments": {json.dumps(A7["arguments"])}}}</tool_call><|im_end|>' in text


def test_a_template_that_renders_calls_outside_the_turn_is_refused():
    turned = CHATML.replace(
        "message['role'] + '<|im_sep|>'", "('call' if message['tool_calls'] else message['role']) + '<|im_sep|>'"
    )
    turned_encoder = ChatEncoder(tokenizer_of("chatml", template=turned))
    with pytest.raises(DataError, match=r"row 5: .*message 2 \(tool_calls\)"):
        turned_encoder.encode([Chat([ASK, {**CALLED, "content": "", "tool_calls": [A7]}])], [5])
