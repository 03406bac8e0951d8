"""A mix takes documents in the shares of its weights, repeats none unless asked to, and depends on its seed alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from conftest import chat_rows, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import phi3lora as p3
from phi3lora.data.mix import due_order, interleaved, weighted_sources

TOKENIZER = make_tokenizer()
PROPERTY = settings(max_examples=150, derandomize=True)
STRATEGIES = ["first_exhausted", "all_exhausted"]
SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)
PAIRS = [{"prompt": f"What is item {i}?", "completion": f"It is {i}."} for i in range(40)]
CHATS = chat_rows(30)


@st.composite
def mixes(draw):
    sizes = draw(SIZES)
    weights = draw(st.lists(st.sampled_from([0.1, 1, 2, 2.5, 7]), min_size=len(sizes), max_size=len(sizes)))
    return sizes, [weight / sum(weights) for weight in weights], draw(st.sampled_from(STRATEGIES))


@PROPERTY
@given(mixes())
def test_any_beginning_of_a_mix_has_the_shares_of_the_weights_to_within_a_document(mix):
    sizes, weights, strategy = mix
    sources, numbers = due_order(sizes, weights, strategy)
    for end in range(1, len(sources) + 1):
        counts = np.bincount(sources[:end], minlength=len(sizes))
        time = end  # weights add up to 1: so many documents are due by then
        assert np.all(np.abs(counts - time * np.array(weights)) <= len(sizes) / 2 + 0.5)
    for i in range(len(sizes)):
        assert numbers[sources == i].tolist() == list(range((sources == i).sum())), "each source in its order"


@PROPERTY
@given(mixes())
def test_a_mix_ends_when_the_first_or_when_every_source_is_exhausted(mix):
    sizes, weights, strategy = mix
    sources, numbers = due_order(sizes, weights, strategy)
    counts = np.bincount(sources, minlength=len(sizes))
    if strategy == "first_exhausted":
        assert (counts <= sizes).all(), "no document is taken twice"
        assert (counts == sizes).any()
    else:
        assert (counts >= sizes).all(), "every document is taken"
        last = (sources[-1], numbers[-1])
        assert last == (sources[-1], sizes[sources[-1]] - 1), "and it ends with the last of them"


@PROPERTY
@given(mixes())
def test_a_stream_is_mixed_in_the_order_of_a_dataset(mix):
    sizes, weights, strategy = mix
    openers = [lambda i=i, size=size: iter([(i, j) for j in range(size)]) for i, size in enumerate(sizes)]
    expected = [
        (i, j % sizes[i]) for i, j in zip(*map(np.ndarray.tolist, due_order(sizes, weights, strategy)), strict=True)
    ]
    assert list(interleaved(openers, weights, strategy)) == expected


def load(rows, **options):
    return p3.ChatDataset.load(rows, TOKENIZER, max_length=128, **options)


OTHER = p3.ChatDataset.load(CHATS, make_tokenizer("phi-4"), max_length=128)


def mix(weights, **options) -> p3.ChatDataset:
    return p3.ChatDataset.mix(weights, **options)


def origins(dataset):
    return [(dataset.source(i), dataset.row_number(i)) for i in range(len(dataset))]


@pytest.fixture
def files(tmp_path):
    paths = {}
    for name, rows in (("pairs", PAIRS), ("chats", CHATS)):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_by_path_are_loaded_each_in_its_format_and_mixed(files, streaming):
    options = {"max_length": 128, "streaming": streaming, "buffer_size": 1000} if streaming else {"max_length": 128}
    mixed = mix({files["pairs"]: 3, str(files["chats"]): 1}, tokenizer=TOKENIZER, **options).first_window
    count = Counter(mixed.source(i) for i in range(len(mixed)))
    assert count == {repr(str(files["pairs"])): 40, repr(str(files["chats"])): 13}
    assert mixed.format == "messages, prompt_completion"
    whole = {(name, i + 1): d for name, path in files.items() for i, d in enumerate(load(path))}
    names = {repr(str(path)): name for name, path in files.items()}
    assert list(mixed) == [whole[names[source], row] for source, row in origins(mixed)]
    if streaming:
        assert origins(mixed) == sorted(origins(mixed), key=origins(mixed).index)
        assert [row for source, row in origins(mixed) if "pairs" in source] == list(range(1, 41)), "in the rows' order"


def test_no_document_is_repeated_unless_asked_for_and_then_all_are_there():
    pairs, chats = load(PAIRS), load(CHATS)
    once = mix([(pairs, 1), (chats, 1)])
    assert len(once) == 60 and len(set(origins(once))) == 60
    every = Counter(origins(mix([(pairs, 1), (chats, 3)], stopping_strategy="all_exhausted")))
    assert len(every) == 70
    assert {n for (source, _), n in every.items() if source == "(list)"} == {1}
    assert {n for (source, _), n in every.items() if source != "(list)"} <= {3, 4}


def test_options_of_loading_are_said_to_have_no_effect_on_loaded_sources(caplog):
    mix([(load(PAIRS), 1), (load(CHATS), 1)], max_length=9, streaming=True)
    assert [r.getMessage() for r in caplog.records] == ["max_length=, streaming=: no effect on a mix of loaded sources"]


def test_a_mix_depends_on_its_seed_and_weights_alone():
    def fingerprint(weights, seed=0, **options):
        return mix(list(zip((load(PAIRS), load(CHATS)), weights, strict=True)), seed=seed, **options).identity()

    same = [fingerprint([3, 1]), fingerprint([3, 1]), fingerprint([0.75, 0.25]), fingerprint([6, 2])]
    assert all(identity == same[0] for identity in same)
    others = [fingerprint([3, 1], seed=1), fingerprint([3, 2]), fingerprint([1, 3]),
              fingerprint([3, 1], stopping_strategy="all_exhausted")]  # fmt: skip
    prints = {identity["fingerprint"] for identity in (same[0], *others)}
    assert len(prints) == 5


def test_which_documents_of_the_larger_source_are_taken_is_drawn_and_not_its_beginning():
    mixed = mix([(load(PAIRS), 1), (load(CHATS[:5]), 1)], seed=3)
    rows = [row for source, row in origins(mixed) if source == "(list)"]
    assert len(rows) == 5 and sorted(rows) != rows and max(rows) > 5


def test_the_two_sides_of_a_split_mix_share_no_row():
    mixed = mix([(load(PAIRS), 1), (load(CHATS), 4)], stopping_strategy="all_exhausted")
    train, held_out = mixed.split(0.3)
    assert len(train) + len(held_out) == len(mixed)
    texts = [{str(document) for document in side} for side in (train, held_out)]
    assert not texts[0] & texts[1]


def test_a_mix_can_be_mixed_selected_and_described():
    inner = mix([(load(PAIRS), 1), (load(CHATS), 1)])
    outer = mix([(inner, 1), (load(CHATS[:20]), 1)])
    assert len(outer.sources) == 3
    assert outer.sources == ("(list)", "(list) 2", "(list) 3")
    assert "documents by source: (list) " in repr(outer)
    held_out = load(PAIRS).split(0.5)
    assert len(mix([(held_out[0], 1), (held_out[1], 1)])) == 40
    assert outer.statistics()["documents"] == len(outer) == 40


# Streams.


def streams(buffer_size=8, weights=(3, 1), **options):
    parts = [load(rows, streaming=True, buffer_size=buffer_size) for rows in (PAIRS, CHATS)]
    return mix(list(zip(parts, weights, strict=True)), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_window_of_a_mix_depends_on_its_number_alone(strategy):
    made = dict(itertools.islice(streams(stopping_strategy=strategy).windows(), 40))
    for start in (1, 6, 20, 31):
        for number, window in itertools.islice(streams(stopping_strategy=strategy).windows(start), 3):
            assert window.fingerprint() == made[number].fingerprint()
            assert origins(window) == origins(made[number])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_windows_of_a_pass_are_the_mix_of_the_rows(strategy):
    windows = [window for _, window in streams(stopping_strategy=strategy).windows(endless=False)]
    assert all(len(window) == 8 for window in windows[:-1])
    order = zip(*map(np.ndarray.tolist, due_order([40, 30], [0.75, 0.25], strategy)), strict=True)
    wholes = [load(PAIRS), load(CHATS)]
    assert [d for window in windows for d in window] == [wholes[i][j % len(wholes[i])] for i, j in order]


def test_a_mixed_stream_is_told_from_one_of_other_weights_even_if_its_first_window_is_the_same():
    one, other, again = streams(1), streams(1, (5, 1)), streams(1)
    assert one.first_window.fingerprint() == other.first_window.fingerprint()
    assert one.identity() != other.identity()
    assert one.identity() == again.identity()
    assert json.loads(json.dumps(one.identity())) == one.identity()
    assert streams(1, stopping_strategy="all_exhausted").identity() != one.identity()


def test_take_and_skip_of_a_mix_and_of_its_streams_share_no_row():
    mixed = streams()
    held_out, rest = mixed.take(10), mixed.skip(10)
    seen = [origins(held_out), *(origins(window) for _, window in rest.windows(endless=False))]
    assert [o for part in seen for o in part] == [o for _, w in streams().windows(endless=False) for o in origins(w)]
    pairs = load(PAIRS, streaming=True).skip(35)
    assert len(mix([(pairs, 1), (load(CHATS, streaming=True), 1)]).first_window) == 10


def test_a_bad_row_of_a_mix_names_its_source_or_is_skipped(files):
    with files["chats"].open("a") as file:
        file.write('{"messages": "none"}\n')
    options = {"tokenizer": TOKENIZER, "max_length": 128, "streaming": True}
    weights = {files["pairs"]: 1, files["chats"]: 1}
    with pytest.raises(p3.DataError, match=r"chats.jsonl': row 31"):
        list(mix(weights, **options).windows(endless=False))
    with pytest.raises(p3.DataError, match=r"chats.jsonl': row 31"):
        mix(weights, tokenizer=TOKENIZER, max_length=128)
    ((_, window),) = mix(weights, on_bad_row="skip", **options).windows(endless=False)
    assert window.bad_rows == (31,)


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ([(PAIRS, 0)], {}, ["weight", "0", "a number > 0"]),
        ({"a.jsonl": -1}, {}, ["'a.jsonl'", "-1"]),
        ({"a.jsonl": True}, {}, ["True"]),
        ({"a.jsonl": float("nan")}, {}, ["nan"]),
        ({"a.jsonl": "1"}, {}, ["'1'"]),
        ({}, {}, ["{source: weight}"]),
        ("a.jsonl", {}, ["'a.jsonl'", "{source: weight}"]),
        (["a.jsonl", "b.jsonl"], {}, ["{source: weight}"]),
        (None, {}, ["None"]),
        ({"a.jsonl": 1}, {"tokenizer": None}, ["tokenizer"]),
        ({"missing.jsonl": 1}, {}, ["no such file", "missing.jsonl"]),
        ([(PAIRS, 1)], {"seed": -1}, ["seed=-1"]),
        ([(PAIRS, 1)], {"stopping_strategy": "never"}, ["stopping_strategy='never'", "'first_exhausted'"]),
        ([(PAIRS[:1], 1), (CHATS, 1e-3)], {}, ["0 of 30", "'all_exhausted'"]),
        ([(PAIRS, 1), (CHATS, 1e-9)], {"stopping_strategy": "all_exhausted"}, ["closer"]),
        ([(load(CHATS), 1), (load(CHATS, streaming=True), 1)], {}, ["streams and datasets", "streaming="]),
        ([(load(CHATS), 1), (load(CHATS).select([]), 1)], {}, ["source 2", "no documents"]),
        ([(load(CHATS), 1), (OTHER, 1)], {}, ["tokenizer"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_mix_that_cannot_be_made_is_refused_with_the_way_out(weights, options, words):
    with pytest.raises(p3.DataError) as caught:
        mix(weights, **{"tokenizer": TOKENIZER, "max_length": 128, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_weights_are_scaled_to_shares():
    assert weighted_sources({"a": 3, "b": 1}) == (["a", "b"], [0.75, 0.25])
    assert weighted_sources([["a", 2]]) == (["a"], [1.0])
