"""Models and PEFT folders, ours and PEFT's, for the tests of export and import."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from conftest import adapted_model, randomize_adapters, tiny_model
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_metadata

IDS = torch.arange(10, 40)[None]
MEMBERS = {"multi-head": {"num_key_value_heads": 4}, "grouped-query": {}, "tied": {"tie_word_embeddings": True}}
QKV = ("q_proj", "k_proj", "v_proj")
LAYER = "model.layers.0."

layouts = pytest.mark.parametrize("layout", ["uniform", "pattern", "split"])


def base_model(changes: dict | None = None, head_scale: float = 10.0):
    """The plain model that :func:`adapted_model` puts its adapters into."""
    model = tiny_model(**(changes or {}))
    model.lm_head.weight.data.mul_(head_scale)
    return model


def unequal_model():
    """Adapters whose ranks and scalings differ from layer to layer, as an imported adapter's may."""
    model = adapted_model(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"])
    layers = adapter_metadata(model)["layers"]
    layers[LAYER + "self_attn.o_proj"] |= {"r": 2, "lora_alpha": 8}  # scaling 4 where the others have 2
    layers[LAYER + "self_attn.qkv_proj"] |= {"r": 5, "lora_alpha": 5 * 2 * 1.3}
    layers[LAYER + "mlp.gate_up_proj"] |= {"r": 4, "lora_alpha": 3, "use_rslora": True}
    model = base_model()
    p3.lora.inject.inject_layers(model, layers, p3.LoraConfig(r=3, lora_alpha=6))
    randomize_adapters(model)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same_logits(model, other) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=0)


def with_peft(base, path):
    """PEFT's model of a folder; PEFT warns of missing and unexpected keys, and warnings are errors here."""
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
    head_dim = c.hidden_size // c.num_attention_heads
    kv = c.num_key_value_heads * head_dim
    fused = {
        "qkv_proj": {"q_proj": c.hidden_size, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
    }
    state = {}
    for key, weight in phi3.state_dict().items():
        name = key.split(".")[-2]
        parts = fused.get(name, {name: len(weight)})
        for part, rows in zip(parts, weight.split(list(parts.values())), strict=True):
            state[key.replace(name, part)] = rows
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(state)
    return llama


def config_of(path: Path) -> dict:
    return json.loads((path / "adapter_config.json").read_text())


def change_config(path: Path, **changes) -> None:
    (path / "adapter_config.json").write_text(json.dumps({**config_of(path), **changes}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object], keep_header: bool = False) -> None:
    file = path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() if keep_header else {"format": "pt"}
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


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


def peft_made(base, path: Path, **settings):
    """Write a folder with PEFT, with random B; return PEFT's model."""
    torch.manual_seed(1)
    task = "CAUSAL_LM" if hasattr(base, "generate") else None
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": task}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings among the targets
        model = peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **settings})).eval()
        model.save_pretrained(path)
    return model
