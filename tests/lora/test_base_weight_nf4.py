"""4-bit frozen weights through bitsandbytes: its own numbers, whole models and checkpoints."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
import torch
from conftest import (
    lively_model,
    randomize_adapters,
    require_four_bit,
    save_checkpoint,
    tiny_model,
)
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import phi3lora as p3
from phi3lora.errors import ModelError, install_hint
from phi3lora.lora.base_weight import base_format, base_linear, base_weight_of, nf4_linear, quantize_base
from phi3lora.lora.inject import remove_lora
from phi3lora.model.estimate import flops_per_token, plan_memory

require_four_bit()
import bitsandbytes as bnb  # noqa: E402

IDS = torch.arange(10, 30)[None]


def linear(size=(64, 96), dtype=torch.float32, seed=0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(*size, bias=False, dtype=dtype)


def nf4_model(**changes):
    """:func:`lively_model`, its linear weights in nf4."""
    model = lively_model(**changes)
    quantize_base(model, "nf4")
    return model


def packed_tensors(model) -> list[torch.Tensor]:
    """Copies of every packed weight and scale."""
    return [t.clone() for m in model.modules() if isinstance(m, nn.Linear) for t in base_weight_of(m).tensors()]


# --- One layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 96), (48, 33)])  # in, out; blocks of 64 that end with a row, and that do not
def test_products_are_bitsandbytes_own_and_keep_nothing_for_the_backward(size, dtype):
    layer = nf4_linear(linear(size, dtype))
    x = torch.randn(2, 3, size[0], dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = base_linear(x, base_weight_of(layer))
    theirs = layer(x)
    assert kept == [] and not layer.weight.requires_grad
    assert y.dtype == dtype and torch.equal(y, theirs)
    dy = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, theirs)))


def test_the_bytes_of_each_format():
    base = linear((1024, 1024))
    assert base_weight_of(base).nbytes == 4 * 2**20
    blocks = 2**20 // 64
    scales = blocks + 4 * (blocks // 256) + 4 * (256 + 16) + 4  # 8 bits each, theirs, two tables of values, an offset
    assert base_weight_of(nf4_linear(base)).nbytes == 2**19 + scales


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_in_the_dtype_of_its_input_or_autocasts(dtype, storage):
    """Also where the packed bytes are stored as another dtype, which FSDP asks for."""
    layer = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", quant_storage=storage).to("cpu")
    adapted = p3.Linear.adapt(layer, r=4)
    assert adapted(torch.randn(3, 64, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(torch.randn(3, 64, dtype=dtype)).dtype == torch.bfloat16


def test_a_state_dict_carries_the_scales_as_bitsandbytes_has_them():
    ours, theirs = (p3.Linear.adapt(nf4_linear(linear(seed=seed)), r=4) for seed in (0, 1))
    randomize_adapters(ours)
    state = ours.state_dict()
    assert state.keys() == {*ours.base_layer().state_dict(), "lora_A", "lora_B"}
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(3, 64)
    assert torch.equal(theirs(x), ours(x))


# --- A model


def test_a_4_bit_model_has_the_dense_ones_report_and_flops_and_less_memory():
    dense, model = lively_model(), nf4_model()
    assert type(model.lm_head) is nn.Linear
    reports = [str(p3.inject_lora(m, p3.LoraConfig(r=4))) for m in (dense, model)]
    assert reports[0] == reports[1]
    assert flops_per_token(model, 64) == flops_per_token(dense, 64)
    assert (base_format(dense), base_format(model)) == ("", "nf4")
    saved = sum(4 * m.in_features * m.out_features for m in dense.model.modules() if isinstance(m, nn.Linear))
    stored = sum(base_weight_of(m).nbytes for m in model.model.modules() if isinstance(m, nn.Linear))
    one_written_out = 4 * 96 * 32  # gate_up_proj, the largest
    change = plan_memory(model, 0).peak_gib["none"] - plan_memory(dense, 0).peak_gib["none"]
    assert change * 2**30 == pytest.approx(stored + one_written_out - saved, abs=1)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_injecting_and_removing_leaves_the_packed_weights_and_the_function(targets):
    model = nf4_model()
    before, logits = packed_tensors(model), model(IDS).logits
    p3.inject_lora(model, p3.LoraConfig(r=4, target_modules=targets))
    assert torch.equal(model(IDS).logits, logits)
    randomize_adapters(model)
    assert not torch.equal(adapted := model(IDS).logits, logits)
    for same in (copy.deepcopy(model), model.to("cpu"), model.train().eval()):
        assert torch.equal(same(IDS).logits, adapted)
    with p3.disabled(model):
        assert torch.equal(model(IDS).logits, logits)
    remove_lora(model)
    assert torch.equal(model(IDS).logits, logits)
    assert {type(m) for m in model.model.modules() if isinstance(m, nn.Linear)} == {bnb.nn.Linear4bit}
    assert all(torch.equal(a, b) for a, b in zip(before, packed_tensors(model), strict=True))


def test_a_weight_that_bitsandbytes_repacked_is_packed_back():
    """Repack as ``Linear4bit`` does in ``eval()`` on a CPU with AVX512-BF16, by hand."""
    model = nf4_model(hidden_size=64, intermediate_size=64, head_dim=16)
    logits = model(IDS).logits
    for layer in model.model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = True
            weight, repack = layer.weight, bnb.functional._convert_weight_packed_for_cpu
            weight.data, weight.quant_state = repack(weight.data, weight.quant_state)
    p3.inject_lora(model, p3.LoraConfig(r=4, target_modules=["o_proj"]))
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in model.modules())
    assert (model(IDS).logits - logits).norm() < 0.05 * logits.norm()  # it kept the scales in bf16 only


def test_8_bit_layers_are_refused_by_name_and_skipped_by_all_linear():
    net = nn.ModuleDict({"a": bnb.nn.Linear8bitLt(16, 16, has_fp16_weights=False), "b": nn.Linear(16, 16)})
    with pytest.raises(ModelError, match="matches 'a' of class Linear8bitLt: load the model in 4 bits"):
        p3.inject_lora(net, p3.LoraConfig(target_modules=["a"]))
    report = p3.inject_lora(net, p3.LoraConfig())
    assert [layer.module for layer in report] == ["b"] and "skipped a: class Linear8bitLt" in str(report)
    with pytest.raises(ModelError, match=r"no nn\.Linear inside; 'a' is of class Linear8bitLt"):
        p3.inject_lora(nn.ModuleDict({"a": net["a"]}), p3.LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = rf"missing \(.*{package}.*\): {re.escape(install_hint('qlora'))}"
    with pytest.raises(ModelError, match=line):
        quantize_base(tiny_model(), "nf4")
    with pytest.raises(ModelError, match=line):
        p3.load_model(p3.demo.BASE, device="cpu", base_precision="nf4")


# --- Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(lively_model(), tmp_path_factory.mktemp("tiny-phi3"), max_shard_size="40KB")


def load_quantised(checkpoint, **settings):
    """The checkpoint, quantised by transformers."""
    where = {"dtype": torch.float32, "device_map": {"": "cpu"}}
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, **where)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_loading_in_nf4_is_quantising_what_was_loaded(checkpoint, dtype):
    loaded, _ = p3.load_model(checkpoint, dtype=dtype, device="cpu", base_precision="nf4")
    model, _ = p3.load_model(checkpoint, dtype=dtype, device="cpu")
    quantize_base(model, "nf4")
    assert not loaded.training and type(loaded.lm_head) is nn.Linear and loaded.dtype == model.dtype
    assert all(torch.equal(a, b) for a, b in zip(packed_tensors(loaded), packed_tensors(model), strict=True))
    assert loaded.model.layers[0].mlp.down_proj.weight.quant_state.nested
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_checkpoint_in_4_bits_is_loaded_as_it_is(checkpoint, tmp_path):
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    save_checkpoint(load_quantised(checkpoint, **nf4), tmp_path)
    fresh, _ = p3.load_model(checkpoint, dtype="float32", device="cpu", base_precision="nf4")
    for base_precision in (None, "nf4"):
        model, _ = p3.load_model(tmp_path, dtype="float32", device="cpu", base_precision=base_precision)
        assert torch.equal(model(IDS).logits, fresh(IDS).logits)
        assert len(p3.inject_lora(model, p3.LoraConfig(r=4))) == 8


def test_a_model_that_transformers_quantised_is_adapted(checkpoint):
    model = load_quantised(checkpoint, bnb_4bit_compute_dtype=torch.float32)  # fp4, plain scales
    logits = model(IDS).logits
    report = p3.inject_lora(model, p3.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "o_proj"]))
    assert report.layers[0].shape == (32, 32)
    assert torch.equal(model(IDS).logits, logits)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.qkv_proj.lora_B.grad.any()


@pytest.mark.parametrize(
    ("quantization", "precision", "message"),
    [
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, None, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "nf4", "gptq"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "fp8", "already in 4 bits"),
    ],
)
def test_a_checkpoint_quantised_in_another_way_is_refused_unread(tmp_path, quantization, precision, message):
    tiny_model().config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    with pytest.raises(ModelError, match=message):
        p3.load_model(tmp_path, device="cpu", base_precision=precision)
