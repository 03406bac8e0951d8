"""compare(): the answers of the base and of the adapter, side by side."""

from __future__ import annotations

import pytest
from conftest import adapted_model, make_tokenizer, tiny_model

import phi3lora as p3

TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    "questions",
    [
        "Hi",
        ["Hi", "What is item 3?"],
        [{"role": "user", "content": "Hi"}],
        [[{"role": "user", "content": "Hi"}], "Why?"],
    ],
)
def test_both_answers_are_those_of_generate(questions):
    model = adapted_model(head_scale=30.0).eval()
    is_one = isinstance(questions, str) or isinstance(questions[0], dict)
    prompts = [questions] if is_one else questions
    compared = p3.compare(model, TOKENIZER, questions, max_new_tokens=6)
    assert [answer.on for answer in compared] == p3.generate(model, TOKENIZER, prompts, max_new_tokens=6)
    with p3.disabled(model):
        assert [answer.off for answer in compared] == p3.generate(model, TOKENIZER, prompts, max_new_tokens=6)
    assert any(answer.on != answer.off for answer in compared) and "changed by the adapter" in repr(compared)
    assert [a.question for a in compared] == [p if isinstance(p, str) else p[-1]["content"] for p in prompts]


def test_answers_stand_side_by_side(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    compared = p3.compare(adapted_model(), TOKENIZER, ["Why? " * 20, "Who?"], max_new_tokens=2)
    head, rule, first, *_ = str(compared).splitlines()
    assert head.split("  ")[0] == "question" and head.index("adapter off") < head.index("adapter on")
    assert set(rule) == {"-"} and first.startswith("Why? Why?")


def test_a_model_without_an_adapter_that_is_on_is_refused():
    model = adapted_model()
    for net in (tiny_model(), model):
        with p3.disabled(model), pytest.raises(p3.AdapterError, match="no adapter that is on"):
            p3.compare(net, TOKENIZER, "Hi")
    with pytest.raises(p3.DataError, match="allowed: a question"):
        p3.compare(model, TOKENIZER, [])
