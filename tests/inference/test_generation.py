"""``generate`` against greedy decoding by hand: where it stops, what it accepts, how it chooses tokens."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import adapted_model, longrope_model, make_tokenizer, quiet_config, tiny_model
from tokenizers import AddedToken
from transformers import GPT2Config, GPT2LMHeadModel

import phi3lora as p3
from phi3lora.inference import generation
from phi3lora.inference.generation import Draw, stop_token_ids

TOKENIZER = make_tokenizer()
END, EOS = TOKENIZER.convert_tokens_to_ids("<|end|>"), TOKENIZER.eos_token_id
PROMPTS = ["Hi", "What is the price of item 7?", "Say hello to the user, then wait for an answer.", "Why?", "42?"]


def confident_model(scale=30.0):
    """A random model with large logits, so that the rounding of padding cannot change its choice."""
    return adapted_model(head_scale=scale, lora_dropout=0.3).eval()


def constant_model(token):
    """A model that generates ``token`` after any text."""
    model = tiny_model()
    model.model.norm.weight.data.zero_()
    model.lm_head = torch.nn.Linear(32, 512)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data.zero_()[token] = 10.0
    return model


def user(text):
    return [{"role": "user", "content": text}]


def prompt_ids(chat):
    return TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def greedy_by_hand(model, chat, count, penalty=1.0):
    """Take the likeliest token again and again, without a cache; tokens already present are penalised."""
    ids, new = prompt_ids(chat), []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        for token in set(ids + new):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        token = int(logits.argmax())
        if token in (END, EOS):
            break
        new.append(token)
    return TOKENIZER.decode(new, skip_special_tokens=True).strip()


def record_calls(model):
    """Return a list that will hold the keyword arguments of each call of ``model.generate``."""
    real, calls = model.generate, []
    model.generate = lambda **options: calls.append(options) or real(**options)
    return calls


# --- The answer and its end


def test_an_answer_equals_greedy_decoding_by_hand_alone_and_in_any_batch():
    model = confident_model()
    expected = [greedy_by_hand(model, user(prompt), 10) for prompt in PROMPTS]
    assert all(expected) and len(set(expected)) > 2
    for batch_size in (1, 2, 16):
        assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=batch_size) == expected
    assert p3.generate(model, TOKENIZER, PROMPTS[0], max_new_tokens=10) == expected[0]
    assert p3.generate(model, TOKENIZER, PROMPTS[:1], max_new_tokens=10) == expected[:1]


@pytest.mark.parametrize("name", ["phi-3", "phi-4", "phi-4-mini"])
def test_it_stops_at_the_template_s_end_of_turn_and_at_eos(name):
    tokenizer = make_tokenizer(name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if name == "phi-4" else "<|end|>")
    assert set(stop_token_ids(tokenizer)) == {end, tokenizer.eos_token_id}
    for stop in (end, tokenizer.eos_token_id):
        model, forwards = constant_model(stop), []
        model.register_forward_hook(lambda *args, seen=forwards: seen.append(1))
        assert p3.generate(model, tokenizer, "Hi", max_new_tokens=20) == ""
        assert len(forwards) == 1


def test_a_trained_model_gives_the_answers_it_was_trained_on_and_stops(tmp_path):
    rows = [{"prompt": "Say x.", "completion": "x x x"}, {"prompt": "Say y.", "completion": "y y"}] * 4
    model = adapted_model(r=8)
    config = quiet_config(tmp_path, max_steps=80, learning_rate=2e-2, per_device_train_batch_size=8)
    p3.train(model, p3.ChatDataset.load(rows, TOKENIZER, max_length=32), config)
    assert p3.generate(model, TOKENIZER, ["Say x.", "Say y."], max_new_tokens=20) == ["x x x", "y y"]


@pytest.mark.parametrize("text", ["What is item 3?", "  spaces  around ", "a<|end|>b", "<|assistant|>\nYes"])
def test_the_prompt_has_exactly_the_tokens_of_training(text):
    """The spelling of a control token in a user's text stays text, in training and here."""
    row = {"messages": [*user(text), {"role": "assistant", "content": "Fine."}]}
    document = p3.ChatDataset.load([row], TOKENIZER, max_length=64)[0]
    first = next(i for i, label in enumerate(document["labels"]) if label != -100)
    model = confident_model()
    calls = record_calls(model)
    p3.generate(model, TOKENIZER, text, max_new_tokens=1)
    assert calls[0]["input_ids"][0].tolist() == document["input_ids"][:first]


def test_a_longrope_model_answers_a_short_prompt_the_same_beside_a_long_one():
    model = longrope_model(head_scale=30.0).eval()
    short, long = "Why? How?", "What is the price? " * 12
    assert len(prompt_ids(user(short))) + 8 < 40 < len(prompt_ids(user(long)))
    alone = [p3.generate(model, TOKENIZER, prompt, max_new_tokens=8) for prompt in (short, long)]
    assert p3.generate(model, TOKENIZER, [short, long], max_new_tokens=8) == alone


# --- Function calling

MARKERS = ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<think>"]
STOCK = {"type": "function", "function": {"name": "stock", "parameters": {"sku": {"type": "str"}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "stock", "arguments": '{"sku": "A7"}'}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def tool_tokenizer(special=False):
    """Phi-4-mini's, with the markers flagged as special or not, and with ``<think>``."""
    tokenizer = make_tokenizer("phi-4-mini")
    tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for m in MARKERS], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("marker", MARKERS)
def test_markers_that_a_content_may_have_stay_in_the_answer_whatever_their_flag(marker, special, capsys):
    tokenizer = tool_tokenizer(special)
    model = constant_model(tokenizer.convert_tokens_to_ids(marker))
    for stream in (False, True):
        assert p3.generate(model, tokenizer, "Hi", max_new_tokens=2, stream=stream) == marker * 2
    assert capsys.readouterr().out.strip() == marker * 2


@pytest.mark.parametrize("token", ["<|user|>", "<|system|>", "<|assistant|>"])
def test_the_template_s_own_tokens_are_not_in_the_answer(token, capsys):
    tokenizer = tool_tokenizer()
    model = constant_model(tokenizer.convert_tokens_to_ids(token))
    for stream in (False, True):
        assert p3.generate(model, tokenizer, "Hi", max_new_tokens=2, stream=stream) == ""
    assert capsys.readouterr().out.strip() == ""


@pytest.mark.parametrize("tools", [[STOCK], [STOCK["function"]], json.dumps([STOCK])])
def test_tools_and_results_are_where_the_template_has_them(tools):
    tokenizer, model = tool_tokenizer(), confident_model()
    calls = record_calls(model)
    chat = [*user("How many?"), CALLED, {"role": "tool", "tool_call_id": "1", "content": "7"}]
    p3.generate(model, tokenizer, chat, tools=tools, system="Be brief.", max_new_tokens=1)
    function, call = json.dumps([STOCK["function"]]), '[{"name": "stock", "arguments": {"sku": "A7"}}]'
    assert tokenizer.decode(calls[0]["input_ids"][0]) == (
        f"<|system|>Be brief.<|tool|>{function}<|/tool|><|end|><|user|>How many?<|end|>"
        f"<|assistant|><|tool_call|>{call}<|/tool_call|><|end|><|tool|>7<|end|><|assistant|>"
    )


def test_tools_go_to_each_of_several_prompts_and_are_refused_where_nothing_renders_them():
    tokenizer, model = tool_tokenizer(), confident_model()
    calls = record_calls(model)
    p3.generate(model, tokenizer, PROMPTS, tools=[STOCK], max_new_tokens=1)
    assert all(tokenizer.decode(ids).count("<|tool|>[") == 1 for ids in calls[0]["input_ids"])
    with pytest.raises(p3.DataError, match=r"^prompt 1: 'tools', which the chat template does not render"):
        p3.generate(model, TOKENIZER, "Hi", tools=[STOCK])


@pytest.mark.parametrize("content", [None, ""])
def test_messages_are_read_as_those_of_a_training_row(content):
    tokenizer, model = tool_tokenizer(), confident_model()
    calls = record_calls(model)
    chat = [*user("How many?"), {**CALLED, "content": content}, {"role": "tool", "tool_call_id": "1", "content": "7"}]
    row = {"messages": [*chat, {"role": "assistant", "content": "7."}], "tools": [STOCK]}
    document = p3.ChatDataset.load([row], tokenizer, max_length=512, train_on="last")[0]
    start = next(i for i, label in enumerate(document["labels"]) if label != -100)
    same = [{"from": "human", "value": "How many?"}, {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "7"}]  # fmt: skip
    for prompt in (chat, same, [chat]):
        p3.generate(model, tokenizer, prompt, tools=[STOCK], max_new_tokens=1)
        assert calls.pop()["input_ids"][0].tolist() == document["input_ids"][:start]
    with pytest.raises(p3.DataError, match=r"^prompt 2: role 'root'; allowed"):
        p3.generate(model, tokenizer, [chat, [{"role": "root", "content": "Hi"}]])


def test_a_model_trained_on_calls_makes_the_call_and_answers_with_its_result(tmp_path):
    tokenizer, ask = tool_tokenizer(), user("How many?")
    called = [*ask, {**CALLED, "content": None}, {"role": "tool", "tool_call_id": "1", "content": "7"}]
    rows = [{"messages": [*called, {"role": "assistant", "content": "Seven."}], "tools": [STOCK]}] * 4
    model = adapted_model(r=8)
    config = quiet_config(tmp_path, max_steps=120, learning_rate=2e-2, per_device_train_batch_size=1)
    p3.train(model, p3.ChatDataset.load(rows, tokenizer, max_length=256), config)
    answers = p3.generate(model, tokenizer, [ask, called], tools=[STOCK], max_new_tokens=80)
    assert answers == ['<|tool_call|>[{"name": "stock", "arguments": {"sku": "A7"}}]<|/tool_call|>', "Seven."]


# --- Forms of a prompt


def test_a_system_prompt_precedes_each_question_and_batch_size_bounds_the_batch():
    model, chat = confident_model(), user("Hi")
    calls = record_calls(model)
    p3.generate(model, TOKENIZER, [chat, *PROMPTS[1:]], system="Be brief.", batch_size=2, max_new_tokens=1)
    assert [len(call["input_ids"]) for call in calls] == [2, 2, 1]
    pairs = [pair for call in calls for pair in zip(call["input_ids"], call["attention_mask"], strict=True)]
    given = [row[mask == 1].tolist() for row, mask in pairs]
    expected = [prompt_ids([{"role": "system", "content": "Be brief."}, *user(prompt)]) for prompt in PROMPTS]
    assert sorted(given) == sorted(expected)
    assert chat == user("Hi")  # the caller's list is not changed


def test_a_chat_and_a_list_of_chats_and_texts_are_accepted():
    model, chat = confident_model(), [*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("And now?")]
    expected = greedy_by_hand(model, chat, 6)
    assert p3.generate(model, TOKENIZER, chat, max_new_tokens=6) == expected
    assert p3.generate(model, TOKENIZER, [chat, "Hi"], max_new_tokens=6)[0] == expected


@pytest.mark.parametrize("prompt", [[], None, 5, [5], [["Hi"]], {"role": "user", "content": "Hi"}], ids=str)
def test_another_prompt_is_an_error_that_says_what_is_allowed(prompt):
    with pytest.raises(p3.DataError, match="allowed"):
        p3.generate(tiny_model(), TOKENIZER, prompt)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_that_ends_in_an_assistant_turn_is_refused_with_its_number(system):
    answered = [*user("Hi"), {"role": "assistant", "content": "Hello!"}]
    with pytest.raises(p3.DataError, match="prompt 2 ends in an assistant turn; allowed: a user's or a tool's"):
        p3.generate(tiny_model(), TOKENIZER, [user("Hi"), answered], system=system)


def test_streaming_prints_the_answer_of_max_new_tokens_and_returns_it(capsys):
    model = constant_model(TOKENIZER.convert_tokens_to_ids("x"))
    answer = p3.generate(model, TOKENIZER, "Hi", max_new_tokens=4, stream=True)
    assert capsys.readouterr().out.strip() == answer == "xxxx"
    assert p3.generate(model, TOKENIZER, "Hi", max_new_tokens=3) == "xxx"
    assert capsys.readouterr() == ("", "")
    with pytest.raises(p3.DataError, match=r"stream=True with 2 prompts; allowed: one"):
        p3.generate(model, TOKENIZER, ["a", "b"], stream=True)


@pytest.mark.parametrize("name", ["phi-3", "phi-3-legacy", "phi-4", "phi-4-mini"])
@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    if x:\n        return 1\n\n    return  2", "日本\n 語 😀\n  👨‍👩‍👧", "1. a\n   - b\n\n\n    c"],
)
def test_the_streamed_text_is_the_answer_with_every_space_and_grows_with_it(name, text, monkeypatch, capsys):
    """The tokens are given: Phi-3's table spells most of the characters in bytes."""
    tokenizer, printed = make_tokenizer(name), [""]
    ids = tokenizer.encode(text, add_special_tokens=False)

    def decode(*args, put, **options):
        for token in ids:
            put(token)
            printed.append(printed[-1] + capsys.readouterr().out)
        return [ids]

    monkeypatch.setattr(generation, "decode", decode)
    answer = p3.generate(confident_model(), tokenizer, "Hi", stream=True)
    printed.append(printed[-1] + capsys.readouterr().out)
    assert answer == text
    assert printed[-1] == answer + "\n"
    assert len(set(printed)) > 3


# --- The choice of tokens


def test_greedy_answers_and_seeds_leave_the_generator_alone_and_sampling_follows_it():
    model = confident_model(scale=3.0)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8, **{"temperature": 1.0, **options})

    def with_seed(seed):
        return p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    state = torch.get_rng_state()
    greedy = p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8)
    assert with_seed(1) == with_seed(1)
    assert len({tuple(with_seed(seed)) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(1) == sample(1)
    for options in ({}, {"top_k": 0}):  # 0: no bound
        assert len({sample(seed, **options) for seed in range(4)}) > 1
    for options in ({"top_p": 1e-6}, {"top_k": 1}, *({"temperature": t} for t in (1e-4, 1e-40, 1e-300))):
        assert {sample(seed, **options) for seed in range(4)} == {greedy}


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "repetition_penalty": 1.5}], ids=str)
def test_sampled_answers_do_not_depend_on_the_batch(options):
    model = confident_model(scale=1.0)

    def sample(prompts, batch_size):
        settings = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, **options}
        return p3.generate(model, TOKENIZER, prompts, batch_size=batch_size, **settings)

    alone = sample(PROMPTS, 1)
    assert all(sample(PROMPTS, size) == alone for size in range(2, len(PROMPTS) + 1))
    assert sample(PROMPTS[:1], 1) == alone[:1]
    assert len(set(sample(PROMPTS[:1] * 8, 4))) > 1


def test_tokens_are_drawn_with_the_probabilities_of_the_softmax():
    scores, rows = torch.tensor([0.0, 1.0, 2.0, float("-inf")]), 4000
    draw = Draw(range(rows))
    for _ in range(2):  # a row's later draws too
        tokens = draw(torch.zeros(rows, 1), scores.expand(rows, -1)).argmax(-1)
        shares = tokens.bincount(minlength=4) / rows
        assert torch.allclose(shares, scores.softmax(0), atol=0.04) and shares[3] == 0  # 5 standard deviations


def test_a_repetition_penalty_equals_one_by_hand_in_a_batch_of_any_lengths():
    """Padding is the end-of-text token and must not count as repeated."""
    model = confident_model(scale=3.0)
    expected = [greedy_by_hand(model, user(prompt), 8, penalty=3.0) for prompt in PROMPTS]
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, repetition_penalty=3.0) == expected
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8) != expected


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}], ids=str)
@pytest.mark.parametrize("temperature", [1e-42, 1.0, 1e300, float("inf")])
def test_no_temperature_makes_scores_infinite(temperature, options):
    """Of several infinite scores, or of NaN, argmax takes the first: here a control token, which is not shown."""
    model = confident_model(scale=1.0)
    settings = {"max_new_tokens": 6, "temperature": temperature, "seed": 0, **options}
    answers = p3.generate(model, TOKENIZER, ["Hi"] * 16, top_k=3, **settings)
    assert (len(set(answers)) == 1) is (temperature < 1e-30)
    assert all(answers)


def test_top_p_and_top_k_without_a_temperature_are_said_to_have_no_effect(caplog):
    model = confident_model()
    p3.generate(model, TOKENIZER, "Hi", max_new_tokens=1, seed=0, top_p=1, temperature=0.0)
    p3.generate(model, TOKENIZER, "Hi", max_new_tokens=1, top_p=0.9, top_k=5, temperature=0.7)
    assert not caplog.records
    p3.generate(model, TOKENIZER, "Hi", max_new_tokens=1, top_p=0.9, top_k=5)
    assert "top_p=0.9 has no effect: at temperature=0" in caplog.text
    assert "top_k=5 has no effect: at temperature=0" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 0.5}, {"repetition_penalty": 0},
        {"max_new_tokens": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 2.5}, {"batch_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(p3.DataError, match=rf"{name}={value}; allowed: "):
        p3.generate(tiny_model(), TOKENIZER, "Hi", **settings)


def test_modes_are_restored_dropout_is_off_and_the_model_s_own_generation_settings_have_no_effect():
    model = adapted_model(head_scale=30.0, lora_dropout=0.9, lora_alpha=400).eval()
    expected = p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8)
    model.train()
    model.model.layers[0].eval()
    model.generation_config.update(do_sample=True, temperature=5.0, max_length=3)
    model.config.use_cache = False
    modes = {name: module.training for name, module in model.named_modules()}
    assert p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"min_new_tokens": 8},
        {"num_beams": 2, "num_return_sequences": 2}, {"return_dict_in_generate": True}, {"stop_strings": ["x"]},
        {"suppress_tokens": list(range(400))}, {"bad_words_ids": [[5]]}, {"forced_eos_token_id": 4},
        {"max_time": 1e-9}, {"use_cache": False}, {"eos_token_id": list(range(512))}, {"top_k": 1, "do_sample": True},
    ],
    ids=str,
)  # fmt: skip
def test_no_setting_of_a_checkpoint_s_generation_config_changes_the_answers(own):
    model = confident_model(scale=3.0)

    def answers():
        sampled = p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=6, temperature=1.0, seed=0)
        return p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=6), sampled

    expected = answers()
    model.generation_config.update(**own)
    before = model.generation_config.to_dict()
    assert answers() == expected
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_answers_as_the_model_inside(wrap):
    model = confident_model()
    expected = p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=4)
    assert p3.generate(wrap(model), TOKENIZER, PROMPTS, max_new_tokens=4) == expected


# --- Odd arguments and surroundings


@pytest.mark.parametrize(
    "options",
    [{"temperature": "1"}, {"temperature": None}, {"top_p": "x"}, {"top_k": True}, {"repetition_penalty": "2"},
     {"seed": "x"}, {"seed": 2**70}, {"seed": 1.5}, {"max_new_tokens": 1.5}, {"batch_size": 0}],
    ids=str,
)  # fmt: skip
def test_a_setting_of_another_type_or_range_is_named(options):
    (name,) = options
    with pytest.raises(p3.DataError, match=f"^{name}=.*; allowed: "):
        p3.generate(tiny_model(), TOKENIZER, "Hi", **options)


def test_a_token_beyond_the_vocabulary_and_another_module_are_named():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(200)])
    with pytest.raises(p3.DataError, match=r"token id \d+; the model's vocabulary has 512.*resize_token_embeddings"):
        p3.generate(tiny_model(), tokenizer, "a <new199>")
    with pytest.raises(p3.ModelError, match="a Linear is not a causal language model"):
        p3.generate(torch.nn.Linear(2, 2), TOKENIZER, "Hi")


@pytest.mark.parametrize("hooked", [False, True], ids=["rows", "transformers"])
def test_an_answer_ends_where_the_context_does_and_a_longer_prompt_is_refused(hooked):
    model = confident_model()
    if hooked:
        model.register_forward_hook(lambda *args: None)
    lengths = [len(prompt_ids(user(prompt))) for prompt in PROMPTS]
    model.config.max_position_embeddings = max(lengths) + 2
    assert max(lengths) - min(lengths) > 8
    for prompt, length, answer in zip(
        PROMPTS, lengths, p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=10**9), strict=True
    ):
        assert answer == greedy_by_hand(model, user(prompt), max(lengths) + 3 - length)
    longest = PROMPTS[lengths.index(max(lengths))]
    for context, tokens in ((max(lengths), 1), (max(lengths) + 1, 2)):
        model.config.max_position_embeddings = context
        answer = p3.generate(model, TOKENIZER, longest, max_new_tokens=10**9)
        assert answer == greedy_by_hand(model, user(longest), tokens)
    model.config.max_position_embeddings = max(lengths) - 1
    with pytest.raises(p3.DataError, match=rf"prompt 2 has {max(lengths)} tokens; the model allows {max(lengths) - 1}"):
        p3.generate(model, TOKENIZER, ["Hi", longest])


def test_a_model_with_a_table_of_positions_answers_prompts_of_unlike_lengths_up_to_its_end():
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=3, bos_token_id=1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    alone = [p3.generate(model, TOKENIZER, prompt, max_new_tokens=1000) for prompt in PROMPTS]
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=1000) == alone


def test_a_cache_that_cannot_be_allocated_is_an_error_with_the_settings_to_lower():
    model = confident_model()
    model.config.max_position_embeddings = 10**16
    with pytest.raises(p3.ModelError, match=r"no memory on cpu .* GiB, .* Lower batch_size or max_new_tokens"):
        p3.generate(model, TOKENIZER, "Hi", max_new_tokens=10**15)


def test_neither_torch_s_default_device_nor_a_huge_batch_size_matters(capsys):
    model = confident_model(scale=3.0)
    settings = {"max_new_tokens": 4, "repetition_penalty": 1.5}
    expected = p3.generate(model, TOKENIZER, PROMPTS, **settings)
    assert p3.generate(model, TOKENIZER, PROMPTS, **settings, batch_size=10**12) == expected
    with torch.device("meta"):
        assert p3.generate(model, TOKENIZER, PROMPTS, **settings) == expected
        assert p3.generate(model, TOKENIZER, PROMPTS[0], **settings, stream=True) == expected[0]
