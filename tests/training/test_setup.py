"""Before the first step: the right error before any file is touched, the banner; out of memory."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import pytest
import torch
from conftest import (
    adapted_model,
    adapters_of,
    chat_dataset,
    chat_rows,
    make_tokenizer,
    quiet_config,
    same_tensors,
    tiny_model,
)

import phi3lora as p3
from phi3lora.config import IGNORE_INDEX
from phi3lora.data.batches import BatchPlan
from phi3lora.data.document_set import DocumentSet
from phi3lora.model.backend import Backend
from phi3lora.training import step as step_module
from phi3lora.training.checkpoint import TrainingState
from phi3lora.training.setup import PlannedRun, banner_facts, check_run

# --- Validation


def head_trainable():
    model = adapted_model()
    model.lm_head.weight.requires_grad = True
    return model


def calls_with_wrong_types(tmp_path):
    """(name of the argument, value in the message, call)."""
    model, chats, config = adapted_model(), chat_dataset(4), quiet_config(tmp_path, max_steps=1)
    train, rows = p3.train, chat_rows(2)
    yield "model", "'a/name'", lambda: train("a/name", chats, config)
    yield "model", "'a/name'", lambda: p3.inject_lora("a/name")
    yield "model", "'a/name'", lambda: p3.evaluate("a/name", chats)
    yield "model", "'a/name'", lambda: p3.doctor("a/name", None, chats)
    yield "model", "'a/name'", lambda: p3.save_adapter("a/name", tmp_path / "a.pt")
    yield "train_dataset", "'a.jsonl'", lambda: train(model, "a.jsonl", config)
    yield "train_dataset", "[{", lambda: train(model, rows, config)
    yield "train_dataset", "'a.jsonl'", lambda: p3.doctor(model, None, "a.jsonl")
    yield "eval_dataset", "[{", lambda: train(model, chats, config, eval_dataset=rows)
    yield "dataset", "'a.jsonl'", lambda: p3.evaluate(model, "a.jsonl")
    yield "dataset", "'a.jsonl'", lambda: p3.batches("a.jsonl")
    yield "config", "{'max_steps': 1}", lambda: train(model, chats, {"max_steps": 1})
    yield "config", "{}", lambda: train(model, chats, {})
    yield "config", "{'r': 8}", lambda: p3.inject_lora(tiny_model(), {"r": 8})
    yield "model", "", lambda: p3.generate(make_tokenizer(), model, "Hi")
    yield "tokenizer", "Phi3ForCausalLM", lambda: p3.generate(model, model, "Hi")
    yield "tokenizer", "'a/name'", lambda: p3.ChatDataset.load(rows, "a/name", max_length=64)
    yield "callbacks", "<class", lambda: train(model, chats, config, callbacks=p3.Callback)
    yield "callbacks", "[<class", lambda: train(model, chats, config, callbacks=[p3.Callback])
    yield "callbacks", "<", lambda: train(model, chats, config, callbacks=p3.Callback())


def test_an_argument_of_a_wrong_type_is_named_with_its_value_and_what_is_allowed(tmp_path):
    for name, value, call in calls_with_wrong_types(tmp_path):
        with pytest.raises(p3.Phi3LoRAError) as caught:
            call()
        assert str(caught.value).startswith(f"{name}={value}") and "; allowed: " in str(caught.value)
    assert not list(tmp_path.iterdir())


BAD_MODELS = {
    "no adapters": (lambda: tiny_model().requires_grad_(False), p3.TrainingError, r"no adapters.*inject_lora"),
    "all frozen": (
        lambda: adapted_model().requires_grad_(False), p3.TrainingError,
        r"only adapters may be trainable, but nothing is",
    ),
    "head": (head_trainable, p3.TrainingError, r"only adapters may be trainable, but lm_head.weight is"),
    "cast": (
        lambda: adapted_model().to(torch.bfloat16), p3.TrainingError,
        r"lora_A is torch.bfloat16.*Cast the base model before inject_lora",
    ),
    "few positions": (
        lambda: adapted_model(changes={"max_position_embeddings": 40, "original_max_position_embeddings": 40}),
        p3.DataError, r"train_dataset has a document of 61 tokens; the model allows 40",
    ),
    "small vocabulary": (
        lambda: adapted_model(changes={"vocab_size": 200}), p3.DataError,
        r"train_dataset has token id \d+; the model's vocabulary has 200.*own tokenizer",
    ),
}  # fmt: skip


def empty():
    return chat_dataset().select([])


STEPS = {"eval_strategy": "steps"}
BAD_RUNS = {
    "empty": ({}, empty, None, p3.DataError, r"train_dataset is empty"),
    "no eval set": (STEPS, chat_dataset, None, p3.TrainingError, r"'steps' needs an eval_dataset"),
    "empty eval set": (STEPS, chat_dataset, empty, p3.DataError, r"eval_dataset is empty"),
    "document longer than a row": ({"max_length": 40}, chat_dataset, None, p3.DataError, r"max_length=40.*61 tokens"),
    "eval on start without set": ({"eval_on_start": True}, chat_dataset, None, p3.TrainingError, r"eval_dataset"),
    "unknown metric": (
        {**STEPS, "metric_for_best_model": "rouge"}, chat_dataset, chat_dataset, p3.TrainingError,
        r"metric_for_best_model='rouge'; allowed: loss",
    ),
    "answers without tokenizer": (
        {**STEPS, "predict_with_generate": True}, chat_dataset, chat_dataset, p3.TrainingError, r"need a tokenizer",
    ),
    "ROUGE without eval set": (
        {"metric_for_best_model": "rougeL"}, chat_dataset, None, p3.TrainingError, r"need an eval_dataset",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_model_that_cannot_train_is_refused_before_any_file_is_written(tmp_path, what):
    make, error, message = BAD_MODELS[what]
    with pytest.raises(error, match=message):
        p3.train(make(), chat_dataset(), quiet_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_run_that_cannot_succeed_is_refused_before_any_file_is_written_or_deleted(tmp_path, what):
    settings, train_set, eval_set, error, message = BAD_RUNS[what]
    kept = tmp_path / "run" / "checkpoint-1" / "file"
    kept.parent.mkdir(parents=True)
    kept.write_text("another run's")
    model = adapted_model()
    before = adapters_of(model)
    config = quiet_config(tmp_path / "run", overwrite_output_dir=True, **settings)
    with pytest.raises(error, match=message):
        p3.train(model, train_set(), config, eval_dataset=eval_set and eval_set())
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()] == [kept.relative_to(tmp_path)]
    assert same_tensors(adapters_of(model), before)


def test_trainable_biases_are_allowed():
    model = adapted_model()
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.bias = torch.nn.Parameter(torch.zeros(o_proj.out_features))
    check_run(PlannedRun(model, chat_dataset(), quiet_config("unused")))


# --- Resolved settings


def test_the_memory_plan_counts_the_state_of_the_configured_optimizer():
    model = adapted_model()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def planned_bytes(optim):
        return PlannedRun(model, chat_dataset(), quiet_config("unused", optim=optim)).memory.peak_gib["full"] * 2**30

    for optim, each in {"adamw_torch": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2 + 8 / 256}.items():
        assert planned_bytes(optim) - planned_bytes("sgd") == pytest.approx(each * numbers)


def banner(**settings):
    planned = PlannedRun(adapted_model(), chat_dataset(), quiet_config("there", **settings))
    state = TrainingState(total_steps=planned.steps.total, global_step=3)
    return {name: str(value) for name, value in banner_facts(planned, state).items()}


def test_the_banner_lists_what_was_resolved():
    facts = banner(
        bf16=True, seed=5, data_seed=6, warmup_ratio=0.5, max_steps=11, gradient_accumulation_steps=2, weight_decay=0.25
    )
    trainable = sum(p.numel() for p in adapted_model().parameters() if p.requires_grad)
    assert f"{trainable:,} trainable in 8 layers" in facts["model"]
    assert "cpu, bf16" in facts["device"]
    assert "layers plain (not on a CUDA device)" in facts["device"]
    assert facts["memory"] == "activation checkpointing none"
    assert facts["step"] == "4 x 2 rows, packed to 64 tokens"
    assert facts["steps"] == "11 (3 done)"
    assert "adamw_torch, cosine from 0.01, 6 warm-up steps, weight decay 0.25" in facts["optimizer"]
    assert (facts["seed"], facts["output"]) == ("5 (data 6)", "there")
    assert "eval data" not in facts and "without effect" not in facts
    assert "from 0.01 (LoRA+: B times 16), 0 warm-up" in banner(lora_plus_lr_ratio=16)["optimizer"]
    assert ", 1 warm-up step, " in banner(warmup_steps=1)["optimizer"]


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, ("plain", "not on a CUDA device")),
        ({"compile": True}, ("compiled", "compile=True")),
        ({"compile": False}, ("plain", "compile=False")),
        ({"compile": True, "activation_checkpointing": "offload"}, ("plain", "offload cannot be compiled")),
    ],
)
def test_how_the_layers_are_computed_and_why(settings, backend):
    planned = PlannedRun(adapted_model(), chat_dataset(), quiet_config("unused", **settings))
    assert planned.backend == Backend(*backend)


def test_the_order_of_documents_follows_data_seed_and_without_it_the_seed():
    def order(**seeds):
        return PlannedRun(adapted_model(), chat_dataset(), quiet_config("unused", **seeds)).steps.steps_of_epoch(0)

    assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) == order(seed=7)
    assert order(seed=7, data_seed=1) != order(seed=7)
    assert order(seed=7, data_seed=0) == order(seed=0)


def run(folder, **changes):
    config = quiet_config(folder, **{"max_steps": 1, **changes})
    return p3.train(adapted_model(), chat_dataset(), config)


# --- Out of memory

REQUEST = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB."


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        (
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
            ['"full"', '"offload"', "per_device_train_batch_size=3, gradient_accumulation_steps=4", "nf4"],
        ),
        ({"per_device_train_batch_size": 1, "activation_checkpointing": "full"}, ['"offload"', "max_length"]),
    ],
)
def test_an_out_of_memory_error_lists_the_settings_to_change(tmp_path, monkeypatch, settings, ways):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(REQUEST + "\nmore lines of torch's")

    monkeypatch.setattr(step_module, "causal_lm_loss", full)
    with pytest.raises(p3.TrainingError) as caught:
        run(tmp_path, **settings)
    message = str(caught.value)
    assert message.startswith(REQUEST) and "\n" not in message
    assert "Predicted peak by mode: none " in message
    assert all(way in message for way in ways)
    assert ("per_device_train_batch_size" in message) == (settings["per_device_train_batch_size"] > 1)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


# --- The caller's environment


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def in_a_coroutine(work):
    async def main():
        work()

    asyncio.run(main())


def beside_a_coroutine(work):
    async def main():
        await asyncio.to_thread(work)

    asyncio.run(main())


def with_gradients_off(work):
    torch.set_grad_enabled(False)
    try:
        work()
        assert not torch.is_grad_enabled()  # as the caller left it
    finally:
        torch.set_grad_enabled(True)


def in_inference_mode(work):
    with torch.inference_mode():
        work()
        assert torch.is_inference_mode_enabled()


def with_a_default_device(work):
    with torch.device("meta"):
        work()
        assert torch.get_default_device().type == "meta"


def with_a_default_dtype(work):
    torch.set_default_dtype(torch.float64)
    try:
        work()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


PLACES = [
    in_a_thread, in_a_coroutine, beside_a_coroutine, with_gradients_off, in_inference_mode, with_a_default_device,
    with_a_default_dtype,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_the_same_wherever_it_is_called(tmp_path, place):
    model, expected = adapted_model(lora_dropout=0.1), adapted_model(lora_dropout=0.1)

    def train(model, folder):
        config = quiet_config(folder, max_steps=2, save_strategy="steps", eval_strategy="steps", eval_steps=1)
        return p3.train(model, chat_dataset(), config, eval_dataset=chat_dataset(5))

    place(lambda: train(model, tmp_path / "there"))
    train(expected, tmp_path / "here")
    assert same_tensors(adapters_of(model), adapters_of(expected))


def test_a_model_made_in_inference_mode_is_refused(tmp_path):
    model = adapted_model()
    with torch.inference_mode():  # after inject_lora, which refuses such a model too
        model.model.norm.weight = torch.nn.Parameter(torch.ones(32), requires_grad=False)
    with pytest.raises(p3.TrainingError, match=r"made inside torch.inference_mode\(\).*outside"):
        p3.train(model, chat_dataset(), quiet_config(tmp_path / "run", max_steps=1))
    assert not (tmp_path / "run").exists()


# --- Wrapped models


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_trains_evaluates_and_resumes_as_the_model_inside(tmp_path, wrap):
    data = chat_dataset(8)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    model, inside = adapted_model(), adapted_model()
    p3.train(model, data, quiet_config(tmp_path / "plain", **settings))
    p3.train(wrap(inside), data, quiet_config(tmp_path / "wrapped", **settings))
    assert same_tensors(adapters_of(model), adapters_of(inside))
    assert p3.evaluate(wrap(inside), data) == p3.evaluate(model, data)
    more = quiet_config(tmp_path / "wrapped", **{**settings, "max_steps": 3, "resume_from_checkpoint": True})
    assert p3.train(adapted_model(), data, more).global_step == 3


def test_a_wrapper_of_the_user_s_own_is_refused_before_any_file_is_touched(tmp_path):
    wrapper = torch.nn.ModuleDict({"inner": adapted_model()})
    for function in (
        lambda: p3.train(wrapper, chat_dataset(4), quiet_config(tmp_path / "run", max_steps=1)),
        lambda: p3.evaluate(wrapper, chat_dataset(4)),
    ):
        with pytest.raises(p3.ModelError, match="ModuleDict is not a causal language model"):
            function()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("block", [p3.disabled, p3.merged])
def test_training_inside_a_block_where_the_adapters_are_off_is_refused(tmp_path, block):
    model = adapted_model()
    with block(model), pytest.raises(p3.TrainingError, match="leave the block first"):
        p3.train(model, chat_dataset(4), quiet_config(tmp_path / "run", max_steps=1))
    assert not list(tmp_path.iterdir())


# --- Passes over the data


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over all tokens of each set, and the plans made of its documents."""
    counts: Counter[tuple[str, int]] = Counter()

    def count(cls, name):
        inner = vars(cls)[name]
        compute = getattr(inner, "func", inner)

        def counted(self, *arguments):
            counts[name, id(getattr(self, "dataset", self))] += 1
            return compute(self, *arguments)

        replaced = counted if compute is inner else cached_property(counted)
        if replaced is not counted:
            replaced.__set_name__(cls, name)
        monkeypatch.setattr(cls, name, replaced)

    for name in ("_digest", "_label_counts"):
        count(DocumentSet, name)
    count(BatchPlan, "micro_batches")
    return counts


def test_nothing_is_computed_twice_before_the_first_step(tmp_path, passes):
    train_set, eval_set = chat_dataset(30, 62).split(0.2)
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 9,
        "save_strategy": "steps",
        "save_steps": 1,
        "log_level": "warning",
    }
    model, tokenizer = adapted_model(), make_tokenizer()
    config = quiet_config(tmp_path / "run", **settings, max_steps=1)
    p3.doctor(model, tokenizer, train_set, config, eval_dataset=eval_set, try_steps=False)
    assert passes.pop(("micro_batches", id(train_set))) == 1
    for steps in (1, 2):
        config = quiet_config(tmp_path / "run", **settings, max_steps=steps, resume_from_checkpoint=steps > 1)
        p3.train(model, train_set, config, eval_dataset=eval_set, tokenizer=tokenizer)
        assert passes.pop(("micro_batches", id(train_set))) == 1
        passes.pop(("micro_batches", id(eval_set)))  # of the evaluation after the last step
    want = {(name, id(data)): 1 for name in ("_digest", "_label_counts") for data in (train_set, eval_set)}
    assert {key: passes[key] for key in want} == want


def test_nothing_of_a_stream_is_computed_twice_before_the_first_step(tmp_path, passes):
    stream = p3.ChatDataset.load(chat_rows(30), make_tokenizer(), max_length=62, streaming=True, buffer_size=20)
    p3.train(adapted_model(), stream, quiet_config(tmp_path / "run", max_steps=1, log_level="warning"))
    assert {count for (_, data), count in passes.items() if data == id(stream.first_window)} == {1}
    assert passes["_digest", id(stream.first_window)] == 1


def test_a_copy_computes_its_own_fingerprint_and_counts():
    dataset = chat_dataset(30, 62).select(range(9))
    before = dataset.fingerprint(), dataset.statistics()
    changed = copy.deepcopy(dataset)
    changed._labels[changed._labels != IGNORE_INDEX] = IGNORE_INDEX
    assert changed.fingerprint() != before[0] and changed.statistics()["supervised_tokens"] == 0
    assert dataset.select(range(3)).fingerprint() != before[0]
    assert (dataset.fingerprint(), dataset.statistics()) == before
