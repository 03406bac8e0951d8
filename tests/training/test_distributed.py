"""One process trains: one of several is refused before it does anything, one alone under torchrun is a run like any."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training.distributed import require_one_process


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_of_several_processes_is_refused_before_any_file_is_written(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    model, config = adapted_model(), quiet_config(tmp_path / "run")
    with pytest.raises(p3.Phi3LoRAError, match=r"WORLD_SIZE=2.*allowed: 1.*plain python or .*=1.*CUDA_VISIBLE_DEVICES"):
        p3.train(model, chat_dataset(), config)
    assert list(tmp_path.iterdir()) == []
    found = p3.doctor(model, None, chat_dataset(), config)["run"]
    assert found.status == "error" and found.text.startswith("WORLD_SIZE=2")


@pytest.mark.parametrize("size", [None, "", "1"])
def test_one_process_is_allowed(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    require_one_process()


def test_torchrun_s_processes_are_refused(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from phi3lora.training.distributed import require_one_process\nrequire_one_process()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "TrainingError: WORLD_SIZE=2" in done.stderr
