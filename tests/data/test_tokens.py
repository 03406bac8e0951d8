"""Words, looked up, are the tokens that the tokenizer makes of the whole text."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from test_exactness import ODD, PROPERTY, SPACES, Case, each_case, turns
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import phi3lora as p3
from phi3lora.data import tokens
from phi3lora.data.formats import Chat
from phi3lora.data.template import ChatEncoder
from phi3lora.data.tokens import _WORD, ContentTokenizer, _cuts_at_spaces


@st.composite
def texts(draw):
    pieces = st.one_of(st.text(max_size=6), st.sampled_from([*SPACES, *ODD, "a", "Word", "'s", "12", ",\n", "x\n  y"]))
    return "".join(draw(st.lists(pieces, max_size=12)))


def ordinary(tokenizer) -> Tokenizer:
    return tokens._without_added_tokens(tokenizer.backend_tokenizer)


@given(text=texts())
def test_words_are_the_text_and_end_where_a_space_follows_a_character(text):
    words = _WORD.findall(text)
    assert "".join(words) == text
    assert all(after.startswith(" ") and not before[-1].isspace() for before, after in pairwise(words))
    assert not any(not a.isspace() and b == " " for word in words for a, b in pairwise(word))


@each_case
@PROPERTY
@given(text=texts())
def test_words_have_the_tokens_of_the_text(case, text):
    text = text.replace("▁", "_")  # in a content of a SentencePiece table this sign is bytes, not part of a run
    core = ordinary(case.tokenizer)
    assert _cuts_at_spaces(core)
    encoded = [i for word in _WORD.findall(text) for i in core.encode(word, add_special_tokens=False).ids]
    assert encoded == core.encode(text, add_special_tokens=False).ids


def test_the_demo_s_tokenizer_is_cut_at_spaces():
    assert _cuts_at_spaces(ordinary(p3.demo.load()[1]))


def trained(model, trainer, splits) -> Tokenizer:
    core = Tokenizer(model)
    core.pre_tokenizer = splits
    core.train_from_iterator(["so it is, so it is not " * 9], trainer)
    core.decoder = decoders.ByteLevel()
    return core


def test_a_tokenizer_that_may_reach_over_a_space_is_not_cut():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fours = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(".{4}"), "isolated"), byte_level])
    unigram = trainers.UnigramTrainer(vocab_size=60, show_progress=False)
    sign = pre_tokenizers.Metaspace(split=False)
    cores = [
        trained(models.BPE(), bpe, fours),
        trained(models.BPE(), bpe, byte_level),
        trained(models.Unigram(), unigram, sign),
        trained(models.BPE(), trainers.BpeTrainer(vocab_size=60, show_progress=False), sign),
    ]
    assert not any(map(_cuts_at_spaces, cores))


@each_case
def test_a_tokenizer_that_is_not_cut_gives_the_same_tokens(case, monkeypatch):
    chat = turns(
        "What is it?", "It is this,  or that.\n\n- 12 of these\n    x = 1", "And  now?", " so it is <loc> done"
    )
    cut = case.encode(chat)
    monkeypatch.setattr(tokens, "_cuts_at_spaces", lambda core: False)
    assert Case(case.name, case.folder).encode(chat) == cut


def test_words_that_were_forgotten_are_tokenised_again(monkeypatch):
    tokenizer = p3.demo.load()[1]
    encoder, chats = ChatEncoder(tokenizer), [turns(f"What is {i}?", f"It is {i}.") for i in range(30)]
    once = encoder.encode([Chat(chat) for chat in chats], range(30))
    monkeypatch.setattr(tokens, "_REMEMBERED", 5)
    for chat, encoded in zip(chats, once, strict=True):
        assert encoder.encode([Chat(chat)], [1]) == [encoded]


def test_each_word_is_tokenised_once(monkeypatch):
    tokenizer = p3.demo.load()[1]
    content = ContentTokenizer(tokenizer, ["<|end|>"])
    given: list[str] = []
    encode = tokens._encode_batch
    monkeypatch.setattr(tokens, "_encode_batch", lambda core, texts: given.extend(texts) or encode(core, texts))
    text = "So it is, so it is"
    chat = tokens.Rendered(text, [tokens.Content(0, len(text), True)], [(0, len(text))])
    (first, second) = content.tokenize([chat, chat])
    assert sorted(word for text in given for word in tokens._WORD.findall(text)) == [" is", " is,", " it", " so", "So"]
    assert len(given) == 2, "those that begin with a space are one text"
    assert first.input_ids.tolist() == second.input_ids.tolist() and first.trained == [(0, len(first.input_ids))]
    given.clear()
    content.tokenize([chat])
    assert given == []
