"""``generate`` against greedy decoding by hand; where it stops; what it takes and refuses."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, longrope_model, make_tokenizer, tiny_model

import phi3lora as p3
from phi3lora.inference.generation import stop_token_ids

TOKENIZER = make_tokenizer()
END, EOS = TOKENIZER.convert_tokens_to_ids("<|end|>"), TOKENIZER.eos_token_id
PROMPTS = ["Hi", "What is the price of item 7?", "Say hello to the user, then wait for an answer.", "Why?", "42?"]


def answering(seed=0, scale=30.0):
    """A random model that is sure of itself, so that padding's rounding cannot change its choice."""
    return adapted_model(seed=seed, head_scale=scale, lora_dropout=0.3).eval()


def rigged(token):
    """A model that says ``token`` whatever comes before."""
    model = tiny_model()
    model.model.norm.weight.data.zero_()
    model.lm_head = torch.nn.Linear(32, 512)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data.zero_()[token] = 10.0
    return model


def prompt_ids(chat):
    return TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def greedy_by_hand(model, chat, count, stops=(END, EOS)):
    """The likeliest token again and again, without a cache; the ids up to the stop token."""
    ids, new = prompt_ids(chat), []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return TOKENIZER.decode(new, skip_special_tokens=True).strip()


def user(text):
    return [{"role": "user", "content": text}]


def test_an_answer_equals_greedy_decoding_by_hand():
    model = answering()
    for prompt in PROMPTS:
        answer = p3.generate(model, TOKENIZER, prompt, max_new_tokens=12)
        assert answer == greedy_by_hand(model, user(prompt), 12)
        assert answer


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_many_prompts_together_get_the_answers_of_each_alone_in_order(batch_size):
    model = answering()
    alone = [p3.generate(model, TOKENIZER, prompt, max_new_tokens=10) for prompt in PROMPTS]
    assert len(set(alone)) > 2
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=10, batch_size=batch_size) == alone


def test_a_list_of_one_prompt_gives_a_list_of_one_answer():
    model = answering()
    assert p3.generate(model, TOKENIZER, ["Hi"], max_new_tokens=5) == [
        p3.generate(model, TOKENIZER, "Hi", max_new_tokens=5)
    ]


@pytest.mark.parametrize("name", ["phi-3", "phi-4", "phi-4-mini"])
def test_it_stops_at_the_templates_end_of_turn_and_at_eos(name):
    tokenizer = make_tokenizer(name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>" if name == "phi-4" else "<|end|>")
    assert set(stop_token_ids(tokenizer)) == {end, tokenizer.eos_token_id}
    for stop in (end, tokenizer.eos_token_id):
        model, forwards = rigged(stop), []
        model.register_forward_hook(lambda *args, seen=forwards: seen.append(1))
        assert p3.generate(model, tokenizer, "Hi", max_new_tokens=20) == ""
        assert len(forwards) == 1


def test_an_answer_that_does_not_stop_has_max_new_tokens():
    letter = TOKENIZER.convert_tokens_to_ids("x")
    assert p3.generate(rigged(letter), TOKENIZER, "Hi", max_new_tokens=7) == "x" * 7
    assert p3.generate(rigged(letter), TOKENIZER, ["Hi", "Hello there"], max_new_tokens=3) == ["xxx", "xxx"]


def test_a_trained_model_says_what_it_was_taught_and_stops(tmp_path):
    rows = [{"prompt": "Say x.", "completion": "x x x"}, {"prompt": "Say y.", "completion": "y y"}] * 4
    chats = p3.ChatDataset.load(rows, TOKENIZER, max_length=32)
    model = adapted_model(r=8)
    p3.train(
        model, chats, p3.TrainingConfig(output_dir=tmp_path, max_steps=80, learning_rate=2e-2, save_strategy="no",
                                        disable_tqdm=True, log_level="error"),
    )  # fmt: skip
    assert p3.generate(model, TOKENIZER, ["Say x.", "Say y."], max_new_tokens=20) == ["x x x", "y y"]


class Spy:
    """Keeps what ``model.generate`` was asked for."""

    def __init__(self, model):
        self.real, self.calls = model.generate, []
        model.generate = self

    def __call__(self, **options):
        self.calls.append(options)
        return self.real(**options)


def test_a_system_prompt_comes_before_each_question():
    model = answering()
    spy = Spy(model)
    p3.generate(model, TOKENIZER, PROMPTS[:2], system="Be brief.", max_new_tokens=2)
    (call,) = spy.calls
    for row, mask, prompt in zip(call["input_ids"], call["attention_mask"], PROMPTS[:2], strict=True):
        expected = prompt_ids([{"role": "system", "content": "Be brief."}, *user(prompt)])
        assert row[mask == 1].tolist() == expected


def test_a_chat_and_a_list_of_chats_and_a_mixture_are_taken():
    model = answering()
    chat = [*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("And now?")]
    one = p3.generate(model, TOKENIZER, chat, max_new_tokens=6)
    assert one == greedy_by_hand(model, chat, 6)
    assert p3.generate(model, TOKENIZER, [chat, "Hi"], max_new_tokens=6) == [
        one,
        p3.generate(model, TOKENIZER, "Hi", max_new_tokens=6),
    ]


def test_the_chat_given_is_left_as_it_was():
    chat = user("Hi")
    p3.generate(answering(), TOKENIZER, chat, system="Be brief.", max_new_tokens=1)
    assert chat == user("Hi")


def test_no_more_prompts_run_together_than_batch_size():
    model = answering()
    spy = Spy(model)
    p3.generate(model, TOKENIZER, PROMPTS, batch_size=2, max_new_tokens=1)
    assert [len(call["input_ids"]) for call in spy.calls] == [2, 2, 1]


@pytest.mark.parametrize("prompt", [[], None, 5, [5], [["Hi"]], {"role": "user", "content": "Hi"}], ids=str)
def test_what_is_no_prompt_is_an_error_that_says_what_is(prompt):
    with pytest.raises(p3.DataError, match="allowed"):
        p3.generate(tiny_model(), TOKENIZER, prompt)


def test_streaming_several_prompts_is_an_error():
    with pytest.raises(p3.DataError, match=r"stream=True with 2 prompts; allowed: one"):
        p3.generate(tiny_model(), TOKENIZER, ["a", "b"], stream=True)


def test_streaming_prints_the_answer_and_returns_it(capsys):
    letter = TOKENIZER.convert_tokens_to_ids("x")
    answer = p3.generate(rigged(letter), TOKENIZER, "Hi", max_new_tokens=4, stream=True)
    assert capsys.readouterr().out.strip() == answer == "xxxx"


def test_not_streaming_prints_nothing(capsys):
    p3.generate(answering(), TOKENIZER, "Hi", max_new_tokens=3)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_greedy_answers_leave_the_generator_alone_and_sampling_follows_it():
    model = answering(scale=3.0)
    state = torch.get_rng_state()
    p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), state)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8, temperature=1.0, **options)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert len({sample(seed, top_p=1e-6) for seed in range(4)}) == 1


def test_a_temperature_near_zero_is_greedy():
    model = answering()
    greedy = p3.generate(model, TOKENIZER, "Why?", max_new_tokens=8)
    assert p3.generate(model, TOKENIZER, "Why?", max_new_tokens=8, temperature=1e-4) == greedy


def test_the_modes_come_back_and_dropout_is_off():
    model = adapted_model(head_scale=30.0, lora_dropout=0.9, lora_alpha=400).eval()
    expected = p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8)
    model.train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8) == expected
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_models_own_generation_settings_do_not_leak_in():
    model = answering()
    expected = p3.generate(model, TOKENIZER, "Why?", max_new_tokens=8)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.max_length = 3
    model.config.use_cache = False
    assert p3.generate(model, TOKENIZER, "Why?", max_new_tokens=8) == expected


@pytest.mark.parametrize("text", ["What is item 3?", "  spaces  around ", "a<|end|>b", "<|assistant|>\nYes"])
def test_the_model_is_asked_in_exactly_the_tokens_it_was_trained_on(text):
    """Also where a user's text spells a control token: it must not become one, in training or here."""
    row = {"messages": [*user(text), {"role": "assistant", "content": "Fine."}]}
    document = p3.ChatDataset.load([row], TOKENIZER, max_length=64)[0]
    first = next(i for i, label in enumerate(document["labels"]) if label != -100)
    model = answering()
    spy = Spy(model)
    p3.generate(model, TOKENIZER, text, max_new_tokens=1)
    assert spy.calls[0]["input_ids"][0].tolist() == document["input_ids"][:first]


def test_a_longrope_models_short_prompt_is_answered_the_same_beside_a_long_one():
    model = longrope_model(head_scale=30.0).eval()
    short, long = "Why? How?", "What is the price? " * 12
    assert len(prompt_ids(user(short))) + 8 < 40 < len(prompt_ids(user(long)))
    alone = [p3.generate(model, TOKENIZER, prompt, max_new_tokens=8) for prompt in (short, long)]
    assert p3.generate(model, TOKENIZER, [short, long], max_new_tokens=8) == alone


# --- How tokens are chosen


def test_a_seed_repeats_an_answer_and_leaves_the_generator_alone():
    model = answering(scale=3.0)
    state = torch.get_rng_state()

    def sample(seed):
        return p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_of_one_is_greedy_and_zero_is_no_bound():
    model = answering(scale=3.0)
    greedy = p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8)
    sampled = [
        [p3.generate(model, TOKENIZER, "Hi", max_new_tokens=8, temperature=1.0, top_k=k, seed=s) for s in range(4)]
        for k in (1, 0)
    ]
    assert set(sampled[0]) == {greedy}
    assert len(set(sampled[1])) > 1


def penalised_by_hand(model, chat, count, penalty):
    """Greedy, the logits of tokens that are there already divided (or, below zero, multiplied) by the penalty."""
    ids, new = prompt_ids(chat), []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        for token in set(ids + new):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        if int(logits.argmax()) in (END, EOS):
            break
        new.append(int(logits.argmax()))
    return TOKENIZER.decode(new, skip_special_tokens=True).strip()


def test_a_repetition_penalty_equals_one_by_hand_whatever_stands_beside_the_prompt():
    """Padding is the end-of-text token, and must not count as said."""
    model = answering(scale=3.0)
    expected = [penalised_by_hand(model, user(prompt), 8, 3.0) for prompt in PROMPTS]
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, repetition_penalty=3.0) == expected
    assert p3.generate(model, TOKENIZER, PROMPTS, max_new_tokens=8) != expected


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 0.5}, {"repetition_penalty": 0}],
    ids=str,
)
def test_settings_outside_their_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(p3.DataError, match=rf"{name}={value}; allowed: "):
        p3.generate(answering(), TOKENIZER, "Hi", **settings)
