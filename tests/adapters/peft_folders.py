"""Models, and PEFT folders of ours and of PEFT's, for the tests of both directions."""

from __future__ import annotations

import itertools
import json
import warnings
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
SUBSETS = [list(s) for n in (1, 2, 3) for s in itertools.combinations(QKV, n)]
SUBSETS += [
    ["gate_proj"],
    ["up_proj", "o_proj"],
    ["gate_proj", "up_proj", "down_proj"],
    ["q_proj", "up_proj", "down_proj"],
]
LAYER = "model.layers.0."
SHALLOW = {"num_hidden_layers": 1}

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
    facts = adapter_metadata(model)["layers"]
    facts[LAYER + "self_attn.o_proj"] |= {"r": 2, "lora_alpha": 8}  # scaling 4 where the others have 2
    facts[LAYER + "self_attn.qkv_proj"] |= {"r": 5, "lora_alpha": 5 * 2 * 1.3}
    facts[LAYER + "mlp.gate_up_proj"] |= {"r": 4, "lora_alpha": 3, "use_rslora": True}
    model = base_model(changes)
    p3.lora.inject.inject_layers(model, facts, p3.LoraConfig(r=3, lora_alpha=6))
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
    """A folder of PEFT's own with random B, and PEFT's model."""
    torch.manual_seed(1)
    task = "CAUSAL_LM" if hasattr(base, "generate") else None
    defaults = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": task}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**defaults, **settings})).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # embeddings among the targets
        model.save_pretrained(path)
    return model
