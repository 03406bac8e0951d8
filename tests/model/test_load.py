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
from conftest import lively_model, make_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.model.load import longrope_boundary, longrope_note, model_device

IDS = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with a tiny Phi-3 in float32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-phi3")
    lively_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


# --- What comes out


@pytest.mark.parametrize("dtype", ["float32", "float16", torch.bfloat16])
def test_the_model_has_the_dtype_asked_for_and_the_checkpoints_function(checkpoint, dtype):
    model, tokenizer = p3.load_model(checkpoint, dtype=dtype, device="cpu")
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not model.training
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=expected)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert tokenizer.encode("hello") == make_tokenizer().encode("hello")


def test_the_defaults_are_bfloat16_packed_attention_and_no_cache(checkpoint):
    model, _ = p3.load_model(checkpoint, device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "phi3lora"
    assert model.config.use_cache is False
    assert model(IDS).past_key_values is None


@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_auto_is_the_checkpoints_own_dtype(saved, tmp_path):
    lively_model().to(saved).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = p3.load_model(tmp_path, dtype="auto", device="cpu")
    assert {p.dtype for p in model.parameters()} == {saved}


def test_use_cache_is_set_in_the_config(checkpoint):
    model, _ = p3.load_model(checkpoint, use_cache=True, device="cpu")
    assert model.config.use_cache is True
    assert model(IDS).past_key_values is not None


@pytest.mark.parametrize("attention", ["phi3lora", "sdpa", "eager"])
def test_each_attention_computes_the_same(checkpoint, attention):
    model, _ = p3.load_model(checkpoint, dtype="float32", attn_implementation=attention, device="cpu")
    assert model.config._attn_implementation == attention
    torch.testing.assert_close(model(IDS).logits, lively_model()(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_model_goes_to_the_device_asked_for(checkpoint):
    model, _ = p3.load_model(checkpoint, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model_device(model) == torch.device("meta")


def test_a_tokenizer_without_padding_pads_with_eos(damaged):
    path = damaged / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))
    (damaged / "special_tokens_map.json").unlink(missing_ok=True)
    _, tokenizer = p3.load_model(damaged, device="cpu")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


# --- What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'; allowed: 'bfloat16', 'float16', 'float32', 'auto'"),
        ({"dtype": torch.int8}, r"dtype=torch\.int8"),
        ({"dtype": None}, "dtype=None"),
        ({"base_precision": "int3"}, "base_precision='int3'; allowed: None"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation='flash_attention_2'; allowed: 'phi3lora'"),
        ({"device": "gpu"}, "device='gpu': .*allowed: an available device"),
        ({"device": "xpu"}, "device='xpu': .*allowed: an available device"),
    ],
)
def test_a_setting_that_is_not_one_of_the_listed_is_refused(checkpoint, setting, message):
    with pytest.raises(ModelError, match=message):
        p3.load_model(checkpoint, **{"device": "cpu", **setting})


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()], ids=["llama", "gpt2"])
def test_another_model_is_refused_before_its_weights_are_looked_for(config, tmp_path):
    config.save_pretrained(tmp_path)  # config.json and nothing else
    with pytest.raises(ModelError, match=f"model_type '{config.model_type}'; supported: .*Phi-3-mini"):
        p3.load_model(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"cannot load '.*nowhere'"):
        p3.load_model(tmp_path / "nowhere")


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


def test_weights_of_other_shapes_are_refused(damaged):
    """transformers would report a mismatch on the console, or start those layers at random."""
    path = damaged / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    with pytest.raises(ModelError, match="cannot load"):
        p3.load_model(damaged, device="cpu")


def test_weights_that_are_missing_are_refused_and_not_made_up(damaged):
    """transformers would start them at random."""
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files, 'model.layers.1.mlp.down_proj.weight'"):
        p3.load_model(damaged, device="cpu")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("vocab_size", 2**40, "describes a matrix"),
        ("head_dim", 2**20, "describes a matrix"),
        ("num_hidden_layers", 2**20, "allowed: 1 to 1000"),
        ("num_hidden_layers", "two", "num_hidden_layers 'two'"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("quantization_config", ["4"], "quantization_config"),
        ("model_type", {"phi3": 1}, "model_type"),
    ],
)
def test_a_field_that_cannot_be_is_refused_before_anything_is_built(damaged, name, value, said):
    path = damaged / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ModelError, match=said):
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
def test_json_of_another_form_raises_no_other_error(damaged, name, content):
    (damaged / name).write_bytes(content)
    with contextlib.suppress(ModelError):  # transformers does without some of these files
        p3.load_model(damaged, device="cpu")


# --- longrope


def longrope_config(**changes) -> Phi3Config:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    return tiny_config(rope_parameters=rope, original_max_position_embeddings=64, **changes)


def test_longrope_switches_at_the_original_length_and_others_never():
    assert longrope_boundary(longrope_config()) == 64
    assert longrope_boundary(tiny_config()) is None
    assert longrope_boundary(object()) is None
    assert "up to 64 tokens" in longrope_note(longrope_config())


def test_the_boundary_is_where_the_rotary_factors_change():
    model = lively_model(**{"rope_parameters": longrope_config().rope_parameters,
                            "original_max_position_embeddings": 64})  # fmt: skip
    boundary = longrope_boundary(model.config)
    rotary, x = model.model.rotary_emb, torch.zeros(1)
    short = rotary(x, torch.arange(boundary)[None])[0]
    long = rotary(x, torch.arange(boundary + 1)[None])[0]
    assert torch.equal(rotary(x, torch.arange(boundary - 9)[None])[0], short[:, :-9])
    assert not torch.equal(long[:, :boundary], short)


def test_loading_a_longrope_model_says_which_lengths_are_trained(tmp_path, caplog):
    model = lively_model()
    model.config = longrope_config()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "phi3lora"):
        p3.load_model(tmp_path, device="cpu")
    assert "up to 64 tokens" in caplog.text
