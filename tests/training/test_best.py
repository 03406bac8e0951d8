"""The best model over resumes: early stopping stays, NaN never wins, another evaluation set or base starts anew."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from conftest import adapted_model, adapters_of, chat_dataset, make_tokenizer, quiet_config, same_tensors, stop_at

import phi3lora as p3
from phi3lora.files import sha256_of
from phi3lora.training import loop
from phi3lora.training.best import greater_is_better

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def run(folder, losses=None, monkeypatch=None, eval_dataset=None, callbacks=(), **settings):
    """Train with the evaluations of ``losses``, by step; None: the real ones."""
    if losses is not None:
        rest = iter(losses)
        metrics = {"perplexity": 1.0, "token_accuracy": 0.5, "n_tokens": 9}
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"loss": next(rest), **metrics})
    model = adapted_model()
    config = quiet_config(folder, **{**EVERY_STEP, **settings})
    result = p3.train(model, chat_dataset(), config, eval_dataset=eval_dataset or chat_dataset(5), callbacks=callbacks)
    return result, adapters_of(model)


# --- Early stopping


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_that_early_stopping_ended_stays_ended(tmp_path, monkeypatch, resume):
    settings = {"early_stopping_patience": 2, "load_best_model_at_end": True, "max_steps": 9}
    first, adapters = run(tmp_path, [3.0, 2.0, 2.5, 2.5, 1.0], monkeypatch, **settings)
    assert first.global_step == 4
    for _ in range(2):
        again, restored = run(tmp_path, [], monkeypatch, resume_from_checkpoint=resume, **settings)
        assert again.global_step == 4 and again.history == first.history
        assert again.best_checkpoint == first.best_checkpoint == str(tmp_path / "checkpoint-2")
        assert same_tensors(restored, adapters)


def test_a_larger_patience_continues_a_run_that_early_stopping_ended(tmp_path, monkeypatch, capsys):
    settings = {"max_steps": 6, "log_level": "passive"}
    run(tmp_path, [2.0, 3.0], monkeypatch, early_stopping_patience=1, **settings)
    settings["resume_from_checkpoint"] = True
    capsys.readouterr()
    ended, _ = run(tmp_path, [], monkeypatch, early_stopping_patience=1, **settings)
    assert "larger early_stopping_patience than 1 continues it" in capsys.readouterr().out
    longer, _ = run(tmp_path, [1.0, 0.9, 0.8, 0.7], monkeypatch, early_stopping_patience=2, **settings)
    assert (ended.global_step, longer.global_step) == (2, 6)


# --- NaN


@pytest.mark.parametrize(
    ("losses", "best"),
    [([math.nan, 2.0, 3.0], 2), ([2.0, math.nan, 3.0], 1), ([3.0, math.nan, 2.0], 3), ([math.inf, math.nan, 9.0], 3)],
)
def test_a_nan_metric_is_never_the_best(tmp_path, monkeypatch, losses, best):
    result, adapters = run(tmp_path, losses, monkeypatch, max_steps=3, load_best_model_at_end=True)
    assert result.best_checkpoint == str(tmp_path / f"checkpoint-{best}")
    p3.load_adapter(model := adapted_model(seed=1), tmp_path / f"checkpoint-{best}" / "lora.safetensors")
    assert same_tensors(adapters_of(model), adapters)


def test_without_a_finite_metric_there_is_no_best_and_patience_runs_out(tmp_path, monkeypatch, capsys):
    settings = {"max_steps": 9, "load_best_model_at_end": True, "log_level": "passive"}
    result, _ = run(tmp_path, [math.nan] * 3, monkeypatch, early_stopping_patience=3, **settings)
    assert (result.global_step, result.best_checkpoint) == (3, None)
    assert "no checkpoint has a finite metric" in capsys.readouterr().out


# --- Another evaluation set


def test_another_evaluation_set_is_asked_for_and_its_best_is_found_anew(tmp_path, monkeypatch, caplog):
    run(tmp_path, [1.0, 2.0], monkeypatch, max_steps=6, callbacks=[stop_at(2)])
    settings = {"max_steps": 6, "resume_from_checkpoint": True, "eval_dataset": chat_dataset(7)}
    with pytest.raises(p3.CheckpointError, match=r"fingerprint of the evaluation data '\w+' then, '\w+' now"):
        run(tmp_path, [], monkeypatch, **settings)
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result, _ = run(tmp_path, [9.0, 7.0, 8.0, 9.0], monkeypatch, resume_with_changes=True, **settings)
    assert result.best_checkpoint == str(tmp_path / "checkpoint-4")  # not checkpoint-1, of the other set
    assert "looking for a new best one" in caplog.text


def test_a_run_may_go_on_without_evaluations_and_remembers_what_the_best_was_measured_on(tmp_path, monkeypatch):
    run(tmp_path, [1.0, 2.0], monkeypatch, max_steps=6, callbacks=[stop_at(2)])
    settings = {"max_steps": 6, "resume_from_checkpoint": True}
    result, _ = run(tmp_path, eval_strategy="no", callbacks=[stop_at(3)], **settings)
    assert result.best_checkpoint == str(tmp_path / "checkpoint-1")
    with pytest.raises(p3.CheckpointError, match="evaluation data"):
        run(tmp_path, [], monkeypatch, eval_dataset=chat_dataset(7), **settings)
    assert run(tmp_path, [3.0] * 3, monkeypatch, **settings)[0].best_checkpoint == str(tmp_path / "checkpoint-1")


# --- The best checkpoint's folder


def test_a_run_that_goes_on_elsewhere_takes_its_best_checkpoint_along(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    run(old, [3.0, 1.0, 2.0], monkeypatch, max_steps=6, callbacks=[stop_at(3)])
    settings = {"max_steps": 6, "load_best_model_at_end": True}
    run(new, [3.0], monkeypatch, resume_from_checkpoint=old / "checkpoint-3", callbacks=[stop_at(4)], **settings)
    shutil.rmtree(old)
    result, _ = run(new, [3.0, 3.0], monkeypatch, resume_from_checkpoint=True, save_total_limit=1, **settings)
    assert result.best_checkpoint == str(new / "checkpoint-2") and Path(result.best_checkpoint).is_dir()


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_best_checkpoint_that_is_lost_is_replaced_by_the_best_of_the_later_ones(tmp_path, monkeypatch, caplog, how):
    run(tmp_path, [1.0, 3.0], monkeypatch, max_steps=5, callbacks=[stop_at(2)])
    best = tmp_path / "checkpoint-1"
    shutil.rmtree(best) if how == "gone" else (best / "lora.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result, _ = run(tmp_path, [5.0, 4.0, 6.0], monkeypatch, max_steps=5, resume_from_checkpoint=True)
    assert result.best_checkpoint == str(tmp_path / "checkpoint-4")
    assert "the best checkpoint" in caplog.text and "checkpoint-1" in caplog.text


# --- Another base


def other_base(seed):
    model = adapted_model()
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj.weight"):
            parameter.data.mul_(1 + seed)
    return model


def train_on(model, folder, **settings):
    config = quiet_config(folder, save_strategy="steps", save_steps=1, **settings)
    return p3.train(model, chat_dataset(), config)


def test_another_base_of_the_same_shape_is_asked_for(tmp_path, caplog):
    train_on(other_base(0), tmp_path, max_steps=2)
    model, again = other_base(1), {"max_steps": 3, "resume_from_checkpoint": True}
    before = adapters_of(model)
    with pytest.raises(p3.CheckpointError, match=r"numbers of the base weights .* then, .* now.*resume_with_changes"):
        train_on(model, tmp_path, **again)
    assert same_tensors(adapters_of(model), before)
    assert train_on(other_base(0), tmp_path, **again).global_step == 3
    with caplog.at_level(logging.WARNING, logger="phi3lora"):
        result = train_on(other_base(1), tmp_path, **{**again, "max_steps": 4}, resume_with_changes=True)
    assert result.global_step == 4 and "numbers of the base weights" in caplog.text


def test_a_checkpoint_without_the_new_facts_resumes_as_before(tmp_path):
    train_on(other_base(0), tmp_path, max_steps=2)
    path = tmp_path / "checkpoint-2"
    about = json.loads((path / "trainer_state.json").read_text())
    del about["base_sample"], about["state"]["measured"]
    (path / "trainer_state.json").write_text(json.dumps(about))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["trainer_state.json"] = sha256_of(path / "trainer_state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert train_on(other_base(1), tmp_path, max_steps=3, resume_from_checkpoint=True).global_step == 3


# --- Metrics of the model's own answers

ANSWERS = {"max_steps": 4, "eval_max_samples": 3, "eval_max_new_tokens": 4}


def train_with_answers(folder, callbacks=(), **settings):
    model = adapted_model(lora_dropout=0.1)
    config = quiet_config(folder, **{**EVERY_STEP, **ANSWERS, **settings})
    options = {"eval_dataset": chat_dataset(5), "tokenizer": make_tokenizer(), "callbacks": callbacks}
    return p3.train(model, chat_dataset(), config, **options), model


def lengths(answers):
    return {"length": sum(len(a.answer) for a in answers) / len(answers)}


def test_the_best_model_can_be_chosen_by_rouge(tmp_path):
    pytest.importorskip("rouge_score")
    result, model = train_with_answers(tmp_path, metric_for_best_model="rougeL", load_best_model_at_end=True)
    scores = {line["step"]: line["eval_rougeL"] for line in result.history if "eval_loss" in line}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert result.best_checkpoint == str(tmp_path / f"checkpoint-{best}")
    found = p3.evaluate(
        model, chat_dataset(5), rouge=True, tokenizer=make_tokenizer(), max_samples=3, max_new_tokens=4, batch_size=8
    )
    assert found["rougeL"] == scores[best] and found["n_answers"] == 3


@pytest.mark.parametrize(("greater", "returned"), [(True, "mine"), (False, "mine"), (True, "eval_mine")])
def test_the_best_model_can_be_chosen_by_a_metric_of_ones_own(tmp_path, greater, returned):
    model, values = adapted_model(), iter([2.0, 5.0, 1.0, 3.0])
    config = quiet_config(
        tmp_path, **EVERY_STEP, **ANSWERS, metric_for_best_model="eval_mine", greater_is_better=greater
    )
    options = {"eval_dataset": chat_dataset(5), "tokenizer": make_tokenizer()}
    result = p3.train(model, chat_dataset(), config, compute_metrics=lambda _: {returned: next(values)}, **options)
    assert [line["eval_mine"] for line in result.history if "eval_mine" in line] == [2.0, 5.0, 1.0, 3.0]
    assert result.best_checkpoint == str(tmp_path / f"checkpoint-{2 if greater else 3}")
    assert result.metrics["eval_n_answers"] == 3


def test_a_metric_that_compute_metrics_does_not_return_is_named(tmp_path):
    config = quiet_config(tmp_path, **EVERY_STEP, **ANSWERS, metric_for_best_model="mine")
    options = {"eval_dataset": chat_dataset(5), "tokenizer": make_tokenizer()}
    with pytest.raises(p3.TrainingError, match=r"'mine' is not among the metrics of the evaluation: loss, .*length"):
        p3.train(adapted_model(), chat_dataset(), config, compute_metrics=lengths, **options)


@pytest.mark.parametrize(
    ("name", "greater"), [("loss", False), ("my_loss", False), ("perplexity", False), ("f1", True)]
)
def test_the_direction_follows_from_the_name(name, greater):
    config = quiet_config("unused", metric_for_best_model=name)
    assert greater_is_better(config) is greater


def test_answers_in_evaluations_do_not_change_the_run_or_its_resume(tmp_path):
    pytest.importorskip("rouge_score")
    plain, reference = train_with_answers(tmp_path / "plain", eval_strategy="no")
    answered, model = train_with_answers(tmp_path / "answered", predict_with_generate=True)
    assert same_tensors(adapters_of(model), adapters_of(reference))
    losses = [[line["loss"] for line in result.history if "loss" in line] for result in (plain, answered)]
    assert losses[0] == losses[1]
    train_with_answers(tmp_path / "cut", [stop_at(2)], predict_with_generate=True)
    resumed, model = train_with_answers(tmp_path / "cut", predict_with_generate=True, resume_from_checkpoint=True)
    assert same_tensors(adapters_of(model), adapters_of(reference))
    scores = [[line.get("eval_rougeL") for line in result.history] for result in (answered, resumed)]
    assert scores[0] == scores[1]


def test_a_callback_that_streams_and_samples_with_a_seed_does_not_change_the_run_or_its_resume(tmp_path):
    class Samples(p3.Callback):
        def on_train_begin(self, state):
            settings = {"max_new_tokens": 2, "temperature": 1.0, "seed": state.global_step}
            self.seen.append(p3.generate(self.model, make_tokenizer(), "Hi", stream=True, **settings))
            assert self.model.training

        def on_save(self, state, path):
            self.on_train_begin(state)

        on_step_end = on_train_begin

    def sampled(folder, callbacks=(), **settings):
        model, samples = adapted_model(lora_dropout=0.1).train(), Samples()
        samples.model, samples.seen = model, []
        p3.train(model, chat_dataset(), quiet_config(folder, **EVERY_STEP, **{"max_steps": 4, **settings}),
                 callbacks=[*callbacks, samples], eval_dataset=chat_dataset(5))  # fmt: skip
        return adapters_of(model), samples.seen

    _, reference = train_with_answers(tmp_path / "plain", eval_strategy="no")
    straight, seen = sampled(tmp_path / "straight")
    assert same_tensors(straight, adapters_of(reference))
    sampled(tmp_path / "cut", [stop_at(2)])
    resumed, seen_again = sampled(tmp_path / "cut", resume_from_checkpoint=True)
    assert same_tensors(resumed, straight)
    assert len(seen) == 9 and seen_again[1:] == seen[5:]
