"""Patterns of targets, layers, ranks and alphas: what each selects, against PEFT's own functions and model."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from conftest import adapters_of, randomize_adapters, same_tensors, tiny_model
from torch import nn

import phi3lora as p3
from phi3lora.lora.inject import lora_layers

PATHS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]


def inject(model=None, **lora):
    model = model or tiny_model()
    return p3.inject_lora(model, p3.LoraConfig(**{"r": 2, **lora})), model


def selected(**lora):
    """Return short path -> adapted segments."""
    report, _ = inject(**lora)
    return {row.module.removeprefix("model.layers."): row.segments for row in report}


# --- Regular expressions, exclusions, layers


def test_a_single_string_with_other_characters_is_a_regular_expression_for_the_whole_path():
    assert selected(target_modules=r"model\.layers\.[\d]+\.self_attn\.(q|v|o)_proj") == {
        f"{i}.self_attn.{name}": segments
        for i in range(2)
        for name, segments in (("o_proj", ()), ("qkv_proj", ("q_proj", "v_proj")))
    }
    assert selected(target_modules="qkv_proj") == selected(target_modules=["qkv_proj"])
    with pytest.raises(p3.ModelError, match=r"matches nothing"):
        inject(target_modules=r"layers\.\d+\.mlp\.down_proj")  # not the whole path
    with pytest.raises(p3.ModelError, match=r"matches nothing"):
        inject(target_modules=[r".*\.down_proj"])  # in a list, names are suffixes, as in PEFT


def test_excluded_layers_and_segments_are_left_out_of_all_linear():
    plain = selected()
    assert selected(exclude_modules=["down_proj"]) == {k: v for k, v in plain.items() if not k.endswith("down_proj")}
    assert selected(exclude_modules=["lm_head"]) == plain
    without_k = selected(exclude_modules=["k_proj", "gate_up_proj"])
    assert without_k["0.self_attn.qkv_proj"] == ("q_proj", "v_proj")
    assert "0.mlp.gate_up_proj" not in without_k
    first_mlp = selected(exclude_modules=r".*\.0\.mlp\..*")
    assert first_mlp == {k: v for k, v in plain.items() if not k.startswith("0.mlp")}
    assert selected(exclude_modules=["gate_proj", "up_proj"]) == {k: v for k, v in plain.items() if "gate_up" not in k}


def test_excluded_layers_are_left_out_of_named_targets_before_they_are_checked():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "deep": nn.ModuleDict({"a": nn.LayerNorm(4)})})
    with pytest.raises(p3.ModelError, match="LayerNorm"):
        inject(copy.deepcopy(net), target_modules=["a"])
    report, _ = inject(net, target_modules=["a"], exclude_modules=["deep.a"])
    assert [row.module for row in report] == ["a"]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"], r".*\.(o|down)_proj"])
@pytest.mark.parametrize(("layers", "kept"), [(1, "1."), ([0], "0."), ([0, 1], ("0.", "1.")), ([], ("0.", "1."))])
def test_only_the_numbered_layers_are_adapted(targets, layers, kept):
    every = selected(target_modules=targets)
    assert selected(target_modules=targets, layers_to_transform=layers) == {
        path: segments for path, segments in every.items() if path.startswith(kept)
    }


def test_layers_are_counted_in_the_list_that_the_pattern_names():
    def net():
        stack = [nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2)]
        return nn.ModuleDict({"h": nn.ModuleList(stack[:1]), "out": nn.ModuleDict({"h": nn.ModuleList(stack)})})

    def paths(**lora):
        return [row.module for row in inject(net(), **lora)[0]]

    def expected(pattern, numbers):
        """By PEFT's own function."""
        from peft.tuners.tuners_utils import check_target_module_exists

        config = peft.LoraConfig(target_modules=["0"], layers_to_transform=numbers, layers_pattern=pattern)
        return [
            path
            for path, m in net().named_modules()
            if isinstance(m, nn.Linear) and check_target_module_exists(config, path)
        ]

    peft = pytest.importorskip("peft")
    for pattern, numbers in (("h", [1]), ("h", [0]), (["h"], [0, 1]), (["x", "h"], [1])):
        assert paths(target_modules=["0"], layers_to_transform=numbers, layers_pattern=pattern) == expected(
            pattern, numbers
        )
    with pytest.raises(p3.ConfigError, match=r"layers_pattern=.*needs layers_to_transform"):
        p3.LoraConfig(layers_pattern="h")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"exclude_modules": ["kproj"]}, r"exclude_modules: 'kproj' matches nothing. Did you mean 'k_proj'\?"),
        ({"exclude_modules": r".*\.9\..*"}, r"exclude_modules: .* matches nothing"),
        ({"exclude_modules": r".*"}, "leave no linear layer"),
        ({"exclude_modules": ["o_proj"], "target_modules": ["o_proj"]}, "leave none of the targets"),
        ({"layers_to_transform": [0, 2]}, "there is no layer 2; Phi3ForCausalLM has 0 to 1"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "there is no layer 0; Phi3ForCausalLM has no layer with"),
        ({"rank_pattern": {"o_proj": 4, "oproj": 3}}, "rank_pattern: 'oproj' matches none of the adapted layers"),
        ({"rank_pattern": {"o_proj": 4, r"0\.self_attn\.o_proj": 3}}, "that no earlier key matches"),
        ({"layers_to_transform": [0], "target_modules": ["o_proj", "lm_head"]}, "leaves out the target 'lm_head'"),
        ({"target_modules": ["all-linear", "lm_head"]}, "As one string, not in a list"),
        ({"target_modules": "all_linear"}, r"Did you mean 'all-linear'\?"),
        ({"alpha_pattern": {"q_proj": 4}, "target_modules": ["o_proj"]}, "alpha_pattern: 'q_proj' matches none"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern gives the segments .*'q_proj': 4, 'k_proj': 2.*same value"),
        ({"alpha_pattern": {"up_proj": 3}}, r"alpha_pattern gives the segments .*'gate_proj': 4, 'up_proj': 3"),
    ],
)  # fmt: skip
def test_patterns_that_match_nothing_or_cannot_be_are_refused_and_leave_the_model_as_it_was(lora, message):
    model = tiny_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(p3.ModelError, match=message) as caught:
        inject(model, **lora)
    assert "\n" not in str(caught.value)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


# --- Ranks and alphas

PATTERNS = {
    "rank_pattern": {r"layers\.1\..*": 3, "o_proj": 5, "qkv_proj": 4},
    "alpha_pattern": {"down_proj": 1.5, r"model\.layers\.0\.self_attn\.qkv_proj": 6},
}


def test_ranks_and_alphas_are_pefts_for_every_layer():
    peft = pytest.importorskip("peft")
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=names, **PATTERNS))
    expected = {
        path.removeprefix("base_model.model."): (
            layer.r["default"],
            layer.lora_alpha["default"],
            layer.scaling["default"],
        )
        for path, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    _, ours = inject(lora_alpha=8, target_modules=names, **PATTERNS)
    assert {path: (layer.r, layer.lora_alpha, layer.scaling) for path, layer in lora_layers(ours).items()} == expected
    assert len({r for r, _, _ in expected.values()}) == 4


def test_a_segments_name_is_a_pattern_where_all_adapted_segments_share_it():
    _, model = inject(target_modules=["q_proj", "v_proj", "o_proj"], rank_pattern={"[qv]_proj": 6, "o_proj": 3})
    assert {path.rpartition(".")[2]: layer.r for path, layer in lora_layers(model).items()} == {
        "qkv_proj": 6,
        "o_proj": 3,
    }
    _, model = inject(target_modules=["q_proj"], rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 1})
    assert {(layer.r, layer.lora_alpha) for layer in lora_layers(model).values()} == {(7, 1)}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_are_saved_loaded_exported_and_imported(tmp_path, use_rslora):
    """Peft's own model of the exported folder computes the same, in both layouts that it reads."""
    peft = pytest.importorskip("peft")
    _, model = inject(lora_alpha=8, use_rslora=use_rslora, exclude_modules=["k_proj"], **PATTERNS)
    randomize_adapters(model)
    ids = torch.arange(2 * 12).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
    p3.save_adapter(model, tmp_path / "a.safetensors")
    again = tiny_model()
    p3.load_adapter(again, tmp_path / "a.safetensors")
    assert same_tensors(adapters_of(again), adapters_of(model))
    assert again.lora_config == model.lora_config
    for layout in ("uniform", "pattern"):
        folder = tmp_path / layout
        p3.export_peft(model, folder, layout=layout, base_model="microsoft/Phi-3-mini-4k-instruct")
        theirs = peft.PeftModel.from_pretrained(tiny_model(), folder)
        imported = tiny_model()
        p3.import_peft(imported, folder)
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(imported(ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert adapters_of(imported).keys() == adapters_of(model).keys()


def test_a_dict_from_a_peft_adapter_selects_the_same_layers():
    """``LoraConfig(**peft_config)`` with every pattern, on names that both know."""
    peft = pytest.importorskip("peft")
    settings = {
        "r": 2, "target_modules": ["qkv_proj", "o_proj", "down_proj"], "layers_to_transform": [0],
        "layers_pattern": ["layers"], "exclude_modules": ["mlp.down_proj"], "rank_pattern": {"o_proj": 3},
    }  # fmt: skip
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    paths = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    _, ours = inject(**theirs.peft_config["default"].to_dict())
    assert list(lora_layers(ours)) == [re.sub(r"^base_model\.model\.", "", path) for path in paths]
