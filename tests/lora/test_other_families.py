"""Our layers in other architectures of transformers, and in its Trainer: what worked with PEFT's works with ours."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import randomize_adapters, tiny_model
from transformers import AutoModelForCausalLM

import phi3lora as p3
from phi3lora.lora.inject import lora_layers

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "GPTNeoX", "StableLm", "Olmo", "Olmo2",
    "Granite", "Cohere", "Starcoder2", "OPT",
)  # fmt: skip
OWN = {"OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}}  # other names of the same sizes
HEADS_OF_8 = ("Llama", "Mistral", "Qwen3", "Gemma", "Gemma2")  # whose config has head_dim
IDS = torch.arange(3, 20)[None]


def make(family: str):
    values = {**SIZES, **OWN.get(family, {}), **({"head_dim": 8} if family in HEADS_OF_8 else {})}
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapted_model_of_another_family_computes_with_the_merged_weights(family):
    model = make(family)
    plain = copy.deepcopy(model)
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    randomize_adapters(model)
    before, adapted = logits(plain), logits(model)
    with torch.no_grad():
        for path, layer in lora_layers(model).items():
            if layer.lora_A.shape[0] == layer.r:  # no fused layer: its delta is one product
                plain.get_submodule(path).weight += 3.0 * layer.lora_B @ layer.lora_A
            else:
                plain.get_submodule(path).weight += layer.delta()
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted, logits(plain), rtol=1e-3, atol=1e-4)
    with p3.merged(model):
        torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-4)


def test_transformers_trainer_trains_our_layers_alone(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model()
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": torch.arange(5, 21), "labels": torch.arange(5, 21)} for _ in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.endswith(("lora_A", "lora_B"))}
