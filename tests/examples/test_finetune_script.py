"""The ShareGPT script: on the demo it learns and saves; ``--real`` asks for the right model, data and settings."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch
from offline import replace_downloads

import phi3lora as p3

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_script.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_it_learns_the_demo_s_voice_and_saves_the_adapter(script, capsys):
    script["main"]([])
    output = capsys.readouterr().out
    assert "format 'sharegpt'" in output
    _, reference, answer = output.partition("\nprompt ")[2].split("\n\n")[0].splitlines()
    assert reference.removeprefix("reference").strip() == answer.removeprefix("answer").strip()

    folder = Path("runs/finetune_script_demo")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line][-1] < 0.05

    model, tokenizer, _, _ = p3.demo.load()
    p3.load_adapter(model, folder / "adapter.safetensors")
    answer = p3.generate(model, tokenizer, "What is the price of the Fusgus scarf?", max_new_tokens=48)
    assert answer.startswith("Thanks for asking!")
    assert len(list(folder.glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_the_real_branch_asks_for_phi_3_and_sharegpt_chats_in_half_precision(script, monkeypatch):
    calls = replace_downloads(monkeypatch, script["demo_conversations"])
    script["main"](["--real"])
    assert calls.models == [("microsoft/Phi-3-mini-4k-instruct", {"dtype": "float16", "base_precision": None})]
    assert calls.datasets == [("macadeliccc/opus_samantha", {"max_length": 2048, "on_bad_row": "skip"})]
    assert Path("runs/finetune_script/adapter.safetensors").is_file()


@pytest.mark.parametrize(("gpu", "bitsandbytes"), [(True, True), (True, False), (False, True)])
def test_the_configuration_is_the_original_s(script, gpu, bitsandbytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "spec" if bitsandbytes else None)
    config = script["training_config"](real=True)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (7, 4)
    assert (config.num_train_epochs, config.max_steps, config.learning_rate) == (3, -1, 1e-4)
    assert (config.lr_scheduler_type, config.eval_strategy, config.save_strategy) == ("linear", "steps", "epoch")
    assert config.optim == ("paged_adamw_32bit" if gpu and bitsandbytes else "adamw_torch")
    assert config.fp16 == gpu
    assert config.activation_checkpointing == "full"
    assert config.resume_from_checkpoint == "auto" and not config.overwrite_output_dir
