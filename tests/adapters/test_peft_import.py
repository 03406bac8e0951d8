"""Folders that PEFT wrote give PEFT's logits; one without a counterpart here is refused and the model unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import adapted_model, tiny_model
from peft_folders import (
    MEMBERS,
    NET_IDS,
    QKV,
    Net,
    as_llama,
    assert_same_logits,
    base_model,
    change_config,
    change_tensors,
    logits,
    peft_made,
)
from safetensors.torch import load_file, save_file
from torch import nn

import phi3lora as p3
from phi3lora.errors import AdapterError, ModelError, Phi3LoRAError
from phi3lora.lora.inject import lora_layers

# --- Folders that PEFT wrote

THEIRS = {
    "fused": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "rslora": {"target_modules": ["qkv_proj", "down_proj"], "use_rslora": True},
    "regex": {"target_modules": r".*\.(qkv_proj|down_proj)", "exclude_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {
        "target_modules": ["qkv_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers",
        "exclude_modules": ["o_proj"],
    },
    "patterns": {
        "target_modules": ["qkv_proj", "o_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {r"layers\.0\.self_attn\.qkv_proj": 7, "o_.*": 2}, "alpha_pattern": {"^model.*down_proj": 32},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "qkv_proj"]},
    "orthogonal": {"target_modules": ["qkv_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_an_adapter_of_peft_s_gives_peft_s_logits(tmp_path, settings):
    theirs, ours = peft_made(base_model(), tmp_path, **settings), base_model()
    report = p3.import_peft(ours, tmp_path)
    if settings.get("init_lora_weights") is None:
        assert (logits(theirs) - logits(base_model())).abs().max() > 0.05
    assert_same_logits(ours, theirs)
    assert {row.class_name for row in report} <= {"Linear", "Embedding"}
    assert all(p.requires_grad == ("lora_" in name) for name, p in ours.named_parameters())


SPLIT = {
    "equal": {"target_modules": [*QKV, "o_proj", "up_proj"]},
    "some": {"target_modules": ["q_proj", "v_proj", "gate_proj"], "use_rslora": True},
    "unequal": {
        "target_modules": [*QKV, "gate_proj", "up_proj"], "rank_pattern": {"k_proj": 2, "up_proj": 6},
        "alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 11}, "use_rslora": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", SPLIT.values(), ids=SPLIT)
def test_split_names_become_segments(tmp_path, settings):
    theirs, ours = peft_made(as_llama(base_model()), tmp_path, **settings), base_model()
    report = p3.import_peft(ours, tmp_path)
    assert_same_logits(ours, theirs)
    found = {segment for row in report for segment in row.segments} | {"o_proj"} & set(settings["target_modules"])
    assert found == set(settings["target_modules"])


def test_every_kind_of_layer_is_imported(tmp_path):
    theirs, ours = peft_made(Net(), tmp_path, target_modules=["embed", "conv", "fused"], lora_alpha=40), Net()
    p3.import_peft(ours, tmp_path)
    assert (theirs(NET_IDS) - Net()(NET_IDS)).abs().max() > 0.05
    torch.testing.assert_close(ours(NET_IDS), theirs(NET_IDS), atol=1e-5, rtol=1e-5)


def rename(path: Path, change) -> None:
    def renamed(tensors):
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    change_tensors(path, renamed)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.model.", "base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["no prefix", "inner model", "adapter's name", "compiled"],
)
def test_names_with_and_without_prefixes_and_settings_that_change_nothing(tmp_path, change):
    theirs, ours = peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "down_proj"]), base_model()
    rename(tmp_path, change)
    change_config(tmp_path, layers_to_transform=[7], fan_in_fan_out=True, added_later=None, modules_to_save=[])
    p3.import_peft(ours, tmp_path)
    assert_same_logits(ours, theirs)


def test_targets_without_tensors_and_another_base_are_said(tmp_path, caplog):
    targets = ["qkv_proj", "down_proj", "lm_head"]  # the last is in one place, the others in two
    peft_made(base_model(), tmp_path, target_modules=targets)
    model, again = base_model(), base_model()
    model.config._name_or_path = again.config._name_or_path = "microsoft/Phi-3-mini-4k-instruct"
    change_config(tmp_path, base_model_name_or_path="unsloth/Phi-3-mini-4k-instruct-bnb-4bit")
    p3.import_peft(model, tmp_path)
    assert not caplog.messages, "all is as it should be"
    change_config(
        tmp_path, target_modules=[*targets, "q_proj"], base_model_name_or_path="microsoft/Phi-3.5-mini-instruct"
    )
    change_tensors(tmp_path, lambda t: [t.pop(key) for key in [*t] if "layers.1.mlp" in key])
    p3.import_peft(again, tmp_path)
    assert "no tensors for 'q_proj'" in caplog.text
    assert "adapts 'down_proj' in 1 of 2 layers" in caplog.text
    assert "was made for 'microsoft/Phi-3.5-mini-instruct', and this model is 'microsoft/Phi-3-mini" in caplog.text


def test_a_pickle_of_tensors_is_read_and_one_with_code_is_not(tmp_path):
    theirs = peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({key: tensor.double() for key, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
    ours = base_model()
    p3.import_peft(ours, tmp_path)
    assert_same_logits(ours, theirs)
    assert {layer.lora_A.dtype for layer in lora_layers(ours).values()} == {torch.float32}
    torch.save({**tensors, "x": Path("/")}, tmp_path / "adapter_model.bin")
    assert_refused(base_model(), tmp_path, "not a readable pickle of tensors only")


# --- Refusals


def assert_refused(model, path, message: str, error=AdapterError) -> None:
    """The import fails with this message and the model is bit for bit, and object for object, as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, trainable = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        p3.import_peft(model, path)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert modules == list(model.modules())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'; allowed: 'LORA'"),
        ({"use_dora": True}, "use_dora=True cannot be imported"),
        ({"bias": "all"}, "bias='all' cannot be imported .trained biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be imported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*a base that its initialisation changed"),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"lora_from_next_year": 3}, "unknown setting lora_from_next_year=3"),
        ({"r": 5}, r"the config says rank 5; allowed: A \(5, in\)"),
        ({"r": "four"}, "r='four'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern=.*: r=0; allowed: "),
        ({"alpha_pattern": {"o_proj": "x"}}, "alpha_pattern=.*lora_alpha='x'"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern=.*unterminated.*a dict of regular expressions"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\]"),
        ({"rank_pattern": {f"layer_{i}": 4 for i in range(20_000)}}, "20,000 keys; the modules of a model have fewer"),
        ({"alpha_pattern": {"(a+)+$": 4}}, "takes too long to match; allowed: at most 300 characters"),
        ({"alpha_pattern": {".*.*.*.*.*x": 4}}, "takes too long to match"),
        ({"rank_pattern": {"a" * 301: 4}}, "takes too long to match"),
    ],
    ids=str,
)
def test_a_config_that_has_no_counterpart_is_refused(tmp_path, changes, message):
    peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "o_proj"])
    change_config(tmp_path, **changes)
    assert_refused(base_model(), tmp_path, message, Phi3LoRAError)


O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{O_PROJ}.lora_magnitude_vector": torch.ones(32)}), "DoRA's magnitudes"),
        (lambda t: t.update({f"{O_PROJ}.lora_B.bias": torch.ones(32)}), "a trained bias"),
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(4)}), "a whole module"),
        (lambda t: t.update({f"{O_PROJ}.lora_C.weight": torch.ones(4)}), "unknown tensor .*lora_C"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(512, 32)}), "another base"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(520, 32)}), "resized embeddings"),
        (lambda t: t.pop(f"{O_PROJ}.lora_B.weight"), "has only lora_A; it needs both"),
        (lambda t: t[f"{O_PROJ}.lora_A.weight"].fill_(float("nan")), "NaN or infinite .*o_proj.lora_A.weight"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(4, 31)}), r"A \(4, 31\).*allowed .*: A \(r, 32\)"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(3, 32)}), "the config says rank 4"),
        (lambda t: t.update({k.replace("base_model.model.", ""): v.clone() for k, v in t.items()}), "twice"),
        (lambda t: t.update({k.replace("o_proj", "q_proj"): v.clone() for k, v in t.items() if "o_proj" in k}),
         "adapts both .*qkv_proj' and a part of it"),
        (lambda t: t.clear(), "no tensors called"),
    ],
)  # fmt: skip
def test_tensors_that_have_no_counterpart_are_refused(tmp_path, change, message):
    peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "o_proj"])
    change_tensors(tmp_path, change)
    assert_refused(base_model(), tmp_path, message)


@pytest.mark.parametrize("name", ["model.layers.9.self_attn.o_proj", "model.layers.0.mlp"])
def test_a_name_that_is_no_layer_of_the_model_is_refused(tmp_path, name):
    peft_made(base_model(), tmp_path, target_modules=["o_proj"])
    rename(tmp_path, lambda key: key.replace("model.layers.0.self_attn.o_proj", name))
    assert_refused(base_model(), tmp_path, "not in the model|a Phi3MLP; allowed: Linear")


@pytest.mark.parametrize("layout", ["uniform", "split"])
def test_adapters_built_differently_are_refused(tmp_path, layout):
    p3.export_peft(adapted_model(), tmp_path / "ours", layout=layout)
    peft_made(base_model(), tmp_path / "theirs", target_modules=["qkv_proj"])
    assert_refused(adapted_model(r=5), tmp_path / "ours", "r 4 in the file, 5 in the model")
    assert_refused(adapted_model(lora_alpha=9), tmp_path / "ours", "lora_alpha 8 in the file, 9 in the model")
    assert_refused(adapted_model(target_modules=["q_proj"]), tmp_path / "ours", "enable_lora")
    assert_refused(adapted_model(target_modules=["o_proj"]), tmp_path / "ours", "does not fit")
    assert_refused(adapted_model(target_modules=["qkv_proj"]), tmp_path / "theirs", "class 'Linear' in the file")


def test_another_model_is_refused(tmp_path):
    p3.export_peft(adapted_model(), tmp_path / "ours")
    peft_made(base_model(), tmp_path / "theirs", target_modules=["qkv_proj"])
    for folder in ("ours", "theirs"):
        assert_refused(tiny_model(num_key_value_heads=4), tmp_path / folder, "shape|add up|allowed", Phi3LoRAError)
        assert_refused(nn.Sequential(nn.Linear(3, 3)), tmp_path / folder, "no layer|not in the model", Phi3LoRAError)


def test_tied_embeddings_are_refused(tmp_path):
    peft_made(base_model(), tmp_path, target_modules=["lm_head"])
    assert_refused(base_model(MEMBERS["tied"]), tmp_path, "another base", AdapterError)
    change_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if ".base_layer." in key])
    assert_refused(base_model(MEMBERS["tied"]), tmp_path, "tied embeddings", ModelError)


def test_unreadable_folders_are_refused(tmp_path):
    model, path = base_model(), tmp_path / "a"
    assert_refused(model, path, "there is no folder")
    peft_made(base_model(), path, target_modules=["o_proj"])
    assert_refused(model, path / "adapter_model.safetensors", "there is no folder")
    whole = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused(model, path, "not a readable safetensors")
    (path / "adapter_model.safetensors").unlink()
    assert_refused(model, path, "has no adapter_model.safetensors")
    for content in (b"{", b"[1]", b"\xff\xfe"):
        (path / "adapter_config.json").write_bytes(content)
        assert_refused(model, path, "not a readable PEFT config")
    (path / "adapter_config.json").unlink()
    assert_refused(model, path, "has no adapter_config.json, so it is no PEFT folder")


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"layers": 3}'])
def test_a_damaged_header_is_ignored(tmp_path, header):
    theirs = peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"phi3lora": header})
    ours = base_model()
    p3.import_peft(ours, tmp_path)
    assert_same_logits(ours, theirs)
