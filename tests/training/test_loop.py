"""``train``: events at their steps, the best model, non-finite losses, early stopping, what a run leaves unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import (
    adapted_model,
    adapters_of,
    chat_dataset,
    interrupt,
    longrope_model,
    make_tokenizer,
    on,
    quiet_config,
    same_tensors,
)

import phi3lora as p3
from phi3lora.training import loop
from phi3lora.training.checkpoint import checkpoints

DATA = chat_dataset(24)
UNPACKED = {"packing": False, "gradient_accumulation_steps": 2}  # 24 documents / (4 x 2): 3 steps an epoch


class Recorder(p3.Callback):
    """Records every hook call with its step and arguments."""

    def __init__(self, model=None):
        self.calls, self.model, self.adapters = [], model, {}

    def _note(self, hook, state, *details):
        self.calls.append((hook, state.global_step, *details))
        if self.model is not None:
            self.adapters[hook, state.global_step] = adapters_of(self.model)

    def on_train_begin(self, state):
        self._note("begin", state)

    def on_step_end(self, state):
        self._note("step", state)

    def on_log(self, state, line):
        self._note("log", state, line)

    def on_evaluate(self, state, metrics):
        self._note("evaluate", state, metrics)

    def on_save(self, state, path):
        self._note("save", state, path)

    def on_train_end(self, state):
        self._note("end", state)

    def steps(self, hook):
        return [call[1] for call in self.calls if call[0] == hook]


def train(folder, model=None, recorder=None, dataset=DATA, eval_dataset=None, callbacks=(), **settings):
    model = model or adapted_model()
    callbacks = [*([recorder] if recorder else []), *callbacks]
    return p3.train(model, dataset, quiet_config(folder, **settings), eval_dataset=eval_dataset, callbacks=callbacks)


def test_the_loss_of_a_learnable_task_falls_and_the_held_out_loss_with_it(tmp_path):
    model = adapted_model(r=8)
    before = p3.evaluate(model, DATA)
    result = train(tmp_path, model, max_steps=40, learning_rate=2e-2, warmup_steps=3)
    losses = [line["loss"] for line in result.history]
    after = p3.evaluate(model, DATA)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert after["loss"] < 0.6 * before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"] + 0.2
    assert result.metrics["train_loss"] < before["loss"]


EVENTS = [  # settings -> steps of 7 with a log line, an evaluation, a checkpoint; an epoch has 3 steps
    ({"logging_steps": 2, "save_strategy": "no", "eval_strategy": "steps"}, [2, 4, 6, 7], [2, 4, 6, 7], []),
    ({"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"}, *[[3, 6, 7]] * 3),
    (
        {"logging_strategy": "no", "eval_strategy": "steps", "eval_steps": 3,
         "save_strategy": "steps", "save_steps": 3},
        [], [3, 6, 7], [3, 6, 7],
    ),
    (
        {"logging_steps": 0.5, "eval_strategy": "steps", "eval_steps": 0.3,
         "save_strategy": "steps", "save_steps": 0.5},
        [4, 7], [3, 6, 7], [4, 7],  # ceil(0.5 * 7), ceil(0.3 * 7)
    ),
    (
        {"logging_steps": 3, "logging_first_step": True, "eval_strategy": "steps", "eval_steps": 100,
         "eval_on_start": True, "save_strategy": "steps", "save_steps": 500},
        [1, 3, 6, 7], [0, 7], [7],
    ),
    (
        {"logging_strategy": "no", "logging_first_step": True, "eval_strategy": "steps", "eval_steps": 7,
         "save_strategy": "steps", "save_steps": 7},
        [1], [7], [7],
    ),
    ({"logging_steps": 500, "eval_strategy": "no"}, [7], [], []),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "logs", "evaluations", "saves"), EVENTS)
def test_logs_evaluations_and_checkpoints_happen_at_exactly_their_steps(
    tmp_path, monkeypatch, settings, logs, evaluations, saves
):
    found = {"loss": 1.0, "perplexity": 2.0, "token_accuracy": 0.5, "n_tokens": 3}
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: found)
    recorder = Recorder()
    result = train(tmp_path, recorder=recorder, eval_dataset=DATA, max_steps=7, **UNPACKED, **settings)
    assert recorder.steps("log") == [line["step"] for line in result.history if "grad_norm" in line] == logs
    assert recorder.steps("evaluate") == [line["step"] for line in result.history if "eval_loss" in line] == evaluations
    assert recorder.steps("save") == [int(p.name.split("-")[1]) for p in checkpoints(tmp_path)][::-1] == saves
    assert recorder.steps("step") == [1, 2, 3, 4, 5, 6, 7]


def test_a_logged_loss_is_the_mean_over_the_tokens_since_the_last_line(tmp_path):
    counts = []
    model = adapted_model()

    count = on(lambda state: counts.append(state.run_loss_count - sum(counts)))
    every = train(tmp_path / "a", model, max_steps=6, callbacks=[count])
    third = train(tmp_path / "b", max_steps=6, logging_steps=3)
    losses = [line["loss"] for line in every.history]
    expected = [
        sum(x * n for x, n in zip(losses[i : i + 3], counts[i : i + 3], strict=True)) / sum(counts[i : i + 3])
        for i in (0, 3)
    ]
    assert len(set(counts)) > 1
    assert [line["loss"] for line in third.history] == pytest.approx(expected)
    total = sum(x * n for x, n in zip(losses, counts, strict=True)) / sum(counts)
    assert every.metrics["train_loss"] == third.metrics["train_loss"] == pytest.approx(total)


def test_callbacks_are_called_in_order_with_the_documented_arguments(tmp_path):
    first, second = Recorder(), Recorder()
    second.calls = first.calls  # one list, to see their order
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    result = train(tmp_path, recorder=first, callbacks=[second], eval_dataset=DATA, max_steps=2, **settings)
    assert [call[:2] for call in first.calls[::2]] == [
        ("begin", 0), ("log", 1), ("step", 1), ("log", 2), ("evaluate", 2), ("save", 2), ("step", 2), ("end", 2),
    ]  # fmt: skip
    assert first.calls[::2] == first.calls[1::2]
    details = {(hook, step): rest for hook, step, *rest in first.calls}
    assert details["log", 1] == [result.history[0]]
    assert details["evaluate", 2] == [{k: v for k, v in result.history[-1].items() if k.startswith("eval_")}]
    assert details["save", 2] == [tmp_path / "checkpoint-2"]
    assert isinstance(details["save", 2][0], Path)


def test_an_object_with_one_hook_is_a_callback(tmp_path):
    class Half:
        seen = 0

        def on_step_end(self, state):
            self.seen += 1

    half = Half()
    result = train(tmp_path, callbacks=[half], max_steps=3, save_strategy="steps")
    assert half.seen == 3
    assert result.best_checkpoint is None  # without evaluations


def test_the_result_describes_the_run(tmp_path):
    result = train(tmp_path, eval_dataset=DATA, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch")
    assert result.metrics["tokens"] == 2 * DATA.lengths.sum()
    assert result.metrics["eval_loss"] == result.history[-1]["eval_loss"]
    assert result.metrics["train_seconds"] > 0
    assert result.metrics["tokens_per_s"] == pytest.approx(result.metrics["tokens"] / result.metrics["train_seconds"])
    assert not result.interrupted
    assert result.best_checkpoint == str(tmp_path / f"checkpoint-{result.global_step}")


def fake_evaluations(monkeypatch, values, metric="loss"):
    """Make the evaluations return these values, one after the other."""
    left = iter(values)

    def evaluate(model, dataset, **options):
        return {"loss": 1.0, "perplexity": 1.0, "token_accuracy": 0.5, "n_tokens": 1, metric: next(left)}

    monkeypatch.setattr(loop, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("settings", "metric", "values", "best"),
    [
        ({}, "loss", [3, 1, 2, 2.5, 1.5], 2),
        ({"save_total_limit": 1}, "loss", [5, 4, 3, 2, 1], 5),
        ({}, "loss", [1, 1, 1, 1, 1], 1),
        ({"metric_for_best_model": "eval_token_accuracy"}, "token_accuracy", [0.3, 0.1, 0.9, 0.2, 0.8], 3),
        ({"metric_for_best_model": "loss", "greater_is_better": True}, "loss", [3, 1, 2, 4, 1.5], 4),
        ({"save_strategy": "no", "metric_for_best_model": "perplexity"}, "perplexity", [3, 1, 2, 2.5, 1.5], 2),
        ({"early_stopping_threshold": 1.0, "early_stopping_patience": 9}, "loss", [3, 2.5, 2.2, 2.1, 2.4], 4),
    ],
)
def test_load_best_model_at_end_restores_exactly_the_best_adapters(
    tmp_path, monkeypatch, settings, metric, values, best
):
    fake_evaluations(monkeypatch, values, metric)
    model = adapted_model()
    recorder = Recorder(model)
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {"max_steps": 5, "load_best_model_at_end": True, **every_step, **settings}
    result = train(tmp_path, model, recorder, eval_dataset=DATA, **options)
    assert result.best_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert same_tensors(adapters_of(model), recorder.adapters["evaluate", best])
    assert best == 5 or not same_tensors(adapters_of(model), recorder.adapters["evaluate", 5])
    p3.load_adapter(other := adapted_model(seed=1), Path(result.best_checkpoint) / "lora.safetensors")
    assert same_tensors(adapters_of(other), adapters_of(model))


def test_the_last_evaluation_can_be_the_best_one(tmp_path, monkeypatch):
    fake_evaluations(monkeypatch, [3, 1])  # at step 2 and, because it is the last, at step 3
    model = adapted_model()
    recorder = Recorder(model)
    settings = {"eval_steps": 2, "save_steps": 3, "save_strategy": "steps", "load_best_model_at_end": True}
    result = train(tmp_path, model, recorder, eval_dataset=DATA, max_steps=3, eval_strategy="steps", **settings)
    assert result.best_checkpoint == str(tmp_path / "checkpoint-3")
    assert same_tensors(adapters_of(model), recorder.adapters["step", 3])


def test_without_load_best_the_last_adapters_stay_and_the_best_checkpoint_is_named(tmp_path, monkeypatch):
    fake_evaluations(monkeypatch, [3, 1, 2])
    model = adapted_model()
    recorder = Recorder(model)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    result = train(tmp_path, model, recorder, eval_dataset=DATA, max_steps=3, save_total_limit=1, **settings)
    assert result.best_checkpoint == str(tmp_path / "checkpoint-2")
    assert same_tensors(adapters_of(model), recorder.adapters["step", 3])
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]


@pytest.mark.parametrize(
    ("patience", "threshold", "values", "stops_at"),
    [
        (1, 0.0, [3, 2, 2.5, 1, 1], 3),
        (2, 0.0, [3, 2, 2.5, 2.5, 1], 4),
        (2, 0.0, [3, 3, 2, 2, 2], 5),
        (2, 0.5, [3, 2.9, 2.8, 1, 1], 3),
        (None, 0.0, [1, 2, 3, 4, 5], 6),
    ],
)
def test_early_stopping_waits_for_patience_evaluations_without_gain(
    tmp_path, monkeypatch, patience, threshold, values, stops_at
):
    fake_evaluations(monkeypatch, [*values, 0.5])
    settings = {"early_stopping_patience": patience, "early_stopping_threshold": threshold}
    result = train(tmp_path, eval_dataset=DATA, max_steps=6, eval_strategy="steps", eval_steps=1, **settings)
    assert result.global_step == stops_at


def poison(model, name):
    parameter = dict(model.named_parameters())[name]
    before = parameter.data.clone()
    parameter.data.view(-1)[0] = float("nan")
    return lambda: parameter.data.copy_(before)


POISONED = ["model.norm.weight", "model.layers.0.self_attn.o_proj.lora_B"]


@pytest.mark.parametrize(("name", "limit"), [(POISONED[0], 3), (POISONED[1], 1)])
def test_a_loss_that_stays_nan_stops_the_run_and_names_step_and_rows(tmp_path, name, limit):
    model = adapted_model()
    poison(model, name)
    before = adapters_of(model)
    recorder = Recorder()
    config = quiet_config(tmp_path, max_nonfinite_steps=limit, max_steps=20, packing=False)
    message = rf"{limit} steps in a row, the last at step {limit} .*loss nan"
    with pytest.raises(p3.TrainingError, match=message) as caught:
        p3.train(model, DATA, config, tokenizer=make_tokenizer(), callbacks=[recorder])
    order = [b["documents"] for b in p3.batches(DATA, batch_size=4, packing=False, seed=42)][limit - 1]
    rows = sorted(DATA.row_number(i) for (i,) in order)
    assert f"rows {rows} of the data" in str(caught.value)
    assert "What is item" in str(caught.value)
    assert all(torch.equal(torch.nan_to_num(v), torch.nan_to_num(before[n])) for n, v in adapters_of(model).items())
    assert len(recorder.steps("step")) == limit - 1


class NanSteps(p3.Callback):
    """Makes the loss NaN in steps ``first`` to ``last``."""

    def __init__(self, model, first, last):
        self.model, self.first, self.last = model, first, last

    def on_step_end(self, state):
        if state.global_step == self.first - 1:
            self.restore = poison(self.model, POISONED[0])
        if state.global_step == self.last:
            self.restore()


def test_fewer_bad_steps_in_a_row_than_the_limit_are_skipped_logged_and_counted(tmp_path, caplog):
    model = adapted_model()
    recorder = Recorder(model)
    bad = [NanSteps(model, 3, 4), NanSteps(model, 7, 8)]
    result = train(tmp_path, model, recorder, callbacks=bad, max_steps=9, max_nonfinite_steps=3)
    for step in (3, 4):
        assert same_tensors(recorder.adapters["step", step], recorder.adapters["step", 2])
    assert not same_tensors(recorder.adapters["step", 5], recorder.adapters["step", 4])
    assert [line["step"] for line in result.history if "loss" in line] == [1, 2, 5, 6, 9]
    assert [line.get("skipped_steps", 0) for line in result.history] == [0, 0, 1, 2, 2, 2, 3, 4, 4]
    assert "; 4 skipped, because the loss or its gradient was not finite" in str(result)
    assert result.metrics["train_loss"] == result.metrics["train_loss"]  # not NaN
    logged = [m for m in caplog.messages if "was skipped" in m]
    assert [m.split(" was")[0] for m in logged] == ["step 3", "step 4", "step 7", "step 8"]
    assert all("rows [" in m for m in logged)


def test_a_run_of_bad_steps_alone_is_an_error_however_short(tmp_path):
    model = adapted_model()
    poison(model, POISONED[0])
    with pytest.raises(p3.TrainingError, match="2 steps in a row") as caught:
        train(tmp_path, model, max_steps=2, max_nonfinite_steps=5)
    assert "First document" not in str(caught.value)  # there is no tokenizer


def facts_of(model):
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    checkpointing = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    return modes, trainable, model.config.use_cache, checkpointing


@pytest.mark.parametrize(("outcome", "checkpointing"), [("done", False), ("error", True)])
def test_the_model_is_left_in_the_modes_it_came_in(tmp_path, outcome, checkpointing):
    model = adapted_model().eval()
    model.model.layers[1].train()
    model.config.use_cache = True
    before = facts_of(model)

    def look(state):
        assert all(module.training for module in model.modules())
        if outcome == "error":
            raise RuntimeError("stop")

    settings = {"gradient_checkpointing": checkpointing, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    if outcome == "error":
        with pytest.raises(RuntimeError, match="stop"):
            train(tmp_path, model, callbacks=[on(look)], eval_dataset=DATA, **settings)
    else:
        train(tmp_path, model, callbacks=[on(look)], eval_dataset=DATA, **settings)
    assert facts_of(model) == before


def test_gradient_checkpointing_recomputes_and_gives_the_same_update(tmp_path):
    def run(checkpointing):
        model, forwards = adapted_model(lora_dropout=0.2), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: forwards.append(1))
        folder = tmp_path / str(checkpointing)
        result = train(folder, model, max_steps=4, gradient_checkpointing=checkpointing)
        return adapters_of(model), len(forwards), [line["loss"] for line in result.history]

    plain, recomputed = run(False), run(True)
    assert (plain[1], recomputed[1]) == (4, 8)
    assert recomputed[2] == plain[2]
    assert same_tensors(plain[0], recomputed[0])


def test_packing_does_not_change_what_one_step_over_all_documents_learns(tmp_path):
    def run(folder, **settings):
        model = adapted_model()
        train(folder, model, max_steps=1, optim="sgd", max_grad_norm=0, lr_scheduler_type="constant",
              learning_rate=1.0, **settings)  # fmt: skip
        return adapters_of(model)

    packed = run(tmp_path / "a", per_device_train_batch_size=30)
    wider = run(tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=30, max_length=150)
    unpacked = run(tmp_path / "c", per_device_train_batch_size=5, gradient_accumulation_steps=5, packing=False)
    start = adapters_of(adapted_model())
    assert max((packed[n] - start[n]).abs().max() for n in start) > 1e-3
    for other in (wider, unpacked):
        for name, value in packed.items():
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("max_length", [64, 200])
def test_a_longrope_model_trains_each_document_in_its_own_regime(tmp_path, max_length):
    """One SGD step over documents of both regimes equals the sum of the documents run alone."""
    assert 5 < (DATA.lengths <= 40).sum() < 19
    model, plain = longrope_model(), longrope_model().train()
    settings = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "learning_rate": 1.0}
    train(tmp_path, model, max_steps=1, gradient_accumulation_steps=30, max_length=max_length, **settings)
    total, count = 0.0, 0
    for document in DATA:
        ids, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        n = int((labels[:, 1:] != -100).sum())
        total, count = total + plain(input_ids=ids, labels=labels).loss * n, count + n
    (total / count).backward()
    torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=1.0).step()
    for name, value in adapters_of(plain).items():
        torch.testing.assert_close(adapters_of(model)[name], value, atol=1e-5, rtol=1e-4)


def test_seed_decides_the_dropout(tmp_path):
    def run(name, seed):
        model = adapted_model(lora_dropout=0.3)
        torch.manual_seed(ord(name))  # earlier draws do not matter
        train(tmp_path / name, model, max_steps=3, seed=seed, data_seed=5)
        return adapters_of(model)

    assert same_tensors(run("a", 1), run("b", 1))
    assert not same_tensors(run("c", 1), run("d", 2))


def test_a_second_run_continues_from_the_adapters_of_the_first(tmp_path):
    model = adapted_model()
    train(tmp_path / "a", model, max_steps=3)
    between, recorder = adapters_of(model), Recorder(model)
    result = train(tmp_path / "b", model, recorder, max_steps=3)
    assert same_tensors(recorder.adapters["begin", 0], between)
    assert not same_tensors(adapters_of(model), between)
    assert result.global_step == 3


def test_an_interrupted_run_is_saved_even_with_save_strategy_no(tmp_path):
    recorder = Recorder()
    result = train(tmp_path, recorder=recorder, callbacks=[on(interrupt, 2)], max_steps=5)
    assert (result.interrupted, result.global_step) == (True, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert recorder.calls[-1][:2] == ("end", 2)


@pytest.mark.gpu
def test_a_compiled_run_equals_an_eager_one_to_rounding(tmp_path):
    losses = []
    for compiled in (False, True):
        model = adapted_model().cuda()
        result = train(tmp_path / str(compiled), model, max_steps=5, compile=compiled)
        losses.append([line["loss"] for line in result.history])
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
