"""Adapter files: what is written is what loralib would write, what is read is checked before anything changes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import loralib as lora
import pytest
import torch
from conftest import lively_model, randomize_adapters
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import phi3lora as p3
from phi3lora.adapters import adapter_file as files
from phi3lora.adapters.adapter_file import adapter_metadata, adapter_state_dict, load_adapter_state, read_adapter
from phi3lora.errors import AdapterError, Phi3LoRAError
from phi3lora.lora.inject import lora_layers

IDS = torch.arange(10, 30)[None]
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
QKV, OUT = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"

suffixes = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])


def adapted(seed: int = 0, **changes) -> nn.Module:
    """The same base each time, with adapters that depend on ``seed``."""
    model = lively_model()
    p3.inject_lora(model, p3.LoraConfig(**{**CONFIG, **changes}))
    randomize_adapters(model, seed)
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def write(path: Path, state: dict[str, torch.Tensor], facts: object = None) -> Path:
    """An adapter file made by hand, with or without the settings that ours carry."""
    text = None if facts is None else facts if isinstance(facts, str) else json.dumps(facts)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=text and {"phi3lora": text})
    else:
        torch.save(state, path)
        if text:
            path.with_name(path.name + ".json").write_text(text)
    return path


# --- Round trips


@suffixes
def test_a_saved_adapter_loads_bit_exact(tmp_path, suffix):
    model, other = adapted(), adapted(seed=1)
    want = model(IDS).logits
    assert not torch.equal(other(IDS).logits, want)
    path = p3.save_adapter(model, tmp_path / "new" / f"adapter{suffix}")
    assert path == tmp_path / "new" / f"adapter{suffix}"
    p3.load_adapter(other, path)
    assert_unchanged(other, snapshot(model))
    assert torch.equal(other(IDS).logits, want)


@suffixes
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"target_modules": "all-linear"}])
def test_a_base_model_gets_the_adapters_the_file_describes(tmp_path, suffix, changes):
    model, base = adapted(**changes), lively_model()
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    p3.load_adapter(base, path)
    assert adapter_metadata(base) == adapter_metadata(model)
    assert base.lora_config == model.lora_config
    assert torch.equal(base(IDS).logits, model(IDS).logits)  # both are in eval mode: no dropout


def test_every_kind_of_layer_makes_the_round_trip(tmp_path):
    def net(seed: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.Conv2d(1, 2, 3))
        p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["0", "1", "2"], segments={"1": (4, 2)}))
        randomize_adapters(model, seed)
        return model

    model, other = net(0), net(1)
    path = p3.save_adapter(model, tmp_path / "a.safetensors")
    assert load_file(path).keys() == {f"{i}.lora_{x}" for i in range(3) for x in "AB"}
    p3.load_adapter(other, path)
    assert_unchanged(other, snapshot(model))


@suffixes
def test_the_tensors_are_loralibs_own_state_dict(tmp_path, suffix):
    model = adapted()
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    saved = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    want = lora.lora_state_dict(model)
    assert saved.keys() == want.keys()
    assert len(saved) == 2 * 2 * 3
    assert all(torch.equal(saved[key], want[key]) for key in want)


def test_the_header_says_how_each_layer_is_built(tmp_path):
    path = p3.save_adapter(adapted(use_rslora=True), tmp_path / "adapter.safetensors")
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["phi3lora"])
    assert facts["config"]["target_modules"] == CONFIG["target_modules"]
    assert facts["layers"][OUT] == {"class": "Linear", "r": 2, "lora_alpha": 4, "use_rslora": True}
    assert facts["layers"][QKV] == {
        "class": "MergedLinear", "r": 2, "lora_alpha": 4, "use_rslora": True,
        "segments": [32, 16, 16], "enable_lora": [True, False, True],
    }  # fmt: skip
    save_pt = p3.save_adapter(adapted(use_rslora=True), tmp_path / "adapter.pt")
    beside = json.loads(save_pt.with_name("adapter.pt.json").read_text())
    assert beside.pop("sha256") == hashlib.sha256(save_pt.read_bytes()).hexdigest()
    assert beside == facts


def test_a_module_called_lora_router_is_not_saved():
    model = nn.ModuleDict({"lora_router": nn.Linear(4, 4), "up": nn.Linear(4, 4)})
    p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["up"], bias="lora_only"))
    assert adapter_state_dict(model).keys() == {"up.lora_A", "up.lora_B", "up.bias"}


@suffixes
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved_and_come_back(tmp_path, suffix, bias):
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["0"], bias=bias))
        nn.init.normal_(model[1].bias)
        return model

    model, other = net(0), net(1)
    biases = {"all": {"0.bias", "1.bias", "2.bias"}, "lora_only": {"0.bias"}}[bias]
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    state, _ = read_adapter(path)
    assert state.keys() == {"0.lora_A", "0.lora_B"} | biases
    kept = other[2].weight.clone()
    p3.load_adapter(other, path)
    for key in state:
        assert torch.equal(other.state_dict()[key], model.state_dict()[key]), key
    assert torch.equal(other[2].weight, kept)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_plain_loralib_file_loads_with_a_warning(tmp_path, suffix, caplog):
    """``torch.save(lora.lora_state_dict(model), path)`` says nothing about alpha and segments."""
    model, other = adapted(), adapted(seed=1)
    path = write(tmp_path / f"plain{suffix}", lora.lora_state_dict(model))
    p3.load_adapter(other, path)
    assert_unchanged(other, snapshot(model))
    assert "alpha and segments cannot be checked" in caplog.text


def test_a_bf16_file_becomes_float32(tmp_path):
    model, other = adapted(), adapted(seed=1)
    state = {key: value.to(torch.bfloat16) for key, value in lora.lora_state_dict(model).items()}
    p3.load_adapter(other, write(tmp_path / "half.pt", state))
    layer = lora_layers(other)[OUT]
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer.lora_A, state[f"{OUT}.lora_A"].float())


def test_loading_keeps_what_trains(tmp_path):
    model, other = adapted(), adapted(seed=1)
    parameters = dict(other.named_parameters())
    p3.load_adapter(other, p3.save_adapter(model, tmp_path / "adapter.pt"))
    for name, parameter in other.named_parameters():
        assert parameter is parameters[name]  # an optimizer made before goes on
        assert parameter.requires_grad == ("lora_" in name)


# --- What does not fit


@suffixes
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha 4 in the file, 8 in the model"),
        ({"r": 4}, "r 2 in the file, 4 in the model"),
        ({"use_rslora": True}, "use_rslora False in the file, True in the model"),
        ({"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}, "enable_lora .*True, False, True. in the f"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "not in the model: .*down_proj"),
        ({"target_modules": [*CONFIG["target_modules"], "up_proj"]}, "missing in the file: .*gate_up_proj"),
    ],
)  # fmt: skip
def test_adapters_built_otherwise_are_refused_and_the_model_kept(tmp_path, suffix, changes, message):
    path = p3.save_adapter(adapted(), tmp_path / f"adapter{suffix}")
    other = adapted(seed=1, **changes)
    before = snapshot(other)
    with pytest.raises(AdapterError, match=message):
        p3.load_adapter(other, path)
    assert_unchanged(other, before)


def test_other_segments_of_the_same_shapes_are_refused(tmp_path):
    """(4, 2) and (2, 4) both enabled: every tensor has the same shape, every number means something else."""

    def net(segments: tuple[int, int]) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6))
        p3.inject_lora(model, p3.LoraConfig(r=2, segments={"0": segments}))
        return model

    path = p3.save_adapter(net((4, 2)), tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterError, match=r"0: segments \[4, 2\] in the file, \[2, 4\] in the model"):
        p3.load_adapter(net((2, 4)), path)


def without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


@suffixes
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: without(s, f"{OUT}.lora_A"), f"missing in the file: {OUT}.lora_A$"),
        (lambda s: {**s, "model.layers.9.lora_A": torch.zeros(2, 2)}, r"not in the model: model\.layers\.9\.lora_A$"),
        (lambda s: {**s, "lm_head.weight": torch.zeros(512, 32)}, r"not in the model: lm_head\.weight$"),
        (lambda s: {**s, f"{OUT}.lora_B": torch.zeros(3, 2)}, rf"other shape: {OUT}.lora_B: \(3, 2\) in the file, "),
        (lambda s: {**s, f"{OUT}.lora_B": s[f"{OUT}.lora_B"] * torch.nan}, f"NaN or infinite values in {OUT}.lora_B"),
        (lambda s: {**s, f"{OUT}.lora_B": s[f"{OUT}.lora_B"] / 0}, f"NaN or infinite values in {OUT}.lora_B"),
        (lambda s: {}, "missing in the file: .* and 9 more"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_facts", [True, False])
def test_tensors_that_do_not_fit_are_named_and_the_model_kept(tmp_path, suffix, spoil, message, with_facts):
    model, other = adapted(), adapted(seed=1)
    facts = adapter_metadata(model) if with_facts else None
    path = write(tmp_path / f"adapter{suffix}", spoil(lora.lora_state_dict(model)), facts)
    before = snapshot(other)
    with pytest.raises(AdapterError, match=message):
        p3.load_adapter(other, path)
    assert_unchanged(other, before)


def test_a_plain_file_whose_shapes_differ_in_rank_is_refused(tmp_path):
    path = write(tmp_path / "plain.pt", lora.lora_state_dict(adapted(r=4)))
    with pytest.raises(AdapterError, match="other shape"):
        p3.load_adapter(adapted(), path)


def test_a_plain_file_cannot_say_how_to_inject(tmp_path):
    base = lively_model()
    path = write(tmp_path / "plain.pt", lora.lora_state_dict(adapted()))
    with pytest.raises(AdapterError, match="call inject_lora"):
        p3.load_adapter(base, path)
    assert not lora_layers(base)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: without(s, f"{OUT}.lora_A"),
        lambda s: {**s, f"{OUT}.lora_A": s[f"{OUT}.lora_A"] * torch.nan},
    ],
    ids=["missing", "nan"],
)
def test_a_bad_file_leaves_a_base_model_without_adapters(tmp_path, spoil):
    """Else a second try, with the right file, would meet fresh adapters that nobody asked for."""
    model, base = adapted(), lively_model()
    before, trainable = snapshot(base), [p.requires_grad for p in base.parameters()]
    path = write(tmp_path / "adapter.safetensors", spoil(lora.lora_state_dict(model)), adapter_metadata(model))
    with pytest.raises(AdapterError):
        p3.load_adapter(base, path)
    assert_unchanged(base, before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    p3.load_adapter(base, p3.save_adapter(model, tmp_path / "good.safetensors"))
    assert torch.equal(base(IDS).logits, model(IDS).logits)


def test_load_adapter_state_checks_a_state_dict_too():
    model = adapted()
    with pytest.raises(AdapterError, match="'checkpoint-7' does not fit"):
        load_adapter_state(model, {}, "checkpoint-7")


# --- What is no adapter file


def test_a_model_without_adapters_has_nothing_to_save(tmp_path):
    with pytest.raises(AdapterError, match="no adapters to save"):
        p3.save_adapter(lively_model(), tmp_path / "adapter.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter.bin", "adapter", "adapter.safetensors.zip"])
def test_other_suffixes_are_refused(tmp_path, name):
    model = adapted()
    with pytest.raises(AdapterError, match=r"allowed: \*\.safetensors, \*\.pt"):
        p3.save_adapter(model, tmp_path / name)
    with pytest.raises(AdapterError, match="allowed"):
        p3.load_adapter(model, tmp_path / name)


@suffixes
def test_a_missing_file_is_refused(tmp_path, suffix):
    with pytest.raises(AdapterError, match="no such adapter file"):
        p3.load_adapter(adapted(), tmp_path / f"none{suffix}")


@suffixes
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_half_written_file_is_refused(tmp_path, suffix, share):
    model = adapted()
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    before = snapshot(model)
    with pytest.raises(AdapterError, match="not a readable adapter file"):
        p3.load_adapter(model, path)
    assert_unchanged(model, before)


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.binary(max_size=60), st.sampled_from([".pt", ".safetensors"]))
@example(b"\x80\x02.", ".pt")  # pickles that are cut short or ask for what is not there
@example(b"\x80\x02}q\x00X\x01\x00\x00\x00as.", ".pt")
@example(b"\x80\x02h\x05.", ".pt")
@example(b"\x80\x02cos\nsystem\n.", ".pt")
@example(b"\x80\x02K\x01.", ".pt")
@example(b"\x80\x02}.", ".pt")
def test_garbage_is_no_adapter_file(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"garbage{suffix}"
    path.write_bytes(content)
    try:
        state, facts = read_adapter(path)
    except AdapterError as error:
        assert str(path) in str(error)
    else:
        assert (state, facts) == ({}, None)  # bytes that happen to be an empty file of the right kind


class Shout:
    """A pickle that would run code on being read."""

    def __reduce__(self):
        return (print, ("run!",))


def test_nothing_in_a_pt_file_is_executed(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"x": Shout()}, path)
    with pytest.raises(AdapterError, match="not a readable adapter file"):
        p3.load_adapter(adapted(), path)
    assert "run!" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_a_pt_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(AdapterError, match="does not hold a dict of tensors"):
        p3.load_adapter(adapted(), path)


@suffixes
@pytest.mark.parametrize("facts", ["not json", "[]", "{}", '{"layers": []}', json.dumps({"layers": {OUT: 3}})])
@pytest.mark.parametrize("injected", [True, False])
def test_settings_that_are_not_ours_are_refused(tmp_path, suffix, facts, injected):
    path = write(tmp_path / f"adapter{suffix}", lora.lora_state_dict(adapted()), facts)
    with pytest.raises(AdapterError):
        p3.load_adapter(adapted() if injected else lively_model(), path)


@pytest.mark.parametrize("config", [3, {"r": "two"}, {"rank": 2}])
def test_a_config_that_cannot_be_is_refused_where_it_is_needed(tmp_path, config):
    facts = {"layers": {}, "config": config}
    path = write(tmp_path / "adapter.safetensors", lora.lora_state_dict(adapted()), facts)
    base = lively_model()
    with pytest.raises(Phi3LoRAError):
        p3.load_adapter(base, path)
    assert not lora_layers(base)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_what_was_there_before(tmp_path, monkeypatch, suffix, where):
    model, path = adapted(), tmp_path / f"adapter{suffix}"
    p3.save_adapter(model, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "write":
        monkeypatch.setattr(files, "save_file", full)
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(os, where, full)
    with pytest.raises(AdapterError, match=r"cannot be written.*No space left.*before is whole"):
        p3.save_adapter(model, path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@suffixes
def test_a_write_that_fails_inside_torch_or_safetensors(tmp_path, suffix):
    """A limit on the size of files stands for a full disk: the C++ and Rust writers meet it in the middle."""
    resource = pytest.importorskip("resource")
    model, path = adapted(), tmp_path / f"adapter{suffix}"
    p3.save_adapter(model, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(AdapterError, match="cannot be written"):
            p3.save_adapter(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_settings_beside_another_file_of_that_name_are_not_believed(tmp_path, caplog):
    path = tmp_path / "adapter.pt"
    p3.save_adapter(adapted(lora_alpha=2), path)
    other = adapted(lora_alpha=64)
    torch.save(lora.lora_state_dict(other), path)  # loralib's way: no settings
    assert files.read_adapter(path)[1] is None
    assert "made for another adapter.pt" in caplog.text
    p3.load_adapter(other, path)
    with pytest.raises(AdapterError, match="does not say how to build"):
        p3.load_adapter(lively_model(), path)
