"""Prompts and references against the chats they came from; ROUGE against the rouge-score package."""

from __future__ import annotations

import json
import re
import sys

import pytest
from conftest import adapted_model, chat_dataset, chat_rows, make_tokenizer

import phi3lora as p3
from phi3lora.errors import install_hint

TOKENIZER = make_tokenizer()
ROWS = chat_rows(9)


def load(rows=ROWS, max_length=200, tokenizer=TOKENIZER, **options):
    return p3.ChatDataset.load(rows, tokenizer, max_length=max_length, **options)


def model():
    return adapted_model(head_scale=30.0).eval()


@pytest.mark.parametrize("name", ["phi-3", "phi-4", "phi-4-mini"])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_each_answer_is_that_of_generate_to_the_chat_without_its_last_turn(train_on, name):
    net, tokenizer = model(), make_tokenizer(name)
    data = load(tokenizer=tokenizer, train_on=train_on)
    answers = p3.sample_answers(net, tokenizer, data, count=9, max_new_tokens=8)
    assert [a.reference for a in answers] == [row["messages"][-1]["content"].strip() for row in ROWS]
    prompts = [row["messages"][:-1] for row in ROWS]
    assert [a.answer for a in answers] == p3.generate(net, tokenizer, prompts, max_new_tokens=8)
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in prompts]
    assert ["".join(a.prompt.split()) for a in answers] == ["".join(text.split()) for text in rendered]


def test_the_last_trained_turn_is_the_one_that_is_answered():
    texts = ["One?", "First.", "Two?", "Second."]
    chat = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts, strict=True)]
    chat[-1]["train"] = False
    (answer,) = p3.sample_answers(model(), TOKENIZER, load([{"messages": chat}]), max_new_tokens=4)
    assert answer.reference == "First."
    assert answer.answer == p3.generate(model(), TOKENIZER, "One?", max_new_tokens=4)


def test_chats_that_were_cut_are_skipped():
    long, short = ({"prompt": "Why?", "completion": text} for text in ("So it is. " * 40, "So."))
    for overflow in ("truncate", "split"):
        data = load([long, short, long], max_length=40, overflow=overflow)
        answers = p3.sample_answers(model(), TOKENIZER, data, count=9, max_new_tokens=2)
        assert [a.reference for a in answers] == ["So."]
        with pytest.raises(p3.DataError, match=r"none of the \d+ documents can be answered.*max_length=40"):
            p3.sample_answers(model(), TOKENIZER, load([long], max_length=40, overflow=overflow))


def test_rows_of_the_same_number_in_several_sources_are_different_chats(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": name}))
    answers = p3.sample_answers(model(), TOKENIZER, load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]), count=9)
    assert sorted(a.reference for a in answers) == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [({"train_on": "all"}, 4, "train_on='all'"), ({}, 0, "count=0; allowed"), ({}, 1.5, "count=1.5; allowed")],
)
def test_chats_without_a_prompt_and_other_counts_are_errors(options, count, message):
    with pytest.raises(p3.DataError, match=message):
        p3.sample_answers(model(), TOKENIZER, load(**options), count=count)


def test_printed_lines_are_shortened_away_from_the_answer():
    answers = p3.sample_answers(model(), TOKENIZER, load(), count=2, max_new_tokens=4)
    lines = str(answers).splitlines()
    names = ["prompt     ", "reference  ", "answer     "]
    assert [line[:11] for line in lines] == [*names, "", *names]
    assert lines[1] == f"reference  {answers[0].reference}"
    long = type(answers[0])("a" * 300 + " the end", "the start " + "b" * 300, "two\nlines")
    lines = str(type(answers)([long])).splitlines()
    assert re.fullmatch(r"prompt     \.\.\.a+ the end", lines[0])
    assert re.fullmatch(r"reference  the start b+\.\.\.", lines[1])
    assert lines[2] == "answer     two lines"
    assert max(map(len, lines)) == 211


# --- ROUGE


def test_rouge_is_the_mean_of_the_package_s_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    net, data = model(), load()
    plain = p3.evaluate(net, data)
    for most, rows in ((None, ROWS), (4, ROWS[:4])):
        found = p3.evaluate(net, data, rouge=True, tokenizer=TOKENIZER, max_samples=most, max_new_tokens=8)
        texts = p3.generate(net, TOKENIZER, [row["messages"][:-1] for row in rows], max_new_tokens=8)
        scores = [scorer.score(row["messages"][-1]["content"], text) for row, text in zip(rows, texts, strict=True)]
        for name in ("rouge1", "rouge2", "rougeL"):
            assert found.pop(name) == pytest.approx(sum(s[name].fmeasure for s in scores) / len(rows))
        assert found.pop("n_answers") == len(rows)
        assert found == plain


def test_answers_equal_to_the_references_score_one_and_others_less():
    pytest.importorskip("rouge_score")
    net, tokenizer, _, _ = p3.demo.load()
    rows = [json.loads(line) for line in (p3.demo.FOLDER / "eval.jsonl").read_text().splitlines()[:6]]
    prompts = [row["messages"][:-1] for row in rows]
    answers = p3.generate(net, tokenizer, prompts, max_new_tokens=24)
    own = [{"messages": [*p, {"role": "assistant", "content": a}]} for p, a in zip(prompts, answers, strict=True)]
    same, other = (
        p3.evaluate(net, load(data, 256, tokenizer=tokenizer), rouge=True, tokenizer=tokenizer, max_new_tokens=24)
        for data in (own, rows)
    )
    assert (same["rouge1"], same["rouge2"], same["rougeL"]) == (1.0, 1.0, 1.0)
    assert 0 < other["rouge2"] <= other["rouge1"] < 1


def test_rouge_names_the_missing_package_or_tokenizer(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(p3.Phi3LoRAError, match=re.escape(install_hint("eval"))):
        p3.evaluate(model(), chat_dataset(4), rouge=True, tokenizer=TOKENIZER)
    monkeypatch.undo()
    pytest.importorskip("rouge_score")
    with pytest.raises(p3.DataError, match="needs the tokenizer"):
        p3.evaluate(model(), chat_dataset(4), rouge=True)
