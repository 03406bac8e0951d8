"""Injection on any module tree and on the whole Phi-3 family: swapped layers, trainable parameters, refusals."""

from __future__ import annotations

import loralib as lora
import pytest
import torch
from conftest import randomize_adapters, tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_metadata
from phi3lora.errors import ModelError
from phi3lora.lora.inject import inject_layers, lora_layers, unreached_layers

LLAMA_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Attention(nn.Module):
    """A user's own block: a fused projection of unequal parts, an output, a router whose name says lora_."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 16)
        self.out = nn.Linear(8, 8)
        self.lora_router = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.qkv(x)[..., :8]) + self.lora_router(x).sum()


class Net(nn.Module):
    """Tokens -> blocks -> a convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapter_names(*paths: str) -> set[str]:
    return {f"{path}.{name}" for path in paths for name in ("lora_A", "lora_B")}


# --- Any module tree


def test_suffixes_select_layers_of_every_kind_in_any_tree():
    model = net()
    report = p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["1.out", "embed", "conv"]))
    classes = {row.module: row.class_name for row in report}
    assert classes == {"embed": "Embedding", "blocks.1.out": "Linear", "conv": "Conv2d"}
    assert trainable(model) == adapter_names("embed", "blocks.1.out", "conv")
    assert type(model.blocks[0].out) is type(model.blocks[1].qkv) is nn.Linear


def test_config_reaches_every_layer():
    model = net()
    config = p3.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.25, use_rslora=True, target_modules=["out", "qkv", "conv", "embed"],
        segments={"qkv": (8, 4, 4)},
    )  # fmt: skip
    p3.inject_lora(model, config)
    for layer in (model.blocks[1].out, model.blocks[1].qkv, model.conv, model.embed):
        assert (layer.r, layer.scaling) == (4, 3.0)
        assert layer is model.embed or layer.lora_dropout.p == 0.25
    assert model.lora_config is config


NAMED_SEGMENTS = {"query": 8, "key": 4, "value": 4}


@pytest.mark.parametrize(
    ("targets", "segments", "enable", "other_class"),
    [
        (["query", "value"], {"qkv": NAMED_SEGMENTS}, [True, False, True], p3.MergedLinear),
        (["qkv"], {"0.qkv": NAMED_SEGMENTS}, [True] * 3, p3.Linear),
        (["qkv"], {"0.qkv": (8, 4, 4)}, [True] * 3, p3.Linear),
    ],
)
def test_targets_are_segments_or_the_fused_name_for_all_of_them(targets, segments, enable, other_class):
    model = net()
    report = p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=targets, segments=segments))
    layer, other = model.blocks[0].qkv, model.blocks[1].qkv
    assert (layer.segments, layer.enable_lora, type(other)) == ((8, 4, 4), enable, other_class)
    assert targets == ["qkv"] or [row.segments for row in report] == [("query", "value")] * 2
    assert trainable(model) == adapter_names("blocks.0.qkv", "blocks.1.qkv")


def test_no_weight_is_copied_and_fresh_adapters_leave_the_logits_bit_identical():
    model, ids = tiny_model(), torch.arange(10, 30)[None]
    before, logits = {name: p.data_ptr() for name, p in model.named_parameters()}, model(ids).logits
    p3.inject_lora(model, p3.LoraConfig(r=2))
    assert {name: p.data_ptr() for name, p in model.named_parameters() if "lora_" not in name} == before
    assert trainable(model) == adapter_names(*lora_layers(model))
    assert torch.equal(model(ids).logits, logits)


# --- Phi-3


@pytest.mark.parametrize(
    ("targets", "qkv", "gate_up"),
    [
        (["q_proj", "v_proj"], [True, False, True], None),
        (["self_attn.k_proj", "up_proj"], [False, True, False], [False, True]),
        (["gate_proj"], None, [True, False]),
        (["qkv_proj", "gate_up_proj"], [True] * 3, [True] * 2),
        (["qkv_proj", "q_proj"], [True] * 3, None),
        (LLAMA_NAMES, [True] * 3, [True] * 2),
        ("all-linear", [True] * 3, [True] * 2),
    ],
)
def test_llama_names_select_phi3s_segments(targets, qkv, gate_up):
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=targets))
    for layer in model.model.layers:
        for module, enable in ((layer.self_attn.qkv_proj, qkv), (layer.mlp.gate_up_proj, gate_up)):
            assert isinstance(module, p3.MergedLinear) == (enable is not None)
            assert enable is None or module.enable_lora == enable
        others = {type(layer.self_attn.o_proj), type(layer.mlp.down_proj)}
        assert others == ({p3.Linear} if targets in (LLAMA_NAMES, "all-linear") else {nn.Linear})


def test_all_linear_skips_the_output_head_whatever_its_name():
    own, phi3 = net(), tiny_model()
    phi3.to_logits = phi3.lm_head
    del phi3.lm_head
    phi3.get_output_embeddings = lambda: phi3.to_logits
    for model, head in ((own, own.lm_head), (phi3, phi3.to_logits)):
        p3.inject_lora(model, p3.LoraConfig(r=2))
        assert head in list(model.modules())
        assert type(head) is nn.Linear


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
MINI = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32064}  # fmt: skip
MEDIUM = {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40,
          "num_key_value_heads": 10, "vocab_size": 32064}  # fmt: skip
LONG = {"rope_parameters": LONGROPE, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
FAMILY = {
    # name: config, (q, kv widths), all parameters of the base (as the model cards say: 3.8 B, 14 B, 14.7 B, 3.8 B)
    "Phi-3-mini-4k": ({**MINI, "sliding_window": 2047}, (3072, 3072), 3_821_079_552),
    "Phi-3-mini-128k, Phi-3.5-mini": ({**MINI, **LONG}, (3072, 3072), 3_821_079_552),
    "Phi-3-medium-4k": ({**MEDIUM, "sliding_window": 2047}, (5120, 1280), 13_960_238_080),
    "Phi-4": ({**MEDIUM, "vocab_size": 100352}, (5120, 1280), 14_659_507_200),
    "Phi-4-mini": (
        {**MINI, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064,
         "tie_word_embeddings": True, "partial_rotary_factor": 0.75},
        (3072, 1024),
        3_836_021_760,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_member_at_its_real_size(name):
    values, (q, kv), base_parameters = FAMILY[name]
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(**values))
    r, hidden, inner = 16, values["hidden_size"], values["intermediate_size"]
    report = p3.inject_lora(model, p3.LoraConfig(r=r, lora_alpha=32))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    for layer in model.model.layers:
        assert layer.self_attn.qkv_proj.segments == (q, kv, kv)
        assert layer.mlp.gate_up_proj.segments == (inner, inner)
    each = {  # r * (what goes in + what comes out), one adapter per segment
        "qkv_proj": r * (hidden + q) + 2 * r * (hidden + kv),
        "o_proj": r * (q + hidden),
        "gate_up_proj": 2 * r * (hidden + inner),
        "down_proj": r * (inner + hidden),
    }
    for row in report:
        assert row.trainable_parameters == each[row.module.rpartition(".")[2]], row.module
    total = sum(each.values()) * values["num_hidden_layers"]
    assert report.trainable_parameters == total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.total_parameters == base_parameters + total


# --- What is trainable


def test_a_users_module_called_lora_router_stays_frozen_and_out_of_the_adapter():
    model = net()
    p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["out"]))
    assert not model.blocks[0].lora_router.weight.requires_grad
    assert p3.adapters.adapter_file.adapter_state_dict(model).keys() == adapter_names("blocks.0.out", "blocks.1.out")
    assert "blocks.0.lora_router.weight" in p3.lora_state_dict(model)  # what going by the name would save


def plain_tree() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 3))


def tree_with_a_weight_called_bias() -> nn.Module:
    return nn.ModuleDict({"bias_gate": nn.Linear(4, 4, bias=False), "up": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("make", "paths", "bias", "biases"),
    [
        (plain_tree, ["0", "1"], "none", []),
        (plain_tree, ["0", "1"], "all", ["0.bias", "2.bias", "3.bias"]),
        (plain_tree, ["0", "1"], "lora_only", ["0.bias"]),
        (net, ["blocks.0.out", "conv"], "lora_only", ["blocks.0.out.bias", "conv.conv.bias"]),
        (tree_with_a_weight_called_bias, ["up"], "all", ["up.bias"]),
    ],
)
def test_bias_modes_train_biases_as_loralib_does_where_no_name_misleads(make, paths, bias, biases):
    model = make()
    report = p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=paths, bias=bias))
    got = trainable(model)
    assert got == adapter_names(*paths) | set(biases)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_parameters == count
    if bias == "lora_only":
        assert sum(row.trainable_parameters for row in report) == count
    if make is plain_tree:
        lora.mark_only_lora_as_trainable(model, bias)
        assert got == trainable(model)


@pytest.mark.parametrize("mode", [True, False])
def test_injection_keeps_every_modules_mode(mode):
    p3.inject_lora(model := tiny_model().train(mode), p3.LoraConfig(r=2, lora_dropout=0.5))
    assert {module.training for module in model.modules()} == {mode}


# --- Refused


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_refused(target):
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ModelError, match="tied embeddings"):
        p3.inject_lora(model, p3.LoraConfig(target_modules=["qkv_proj", target]))
    assert not lora_layers(model)  # and nothing was swapped
    p3.inject_lora(tiny_model(), p3.LoraConfig(target_modules=[target]))  # untied: fine


@pytest.mark.parametrize("layer", [p3.Linear(4, 4, r=2), lora.Linear(4, 4, r=2)])
def test_a_model_that_has_adapters_is_refused(layer):
    with pytest.raises(ModelError, match=r"already has 1 LoRA layers .*'0'"):
        p3.inject_lora(nn.Sequential(layer), p3.LoraConfig(r=2))


def test_a_target_that_matches_nothing_lists_the_candidates():
    model = tiny_model()
    with pytest.raises(ModelError) as caught:
        p3.inject_lora(model, p3.LoraConfig(target_modules=["qkv_proj", "qproj"]))
    assert "Did you mean 'q_proj'?" in str(caught.value)
    candidates = str(caught.value).partition("Candidates: ")[2].split(", ")
    assert set(candidates) == {"qkv_proj", "gate_up_proj", "embed_tokens", "lm_head", *LLAMA_NAMES}
    assert not lora_layers(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["norm"]}, "'norm' matches 'norm' of class LayerNorm"),
        ({"target_modules": ["0"], "segments": {"qkv": (8, 4, 4)}}, r"'0' matches 'blocks\.0' of class Attention"),
        ({"target_modules": ["ut"]}, "'ut' matches nothing"),  # a suffix is whole names, not letters
        ({"segments": {"qkv": (8, 4)}}, "add up to 12; .*out_features=16"),
        ({"segments": {"nowhere": (8, 8)}}, "'nowhere' matches no module; Candidates: embed, qkv"),
        ({"segments": {"conv": (1, 1)}}, "'conv' is of class Conv2d"),
    ],
)
def test_targets_and_segments_that_do_not_fit_are_refused(config, message):
    model = net()
    with pytest.raises(ModelError, match=message):
        p3.inject_lora(model, p3.LoraConfig(**config))
    assert not lora_layers(model)


@pytest.mark.parametrize("target", ["qkv_proj", "q_proj"])
def test_a_subclass_of_linear_is_refused_by_layer_name_and_by_segment_name(target):
    """It may store or multiply its weight in its own way."""
    model = tiny_model()
    model.model.layers[0].self_attn.qkv_proj = type("Quantized", (nn.Linear,), {})(32, 64, bias=False)
    with pytest.raises(ModelError, match="of class Quantized"):
        p3.inject_lora(model, p3.LoraConfig(target_modules=[target]))


# --- torch's own transformer


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fused_encoder_does_not_bypass_adapters(padded):
    """torch also packs padded rows into a nested tensor, which only its fused kernel can read."""
    model = nn.TransformerEncoder(encoder(), 2) if padded else encoder()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else torch.zeros(2, 5, dtype=torch.bool)
    p3.inject_lora(model, p3.LoraConfig(r=2))
    randomize_adapters(model, std=1)
    inputs = {"src": torch.randn(2, 5, 16), **({"src_key_padding_mask": padding} if padded else {})}
    with torch.no_grad():  # where torch takes its fused kernel
        fused = model.eval()(**inputs)
        separate = model.train()(**inputs)  # where it never does; dropout is 0
    torch.testing.assert_close(fused[~padding], separate[~padding])


def test_multihead_attentions_out_proj_is_skipped_and_refused_as_a_target():
    """nn.MultiheadAttention multiplies with out_proj.weight itself: an adapter there would never run."""
    layer = encoder()
    with pytest.raises(ModelError, match="out_proj' of class NonDynamicallyQuantizableLinear"):
        p3.inject_lora(layer, p3.LoraConfig(target_modules=["out_proj"]))
    report = p3.inject_lora(layer, p3.LoraConfig(r=2))
    assert {row.module for row in report} == {"linear1", "linear2"}
    assert report.skipped.keys() == {"self_attn.out_proj"} and "skipped self_attn.out_proj: class" in str(report)
    with pytest.raises(ModelError, match=r"Sequential has no nn\.Linear inside"):
        p3.inject_lora(nn.Sequential(nn.ReLU()), p3.LoraConfig())


def test_weights_made_for_inference_are_refused_and_adapters_made_in_inference_mode_train(tmp_path):
    with torch.inference_mode():
        model = net()
    with pytest.raises(ModelError, match=r"'embed.weight' was made inside torch.inference_mode\(\)"):
        p3.inject_lora(model, p3.LoraConfig(target_modules=["out"]))
    trained = net()
    with torch.inference_mode():
        p3.inject_lora(trained, p3.LoraConfig(target_modules=["out"]))
    trained.blocks[0](torch.randn(2, 8)).sum().backward()
    assert trained.blocks[0].out.lora_B.grad.any()
    path = p3.save_adapter(trained, tmp_path / "a.safetensors")
    with torch.inference_mode():  # to generate, an adapter may be put on such a model
        p3.load_adapter(model, path)
        assert model.blocks[0](torch.randn(2, 8)).shape == (2, 8)


def test_default_dtype_default_device_and_gradients_off_change_nothing():
    torch.set_default_dtype(torch.float64)
    try:
        model = net()
        with torch.device("meta"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["out", "embed", "conv"]))
    finally:
        torch.set_default_dtype(torch.float32)
    adapters = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    assert {(p.dtype, p.device.type, p.requires_grad) for p in adapters} == {(torch.float32, "cpu", True)}
    y = model.blocks[0](torch.randn(2, 8, dtype=torch.float64))
    y.sum().backward()
    assert y.dtype == torch.float64 and model.blocks[0].out.lora_B.grad.any()
    torch.manual_seed(0)
    plain = net()
    torch.set_grad_enabled(False)
    try:
        p3.inject_lora(plain, p3.LoraConfig(r=2, target_modules=["out"]))
    finally:
        torch.set_grad_enabled(True)
    plain.blocks[0](torch.randn(2, 8)).sum().backward()
    assert plain.blocks[0].out.lora_B.grad.any()


# --- One layer under two names


class TwoNames(nn.Module):
    """A container and a layer that stand in two places each."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4))
        self.backbone = self.net
        self.first = nn.Linear(4, 4)
        self.again = nn.ModuleDict({"first": self.first})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone(self.net(self.again["first"](self.first(x))))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["net.0", "first"], ["backbone.0", "again.first"], ["net.0", "backbone.0", "first"]]
)
def test_a_module_under_two_names_is_one_layer(targets, tmp_path):
    torch.manual_seed(0)
    model = TwoNames()
    report = p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=targets))
    assert {row.module for row in report} == {"net.0", "first"}
    assert report.trainable_parameters == 2 * 16
    path = p3.save_adapter(model, tmp_path / "a.safetensors")
    for name in ("b", "c"):
        assert model.net is model.backbone and model.first is model.again["first"]
        assert type(model.first) is type(model.net[0]) is p3.Linear
        p3.load_adapter(model, path, name=name)
        p3.set_adapter(model, name)
    p3.delete_adapter(model, "default")
    p3.delete_adapter(model, "b")
    p3.delete_adapter(model, "c")
    assert model.first is model.again["first"] and type(model.first) is type(model.net[0]) is nn.Linear


def test_weights_tied_to_any_other_module_are_refused():
    class Bias(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.matrix = weight

    for tie, other in (
        (lambda model: setattr(model.blocks[1].out, "weight", model.blocks[0].out.weight), "blocks.1.out"),
        (lambda model: setattr(model, "extra", Bias(model.blocks[0].out.weight)), "extra"),
        (lambda model: setattr(model, "extra", model.blocks[0].out.weight), "the model itself"),
    ):
        model = net()
        tie(model)
        with pytest.raises(ModelError, match=f"'blocks.0.out' shares its weight with {other}"):
            p3.inject_lora(model, p3.LoraConfig(target_modules=["0.out"]))
        p3.inject_lora(model, p3.LoraConfig(target_modules=["qkv"]))


# --- Other libraries' adapters


class OwnLora(nn.Module):
    """A user's LoRA layer around another one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.lora_a = base, nn.Linear(base.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base.out_features, bias=False)


def peft_adapted(tuner: str, wrapped: bool) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = {
        "lora": peft.LoraConfig(target_modules=["qkv_proj"]),
        "ia3": peft.IA3Config(target_modules=["qkv_proj"], feedforward_modules=[]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[tuner]
    model = tiny_model()
    adapted = peft.get_peft_model(model, config)
    return adapted if wrapped else model


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft_adapted("lora", True),
        lambda: peft_adapted("lora", False),
        lambda: peft_adapted("ia3", False),
        lambda: peft_adapted("prompt", True),
        lambda: nn.Sequential(nn.Linear(4, 4), OwnLora(nn.Linear(4, 4))),
    ],
)
def test_another_librarys_adapters_are_refused(make):
    model = make()
    before = {name: (type(m), m.training) for name, m in model.named_modules()}, trainable(model)
    for targets in ("all-linear", ["o_proj", "0"]):
        with pytest.raises(ModelError, match=r"adapters of another library \(.*merge_and_unload"):
            p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=targets))
    assert before == ({name: (type(m), m.training) for name, m in model.named_modules()}, trainable(model))


def test_a_model_that_peft_has_merged_is_accepted():
    model = peft_adapted("lora", True).merge_and_unload()
    assert len(p3.inject_lora(model, p3.LoraConfig(r=2))) == 8


# --- Layers that get no gradient


class Reads(nn.Module):
    """Layers that it calls, tests, and multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.tested, self.read = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.tested.weight, torch.Tensor) and self.tested.weight.device.type != "meta":
            x = x.to(self.tested.weight.dtype).view(-1, self.tested.weight.shape[1])
        return self.tested(self.called(x)) @ self.read.weight.t()


def reads_on_the_instance() -> nn.Module:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("called", "tested", "read")})
    model.forward = lambda x: nn.functional.linear(model.tested(model.called(x)), model.read.weight)
    return model


@pytest.mark.parametrize("make", [Reads, reads_on_the_instance])
def test_a_layer_whose_weight_its_parent_reads_is_named_by_the_report_and_by_its_missing_gradient(make):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    report = p3.inject_lora(model, p3.LoraConfig(r=2))
    assert report.bypassed == {"0.read": type(model[0]).__name__}
    assert f"may be bypassed: 0.read, whose weight {type(model[0]).__name__} reads" in str(report)
    model(torch.randn(2, 4)).sum().backward()
    assert unreached_layers(model) == ["0.read"]
    model[0].read.enabled = False
    assert unreached_layers(model) == []
    assert not p3.inject_lora(tiny_model(), p3.LoraConfig(r=2)).bypassed


# --- The report


def test_experts_in_stacked_parameters_are_named_with_their_share():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name)
    share = f"{100 * experts / sum(p.numel() for p in model.parameters()):.1f} % of the model"
    report = p3.inject_lora(model, p3.LoraConfig(r=2))
    assert report.skipped.keys() == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert all(share in reason and "16x96x32" in reason for reason in report.skipped.values())
    assert str(report).count("skipped model.layers.*.mlp.experts: stacked matrices") == 1
    with pytest.raises(ModelError, match=r"gate_up_proj' is a parameter of shape \(16, 96, 32\); only layers can"):
        p3.inject_lora(MixtralForCausalLM(config), p3.LoraConfig(target_modules=["gate_up_proj"]))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 3, 3), nn.Bilinear(2, 3, 4))
    assert p3.inject_lora(plain, p3.LoraConfig(r=2)).skipped == {}


def test_the_report_is_a_table_of_the_stack_with_totals():
    model = tiny_model()
    report = p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    base = sum(p.numel() for p in tiny_model().parameters())
    assert (report.trainable_parameters, report.total_parameters, len(report)) == (704, base + 704, 4)
    assert str(report).splitlines() == [
        "module                             class         weight  segments        trainable each  layers",
        "-----------------------------------------------------------------------------------------------",
        "model.layers.*.self_attn.o_proj    Linear        32x32                   128             2",
        "model.layers.*.self_attn.qkv_proj  MergedLinear  64x32   q_proj, v_proj  224             2",
        f"trainable 704 of {base + 704:,} parameters ({100 * 704 / (base + 704):.3f} %)",
    ]


# --- Layers described one by one


def test_each_layer_gets_its_own_settings():
    model = tiny_model()
    facts = {
        "model.layers.0.self_attn.qkv_proj": {
            "class": "MergedLinear", "r": 3, "lora_alpha": 6, "use_rslora": True,
            "segments": [32, 16, 16], "enable_lora": [True, False, True],
        },
        "model.layers.1.self_attn.qkv_proj": {"class": "Linear", "r": 5, "lora_alpha": 1, "use_rslora": False},
        "model.embed_tokens": {"class": "Embedding", "r": 2, "lora_alpha": 4, "use_rslora": False},
    }  # fmt: skip
    config = p3.LoraConfig(lora_dropout=0.25)
    weights = {name: id(p) for name, p in model.named_parameters()}
    report = inject_layers(model, facts, config)
    assert adapter_metadata(model)["layers"] == facts
    segments = {row.module: row.segments for row in report if row.segments}
    assert segments == {"model.layers.0.self_attn.qkv_proj": ("q_proj", "v_proj")} and len(report) == 3
    assert model.lora_config is config and model.model.layers[0].self_attn.qkv_proj.lora_dropout.p == 0.25
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    assert all(id(p) == weights[name] for name, p in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("layers.7.mlp.down_proj", {}, "no layer 'model.layers.7.mlp.down_proj'"),
        ("layers.0.mlp.down_proj", {"class": "Conv1d"}, "to adapt as 'Conv1d'"),
        ("layers.0.mlp", {}, "is of class Phi3MLP"),
        ("embed_tokens", {}, "takes a plain nn.Linear"),
        ("layers.0.mlp.down_proj", {"r": None}, "r=None"),
        ("layers.0.mlp.down_proj", {"lora_alpha": "8"}, "lora_alpha='8'"),
        ("layers.0.mlp.down_proj", {"class": "MergedLinear"}, "segments=None"),
        ("layers.0.mlp.down_proj", {"class": "MergedLinear", "segments": [8], "enable_lora": [True]}, "add up to 8"),
        ("layers.0.mlp.down_proj", {"class": "MergedLinear", "segments": [32], "enable_lora": []}, "enable_lora="),
        ("lm_head", {}, "tied embeddings"),
    ],
)
def test_settings_that_do_not_fit_swap_nothing(path, changes, message):
    model = tiny_model(tie_word_embeddings=path == "lm_head")
    path = path if path == "lm_head" else f"model.{path}"
    modules = list(model.modules())
    fitting = {"class": "Linear", "r": 4, "lora_alpha": 8, "use_rslora": False}
    with pytest.raises(p3.Phi3LoRAError, match=message):
        inject_layers(model, {"model.layers.1.mlp.down_proj": fitting, path: {**fitting, **changes}}, p3.LoraConfig())
    assert modules == list(model.modules())
