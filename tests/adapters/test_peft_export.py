"""Exported folders: PEFT and transformers compute our logits from them, and import_peft restores the adapter."""

from __future__ import annotations

import logging
import os
import subprocess

import pytest
import torch
from conftest import adapted_model, adapters_of, longrope_model, randomize_adapters, same_tensors
from peft_folders import (
    LAYER,
    NET_IDS,
    Net,
    adapted_net,
    as_llama,
    assert_same_logits,
    base_model,
    change_config,
    change_tensors,
    config_of,
    layouts,
    logits,
    unequal_model,
    with_peft,
    with_transformers,
)
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig

import phi3lora as p3
from phi3lora import files
from phi3lora.__main__ import main
from phi3lora.adapters.adapter_file import adapter_metadata
from phi3lora.errors import AdapterError
from phi3lora.lora.inject import lora_layers

# --- Other libraries compute our logits


@layouts
@pytest.mark.parametrize("load", [with_peft, with_transformers])
def test_unequal_layers_are_the_same_in_peft_and_transformers(tmp_path, layout, load):
    """Equal ranks and every subset of modules: test_every_subset.py."""
    model, base = unequal_model(), base_model()
    assert (logits(model) - logits(base)).abs().max() > 0.05
    p3.export_peft(model, tmp_path, layout=layout)
    assert_same_logits(load(as_llama(base) if layout == "split" else base, tmp_path), model)


@pytest.mark.parametrize("layout", ["uniform", "pattern"])
def test_every_kind_of_layer_is_the_same_in_peft(tmp_path, layout):
    net = adapted_net()
    exported = p3.export_peft(net, tmp_path, layout=layout)
    assert exported.rank == 2 * 3 * 3  # the 3 x 3 convolution's
    assert list(exported.commands) == ["PEFT"]
    assert (net(NET_IDS) - Net()(NET_IDS)).abs().max() > 0.1
    torch.testing.assert_close(with_peft(Net(), tmp_path)(NET_IDS), net(NET_IDS), atol=1e-5, rtol=0)
    again = Net()
    p3.import_peft(again, tmp_path)
    assert same_tensors(adapters_of(again), adapters_of(net))


def test_embeddings_the_output_head_and_some_layers_by_their_full_names(tmp_path):
    targets = ["lm_head", "model.embed_tokens", "model.layers.1.self_attn.qkv_proj"]
    model = adapted_model(target_modules=targets)
    p3.export_peft(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == targets
    for load in (with_peft, with_transformers):
        assert_same_logits(load(base_model(), tmp_path), model)


# --- The rules of other loaders, restated


@pytest.mark.parametrize("make", [lambda: adapted_model(use_rslora=True), unequal_model], ids=["equal", "unequal"])
def test_the_uniform_layout_keeps_vllm_s_rules(tmp_path, make):
    """PEFTHelper's fields and checks, parse_fine_tuned_lora_name, and the shapes that it copies into its buffers."""
    model = make()
    exported = p3.export_peft(model, tmp_path / "support")
    config = config_of(tmp_path / "support")
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert (
        config["bias"] == "none"
        and config["use_rslora"] is False
        and config["modules_to_save"] is None
        and config["use_dora"] is False
    )
    assert config["r"] == exported.rank in (10, 12) and "--max-lora-rank 16" in exported.commands["vLLM"]
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(config["target_modules"]) <= fused
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(tmp_path / "support" / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        assert parts[-3] in fused
        sides.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor
    scaling = config["lora_alpha"] / config["r"]  # vllm_lora_scaling_factor: one for all, patterns are not read
    for path, layer in lora_layers(model).items():
        A, B = sides[path]["lora_A"], sides[path]["lora_B"]
        assert A.shape == (config["r"], layer.in_features) and B.shape == (layer.out_features, config["r"])
        torch.testing.assert_close(scaling * B @ A, layer.delta().detach())
        llama_cpp = config["lora_alpha"] / B.shape[1]  # adapter.lora.alpha over the tensor's own rank
        torch.testing.assert_close(llama_cpp * B @ A, layer.delta().detach())
    assert sides.keys() == lora_layers(model).keys()


def test_patterns_name_the_layers_that_differ(tmp_path):
    p3.export_peft(unequal_model(), tmp_path, layout="pattern")
    config = config_of(tmp_path)
    assert (config["r"], config["lora_alpha"]) == (3, 6)  # layer 1's o_proj and gate_up_proj
    assert config["rank_pattern"] == {
        r"^model\.layers\.0\.self_attn\.qkv_proj": 10,
        r"^model\.layers\.0\.self_attn\.o_proj": 2,
        r"^model\.layers\.0\.mlp\.gate_up_proj": 4,
        r"^model\.layers\.1\.self_attn\.qkv_proj": 6,
    }
    p3.export_peft(adapted_model(r=3, lora_alpha=6), tmp_path, layout="pattern")
    assert config_of(tmp_path)["rank_pattern"] == {"qkv_proj": 9, "gate_up_proj": 6}
    assert config_of(tmp_path)["alpha_pattern"] == {"qkv_proj": 18, "gate_up_proj": 12}


def test_the_command_line_writes_the_same_folder(tmp_path, capsys):
    model, _, _, _ = p3.demo.load()
    p3.inject_lora(model, p3.LoraConfig(r=2, lora_alpha=4))
    randomize_adapters(model)
    file = p3.save_adapter(model, tmp_path / "a.safetensors")
    options = ["--model", str(p3.demo.BASE), "--adapter", str(file), "--out", str(tmp_path / "cli")]
    assert main(["export", *options, "--layout", "pattern"]) == 0
    assert f"PEFT adapter in {tmp_path / 'cli'}" in capsys.readouterr().out
    p3.export_peft(model, tmp_path / "direct", layout="pattern")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cli", "direct")]
    assert same_tensors(*tensors)
    assert config_of(tmp_path / "cli")["base_model_name_or_path"] == str(p3.demo.BASE)


def test_the_folder_has_every_stop_token(tmp_path, tokenizer):
    exported = p3.export_peft(
        adapted_model(), tmp_path, tokenizer=tokenizer, base_model="microsoft/Phi-3-mini-4k-instruct"
    )
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|end|>", "<|endoftext|>"]
    assert (tmp_path / "tokenizer.json").is_file()
    assert config_of(tmp_path)["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
    text = str(exported)
    for line in (
        "PeftModel.from_pretrained",
        "vllm serve microsoft/Phi-3-mini-4k-instruct --enable-lora --lora-modules",
        f"--max-lora-rank 16 --generation-config {tmp_path}",
        "convert_lora_to_gguf.py --base-model-id microsoft/Phi-3-mini-4k-instruct",
        f"ADAPTER {tmp_path / 'adapter.gguf'}",
        'PARAMETER stop "<|end|>"',
    ):
        assert line in text
    assert "note" not in text


def test_notes_about_the_base_the_layout_and_the_servers(tmp_path):
    base = str(tmp_path / "base")
    split = p3.export_peft(adapted_model(r=171, lora_alpha=1), tmp_path / "a", base_model=base)
    assert "rank 513 is more than vLLM allows (512)" in str(split) and "vLLM" not in split.commands
    assert f"the base is recorded as {base}, a folder on this machine" in str(split) and "no tokenizer" in str(split)
    pattern = p3.export_peft(longrope_model(), tmp_path / "b", layout="pattern", base_model="microsoft/phi-4")
    assert "longrope: documents of up to 40 tokens" in str(pattern) and "this machine" not in str(pattern)
    assert list(pattern.commands) == ["PEFT", "vLLM"] and pattern.commands["vLLM"].endswith(" --max-model-len 40")
    assert "llama.cpp, Ollama and SGLang ignore them silently" in str(pattern)
    assert "llama.cpp, Ollama and SGLang ignore them silently" in (tmp_path / "b" / "README.md").read_text()


# --- Our own folders come back


@layouts
def test_unequal_layers_come_back_as_they_were(tmp_path, layout):
    """Bit for bit where the ratio of the scalings is a power of two, as o_proj's is; the others are reported."""
    model, again = unequal_model(), base_model()
    exported = p3.export_peft(model, tmp_path, layout=layout)
    assert ("layout='pattern' keeps every bit" in str(exported)) == bool(exported.rounded) == (layout != "pattern")
    assert {name.split(".")[3] for name in exported.rounded} == ({"self_attn", "mlp"} if exported.rounded else set())
    assert LAYER + "self_attn.o_proj" not in exported.rounded
    p3.import_peft(again, tmp_path)
    assert adapter_metadata(again) == adapter_metadata(model)
    for name, tensor in adapters_of(again).items():
        is_rounded = layout != "pattern" and name.startswith((LAYER + "self_attn.qkv_proj", LAYER + "mlp.gate_up_proj"))
        torch.testing.assert_close(tensor, adapters_of(model)[name], rtol=2**-22 if is_rounded else 0, atol=0)


@layouts
def test_matching_adapters_are_loaded_into(tmp_path, layout):
    model, other = adapted_model(), adapted_model()
    p3.export_peft(model, tmp_path, layout=layout)
    randomize_adapters(other, seed=3)
    parameters = dict(other.named_parameters())
    p3.import_peft(other, tmp_path)
    assert same_tensors(adapters_of(other), adapters_of(model))
    assert all(p is parameters[name] for name, p in other.named_parameters())


@layouts
def test_a_folder_that_was_changed_is_imported_as_peft_reads_it(tmp_path, layout, caplog):
    base = base_model()
    p3.export_peft(adapted_model(), tmp_path, layout=layout)
    change_config(tmp_path, lora_alpha=3, alpha_pattern={})
    again = base_model()
    with caplog.at_level(logging.WARNING, "phi3lora"):
        p3.import_peft(again, tmp_path)
    assert "changed since export_peft wrote it" in caplog.text
    theirs = with_peft(as_llama(base) if layout == "split" else base, tmp_path)
    assert_same_logits(again, theirs)


@layouts
def test_without_our_header_each_module_becomes_a_layer(tmp_path, layout):
    model, again = adapted_model(use_rslora=True), base_model()
    p3.export_peft(model, tmp_path, layout=layout)
    change_tensors(tmp_path, lambda tensors: None)
    p3.import_peft(again, tmp_path)
    kinds = {layer["class"] for layer in adapter_metadata(again)["layers"].values()}
    assert kinds == ({"Linear", "MergedLinear"} if layout == "split" else {"Linear"})
    assert_same_logits(again, model)


def test_padding_that_was_trained_is_kept(tmp_path):
    """PEFT trains the padded rows too; they must not be cut off where the header is still there."""
    p3.export_peft(adapted_model(), tmp_path)

    def train_on(tensors):
        for tensor in tensors.values():
            tensor += 0.02 * torch.randn(tensor.shape)

    change_tensors(tmp_path, train_on, keep_header=True)
    again = base_model()
    p3.import_peft(again, tmp_path)
    assert_same_logits(again, with_peft(base_model(), tmp_path))


# --- Refusals


def test_what_cannot_be_exported_is_refused(tmp_path):
    def refused(model, message: str, **options) -> None:
        with pytest.raises(AdapterError, match=message):
            p3.export_peft(model, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()

    model = adapted_model()
    refused(base_model(), "no adapters to export")
    refused(model, "layout='fused'; allowed: 'uniform', 'pattern', 'split'", layout="fused")
    for block in (p3.disabled, p3.merged):
        with block(model):
            refused(model, "disabled or merged")
    refused(adapted_net(bias="lora_only"), "trained biases .*conv.bias")
    refused(p3.Linear(4, 4, r=2, bias=False), "the model itself")
    unnamed = adapted_net(target_modules=["fused"], segments={"fused": [3, 4]})
    refused(unnamed, "the segments of 'fused' have no names", layout="split")
    transposed = nn.Sequential(p3.Linear(4, 4, r=2, fan_in_fan_out=True, bias=False))
    refused(transposed, "fan_in_fan_out")
    refused(nn.Sequential(p3.Embedding(4, 4, r=2, max_norm=1.0)), "max_norm")
    for change in ({"groups": 2}, {"dilation": 2}, {"padding_mode": "circular", "padding": 1}):
        refused(nn.Sequential(p3.Conv2d(4, 4, 3, r=2, bias=False, **change)), "no groups, dilation or padding mode")
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_A[0, 0] = float("nan")
    refused(model, "NaN or infinite")
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match="which is a file"):
        p3.export_peft(adapted_model(), tmp_path / "file")


# --- Written as a whole


def test_a_killed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    """Killed before each flush of a file or folder and at the exchange: PEFT reads the old adapter or the new one."""
    folder, ids = tmp_path / "e", torch.tensor([[5, 6, 7, 8, 9, 10]])
    old, new = adapted_model(lora_alpha=8), adapted_model(lora_alpha=64)
    randomize_adapters(new, seed=3)
    wants = {name: m(input_ids=ids).logits for name, m in (("old", old), ("new", new))}
    p3.export_peft(old, folder, base_model="o/b")
    (folder / "notes.txt").write_text("mine")
    seen = []
    for step in range(9):
        child = os.fork()
        if child == 0:
            calls, fsync, exchange = [], files.fsync, files._exchange

            def die_at(real):
                def call(*arguments):
                    calls.append(real)  # noqa: B023
                    return os.kill(os.getpid(), 9) if len(calls) > step else real(*arguments)  # noqa: B023

                return call

            monkeypatch.setattr(files, "fsync", die_at(fsync))
            monkeypatch.setattr(files, "_exchange", die_at(exchange))
            p3.export_peft(new, folder, base_model="o/b")
            os._exit(0)
        os.waitpid(child, 0)
        model = adapted_model()
        p3.delete_adapter(model, "default")
        p3.import_peft(model, folder)
        logits = model(input_ids=ids).logits
        (found,) = [name for name, want in wants.items() if torch.allclose(logits, want, atol=1e-5)]
        seen.append(found)
        assert (folder / "notes.txt").read_text() == "mine"
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen)
    p3.export_peft(new, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["e"]


def test_an_export_that_cannot_be_written_is_one_error_and_leaves_the_earlier_one(tmp_path):
    resource = pytest.importorskip("resource")
    p3.export_peft(adapted_model(), tmp_path / "e", base_model="o/b")
    before = {file.name: file.read_bytes() for file in (tmp_path / "e").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            AdapterError, match=r"the export .* cannot be written: .*; an earlier one there is unchanged"
        ):
            p3.export_peft(adapted_model(r=5), tmp_path / "e")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in (tmp_path / "e").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["e"]


def test_what_is_printed_quotes_what_it_inserts(tmp_path, tokenizer, monkeypatch):
    """A stop text with a newline would end the block and begin a command; an escape would reach the terminal."""
    odd = "<|end|>\nEND\nrm -rf ~\n"
    monkeypatch.setattr("phi3lora.adapters.peft_export.stop_token_ids", lambda tokenizer: [1, 2, 3])
    monkeypatch.setattr(type(tokenizer), "convert_ids_to_tokens", lambda self, ids: [odd, 'a"b', "<|end|>"])
    base = "o/b\x1b[31m'; touch ran; '\n"
    exported = p3.export_peft(adapted_model(), tmp_path / "e", tokenizer=tokenizer, base_model=base)
    lines = str(exported).splitlines()
    assert all(line.isprintable() for line in lines) and "rm -rf ~" not in lines and "END" in lines
    assert 'PARAMETER stop "<|end|>"' in lines and sum(line.startswith("PARAMETER") for line in lines) == 1
    assert any("Modelfile cannot hold the stop texts" in note and repr(odd) in note for note in exported.notes)
    word = exported.commands["vLLM"].removeprefix("vllm serve ").partition(" --enable")[0]
    shown = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, cwd=tmp_path).stdout
    assert shown.decode() == base and not (tmp_path / "ran").exists()
    strange = p3.export_peft(adapted_model(), tmp_path / "e\nEND\nrm", base_model="o/b")
    assert "Ollama" not in strange.commands and "\nrm" not in str(strange)


def test_the_base_may_be_a_path(tmp_path):
    p3.export_peft(adapted_model(), tmp_path / "a", base_model=tmp_path / "base")
    assert config_of(tmp_path / "a")["base_model_name_or_path"] == str(tmp_path / "base")
