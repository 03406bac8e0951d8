"""The model card's script: its dicts are the card's, its metrics and model are where ``Trainer`` puts them."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from offline import replace_downloads
from test_config import PEFT_CONFIG, TRAINING_CONFIG

import phi3lora as p3

SCRIPT = Path(__file__).parents[2] / "examples" / "sample_finetune.py"


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return runpy.run_path(str(SCRIPT))


def test_its_dicts_are_the_card_s(script):
    assert script["training_config"] == TRAINING_CONFIG
    assert script["peft_config"] == PEFT_CONFIG


@pytest.mark.slow
def test_the_demo_run_leaves_metrics_checkpoint_and_model(script, monkeypatch):
    load = p3.demo.load

    def load_less():
        model, tokenizer, train_set, eval_set = load()
        return model, tokenizer, train_set.select(range(160)), eval_set.select(range(40))

    monkeypatch.setattr(p3.demo, "load", load_less)
    script["main"]([])
    folder = Path("checkpoint_dir")
    train = json.loads((folder / "train_results.json").read_text())
    held_out = json.loads((folder / "eval_results.json").read_text())
    assert train["train_samples"] == 160 and math.isfinite(train["train_loss"])
    assert held_out["eval_samples"] == 40
    [checkpoint] = folder.glob("checkpoint-*")
    assert (checkpoint / "lora.safetensors").is_file()

    for name, load_into in (("adapter.safetensors", p3.load_adapter), ("peft", p3.import_peft)):
        model, _, _, eval_set = load_less()
        before = p3.evaluate(model, eval_set)["loss"]
        load_into(model, folder / name)
        after = p3.evaluate(model, eval_set)["loss"]
        assert after == pytest.approx(held_out["eval_loss"], rel=1e-5)
        assert after < before


def test_the_real_branch_asks_for_phi_3_and_ultrachat(script, monkeypatch):
    rows = [json.loads(line) for line in (p3.demo.FOLDER / "train.jsonl").read_text().splitlines()]
    calls = replace_downloads(monkeypatch, lambda: rows)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    script["main"](["--real"])
    options = {"dtype": "bfloat16", "base_precision": None, "use_cache": False}
    assert calls.models == [("microsoft/Phi-3-mini-4k-instruct", options)]
    assert [(name, o["split"], o["max_length"]) for name, o in calls.datasets] == [
        ("HuggingFaceH4/ultrachat_200k", "train_sft", 2048), ("HuggingFaceH4/ultrachat_200k", "test_sft", 2048),
    ]  # fmt: skip
    [config] = calls.configs
    assert config == p3.TrainingConfig(**script["training_config"])
    assert config.bf16


@pytest.mark.slow
def test_it_runs_under_torchrun_as_it_is(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("***** train metrics *****") == 1
    assert "4 x 1 rows in each of 2 processes" in done.stdout
    folder = tmp_path / "checkpoint_dir"
    train = json.loads((folder / "train_results.json").read_text())
    assert math.isfinite(train["train_loss"]) and train["train_samples"] > 500
    [checkpoint] = folder.glob("checkpoint-*")
    assert (checkpoint / "rng_state_1.pth").is_file() and (folder / "adapter.safetensors").is_file()
