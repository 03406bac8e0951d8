"""``load_model`` on a tiny checkpoint saved here, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import (
    ATTENTION_VARIANTS,
    lively_model,
    make_tokenizer,
    randomize_adapters,
    require_four_bit,
    save_checkpoint,
    tiny_config,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.lora import base_weight
from phi3lora.model import load
from phi3lora.model.load import longrope_boundary, model_device

IDS = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny Phi-3 in float32 and its tokenizer."""
    return save_checkpoint(lively_model(), tmp_path_factory.mktemp("tiny-phi3"))


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


# --- What comes out


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_the_model_has_the_requested_dtype_and_the_checkpoints_function(checkpoint, dtype):
    model, tokenizer = p3.load_model(checkpoint, dtype=dtype, device="cpu")
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=expected)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    for attention in ("phi3lora", "sdpa", "eager") if expected == torch.float32 else ():
        same, _ = p3.load_model(checkpoint, dtype=dtype, attn_implementation=attention, device="cpu")
        assert same.config._attn_implementation == attention
        torch.testing.assert_close(same(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.encode("hello") == make_tokenizer().encode("hello")


def test_the_defaults_are_bfloat16_packed_attention_and_no_cache(checkpoint):
    model, _ = p3.load_model(checkpoint, device="cpu")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "phi3lora")
    assert model(IDS).past_key_values is None
    with_cache, _ = p3.load_model(checkpoint, use_cache=True, device="cpu")
    assert with_cache(IDS).past_key_values is not None


def test_auto_is_the_checkpoints_own_dtype(checkpoint, tmp_path):
    for folder in (checkpoint, save_checkpoint(lively_model().half(), tmp_path)):
        model, _ = p3.load_model(folder, dtype="auto", device="cpu")
        assert {p.dtype for p in model.parameters()} == {torch.float32 if folder is checkpoint else torch.float16}


def test_the_model_goes_to_the_requested_device(checkpoint):
    model, _ = p3.load_model(checkpoint, device="meta")
    assert {model_device(model), *(p.device for p in model.parameters())} == {torch.device("meta")}


def test_a_tokenizer_without_padding_pads_with_eos(damaged):
    change_json(damaged / "tokenizer_config.json", pad_token=None)
    (damaged / "special_tokens_map.json").unlink(missing_ok=True)
    _, tokenizer = p3.load_model(damaged, device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


# --- What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": torch.int8}, "dtype='int8'; allowed"),
        ({"dtype": None}, "dtype='None'"),
        ({"base_precision": "int3"}, "base_precision='int3'"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2'; allowed"),
        ({"device": "gpu"}, "device='gpu': "),
        ({"device": "xpu"}, "device='xpu': "),
    ],
)
def test_an_unknown_setting_is_refused(checkpoint, setting, message):
    with pytest.raises(ModelError, match=message):
        p3.load_model(checkpoint, **{"device": "cpu", **setting})


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()], ids=["llama", "gpt2"])
def test_another_model_is_refused_before_its_weights_are_read(config, tmp_path):
    config.save_pretrained(tmp_path)  # config.json and nothing else
    with pytest.raises(ModelError, match=f"model_type '{config.model_type}'; supported: .*Phi-3-mini"):
        p3.load_model(tmp_path)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_half_written_file_is_refused(damaged, name, half):
    path = damaged / name
    content = path.read_bytes()
    path.unlink()
    if half:
        path.write_bytes(content[: len(content) // 2])
    elif name == "tokenizer.json":
        (damaged / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=re.escape(str(damaged))):
        p3.load_model(damaged, device="cpu")


def test_missing_weights_are_refused(damaged):
    """transformers would initialise them at random."""
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files.*down_proj"):
        p3.load_model(damaged, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("intermediate_size", 64, "cannot load"),  # transformers would initialise weights of another shape at random
        ("vocab_size", 2**40, "describes a matrix"),
        ("head_dim", 2**20, "describes a matrix"),
        ("num_hidden_layers", 2**20, "allowed: 1 to 1000"),
        ("num_hidden_layers", "two", "num_hidden_layers 'two'"),
        ("num_hidden_layers", 900, "describes 900 layers of"),
        ("num_labels", 30_000_000, "num_labels 30000000; allowed: 0 to 10000"),
        ("num_labels", "many", "num_labels 'many'"),
        ("partial_rotary_factor", 1e9, "partial_rotary_factor 1000000000.0; allowed: 0 to 1"),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 2**40}, "partial_rotary_factor"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("quantization_config", ["4"], "quantization_config"),
        ("model_type", {"phi3": 1}, "model_type"),
    ],
)
def test_a_config_that_does_not_describe_the_files_is_refused(damaged, name, value, message):
    change_json(damaged / "config.json", **{name: value})
    with pytest.raises(ModelError, match=message):
        p3.load_model(damaged, device="cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 100_000),
        ("config.json", b"[1]"),
        ("tokenizer.json", b"\xff\xfe{}"),
        ("tokenizer_config.json", b"[1]"),
        ("generation_config.json", b'{"a": ' + b"9" * 5000 + b"}"),
    ],
)
def test_malformed_json_raises_no_other_error(damaged, name, content):
    (damaged / name).write_bytes(content)
    with contextlib.suppress(ModelError):  # transformers does without some of these files
        p3.load_model(damaged, device="cpu")


def test_a_folder_with_an_adapter_is_refused(damaged):
    """transformers would add the adapter in silence, also to a model that it is merged into already."""
    model = p3.load_model(damaged, dtype="float32", device="cpu")[0]
    p3.inject_lora(model, p3.LoraConfig(r=2))
    exported = damaged.with_name("exported")
    p3.export_peft(model, exported)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(exported / name, damaged)
    with pytest.raises(ModelError, match=r"holds an adapter_config\.json beside.*import_peft\(model, folder\)"):
        p3.load_model(damaged, device="cpu")
    (damaged / "adapter_config.json").unlink()
    assert not any("lora" in name for name in p3.load_model(damaged, device="cpu")[0].state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", r"'\./nowhere': there is no such folder, and it cannot be a name on the hub \('owner/name'\)"),
        ("a/" * 3000, "there is no such folder"),
        ("a/b/c", "there is no such folder, and it cannot be a name on the hub"),
        ("chats.jsonl", "'chats.jsonl': it is a file; allowed: a model's folder"),
        ("run", r"'run': it is a folder without a config.json.*--model BASE --adapter FOLDER"),
    ],
)
def test_a_path_without_a_model_is_refused_in_our_own_words(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("{}")
    Path("run").mkdir()
    Path("run", "adapter.safetensors").touch()
    for read in (p3.load_model, load.read_model_config):
        with pytest.raises(ModelError, match=message):
            read(name)


# --- longrope


LONGROPE = {**ATTENTION_VARIANTS["longrope"], "original_max_position_embeddings": 64}


def test_the_boundary_is_where_the_rotary_factors_change():
    model = lively_model(**LONGROPE)
    assert longrope_boundary(model.config) == 64
    assert longrope_boundary(tiny_config()) is None
    rotary, x = model.model.rotary_emb, torch.zeros(1)
    shorter, short, long = (rotary(x, torch.arange(tokens)[None])[0] for tokens in (55, 64, 65))
    assert torch.equal(shorter, short[:, :55])
    assert not torch.equal(long[:, :64], short)


def test_loading_a_longrope_model_says_which_lengths_are_trained(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "phi3lora"):
        p3.load_model(save_checkpoint(lively_model(**LONGROPE), tmp_path), device="cpu")
    assert "up to 64 tokens" in caplog.text


def test_a_model_saved_with_adapters_inside_is_refused_with_a_way_that_keeps_them(checkpoint, tmp_path):
    config = p3.LoraConfig(r=2, target_modules=["o_proj"])
    model, tokenizer = p3.load_model(checkpoint, dtype="float32", device="cpu")
    p3.inject_lora(model, config)
    randomize_adapters(model)
    for saved in (tmp_path / "whole", tmp_path / "shards"):
        model.save_pretrained(saved, max_shard_size="20KB" if saved.name == "shards" else "5GB")
        tokenizer.save_pretrained(saved)
        with pytest.raises(ModelError, match=r"tensors of adapters, 'model.layers.0.self_attn.o_proj.lora_A' first"):
            p3.load_model(saved, dtype="float32", device="cpu")
    again, _ = p3.load_model(checkpoint, dtype="float32", device="cpu")
    p3.inject_lora(again, config)
    again.load_state_dict(load_file(tmp_path / "whole/model.safetensors"), strict=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("precision", ["fp8", "nf4-fp8"])
def test_a_base_is_moved_and_quantised_layer_by_layer(monkeypatch, precision):
    if precision != "fp8":
        require_four_bit()
    monkeypatch.setattr(base_weight, "reason_against_fp8", lambda device: None)  # the products are emulated
    events = []
    to, quantise = Phi3DecoderLayer.to, load.quantize_base
    monkeypatch.setattr(Phi3DecoderLayer, "to", lambda layer, *a, **k: events.append("moved") or to(layer, *a, **k))
    monkeypatch.setattr(load, "quantize_base", lambda layer, p: events.append("quantised") or quantise(layer, p))
    model, _ = p3.load_model(p3.demo.BASE, dtype="float32", device="cpu", base_precision=precision)
    assert base_weight.base_format(model.model) == precision and type(model.lm_head) is nn.Linear
    assert events[: 2 * len(model.model.layers)] == ["moved", "quantised"] * len(model.model.layers)
    p3.inject_lora(model, p3.LoraConfig(r=4))
    logits = model(input_ids=torch.arange(5, 12)[None]).logits
    exact = p3.load_model(p3.demo.BASE, dtype="float32", device="cpu")[0](input_ids=torch.arange(5, 12)[None]).logits
    assert 0 < (logits - exact).norm() / exact.norm() < 0.5


def test_the_revision_of_a_folder_is_refused(checkpoint):
    for load_it in (p3.load_model, load.load_tokenizer, load.read_model_config):
        with pytest.raises(ModelError, match=r"revision=.v2. is for a model of the hub, and .* is a folder"):
            load_it(str(checkpoint), revision="v2")
