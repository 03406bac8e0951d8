"""Files that phi3lora 0.1.0 wrote: the present version loads each bit for bit, and resumes its checkpoint.

``make_fixtures.py`` wrote them; the checkpoint's versions were then set to torch 2.11.0 and transformers 5.17.0, older
than what is installed.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import adapters_of, same_tensors
from make_fixtures import LORA, StopAtThree, run
from safetensors import safe_open
from safetensors.torch import load_file

import phi3lora as p3
from phi3lora.errors import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "checkpoint-3"


def load_state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def demo_model():
    return p3.load_model(p3.demo.BASE, dtype="float32", device="cpu")[0]


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt"])
def test_an_adapter_file_loads_bit_for_bit(name):
    model = demo_model()
    p3.load_adapter(model, FIXTURES / name)
    assert same_tensors(adapters_of(model), load_file(FIXTURES / "adapter.safetensors"))
    layer = model.model.layers[0].self_attn.qkv_proj
    assert (layer.r, layer.lora_alpha) == (LORA["r"], LORA["lora_alpha"])


def test_an_adapter_is_saved_as_it_was(tmp_path):
    model = demo_model()
    p3.load_adapter(model, FIXTURES / "adapter.safetensors")
    p3.save_adapter(model, tmp_path / "adapter.safetensors")
    p3.save_adapter(model, tmp_path / "adapter.pt")
    assert described(tmp_path) == described(FIXTURES)
    assert same_tensors(load_file(tmp_path / "adapter.safetensors"), load_file(FIXTURES / "adapter.safetensors"))
    assert same_tensors(load_state(tmp_path / "adapter.pt"), load_state(FIXTURES / "adapter.pt"))
    assert not (tmp_path / "adapter.pt.json").exists(), "a .pt file now carries its settings itself"


def described(folder: Path) -> dict:
    """Return what the safetensors file of a folder says of itself."""
    with safe_open(folder / "adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["phi3lora"])
    settings["config"] = without_new_settings(
        settings["config"], json.loads((CHECKPOINT / "lora_config.json").read_text())["config"]
    )
    return {**metadata, "phi3lora": settings}


def without_new_settings(config: dict, old: dict) -> dict:
    """Return a config without the settings that version 0.1.0 does not have; it ignores them at their defaults."""
    return {name: value for name, value in config.items() if name in old}


def test_a_peft_folder_imports_bit_for_bit():
    model = demo_model()
    p3.import_peft(model, FIXTURES / "peft")
    assert same_tensors(adapters_of(model), load_file(FIXTURES / "adapter.safetensors"))


@pytest.fixture
def folder(tmp_path):
    """The folder of the run that was stopped after three steps."""
    shutil.copytree(CHECKPOINT, tmp_path / "run" / "checkpoint-3")
    shutil.copy(FIXTURES / "metrics.jsonl", tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_resumes_with_its_exact_state(folder, monkeypatch):
    saved = json.loads((CHECKPOINT / "trainer_state.json").read_text())["state"]
    found = {}

    class Watch(p3.Callback):
        def on_train_begin(self, state):
            found["state"] = copy.deepcopy({name: getattr(state, name) for name in saved})

    real = torch.optim.AdamW.step

    def step(optimizer, *arguments, **options):
        if "moments" not in found:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            found["adapters"] = [p.detach().clone() for p in parameters]
            found["moments"] = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
            found["learning_rate"] = optimizer.param_groups[0]["lr"]
        return real(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    if not torch.__version__.startswith("2.11.0"):
        with pytest.raises(CheckpointError, match=r"torch 2\.11\.0 then"):
            run(folder, [Watch()], resume_from_checkpoint=True)
    model, result = run(folder, [Watch()], resume_from_checkpoint=True, resume_with_changes=True)

    assert found["state"] == saved
    assert result.history[: len(saved["history"])] == saved["history"]
    optimizer = load_state(CHECKPOINT / "optimizer.pt")
    assert len(found["moments"]) == len(optimizer["state"])
    for i, moments in enumerate(found["moments"]):
        assert same_tensors(moments, optimizer["state"][i])
    assert same_tensors(
        dict(zip(adapters_of(model), found["adapters"], strict=True)), load_file(CHECKPOINT / "lora.safetensors")
    )
    assert found["learning_rate"] == pytest.approx(0.01 * 0.85355339)  # a quarter into the cosine

    assert result.global_step == 6
    expected = load_file(FIXTURES / "adapter.safetensors")  # of the run that was not stopped
    for name, tensor in adapters_of(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_the_present_version_writes_the_same_checkpoint(tmp_path):
    run(tmp_path / "run", [StopAtThree()])
    new = tmp_path / "run" / "checkpoint-3"
    assert {path.name for path in new.iterdir()} == {path.name for path in CHECKPOINT.iterdir()}
    for name in ("manifest.json", "trainer_state.json", "lora_config.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (new, CHECKPOINT))
        if name == "trainer_state.json":  # new facts, which version 0.1.0 ignores
            del ours["base_sample"], ours["state"]["measured"], ours["state"]["first_loss"], ours["processes"]
        if "config" in ours:
            ours["config"] = without_new_settings(ours["config"], theirs["config"])
        assert keys(ours) == keys(theirs), name
    ours, theirs = load_state(new / "optimizer.pt"), load_state(CHECKPOINT / "optimizer.pt")
    assert keys(ours) == keys(theirs)
    for name, tensor in load_file(new / "lora.safetensors").items():
        expected = load_file(CHECKPOINT / "lora.safetensors")[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4)


def keys(value: object) -> object:
    """Return nested dicts and lists with their keys alone."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    return [keys(item) for item in value] if isinstance(value, list) else None
