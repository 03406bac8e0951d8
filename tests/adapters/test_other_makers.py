"""Adapters that people have: configs of PEFT 0.5 to 0.21, Unsloth's and mlx-lm's folders; right, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft_folders import base_model, change_config, config_of, logits, peft_made
from safetensors.torch import load_file, save_file

import phi3lora as p3
from phi3lora.errors import AdapterError

# Version -> the fields that its LoraConfig writes beside those of 0.5, at the values that it writes.
_FIELDS_OF_0_5 = (
    "auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r revision target_modules task_type"
).split()
_ADDED = {
    "0.8": {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "megatron_config": None,
            "megatron_core": "megatron.core", "loftq_config": {}},
    "0.11": {"use_dora": False, "layer_replication": None},
    "0.15": {"exclude_modules": None, "trainable_token_indices": None, "eva_config": None, "corda_config": None,
             "lora_bias": False},
    "0.17": {"use_qalora": False, "qalora_group_size": 16, "target_parameters": None},
    "0.19": {"peft_version": "0.19.1", "lora_ga_config": None, "alora_invocation_tokens": None, "use_bdlora": None,
             "arrow_config": None, "ensure_weight_tying": False},
}  # fmt: skip
VERSIONS = ["0.5", *_ADDED, "installed"]


def written_by(version: str, path) -> None:
    """Reduce a folder's config to the fields of a version."""
    if version == "installed":
        return
    config = {key: value for key, value in config_of(path).items() if key in _FIELDS_OF_0_5}
    for added, fields in _ADDED.items():
        if [int(part) for part in version.split(".")] >= [int(part) for part in added.split(".")]:
            config |= fields
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", VERSIONS)
def test_configs_of_peft_s_versions_are_read_and_a_field_that_changes_the_adapter_is_refused(tmp_path, version):
    made = peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "down_proj"], lora_alpha=12)
    written_by(version, tmp_path)
    model = base_model()
    p3.import_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(made), atol=1e-5, rtol=0)
    for field, value in {"bias": "all", "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}.items():
        before = config_of(tmp_path)
        change_config(tmp_path, **{field: value})
        with pytest.raises(AdapterError, match=f"{field}=.*cannot be imported"):
            p3.import_peft(base_model(), tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(before))


def test_unsloth_s_save_on_its_llama_style_base_becomes_segments(tmp_path):
    """It names q_proj, ... and a base of its own, and its auto_mapping has keys that PEFT's has not."""
    from peft_folders import as_llama

    split = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made = peft_made(as_llama(base_model()), tmp_path, target_modules=split, lora_alpha=16)
    mapping = {"base_model_class": "MistralForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    name = "unsloth/Phi-3-mini-4k-instruct-bnb-4bit"
    change_config(tmp_path, auto_mapping=mapping, base_model_name_or_path=name, task_type=None, loftq_config={})
    model = base_model()
    p3.import_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(made), atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_is_read(tmp_path, start):
    made = peft_made(base_model(), tmp_path, target_modules=["qkv_proj", "down_proj"], init_lora_weights=start)
    torch.manual_seed(2)
    for name, parameter in made.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path)
    model = base_model()
    p3.import_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(made), atol=1e-5, rtol=0)


# --- mlx-lm


def mlx_folder(path, model, rank: int = 2, scale: float = 3.0, **config):
    """Write a folder as mlx-lm does, from the adapters of a model that computes the same."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, _, side = name.rpartition(".")
        if side in ("lora_A", "lora_B"):
            tensors[f"{module}.{side.lower()}"] = tensor.t().contiguous()
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    whole = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "batch_size": 4, "iters": 100}
    (path / "adapter_config.json").write_text(json.dumps({**whole, **config}))


def adapted_whole():
    """Whole layers of rank 2, scaled by 3, as mlx-lm adapts them."""
    model = base_model()
    layers = {
        f"model.layers.{i}.{name}": {"class": "Linear", "r": 2, "lora_alpha": 6.0, "use_rslora": False}
        for i in (0, 1)
        for name in ("self_attn.qkv_proj", "mlp.down_proj")
    }
    p3.lora.inject.inject_layers(model, layers, p3.LoraConfig(r=2, lora_alpha=6))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_mlx_lm_s_folder_is_the_same_function(tmp_path):
    """mlx-lm adds scale * (x lora_a) lora_b: tuner/lora.py, LoRALinear."""
    want = adapted_whole()
    mlx_folder(tmp_path / "mlx", want)
    model = base_model()
    report = p3.import_peft(model, tmp_path / "mlx")
    assert len(report) == 4
    torch.testing.assert_close(logits(model), logits(want), atol=1e-6, rtol=0)
    assert (logits(model) - logits(base_model())).abs().max() > 0.1


def test_what_mlx_lm_s_folder_cannot_say_is_refused(tmp_path):
    def refused(message: str, change=None, **config) -> None:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        mlx_folder(path, adapted_whole(), **config)
        if change is not None:
            tensors = load_file(path / "adapters.safetensors")
            change(tensors)
            save_file(tensors, path / "adapters.safetensors")
        model = base_model()
        with pytest.raises(AdapterError, match=message):
            p3.import_peft(model, path)
        assert not any("lora_" in name for name, _ in model.named_parameters())

    down = "model.layers.0.mlp.down_proj"
    refused("fine_tune_type='dora' of mlx-lm; allowed: 'lora'", fine_tune_type="dora")
    refused("fine_tune_type='full'", fine_tune_type="full")
    refused("lora_parameters=None", lora_parameters=None)
    refused("has rank 0 and scale 3.0", rank=0)
    refused("has rank 2 and scale None", lora_parameters={"rank": 2, "alpha": 6})
    refused("the config says rank 3", rank=3)
    refused(f"{down}.m'.*DoRA's m", lambda t: t.update({f"{down}.m": torch.ones(32)}))
    refused("only lora_A", lambda t: t.pop(f"{down}.lora_b"))
    refused(
        "which is not in the model", lambda t: t.update({"x.lora_a": torch.ones(4, 2), "x.lora_b": torch.ones(2, 4)})
    )
    refused("NaN or infinite|not finite", lambda t: t[f"{down}.lora_a"].fill_(float("nan")))


def test_an_alpha_of_an_early_mlx_lm_is_not_dropped(tmp_path):
    """Until 0.14.1 it computed scale * (alpha / rank) * (x lora_a) lora_b; from 0.14.2 on, it ignores an alpha."""

    def folder(name: str, alpha, **settings):
        parameters = {"rank": 2, "alpha": alpha, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.qkv_proj"]}
        mlx_folder(tmp_path / name, adapted_whole(), lora_parameters=parameters, **settings)
        if not settings:
            early = {"lora_layers": 2, "use_dora": False, "lora_parameters": parameters}
            (tmp_path / name / "adapter_config.json").write_text(json.dumps(early))
        return tmp_path / name

    with pytest.raises(AdapterError, match=r"alpha 16: mlx-lm before 0.14.2 .* / rank, 24, and later .* alone, 3; set"):
        p3.import_peft(base_model(), folder("early", 16.0))
    with pytest.raises(AdapterError, match="alpha '16'; allowed: a number"):
        p3.import_peft(base_model(), folder("text", "16"))
    for path in (folder("equal", 2), folder("none", None), folder("later", 16.0, fine_tune_type="lora")):
        model = base_model()
        p3.import_peft(model, path)
        torch.testing.assert_close(logits(model), logits(adapted_whole()), atol=1e-6, rtol=0)


def test_the_config_says_whose_folder_it_is(tmp_path):
    """A converted adapter may lie beside the original; an interrupted mlx-lm run has numbered files alone."""
    made = peft_made(base_model(), tmp_path / "both", target_modules=["qkv_proj"])
    mlx_folder(tmp_path / "mlx", adapted_whole())
    (tmp_path / "mlx" / "adapters.safetensors").rename(tmp_path / "both" / "adapters.safetensors")
    model = base_model()
    p3.import_peft(model, tmp_path / "both")
    torch.testing.assert_close(logits(model), logits(made), atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match=r"it has mlx-lm's adapter_config.json and no adapters.safetensors$"):
        p3.import_peft(base_model(), tmp_path / "mlx")
    (tmp_path / "mlx" / "0000100_adapters.safetensors").touch()
    with pytest.raises(AdapterError, match=r"it holds 0000100_adapters.safetensors: give one of them"):
        p3.import_peft(base_model(), tmp_path / "mlx")


def test_another_trainer_s_output_folder_names_its_adapters(tmp_path):
    from phi3lora.cli.commands import find_adapter

    for step in (10, 9):
        peft_made(base_model(), tmp_path / f"checkpoint-{step}", target_modules=["qkv_proj"])
    for use in (lambda path: p3.import_peft(base_model(), path), find_adapter):
        with pytest.raises(AdapterError, match="checkpoint-9, checkpoint-10"):
            use(tmp_path)
