"""``phi3lora init``: the file reads back, fits 80 columns, and its settings fit the card."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

import phi3lora as p3
from phi3lora.__main__ import main
from phi3lora.model.estimate import GIB, plan_memory
from phi3lora.run_file import read_run

MEMBERS = {
    "Phi-3-mini": {},
    "Phi-4": {
        "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 10, "vocab_size": 100352,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("member", "gib", "precision"),
    [
        ("Phi-3-mini", 80, None), ("Phi-3-mini", 12, None), ("Phi-3-mini", 6, "nf4"),
        ("Phi-4", 80, None), ("Phi-4", 24, "nf4"),
    ],
)  # fmt: skip
def test_the_settings_fit_the_card(tmp_path, capsys, member, gib, precision):
    config = Phi3Config(**MEMBERS[member], pad_token_id=0, sliding_window=None)
    config.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.yaml"
    words = ["init", str(path), "--model", str(tmp_path / "model"), "--data", "a.jsonl", "b.jsonl"]
    assert main([*words, "--device-memory-gib", str(gib)]) == 0
    run = read_run(str(path))
    assert (run.model.base_precision, run.data.source) == (precision, ["a.jsonl", "b.jsonl"])
    rows = run.training.per_device_train_batch_size
    assert rows * run.training.gradient_accumulation_steps == 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights_gib = sum(p.numel() for p in model.parameters()) * 2 / GIB
    p3.inject_lora(model, run.lora)
    tokens = rows * run.data.max_length
    peak = plan_memory(model, tokens, base_precision=precision).peak_gib["offload"] + weights_gib
    assert 0 < peak < gib  # "auto" takes the fastest mode that fits
    if rows == 1 and precision is None:
        assert weights_gib > gib / 2


def test_the_file_fits_80_columns_and_names_every_setting_once(tmp_path):
    path = tmp_path / "run.yaml"
    assert main(["init", str(path), "--model", "demo"]) == 0
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 80
    uncommented = "\n".join(
        line.replace("# ", "", 1)
        if line.startswith("  # ") and not line.startswith("  #     ") and ": " in line
        else line
        for line in text.splitlines()
    )
    for section in ("lora", "training"):
        for name in getattr(read_run(str(path)), section).to_dict():
            if name not in ("modules_to_save", "gradient_checkpointing", "task_type"):
                assert f"\n  {name}: " in uncommented, name


def test_init_overwrites_nothing_and_names_a_missing_model(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", str(path), "--model", "demo"]) == 1
    assert path.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["init", str(path), "--model", str(tmp_path / "other"), "--overwrite"]) == 1
    assert path.read_text() == "mine" and "model_type 'llama'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.txt"], "'run.txt' is to be YAML; allowed: *.yaml, *.yml"),
        (["run.json"], "'run.json' is to be YAML"),  # `train` would read it as JSON
        (["--device-memory-gib", "nan"], "--device-memory-gib nan; allowed: a number > 0"),
        (["--device-memory-gib", "inf"], "--device-memory-gib inf; allowed: a number > 0"),
        (["--device-memory-gib", "-5"], "--device-memory-gib -5; allowed"),
    ],
)
def test_init_refuses_a_file_that_train_cannot_read_and_a_card_without_memory(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words, "--model", "demo"]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_init_makes_the_folder_of_the_file(tmp_path):
    path = tmp_path / "a b" / "ü.yaml"
    assert main(["init", str(path), "--model", "demo"]) == 0
    assert read_run(str(path)).model.name_or_path == "demo"


def test_without_a_hub_the_message_is_one_line_and_has_no_chain_of_causes(monkeypatch, capsys):
    def unreachable(*arguments, **options):
        raise OSError("We couldn't connect to 'https://hub' to load the files\nand couldn't find them in the cache.")

    monkeypatch.setattr("phi3lora.model.load.PreTrainedConfig.get_config_dict", unreachable)
    assert main(["train", "--model", "some/model", "--data", "demo"]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "the hub cannot be reached" in line and "--model demo" in line
    with pytest.raises(p3.ModelError) as caught:
        p3.load_model("some/model")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
