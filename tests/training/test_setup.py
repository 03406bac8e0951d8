"""Before the first step: the right error, before any file is written or deleted; and a banner that says it all."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, adapters_of, chat_dataset, quiet_config, same_tensors, tiny_model

import phi3lora as p3
from phi3lora.model.backend import PLAIN, Backend
from phi3lora.training.setup import (
    banner_facts,
    check_run,
    claim_output_dir,
    resolve_backend,
    resolve_checkpointing,
    resolve_plans,
)
from phi3lora.training.state import TrainingState


def without_adapters():
    return tiny_model().requires_grad_(False)


def all_frozen():
    return adapted_model().requires_grad_(False)


def head_trainable():
    model = adapted_model()
    model.lm_head.weight.requires_grad = True
    return model


def cast_to_bfloat16():
    return adapted_model().to(torch.bfloat16)


BAD_MODELS = {
    "no adapters": (without_adapters, p3.TrainingError, r"no adapters.*inject_lora"),
    "all frozen": (all_frozen, p3.TrainingError, r"only adapters may be trainable, but nothing is"),
    "head": (head_trainable, p3.TrainingError, r"only adapters may be trainable, but lm_head.weight is"),
    "cast": (cast_to_bfloat16, p3.TrainingError, r"lora_A is torch.bfloat16.*Cast the base model before inject_lora"),
    "few positions": (
        lambda: adapted_model(changes={"max_position_embeddings": 40, "original_max_position_embeddings": 40}),
        p3.DataError,
        r"train_dataset has a document of 63 tokens; the model allowed 40",
    ),
    "small vocabulary": (
        lambda: adapted_model(changes={"vocab_size": 200}),
        p3.DataError,
        r"train_dataset has token id \d+; the model's vocabulary has 200.*own tokenizer",
    ),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_a_model_that_cannot_train_is_refused_before_any_file_is_written(tmp_path, what):
    make, error, message = BAD_MODELS[what]
    with pytest.raises(error, match=message):
        p3.train(make(), chat_dataset(), quiet_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def empty():
    return chat_dataset().select([])


BAD_RUNS = {
    "empty": ({}, empty, None, p3.DataError, r"train_dataset is empty"),
    "no eval set": ({"eval_strategy": "steps"}, chat_dataset, None, p3.TrainingError, r"'steps' needs an eval_dataset"),
    "empty eval set": ({"eval_strategy": "steps"}, chat_dataset, empty, p3.DataError, r"eval_dataset is empty"),
    "document longer than a row": ({"max_length": 40}, chat_dataset, None, p3.DataError, r"max_length=40.*63 tokens"),
    "the same, steps given": (
        {"max_length": 40, "max_steps": 3}, chat_dataset, None, p3.DataError, r"max_length=40.*63 tokens",
    ),
    "eval on start without set": ({"eval_on_start": True}, chat_dataset, None, p3.TrainingError, r"eval_dataset"),
    "unknown metric": (
        {"eval_strategy": "steps", "metric_for_best_model": "rouge"}, chat_dataset, chat_dataset, p3.TrainingError,
        r"metric_for_best_model='rouge'; allowed: loss",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_run_that_cannot_go_well_is_refused_before_any_file_is_written_or_deleted(tmp_path, what):
    settings, train_set, eval_set, error, message = BAD_RUNS[what]
    kept = tmp_path / "run" / "checkpoint-1" / "file"
    kept.parent.mkdir(parents=True)
    kept.write_text("another run's")
    model = adapted_model()
    before = adapters_of(model)
    config = quiet_config(tmp_path / "run", overwrite_output_dir=True, **settings)
    with pytest.raises(error, match=message):
        p3.train(model, train_set(), config, eval_dataset=eval_set and eval_set())
    assert kept.is_file()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-1"]
    assert same_tensors(adapters_of(model), before)


def test_trainable_biases_are_no_stranger():
    model = adapted_model()
    o_proj = model.model.layers[0].self_attn.o_proj
    o_proj.bias = torch.nn.Parameter(torch.zeros(o_proj.out_features))
    check_run(model, chat_dataset(), None, quiet_config("unused"))


@pytest.fixture
def used(tmp_path):
    """A folder with another run's checkpoint, metrics, and a file of the user's."""
    for name in ("checkpoint-2/x", "checkpoint-10/x", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    return tmp_path


def test_a_folder_with_another_runs_checkpoints_is_refused_and_left_alone(used):
    before = sorted(used.rglob("*"))
    with pytest.raises(
        p3.CheckpointError, match=r"checkpoint-10 the newest.*resume_from_checkpoint.*overwrite_output_dir"
    ):
        p3.train(adapted_model(), chat_dataset(), quiet_config(used))
    assert sorted(used.rglob("*")) == before


def test_overwriting_deletes_that_runs_checkpoints_and_metrics_and_nothing_else(used):
    claim_output_dir(quiet_config(used, overwrite_output_dir=True), resuming=False)
    assert [p.name for p in used.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resuming_wins_over_overwriting(used, resume):
    before = sorted(used.rglob("*"))
    claim_output_dir(quiet_config(used, overwrite_output_dir=True, resume_from_checkpoint=resume), resuming=True)
    assert sorted(used.rglob("*")) == before


def test_a_folder_without_checkpoints_is_anybodys(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    claim_output_dir(quiet_config(tmp_path), resuming=False)
    claim_output_dir(quiet_config(tmp_path / "new"), resuming=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_memory_plan_counts_the_state_of_the_optimizer_at_hand():
    model = adapted_model()
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = p3.training.step.resolve_precision(quiet_config("there"), model, torch.device("cpu"))

    def planned_bytes(optim):
        config = quiet_config("there", optim=optim)
        _, plan = resolve_checkpointing(model, chat_dataset(), config, PLAIN, precision)
        return plan.peak_gib["full"] * 2**30

    for optim, each in {"adamw_torch": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2 + 8 / 256}.items():
        assert planned_bytes(optim) - planned_bytes("sgd") == pytest.approx(each * numbers)


def facts(**settings):
    model, dataset, config = adapted_model(), chat_dataset(), quiet_config("there", **settings)
    precision = p3.training.step.resolve_precision(config, model, torch.device("cpu"))
    backend = resolve_backend(model, config, precision)
    steps = resolve_plans(model, dataset, config, backend)
    memory = resolve_checkpointing(model, dataset, config, backend, precision)
    state = TrainingState(total_steps=steps.total, global_step=3)
    told = banner_facts(model, steps, config, state, precision, None, backend, memory)
    return {name: str(value) for name, value in told.items()}


def test_the_banner_says_what_was_resolved():
    told = facts(
        bf16=True, seed=5, data_seed=6, warmup_ratio=0.5, max_steps=11, gradient_accumulation_steps=2, weight_decay=0.25
    )
    model = adapted_model()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable:,} trainable in 8 layers" in told["model"]
    assert "cpu, bf16" in told["device"]
    assert "layers plain (not on a CUDA device)" in told["device"]
    assert told["memory"] == "activation checkpointing none"
    assert told["step"] == "4 x 2 rows, packed to 64 tokens"
    assert told["steps"] == "11 (3 done)"
    assert "adamw_torch, linear from 0.01, 6 warm-up steps, weight decay 0.25" in told["optimizer"]
    assert "from 0.01 (LoRA+: B times 16), 0 warm-up" in facts(lora_plus_lr_ratio=16)["optimizer"]
    assert told["seed"] == "5 (data 6)"
    assert told["output"] == "there"
    assert "eval data" not in told
    assert "without effect" not in told


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
    model, config = adapted_model(), quiet_config("unused", **settings)
    precision = p3.training.step.resolve_precision(config, model, torch.device("cpu"))
    assert resolve_backend(model, config, precision) == Backend(*backend)


def test_the_banner_lists_the_names_without_effect():
    assert facts(remove_unused_columns=False, dataloader_num_workers=4)["without effect"] == (
        "dataloader_num_workers, remove_unused_columns"
    )


def test_the_order_of_documents_follows_data_seed_and_without_it_the_seed():
    def order(**seeds):
        return resolve_plans(adapted_model(), chat_dataset(), quiet_config("unused", **seeds), PLAIN).steps_of_epoch(0)

    assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) == order(seed=7)
    assert order(seed=7, data_seed=1) != order(seed=7)
    assert order(seed=7, data_seed=0) == order(seed=0)
