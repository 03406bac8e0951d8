"""Prompts and references against the chats they came from; ROUGE against the rouge-score package."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adapted_model, chat_dataset, chat_rows, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.errors import install_hint
from phi3lora.inference.evaluation import RougeTokenizer, _answerable, _answers, _answers_together, rouge_scorer

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
    [
        ({"train_on": "all"}, 4, "train_on='all'"),
        ({}, 0, "count=0; allowed"),
        ({}, 1.5, "count=1.5; allowed"),
        ({}, True, "count=True; allowed"),
    ],
)
def test_chats_without_a_prompt_and_other_counts_are_errors(options, count, message):
    with pytest.raises(p3.DataError, match=message):
        p3.sample_answers(model(), TOKENIZER, load(**options), count=count)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_new_tokens": 0}, {"max_new_tokens": "3"}], ids=str)
def test_sizes_of_another_range_are_errors(options):
    (name,) = options
    with pytest.raises(p3.DataError, match=f"^{name}=.*allowed: a whole number >= 1"):
        p3.sample_answers(model(), TOKENIZER, load(), **options)
    with pytest.raises(p3.DataError, match=f"^{name}=.*allowed: a whole number >= 1"):
        p3.evaluate(model(), load(), compute_metrics=lambda _: {}, tokenizer=TOKENIZER, **options)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_max_samples_of_another_range_is_an_error(count):
    with pytest.raises(p3.DataError, match=r"^max_samples=.*allowed: a whole number >= 1"):
        p3.evaluate(model(), load(), compute_metrics=lambda _: {}, tokenizer=TOKENIZER, max_samples=count)


def test_a_stream_has_no_samples():
    stream = p3.ChatDataset.load(chat_rows(4), TOKENIZER, max_length=64, streaming=True)
    with pytest.raises(p3.DataError, match=r"not a stream; pass stream\.take"):
        p3.sample_answers(model(), TOKENIZER, stream)


def test_printed_lines_are_shortened_away_from_the_answer():
    answers = p3.sample_answers(model(), TOKENIZER, load(), count=np.int64(2), max_new_tokens=4)
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


ALPHABETS = {
    "Russian": ("Заказ будет доставлен завтра.", "Заказ уже отменён."),
    "Greek": ("παραγγελία έρχεται αύριο.", "πληρωμή απέτυχε."),
    "Arabic": ("سيصل طلبك غدا", "تم إلغاء الحساب"),
    "Hebrew": ("ההזמנה תגיע מחר", "החשבון בוטל"),
    "Hindi": ("आपका ऑर्डर कल पहुँचेगा।", "खाता बंद है।"),
    "Bengali": ("আপনার অর্ডার কাল পৌঁছাবে", "অ্যাকাউন্ট বন্ধ"),
    "Chinese": ("您的订单明天到达。", "账户已经关闭。"),
    "Japanese": ("ご注文は明日届きます。", "アカウントを閉じました。"),
    "Korean": ("주문은 내일 도착합니다.", "계정이 닫혔습니다."),
    "Thai": ("คำสั่งซื้อจะมาถึงพรุ่งนี้", "ปิดบัญชีแล้ว"),
    "Khmer": ("ការបញ្ជាទិញនឹងមកដល់ថ្ងៃស្អែក", "គណនីត្រូវបានបិទ"),
    "Georgian": ("შეკვეთა ხვალ ჩამოვა", "ანგარიში დახურულია"),
    "Amharic": ("ትዕዛዝዎ ነገ ይደርሳል", "መለያው ተዘግቷል"),
    "French": ("Ça arrivera demain, bien sûr à l'heure.", "Le compte est fermé."),
    "emoji": ("👍", "❤️"),
    "symbols": ("✓ √ ∑", "→"),
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_a_right_answer_scores_one_in_every_alphabet_and_another_one_less(alphabet):
    pytest.importorskip("rouge_score")
    right, wrong = ALPHABETS[alphabet]
    for text, low, high in ((right, 1.0, 1.0), (unicodedata.normalize("NFD", right), 1.0, 1.0), (wrong, 0.0, 0.7)):
        scores = rouge_scorer().score(right, text)
        assert low <= scores["rougeL"].fmeasure <= high
        assert low <= scores["rouge1"].fmeasure <= high


def test_words_count_where_there_are_spaces_and_characters_where_there_are_none():
    tokens = RougeTokenizer().tokenize
    assert tokens("Заказ №5, отменён!") == ["заказ", "№", "5", "отменён"]
    assert tokens("订单5号 OK") == ["订", "单", "5", "号", "ok"]
    assert tokens("หมู่") == ["ห", "มู่"], "marks stay with their character"
    assert tokens("हिन्दी में") == ["हिन्दी", "में"]
    assert tokens("❤️👍") == ["❤", "👍"]


@given(text=st.text(st.characters(max_codepoint=127)))
@settings(max_examples=300)
def test_ascii_text_has_rouge_score_s_own_tokens(text):
    package = pytest.importorskip("rouge_score.tokenizers")
    assert RougeTokenizer().tokenize(text) == package.DefaultTokenizer().tokenize(text)


# --- compute_metrics


def test_compute_metrics_gets_the_answers_and_its_numbers_are_returned():
    net, data, seen = model(), load(), []

    def exact(answers):
        seen.append(answers)
        return {"exact": sum(a.answer == a.reference for a in answers) / len(answers), "count": np.float32(2.5)}

    found = p3.evaluate(net, data, compute_metrics=exact, tokenizer=TOKENIZER, max_samples=4, max_new_tokens=8)
    assert found == {**p3.evaluate(net, data), "exact": 0.0, "count": 2.5, "n_answers": 4}
    assert seen == [p3.sample_answers(net, TOKENIZER, data, count=4, max_new_tokens=8)]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, "returned 0.5; allowed: a dict"),
        ({"exact": "high"}, "'exact': 'high'.*names to numbers"),
        ({"loss": 1.0}, "'loss', a metric that evaluate has already"),
        ({"n_answers": 1}, "'n_answers'"),
        ({1: 2}, "names to numbers"),
        ({"eval_loss": 1.0}, "'eval_loss', a metric that evaluate has already"),
        ({"exact": np.ones(2)}, "'exact'.*names to numbers"),
        ({"exact": torch.ones(2)}, "'exact'.*names to numbers"),
        ({"exact": 10**400}, "'exact'.*names to numbers"),
    ],
)
def test_anything_but_new_names_and_numbers_is_refused(returned, message):
    with pytest.raises(p3.DataError, match=message):
        p3.evaluate(
            model(), load(), compute_metrics=lambda _: returned, tokenizer=TOKENIZER, max_samples=1, max_new_tokens=1
        )
    with pytest.raises(p3.DataError, match="compute_metrics needs the tokenizer"):
        p3.evaluate(model(), load(), compute_metrics=lambda _: returned)


@pytest.mark.parametrize("size", [1, 2, 3, 12])
def test_processes_share_the_answers_and_have_all_of_them(size):
    """Each process in turn, with the others' shares computed beforehand in place of the exchange."""
    net, pairs = model(), _answerable(load(), 5)
    alone = _answers_together(net, TOKENIZER, pairs, 4, 2, None)
    shares = [list(_answers(net, TOKENIZER, pairs[rank::size], 4, 2)) for rank in range(size)]
    for rank in range(size):
        gathered = []
        world = SimpleNamespace(rank=rank, size=size, gather=lambda own, to=gathered: to.append(own) or shares)
        assert _answers_together(net, TOKENIZER, pairs, 4, 2, world) == alone
        assert gathered == [shares[rank]]
