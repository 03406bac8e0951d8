"""Merged weights give the adapted model's logits; after a merged block the base has its own bits again."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from conftest import (
    ATTENTION_VARIANTS,
    adapted_model,
    make_tokenizer,
    randomize_adapters,
    require_four_bit,
    same_tensors,
    save_checkpoint,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import phi3lora as p3
from phi3lora import files
from phi3lora.errors import AdapterError
from phi3lora.lora.base_weight import Fp8Linear, quantize_base

IDS = torch.arange(5, 25)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_merged_directory_in_the_home_folder_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    p3.save_merged(adapted_model(), make_tokenizer(), "~/merged")
    assert p3.load_model("~/merged", dtype="float32", device="cpu") and not os.listdir()


@pytest.mark.parametrize(
    ("variant", "lora"),
    [
        ("grouped-query", {"target_modules": "all-linear"}),
        ("multi-head", {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True}),
        ("tied", {"target_modules": ["o_proj"]}),
        ("partial-rotary", {"target_modules": ["k_proj", "down_proj"], "use_rslora": True}),
    ],
)
def test_a_merged_directory_is_the_adapted_model(tmp_path, variant, lora):
    model = adapted_model(changes=ATTENTION_VARIANTS[variant], head_scale=1, **lora)
    before = weights(model)
    report = p3.save_merged(model, None, tmp_path)
    plain, loading = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain) is type(tiny_model())
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    with p3.disabled(model):
        assert (logits(model) - logits(plain)).abs().max() > 1e-3  # else equal logits would prove nothing
    assert report.max_logit_difference < 1e-4
    assert report.mean_kl < 1e-6
    assert report.greedy_agreement == 1
    assert same_tensors(weights(model), before)


@pytest.mark.parametrize("flag", ["return_dict", "output_hidden_states", "output_attentions"])
def test_a_model_whose_config_changes_what_a_forward_returns_is_merged_with_that_config(tmp_path, flag):
    changes = {flag: flag != "return_dict"}
    save_checkpoint(tiny_model(), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **changes}))
    model, tokenizer = p3.load_model(tmp_path / "base", dtype="float32", device="cpu")
    p3.inject_lora(model, p3.LoraConfig(r=2))
    randomize_adapters(model)
    assert p3.generate(model, tokenizer, "Hello", max_new_tokens=2) is not None
    for base in (None, tmp_path / "base"):
        assert p3.save_merged(model, tokenizer, tmp_path / "merged", base=base).greedy_agreement == 1
        assert json.loads((tmp_path / "merged" / "config.json").read_text())[flag] is changes[flag]


def test_the_tokenizer_the_stop_tokens_and_the_report_are_saved_too(tmp_path):
    tokenizer = make_tokenizer()
    report = p3.save_merged(adapted_model(), tokenizer, tmp_path)
    assert json.loads((tmp_path / "merge_report.json").read_text())["positions"] == report.positions
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    config = json.loads((tmp_path / "generation_config.json").read_text())
    assert config["eos_token_id"] == [tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id]
    assert "same likeliest token 100.0%" in str(report)


def test_bf16_is_rounded_once_and_the_report_measures_it(tmp_path):
    model = adapted_model(dtype=torch.bfloat16)
    report = p3.save_merged(model, None, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    layer = model.model.layers[0].mlp.down_proj
    expected = (layer.weight.float() + layer.delta()).to(torch.bfloat16)
    assert torch.equal(plain.model.layers[0].mlp.down_proj.weight, expected)
    assert report.dtype == "bfloat16"
    assert 0 < report.max_logit_difference < 0.5


def fp8_base(model):
    """The model with all its linear layers except the head in fp8."""
    for path, layer in list(model.model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.model.get_submodule(parent), name, Fp8Linear.from_linear(layer))
    return model


def test_a_quantised_base_is_dequantised_or_replaced_by_the_dense_one(tmp_path):
    dense = tiny_model(hidden_size=64)
    dense.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = fp8_base(tiny_model(hidden_size=64))
    p3.inject_lora(model, p3.LoraConfig(r=4, target_modules=["o_proj"]))
    torch.nn.init.normal_(model.model.layers[0].self_attn.o_proj.lora_B, std=0.1)
    assert p3.save_merged(model, None, tmp_path / "own").max_logit_difference < 0.2  # fp8 rounds activations too
    p3.save_merged(model, None, tmp_path / "dense", base=tmp_path / "base")
    own, better = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("own", "dense"))
    gate_up = "model.layers.0.mlp.gate_up_proj.weight"
    assert torch.equal(better.state_dict()[gate_up], dense.state_dict()[gate_up])
    torch.testing.assert_close(own.state_dict()[gate_up], model.model.layers[0].mlp.gate_up_proj.weight.float()
                               * model.model.layers[0].mlp.gate_up_proj.scale)  # fmt: skip
    delta = model.model.layers[0].self_attn.o_proj.delta()
    o_proj = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(better.state_dict()[o_proj], dense.state_dict()[o_proj] + delta)


def test_merged_changes_the_weights_inside_the_block_and_restores_their_bits():
    model = adapted_model(dtype=torch.bfloat16)
    before, adapted = weights(model), logits(model)
    with p3.merged(model):
        inside = logits(model)
        assert not torch.equal(
            model.model.layers[0].mlp.down_proj.weight, before["model.layers.0.mlp.down_proj.weight"]
        )
    assert (inside - adapted).abs().max() < 0.5
    assert same_tensors(weights(model), before)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(KeyboardInterrupt), p3.merged(model):
        raise KeyboardInterrupt
    assert same_tensors(weights(model), before)


def test_every_kind_of_layer_can_be_merged():
    layers = nn.Sequential(p3.Linear(4, 6, r=2, fan_in_fan_out=True), p3.Linear(6, 5, r=2, lora_alpha=3))
    convolution, embedding = p3.Conv2d(3, 4, 3, r=2), p3.Embedding(7, 3, r=2)
    for module, x in ((layers, torch.randn(2, 4)), (convolution, torch.randn(1, 3, 5, 5)), (embedding, IDS % 7)):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter)
        expected, before = module(x), weights(module)
        with p3.merged(module):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        assert same_tensors(weights(module), before)


def test_a_transposed_weight_is_saved_as_a_linear_layer_s(tmp_path):
    model = tiny_model()
    square = model.model.layers[0].self_attn.o_proj.weight.detach()
    layer = p3.Linear(*square.shape, r=2, lora_alpha=4, fan_in_fan_out=True, bias=False)
    layer.weight = nn.Parameter(square.t().contiguous(), requires_grad=False)
    model.model.layers[0].self_attn.o_proj = layer
    randomize_adapters(model)
    assert p3.save_merged(model, None, tmp_path).max_logit_difference < 1e-4


def test_what_cannot_be_merged_is_refused(tmp_path):
    with pytest.raises(p3.AdapterError, match="no adapters to merge"):
        p3.save_merged(tiny_model(), None, tmp_path)
    model = adapted_model()
    refused = pytest.raises(p3.AdapterError, match="merged already")
    with p3.merged(model), refused, p3.merged(model):
        pass
    model = fp8_base(tiny_model(hidden_size=64))
    p3.inject_lora(model, p3.LoraConfig(r=4))
    with pytest.raises(p3.AdapterError, match="quantised weight"), p3.merged(model):
        pass


def test_a_merged_model_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """Fewer shards than before, a user's own files, a full disk, a kill."""
    resource = pytest.importorskip("resource")
    folder, model = tmp_path / "m", adapted_model()
    p3.save_merged(model, None, folder)
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("of an earlier model in two shards")
    (folder / "notes.txt").write_text("mine")
    p3.save_merged(model, None, folder)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "merge_report.json", "model.safetensors", "notes.txt"}
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(AdapterError, match=r"cannot be written: .*an earlier one there is unchanged"):
            p3.save_merged(adapted_model(lora_alpha=64), None, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(files, "_exchange", lambda *_: os.kill(os.getpid(), 9))
        p3.save_merged(adapted_model(lora_alpha=64), None, folder)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    p3.save_merged(model, None, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


# --- What is written, and what is not touched


@pytest.mark.parametrize(
    "own",
    [
        {"temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.7},
        {"eos_token_id": 5},
        {"num_beams": 1, "length_penalty": 3.0, "num_return_sequences": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokenizer", [None, make_tokenizer()], ids=["no tokenizer", "tokenizer"])
def test_the_model_s_generation_settings_stay_and_their_copy_is_one_that_loads(tmp_path, own, tokenizer):
    model = adapted_model()
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    settings, config = model.generation_config, model.config.to_dict()
    before = settings.to_dict()
    p3.save_merged(model, tokenizer, tmp_path)
    assert model.generation_config is settings
    assert settings.to_dict() == before
    assert model.config.to_dict() == config
    saved = GenerationConfig.from_pretrained(tmp_path)
    saved.validate(strict=True)
    if tokenizer is None:
        assert saved.eos_token_id == settings.eos_token_id
    if own.get("do_sample"):
        assert saved.do_sample and saved.temperature == 0.7


def test_a_head_of_its_own_that_the_config_calls_tied_is_refused(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["o_proj", "lm_head"]))
    nn.init.normal_(model.lm_head.lora_B)
    with pytest.raises(p3.AdapterError, match=r"set model.config.tie_word_embeddings = False"):
        p3.save_merged(model, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model.config.tie_word_embeddings = False
    assert p3.save_merged(model, None, tmp_path / "merged").max_logit_difference < 1e-3
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def other_bases(base, adapted, tmp_path):
    """Yield checkpoints that are not ``base``: other numbers, a changed norm, the merged model itself."""
    other = tiny_model(hidden_size=64)
    nn.init.normal_(other.model.embed_tokens.weight)
    yield other
    other = copy.deepcopy(base)
    other.model.layers[1].input_layernorm.weight.data[0] += 0.5
    yield other
    other = copy.deepcopy(base)
    other.model.layers[0].mlp.down_proj.weight.data += 0.01 * torch.randn(64, 48)
    yield other
    p3.save_merged(adapted, None, tmp_path / "merged")
    yield AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")


@pytest.mark.parametrize("precision", [None, "nf4", "fp8"])
def test_base_must_be_the_model_that_was_tuned(tmp_path, precision):
    base = tiny_model(hidden_size=64)
    model = copy.deepcopy(base)
    if precision == "nf4":
        require_four_bit()
        quantize_base(model, "nf4")
    elif precision == "fp8":
        fp8_base(model)
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
    randomize_adapters(model)
    dense = copy.deepcopy(base)
    p3.inject_lora(dense, p3.LoraConfig(r=4, lora_alpha=8))
    randomize_adapters(dense)
    save_checkpoint(base, tmp_path / "base")
    p3.save_merged(model, None, tmp_path / "own", base=tmp_path / "base")
    for i, other in enumerate(other_bases(base, dense, tmp_path)):
        folder = save_checkpoint(other, tmp_path / f"other{i}")
        with pytest.raises(p3.ModelError, match="is another model than the one that was tuned"):
            p3.save_merged(model, None, tmp_path / "new", base=folder)
    assert not (tmp_path / "new").exists()


def test_a_merged_model_and_an_export_never_share_a_folder(tmp_path):
    model = adapted_model()
    p3.export_peft(model, tmp_path / "peft")
    with pytest.raises(p3.AdapterError, match=r"holds a PEFT adapter .* use another folder"):
        p3.save_merged(model, None, tmp_path / "peft")
    p3.save_merged(model, None, tmp_path / "merged")
    with pytest.raises(p3.AdapterError, match=r"holds a model .* use another folder"):
        p3.export_peft(model, tmp_path / "merged")
    for _ in range(2):  # its own kind is replaced
        p3.export_peft(model, tmp_path / "peft")
        p3.save_merged(model, None, tmp_path / "merged")
