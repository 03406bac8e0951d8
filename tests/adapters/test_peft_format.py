"""PEFT folders: what we write, PEFT, transformers, vLLM and llama.cpp compute as we do; what PEFT writes, we do."""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import adapted_model, adapters_of, longrope_model, randomize_adapters, same_tensors, tiny_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import phi3lora as p3
from phi3lora.adapters.files import adapter_facts
from phi3lora.adapters.serving import max_lora_rank
from phi3lora.errors import AdapterError, ModelError, Phi3LoRAError
from phi3lora.model.injection import lora_layers

IDS = torch.arange(10, 40)[None]
MEMBERS = {"multi-head": {"num_key_value_heads": 4}, "grouped-query": {}, "tied": {"tie_word_embeddings": True}}
QKV = ("q_proj", "k_proj", "v_proj")
SUBSETS = [list(s) for n in (1, 2, 3) for s in itertools.combinations(QKV, n)]
SUBSETS += [
    ["gate_proj"],
    ["up_proj", "o_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["q_proj", "up_proj", "down_proj"],
]
LAYER = "model.layers.0."

members = pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS)
layouts = pytest.mark.parametrize("layout", ["uniform", "pattern", "split"])


def base_model(changes: dict | None = None, head_scale: float = 10.0):
    """The plain model that :func:`adapted_model` puts its adapters into."""
    model = tiny_model(**(changes or {}))
    model.lm_head.weight.data.mul_(head_scale)
    return model


def unequal_model(changes: dict | None = None):
    """Adapters whose ranks and scalings differ from layer to layer, as an imported adapter's may."""
    model = adapted_model(changes=changes, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    facts = adapter_facts(model)["layers"]
    facts[LAYER + "self_attn.o_proj"] |= {"r": 2, "lora_alpha": 8}  # scaling 4 where the others have 2
    facts[LAYER + "self_attn.qkv_proj"] |= {"r": 5, "lora_alpha": 5 * 2 * 1.3}
    facts[LAYER + "mlp.gate_up_proj"] |= {"r": 4, "lora_alpha": 3, "use_rslora": True}
    model = base_model(changes)
    p3.model.injection.inject_layers(model, facts, p3.LoraConfig(r=3, lora_alpha=6))
    randomize_adapters(model)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_acts(model, base) -> None:
    """The adapters matter: else every comparison below would hold for nothing."""
    assert (logits(model) - logits(base)).abs().max() > 0.05


def with_peft(base, path):
    """PEFT's model of a folder; a missing or unexpected key is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected|Missing).*")
        return PeftModel.from_pretrained(base, path).eval()


def with_transformers(base, path):
    info = base.load_adapter(str(path))
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    return base.eval()


def as_llama(phi3) -> LlamaForCausalLM:
    """The same function as a llama: fused layers split, by plain slicing."""
    c = phi3.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps, max_position_embeddings=512,
        tie_word_embeddings=c.tie_word_embeddings, pad_token_id=3,
    )  # fmt: skip
    head = c.hidden_size // c.num_attention_heads
    q, kv = c.num_attention_heads * head, c.num_key_value_heads * head
    state = {}
    for key, weight in phi3.state_dict().items():
        if "qkv_proj" in key:
            parts = dict(zip(QKV, weight.split([q, kv, kv]), strict=True))
            state.update({key.replace("qkv_proj", name): part for name, part in parts.items()})
        elif "gate_up_proj" in key:
            state[key.replace("gate_up_proj", "gate_proj")], state[key.replace("gate_up_proj", "up_proj")] = (
                weight.chunk(2)
            )
        else:
            state[key] = weight
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(state)
    return llama


def config_of(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


def change_config(path: Path, **changes) -> None:
    (path / "adapter_config.json").write_text(json.dumps({**config_of(path), **changes}))


def change_tensors(path: Path, change, keep_header: bool = False) -> None:
    file = path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() if keep_header else {"format": "pt"}
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


# --- What others compute from our folder


def test_the_llama_is_the_phi3():
    base = base_model()
    torch.testing.assert_close(logits(as_llama(base)), logits(base), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_peft_computes_our_logits_for_every_subset_of_segments(tmp_path, targets, rslora):
    model = adapted_model(target_modules=targets, use_rslora=rslora, r=3, lora_alpha=30)
    want = logits(model)
    assert_acts(model, base_model())
    for layout in ("uniform", "pattern"):
        p3.export_peft(model, tmp_path / layout, layout=layout)
        torch.testing.assert_close(logits(with_peft(base_model(), tmp_path / layout)), want, atol=1e-4, rtol=0)
    p3.export_peft(model, tmp_path / "split", layout="split")
    torch.testing.assert_close(logits(with_peft(as_llama(base_model()), tmp_path / "split")), want, atol=1e-4, rtol=0)


@members
@layouts
@pytest.mark.parametrize("load", [with_peft, with_transformers])
@pytest.mark.parametrize("make", [adapted_model, unequal_model])
def test_peft_and_transformers_compute_our_logits(tmp_path, changes, layout, load, make):
    model = make(changes=changes)
    p3.export_peft(model, tmp_path / "a", layout=layout)
    base = base_model(changes)
    assert_acts(model, base)
    got = logits(load(as_llama(base) if layout == "split" else base, tmp_path / "a"))
    torch.testing.assert_close(got, logits(model), atol=1e-4, rtol=0)


def test_the_output_head_and_the_embeddings_are_exported_too(tmp_path):
    model = adapted_model(target_modules=["embed_tokens", "lm_head", "q_proj"])
    p3.export_peft(model, tmp_path)
    assert {"base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_A.weight"} <= set(
        load_file(tmp_path / "adapter_model.safetensors")
    )
    torch.testing.assert_close(logits(with_peft(base_model(), tmp_path)), logits(model), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(with_transformers(base_model(), tmp_path)), logits(model), atol=1e-4, rtol=0)


class Net(nn.Module):
    """One layer of each kind, two convolutions of which one is adapted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.inner = nn.ModuleDict({"conv": nn.Conv2d(4, 2, 1)})
        self.fused = nn.Linear(6, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.inner["conv"](self.conv(self.embed(ids)[:, None])).mean(dim=(2, 3))
        return self.fused(torch.cat([x, x, x], dim=-1))


NET_IDS = torch.arange(8).view(1, 8)


def adapted_net(**changes) -> Net:
    net = Net()
    targets = ["embed", "conv", "b"]
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets, "segments": {"fused": {"a": 3, "b": 4}}}
    p3.inject_lora(net, p3.LoraConfig(**{**settings, **changes}))
    randomize_adapters(net, std=0.5)
    return net


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


def test_an_adapter_in_some_layers_only_names_them_in_full(tmp_path):
    model = adapted_model(target_modules=["model.layers.1.self_attn.qkv_proj"])
    p3.export_peft(model, tmp_path)
    assert config_of(tmp_path)["target_modules"] == ["model.layers.1.self_attn.qkv_proj"]
    torch.testing.assert_close(logits(with_peft(base_model(), tmp_path)), logits(model), atol=1e-4, rtol=0)


# --- Loaders' rules, restated


@pytest.mark.parametrize("make", [adapted_model, unequal_model])
def test_the_uniform_layout_keeps_vllm_s_rules(tmp_path, make):
    """PEFTHelper's fields and checks, parse_fine_tuned_lora_name, and the shapes that it copies into its buffers."""
    model = make()
    exported = p3.export_peft(model, tmp_path / "support")
    config = config_of(tmp_path / "support")
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["bias"] == "none" and config["modules_to_save"] is None and config["use_dora"] is False
    allowed = max_lora_rank(config["r"])
    assert f"--max-lora-rank {allowed}" in exported.commands["vLLM"] and config["r"] == exported.rank <= allowed
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


def test_ranks_that_vllm_allows():
    assert [max_lora_rank(r) for r in (1, 2, 8, 9, 48, 257, 320, 321, 512, 513)] == [
        1, 8, 8, 16, 64, 320, 320, 512, 512, None,
    ]  # fmt: skip


def test_the_config_s_scaling_is_each_module_s(tmp_path):
    model = adapted_model(r=3, lora_alpha=5, use_rslora=True)
    p3.export_peft(model, tmp_path)
    config = config_of(tmp_path)
    assert config["r"] == 9 and config["use_rslora"] is False  # 3 segments of rank 3
    assert config["lora_alpha"] / 9 == pytest.approx(5 / 3**0.5, rel=1e-12)


def test_a_power_of_two_between_scalings_is_exact_and_others_are_said(tmp_path):
    exported = p3.export_peft(unequal_model(), tmp_path / "a")
    qkv, gate_up = LAYER + "self_attn.qkv_proj", LAYER + "mlp.gate_up_proj"
    assert set(exported.rounded) == {qkv, gate_up}  # o_proj's ratio is 2
    assert "pattern" in str(exported)
    assert p3.export_peft(unequal_model(), tmp_path / "b", layout="pattern").rounded == ()
    assert (
        config_of(tmp_path / "b")["rank_pattern"].keys()
        == config_of(tmp_path / "b")["alpha_pattern"].keys() - {"^model\\.layers\\.1\\.self_attn\\.o_proj"}
        or config_of(tmp_path / "b")["rank_pattern"]
    )


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
        "--max-lora-rank 16",
        "convert_lora_to_gguf.py --base-model-id microsoft/Phi-3-mini-4k-instruct",
        f"ADAPTER {tmp_path / 'adapter.gguf'}",
        'PARAMETER stop "<|end|>"',
    ):
        assert line in text


def test_a_longrope_model_s_regimes_are_mentioned(tmp_path):
    assert "longrope: documents of up to 40 tokens" in str(p3.export_peft(longrope_model(), tmp_path))


def test_the_pattern_layout_offers_peft_alone(tmp_path):
    assert list(p3.export_peft(adapted_model(), tmp_path, layout="pattern").commands) == ["PEFT"]


# --- Our own folders come back


@members
@layouts
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_our_own_export_comes_back_bit_exact(tmp_path, changes, layout, rslora):
    for i, targets in enumerate(SUBSETS):
        model = adapted_model(changes=changes, target_modules=targets, use_rslora=rslora, r=3, lora_alpha=7)
        randomize_adapters(model)
        p3.export_peft(model, tmp_path / str(i), layout=layout)
        again = base_model(changes)
        report = p3.import_peft(again, tmp_path / str(i))
        assert adapter_facts(again) == adapter_facts(model)
        assert same_tensors(adapters_of(again), adapters_of(model))
        assert again.lora_config == model.lora_config
        assert report.trainable_parameters == sum(t.numel() for t in adapters_of(model).values())


@layouts
def test_unequal_layers_come_back_as_they_were(tmp_path, layout):
    model, again = unequal_model(), base_model()
    exported = p3.export_peft(model, tmp_path, layout=layout)
    p3.import_peft(again, tmp_path)
    assert adapter_facts(again) == adapter_facts(model)
    rounded = {
        name for name in adapters_of(model) if any(name.startswith(r.rpartition(".")[0]) for r in exported.rounded)
    }
    for name, tensor in adapters_of(again).items():
        tolerance = 2**-22 if name in rounded else 0
        torch.testing.assert_close(tensor, adapters_of(model)[name], rtol=tolerance, atol=0)
    assert bool(rounded) == (layout != "pattern")


@layouts
def test_an_import_is_exported_and_saved_again_like_any_adapter(tmp_path, layout):
    peft_made(base_model(), tmp_path / "theirs", target_modules=["qkv_proj", "o_proj"], rank_pattern={"o_proj": 2})
    model = base_model()
    p3.import_peft(model, tmp_path / "theirs")
    p3.export_peft(model, tmp_path / "ours", layout=layout)
    p3.save_adapter(model, tmp_path / "ours.safetensors")
    for load, path in ((p3.import_peft, tmp_path / "ours"), (p3.load_adapter, tmp_path / "ours.safetensors")):
        again = base_model()
        load(again, path)
        assert adapter_facts(again) == adapter_facts(model)
        assert same_tensors(adapters_of(again), adapters_of(model))


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
def test_a_folder_changed_since_counts_as_peft_reads_it(tmp_path, layout, caplog):
    base = base_model()
    p3.export_peft(adapted_model(), tmp_path, layout=layout)
    change_config(tmp_path, lora_alpha=3, alpha_pattern={})
    again = base_model()
    with caplog.at_level(logging.WARNING, "phi3lora"):
        p3.import_peft(again, tmp_path)
    assert "changed since export_peft wrote it" in caplog.text
    theirs = with_peft(as_llama(base) if layout == "split" else base, tmp_path)
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-4, rtol=0)


@layouts
def test_without_our_header_the_structure_counts(tmp_path, layout):
    model, again = adapted_model(use_rslora=True), base_model()
    p3.export_peft(model, tmp_path, layout=layout)
    change_tensors(tmp_path, lambda tensors: None)
    p3.import_peft(again, tmp_path)
    kinds = {facts["class"] for facts in adapter_facts(again)["layers"].values()}
    assert kinds == ({"Linear", "MergedLinear"} if layout == "split" else {"Linear"})
    torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=0)


def test_values_trained_on_in_the_padding_are_kept(tmp_path):
    """PEFT trains the padded rows too; a header that survived it must not cut them off."""
    p3.export_peft(adapted_model(), tmp_path)

    def train_on(tensors):
        for tensor in tensors.values():
            tensor += 0.02 * torch.randn(tensor.shape)

    change_tensors(tmp_path, train_on, keep_header=True)
    again = base_model()
    p3.import_peft(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(with_peft(base_model(), tmp_path)), atol=1e-4, rtol=0)


# --- What PEFT writes


def peft_made(base, path: Path, **settings):
    """A folder of PEFT's own with random B, and PEFT's model."""
    torch.manual_seed(1)
    task = "CAUSAL_LM" if hasattr(base, "generate") else None
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": task}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **settings})).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings among the targets
        model.save_pretrained(path)
    return model


THEIRS = {
    "fused": {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "rslora": {"target_modules": ["qkv_proj", "down_proj"], "use_rslora": True},
    "regex": {"target_modules": r".*\.(qkv_proj|down_proj)", "exclude_modules": None},
    "all-linear": {"target_modules": "all-linear"},
    "one layer": {"target_modules": ["qkv_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": ["qkv_proj", "o_proj", "down_proj"], "use_rslora": True,
        "rank_pattern": {r"layers\.0\.self_attn\.qkv_proj": 7, "o_.*": 2}, "alpha_pattern": {"^model.*down_proj": 32},
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "qkv_proj"]},
    "gaussian": {"target_modules": ["qkv_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_an_adapter_of_peft_s_gives_peft_s_logits(tmp_path, settings):
    theirs, ours = peft_made(base_model(), tmp_path, **settings), base_model()
    report = p3.import_peft(ours, tmp_path)
    if settings.get("init_lora_weights") is None:
        assert (logits(theirs) - logits(base_model())).abs().max() > 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)
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
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)
    found = {segment for row in report for segment in row.segments} | {"o_proj"} & set(settings["target_modules"])
    assert found == set(settings["target_modules"])


def test_split_names_load_into_matching_adapters(tmp_path):
    theirs = peft_made(as_llama(base_model()), tmp_path, target_modules=["q_proj", "v_proj"])
    ours = adapted_model(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    p3.import_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)


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
def test_names_with_and_without_prefixes(tmp_path, change):
    theirs, ours = peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "down_proj"]), base_model()
    rename(tmp_path, change)
    p3.import_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)


def test_lower_precision_becomes_float32(tmp_path):
    peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    change_tensors(tmp_path, lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}))
    ours = base_model()
    p3.import_peft(ours, tmp_path)
    want = load_file(tmp_path / "adapter_model.safetensors")[
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    ]
    layer = lora_layers(ours)[LAYER + "self_attn.qkv_proj"]
    assert layer.lora_A.dtype == torch.float32 and torch.equal(layer.lora_A, want.float())


def test_a_pickle_of_tensors_is_read_and_one_with_code_is_not(tmp_path):
    theirs = peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    ours = base_model()
    p3.import_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)
    torch.save({**tensors, "x": Path("/")}, tmp_path / "adapter_model.bin")
    assert_refused(base_model(), tmp_path, "cannot be read without running code from it")


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
        ({"peft_type": None}, "peft_type=None"),
        ({"use_dora": True}, "use_dora=True cannot be imported"),
        ({"bias": "all"}, "bias='all' cannot be imported .trained biases"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] cannot be imported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*a base that its initialisation changed"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices=\[5\]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"target_parameters": ["mlp.weight"]}, "target_parameters="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config="),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"lora_from_next_year": 3}, "unknown setting lora_from_next_year=3"),
        ({"r": 5}, r"the config says rank 5; allowed: A \(5, in\)"),
        ({"r": "four"}, "r='four'"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": -1}, "lora_alpha=-1"),
        ({"use_rslora": "yes"}, "use_rslora='yes'"),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern: 'o_proj': 0; allowed: .*whole numbers >= 1"),
        ({"alpha_pattern": {"o_proj": "x"}}, "alpha_pattern: 'o_proj': 'x'"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\]"),
    ],
    ids=str,
)
def test_a_config_that_has_no_counterpart_is_refused(tmp_path, changes, message):
    peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "o_proj"])
    change_config(tmp_path, **changes)
    assert_refused(base_model(), tmp_path, message, Phi3LoRAError)


def test_settings_that_change_nothing_are_passed_over(tmp_path):
    peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    change_config(tmp_path, layers_to_transform=[7], fan_in_fan_out=True, added_later=None, modules_to_save=[])
    p3.import_peft(base_model(), tmp_path)


O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{O_PROJ}.lora_magnitude_vector": torch.ones(32)}), "DoRA's magnitudes"),
        (lambda t: t.update({f"{O_PROJ}.lora_magnitude_vector.weight": torch.ones(32)}), "DoRA's magnitudes"),
        (lambda t: t.update({f"{O_PROJ}.lora_B.bias": torch.ones(32)}), "a trained bias"),
        (lambda t: t.update({f"{O_PROJ}.base_layer.bias": torch.ones(32)}), "a trained bias"),
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(4)}), "a whole module"),
        (lambda t: t.update({f"{O_PROJ}.lora_C.weight": torch.ones(4)}), "unknown tensor .*lora_C"),
        (lambda t: t.update({f"{O_PROJ}.lora_A": torch.ones(4)}), "unknown tensor"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(512, 32)}), "another base"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(520, 32)}), "resized embeddings"),
        (lambda t: t.pop(f"{O_PROJ}.lora_B.weight"), "has only lora_A; it needs both"),
        (lambda t: t[f"{O_PROJ}.lora_A.weight"].fill_(float("nan")), "o_proj.lora_A.weight.*NaN"),
        (lambda t: t[f"{O_PROJ}.lora_B.weight"][0].fill_(float("inf")), "o_proj.lora_B.weight.*infinite"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(4, 31)}), r"A \(4, 31\).*allowed: A \(r, 32\)"),
        (lambda t: t.update({f"{O_PROJ}.lora_B.weight": torch.ones(31, 4)}), r"B \(31, 4\)"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(3, 32)}), "the config says rank 4"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.weight": torch.ones(())}), "the config says rank 4"),
        (lambda t: t.update({f"{O_PROJ}.lora_A.default.weight": torch.ones(4, 32)}), "twice"),
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


@pytest.mark.parametrize(
    "name", ["model.layers.9.self_attn.o_proj", "../../o_proj", "..", "__class__", "model.config", "model.layers.0.mlp"]
)
def test_a_name_that_leads_out_of_the_model_is_refused(tmp_path, name):
    peft_made(base_model(), tmp_path, target_modules=["o_proj"])
    rename(tmp_path, lambda key: key.replace("model.layers.0.self_attn.o_proj", name))
    assert_refused(base_model(), tmp_path, "not in the model|a Phi3MLP; allowed: Linear")


@pytest.mark.parametrize("layout", ["uniform", "split"])
def test_adapters_built_otherwise_are_not_loaded_into(tmp_path, layout):
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
    assert_refused(model, path, "no such folder")
    peft_made(base_model(), path, target_modules=["o_proj"])
    assert_refused(model, path / "adapter_model.safetensors", "no such folder")
    whole = (path / "adapter_model.safetensors").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 100):
        (path / "adapter_model.safetensors").write_bytes(damaged)
        assert_refused(model, path, "not a readable safetensors file")
    (path / "adapter_model.safetensors").unlink()
    assert_refused(model, path, "has no adapter_model.safetensors")
    for text in ("{", "[1]", ""):
        (path / "adapter_config.json").write_text(text)
        assert_refused(model, path, "not a readable PEFT config|allowed: a JSON object")
    (path / "adapter_config.json").write_bytes(b"\xff\xfe")
    assert_refused(model, path, "not a readable PEFT config")
    (path / "adapter_config.json").unlink()
    assert_refused(model, path, "not a readable PEFT config")


@pytest.mark.parametrize("header", ["{", "[]", "{}", '{"layers": 3}'])
def test_a_damaged_header_is_passed_over(tmp_path, header):
    theirs = peft_made(base_model(), tmp_path, target_modules=["qkv_proj"])
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"phi3lora": header})
    ours = base_model()
    p3.import_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)


def test_what_cannot_be_exported_is_refused(tmp_path):
    def refused(model, message: str, **options) -> None:
        with pytest.raises(AdapterError, match=message):
            p3.export_peft(model, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()

    model = adapted_model()
    refused(base_model(), "no adapters to export")
    refused(model, "layout='fused'; allowed: 'uniform', 'pattern', 'split'", layout="fused")
    with p3.disabled(model):
        refused(model, "switched off or merged")
    with p3.merged(model):
        refused(model, "switched off or merged")
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


def test_layers_built_by_hand_make_the_round_trip(tmp_path):
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(p3.MergedLinear(5, 6, r=2, segments=(4, 2), enable_lora=[True, True], bias=False))

    model, again = net(), nn.Sequential(nn.Linear(5, 6, bias=False))
    randomize_adapters(model)
    again[0].load_state_dict({"weight": model[0].weight})
    p3.export_peft(model, tmp_path)
    p3.import_peft(again, tmp_path)
    assert same_tensors(adapters_of(again), adapters_of(model))
    x = torch.randn(3, 5)
    torch.testing.assert_close(again(x), model(x))
