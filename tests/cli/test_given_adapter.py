"""The base that an adapter names is the model of a command that names none."""

from __future__ import annotations

import json

import pytest
from conftest import quiet_config

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.cli.given_adapter import base_of
from phi3lora.run_settings import ModelSettings


class LoadedError(Exception):
    """Raised in the place of loading a model."""


@pytest.fixture
def loaded(monkeypatch):
    """The names and revisions of the models that commands asked for; none is loaded."""
    calls = []

    def load(name, *, revision=None, **_):
        calls.append((name, revision))
        raise LoadedError

    def read_config(name, revision=None):
        if name.startswith(("unsloth/", "/no")):
            raise p3.ModelError("not a Phi-3 model")
        return {"model_type": "phi3"}

    monkeypatch.setattr("phi3lora.cli.commands.load_model", load)
    monkeypatch.setattr("phi3lora.cli.given_adapter.read_model_config", read_config)
    return calls


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run on the embedded model, with a checkpoint and an adapter."""
    folder = tmp_path_factory.mktemp("run")
    model, _, train_set, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=2))
    settings = {"max_steps": 1, "max_length": 256, "save_strategy": "steps"}
    p3.train(model, train_set.select(range(8)), quiet_config(folder, **settings))
    p3.save_adapter(model, folder / "adapter.safetensors")
    p3.export_peft(model, folder / "peft", base_model=str(p3.demo.BASE))
    return folder


@pytest.mark.parametrize("words", [["chat"], ["merge", "--out", "o"], ["export", "--out", "o"]], ids=lambda w: w[0])
@pytest.mark.parametrize("form", [".", "adapter.safetensors", "checkpoint-1", "checkpoint-1/lora.safetensors", "peft"])
def test_a_model_that_is_not_named_is_the_one_that_the_adapter_names(words, form, run_folder, loaded, caplog):
    with pytest.raises(LoadedError):
        main([*words, "--adapter", str(run_folder / form)])
    assert loaded == [(str(p3.demo.BASE), None)]
    assert "the base that" in caplog.text and "--model takes another" in caplog.text


def test_a_named_model_stays_without_a_word(run_folder, loaded, caplog):
    with pytest.raises(LoadedError):
        main(["chat", "--model", "a/b", "--adapter", str(run_folder)])
    assert loaded == [("a/b", None)] and not caplog.text


def test_import_loads_the_base_that_the_folder_names(run_folder, tmp_path, caplog):
    out = tmp_path / "a.safetensors"
    assert main(["import", str(run_folder / "peft"), "--out", str(out)]) == 0
    assert out.is_file() and f"the model is {p3.demo.BASE}, the base that" in caplog.text


@pytest.mark.parametrize(
    ("config", "model", "said"),
    [
        ({"base_model_name_or_path": "org/base", "revision": "v2"}, ("org/base", "v2"), "the model is org/base"),
        ({"base_model_name_or_path": str(p3.demo.BASE), "revision": "v2"}, (str(p3.demo.BASE), None), "the model is"),
        ({"model": "org/base"}, ("org/base", None), "the model is org/base"),  # mlx-lm
        ({"base_model_name_or_path": "/no/such/base"}, (ModelSettings().name_or_path, None), "'/no/such/base', which"),
        ({"base_model_name_or_path": "unsloth/x-bnb-4bit"}, (ModelSettings().name_or_path, None), "cannot be loaded"),
        ({"base_model_name_or_path": None}, (ModelSettings().name_or_path, None), "names no base: the model is"),
        ({"base_model_name_or_path": ModelSettings().name_or_path}, (ModelSettings().name_or_path, None), ""),
    ],
    ids=str,
)
def test_the_base_in_a_peft_config_is_used_or_named(config, model, said, tmp_path, loaded, caplog):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoadedError):
        main(["import", str(tmp_path), "--out", str(tmp_path / "a.pt")])
    assert loaded == [model]
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_a_folder_to_import_that_is_not_there_is_refused_before_a_model_is_loaded(tmp_path, loaded, capsys):
    assert main(["import", str(tmp_path / "nowhere"), "--out", str(tmp_path / "a.pt")]) == 1
    assert "there is no folder" in capsys.readouterr().err and not loaded


def test_configs_and_records_that_cannot_be_read_name_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[]")
    assert base_of(tmp_path) == {}
    (tmp_path / "run.yaml").write_text("# The settings of a run, as resolved.\nmodel: {gone: 1}\n")
    assert base_of(tmp_path / "adapter.pt") == {}
