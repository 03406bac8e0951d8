"""Adapter files hold what loralib would write, and nothing changes in a model until all of a file has been checked."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import loralib as lora
import pytest
import torch
from conftest import adapted_model, adapters_of, lively_model, randomize_adapters, same_tensors, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import phi3lora as p3
from phi3lora.adapters.adapter_file import (
    HEADER_KEY,
    adapter_metadata,
    adapter_state_dict,
    load_adapter_state,
    read_adapter,
)
from phi3lora.errors import AdapterError
from phi3lora.files import sha256_of, tensor_file

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


def assert_refused(model: nn.Module, path: Path, message: str) -> None:
    """Loading fails with ``message`` and the model is as it was."""
    before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterError, match=message):
        p3.load_adapter(model, path)
    assert same_tensors(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def write(path: Path, state: dict[str, torch.Tensor], metadata: object = None) -> Path:
    """An adapter file made by hand, with or without the settings that ours carry."""
    text = None if metadata is None else metadata if isinstance(metadata, str) else json.dumps(metadata)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path, metadata=text and {"phi3lora": text})
    else:
        torch.save(state, path)
        if text:
            path.with_name(path.name + ".json").write_text(text)
    return path


# --- Round trips


@suffixes
def test_a_saved_adapter_loads_bit_exact_into_the_same_parameters(tmp_path, suffix):
    model, other = adapted(), adapted(seed=1)
    parameters, want = dict(other.named_parameters()), model(IDS).logits
    assert not torch.equal(other(IDS).logits, want)
    path = p3.save_adapter(model, tmp_path / "new" / f"adapter{suffix}")
    assert path == tmp_path / "new" / f"adapter{suffix}"
    p3.load_adapter(other, path)
    assert same_tensors(other.state_dict(), model.state_dict())
    assert torch.equal(other(IDS).logits, want)
    for name, parameter in other.named_parameters():
        assert parameter is parameters[name]  # an optimizer made before stays valid
        assert parameter.requires_grad == ("lora_" in name)


@pytest.mark.parametrize(
    ("suffix", "changes"),
    [
        (".pt", {}),
        (".safetensors", {"use_rslora": True}),
        (".safetensors", {"lora_dropout": 0.5}),
        (".safetensors", {"target_modules": "all-linear"}),
    ],
)
def test_a_base_model_gets_the_adapters_the_file_describes(tmp_path, suffix, changes):
    model, base = adapted(**changes), lively_model()
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    p3.load_adapter(base, path)
    assert adapter_metadata(base) == adapter_metadata(model)
    assert base.lora_config == model.lora_config
    assert torch.equal(base(IDS).logits, model(IDS).logits)  # both are in eval mode: no dropout


def test_the_files_hold_loralib_s_state_dict_and_each_layer_s_settings(tmp_path):
    model = adapted(use_rslora=True)
    path, pickled = (p3.save_adapter(model, tmp_path / f"adapter{suffix}") for suffix in (".safetensors", ".pt"))
    want = lora.lora_state_dict(model)
    assert len(want) == 2 * 2 * 3
    assert same_tensors(load_file(path), want) and same_tensors(torch.load(pickled, weights_only=True), want)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["phi3lora"])
    assert metadata["config"]["target_modules"] == CONFIG["target_modules"]
    assert metadata["layers"][OUT] == {"class": "Linear", "r": 2, "lora_alpha": 4, "use_rslora": True}
    assert metadata["layers"][QKV] == {
        "class": "MergedLinear", "r": 2, "lora_alpha": 4, "use_rslora": True,
        "segments": [32, 16, 16], "enable_lora": [True, False, True],
    }  # fmt: skip
    assert read_adapter(pickled)[1] == metadata
    assert {file.name for file in tmp_path.iterdir()} == {"adapter.safetensors", "adapter.pt"}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved_and_come_back(tmp_path, bias):
    """Nothing else is: a user's module may be called lora_router."""

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.ModuleDict({"up": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "lora_router": nn.Linear(4, 3)})
        p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["up"], bias=bias))
        nn.init.normal_(model["norm"].bias)
        return model

    model, other = net(0), net(1)
    router = other["lora_router"].weight.clone()
    path = p3.save_adapter(model, tmp_path / "adapter.pt")
    state, _ = read_adapter(path)
    biases = {"all": {"up.bias", "norm.bias", "lora_router.bias"}, "lora_only": {"up.bias"}}[bias]
    assert state.keys() == {"up.lora_A", "up.lora_B"} | biases
    p3.load_adapter(other, path)
    assert same_tensors({key: other.state_dict()[key] for key in state}, state)
    assert torch.equal(other["lora_router"].weight, router)


@suffixes
def test_a_plain_loralib_file_loads_with_a_warning(tmp_path, suffix, caplog):
    """``torch.save(lora.lora_state_dict(model), path)`` says nothing about alpha and segments; it may be in bf16."""
    other = adapted(seed=1)
    state = {key: tensor.to(torch.bfloat16) for key, tensor in lora.lora_state_dict(adapted()).items()}
    path = write(tmp_path / f"plain{suffix}", state)
    p3.load_adapter(other, path)
    assert same_tensors(adapters_of(other), {key: tensor.float() for key, tensor in state.items()})
    assert "alpha and segments cannot be checked" in caplog.text
    assert_refused(lively_model(), path, "does not say how to build its layers; call inject_lora")
    assert_refused(adapted(r=4), path, "other shape")


# --- Files that do not fit the model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha 4 in the file, 8 in the model"),
        ({"target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}, "enable_lora .*True, False, True. in the f"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "not in the model: .*down_proj"),
        ({"target_modules": [*CONFIG["target_modules"], "up_proj"]}, "missing in the file: .*gate_up_proj"),
    ],
)
def test_adapters_built_differently_are_refused(tmp_path, changes, message):
    path = p3.save_adapter(adapted(), tmp_path / "adapter.safetensors")
    assert_refused(adapted(seed=1, **changes), path, message)


def test_other_segments_of_the_same_shapes_are_refused(tmp_path):
    """(4, 2) and (2, 4) both enabled: every tensor has the same shape, every number means something else."""

    def net(segments: tuple[int, int]) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6))
        p3.inject_lora(model, p3.LoraConfig(r=2, segments={"0": segments}))
        return model

    path = p3.save_adapter(net((4, 2)), tmp_path / "adapter.safetensors")
    assert_refused(net((2, 4)), path, r"0: segments \[4, 2\] in the file, \[2, 4\] in the model")


@suffixes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{OUT}.lora_A"), f"missing in the file: {OUT}.lora_A$"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(512, 32)}), r"not in the model: lm_head\.weight$"),
        (lambda s: s.update({f"{OUT}.lora_B": torch.zeros(3, 2)}), rf"other shape: {OUT}.lora_B: \(3, 2\) in the file"),
        (lambda s: s[f"{OUT}.lora_B"].mul_(torch.nan), f"NaN or infinite values in {OUT}.lora_B"),
        (lambda s: s.update({f"{OUT}.lora_B": torch.ones(32, 2, dtype=torch.int8)}), "o_proj.lora_B as torch.int8"),
        (lambda s: s.clear(), "missing in the file: "),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(tmp_path, suffix, change: Callable, message):
    """Also in a plain base, which is left without adapters: else a second try would meet ones that nobody asked for."""
    model = adapted()
    state = {key: tensor.clone() for key, tensor in lora.lora_state_dict(model).items()}
    change(state)
    path = write(tmp_path / f"adapter{suffix}", state, adapter_metadata(model))
    base = lively_model()
    for target in (adapted(seed=1), base):
        assert_refused(target, path, message)
    p3.load_adapter(base, p3.save_adapter(model, tmp_path / "good.safetensors"))
    assert torch.equal(base(IDS).logits, model(IDS).logits)


def test_tampered_segments_of_the_same_shapes_are_refused(tmp_path):
    """k and v exchange places with nothing but the settings changed: the model knows where its segments are."""
    model = adapted()
    metadata = adapter_metadata(model)
    for segments in ([16, 16, 32], [32, 32, 0], [2**40, 1, 1], [64], "32", None):
        metadata["layers"][QKV]["segments"] = segments
        path = write(tmp_path / "adapter.safetensors", lora.lora_state_dict(model), metadata)
        assert_refused(lively_model(), path, r"qkv_proj has segments .*; allowed in this model: \[32, 16, 16\]")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 2**40), ("r", 0), ("r", -1), ("r", 2.0), ("r", None), ("lora_alpha", float("nan")), ("lora_alpha", "4"),
        ("use_rslora", "yes"), ("class", "Conv2d"), ("class", "Linear4bit"),
    ],
)  # fmt: skip
def test_settings_out_of_bounds_build_nothing(tmp_path, name, value):
    """Also beside another adapter; the model is as it was, to the name of every parameter."""
    model = adapted()
    metadata = adapter_metadata(model)
    metadata["layers"][OUT][name] = value
    path = write(tmp_path / "adapter.safetensors", lora.lora_state_dict(model), metadata)
    for target, more in ((lively_model(), {}), (adapted(target_modules=["down_proj"]), {"name": "other"})):
        before, trainable = snapshot(target), [p.requires_grad for p in target.parameters()]
        with pytest.raises(p3.Phi3LoRAError, match=r"and a lora_A of shape \(2, 32\)" if value == 2**40 else None):
            p3.load_adapter(target, path, **more)
        assert same_tensors(target.state_dict(), before)
        assert [p.requires_grad for p in target.parameters()] == trainable
        assert not hasattr(target, "lora_config") or p3.list_adapters(target) == {"default": True}


# --- Files that are no adapters


@suffixes
def test_settings_of_another_version_are_refused_by_name(tmp_path, suffix):
    model, path = adapted(), tmp_path / f"adapter{suffix}"
    state, known = adapter_state_dict(model), adapter_metadata(model)
    layer = known["layers"][OUT]
    for change, message in {
        "format": ({"format": 2}, "format 2; allowed: 1"),
        "no format": ({"format": None}, "format None; allowed: 1"),
        "top": ({"ranks": {}}, "unknown 'ranks'"),
        "layer": (
            {"layers": {**known["layers"], OUT: {**layer, "use_dora": True}}},
            f"'{OUT}' has the unknown 'use_dora'",
        ),
        "config": ({"config": {**known["config"], "use_dora": True}}, "its settings cannot be used: .*use_dora"),
        "alpha": ({"layers": {**known["layers"], OUT: {**layer, "lora_alpha": 0}}}, "cannot be used: .*lora_alpha=0"),
    }.values():
        path.write_bytes(tensor_file(suffix, state, {HEADER_KEY: json.dumps({**known, **change})}))
        assert_refused(lively_model(), path, message)


@suffixes
def test_missing_and_half_written_files_are_refused(tmp_path, suffix):
    model = adapted()
    assert_refused(model, tmp_path / f"none{suffix}", "there is no adapter file")
    assert_refused(model, tmp_path / f"adapter{suffix}.zip", r"allowed: \*\.safetensors, \*\.pt")
    with pytest.raises(AdapterError, match="cannot be called 'adapter"):
        p3.save_adapter(model, tmp_path / "adapter.bin")
    with pytest.raises(AdapterError, match=r"is a folder; allowed: the adapter file: \*"):
        p3.load_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="no adapters to save"):
        p3.save_adapter(lively_model(), tmp_path / f"adapter{suffix}")
    assert not list(tmp_path.iterdir())
    path = p3.save_adapter(model, tmp_path / f"adapter{suffix}")
    if suffix == ".safetensors":
        assert_refused(model, tmp_path, rf"is a folder; allowed: the adapter file in it, '.*adapter\{suffix}'")
    content = path.read_bytes()
    for share in (0, 0.01, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        assert_refused(model, path, "not a readable adapter file")


class RunsCode:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return (print, ("run!",))


@pytest.mark.parametrize("content", [{"x": RunsCode()}, [1, 2], {"a": 1}, torch.zeros(2)])
def test_a_pt_file_of_something_else_is_refused_and_runs_nothing(tmp_path, content, capsys):
    torch.save(content, tmp_path / "other.pt")
    assert_refused(adapted(), tmp_path / "other.pt", "not a readable adapter file: (it does not hold|Unpickl)")
    assert "run!" not in capsys.readouterr().out


@suffixes
@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"layers": []}', '{"layers": {"a": 3}}', '{"layers": {}, "config": 3}']
)
def test_settings_that_are_not_ours_are_refused(tmp_path, suffix, text):
    path = write(tmp_path / f"adapter{suffix}", lora.lora_state_dict(adapted()), text)
    assert_refused(adapted(), path, "not a readable adapter file|the settings stored with the tensors")


# --- Writes that fail


@suffixes
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch, suffix, step):
    """A limit on the size of files stands for a full disk: the C++ and Rust writers meet it in the middle."""
    resource = pytest.importorskip("resource")
    model, path = adapted(), tmp_path / f"adapter{suffix}"
    p3.save_adapter(model, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomize_adapters(model, seed=1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if step == "write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    else:
        monkeypatch.setattr(os, step, fail)
    try:
        with pytest.raises(AdapterError, match=r"cannot be written.*is unchanged"):
            p3.save_adapter(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def older_pt(model: nn.Module, path: Path) -> Path:
    """Write a ``.pt`` as version 0.1 did, with its settings and their checksum beside it."""
    torch.save(lora.lora_state_dict(model), path)
    beside = {**adapter_metadata(model), "sha256": sha256_of(path)}
    path.with_name(path.name + ".json").write_text(json.dumps(beside))
    return path


def test_a_pt_with_its_settings_beside_it_loads_and_is_replaced_by_one_file(tmp_path):
    model, base = adapted(), lively_model()
    path = older_pt(model, tmp_path / "adapter.pt")
    p3.load_adapter(base, path)
    assert torch.equal(base(IDS).logits, model(IDS).logits)
    p3.save_adapter(adapted(lora_alpha=64), path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.pt"]
    assert read_adapter(path)[1]["layers"][OUT]["lora_alpha"] == 64


def test_a_pt_loads_verbatim_as_loralib_s_readme_does(tmp_path):
    path = p3.save_adapter(adapted(), tmp_path / "adapter.pt")
    model = adapted(seed=1)
    result = model.load_state_dict(torch.load(path), strict=False)
    assert not result.unexpected_keys
    assert same_tensors(adapters_of(model), adapters_of(adapted()))


@suffixes
def test_a_killed_save_leaves_the_earlier_file_and_no_litter_for_the_next(tmp_path, monkeypatch, suffix):
    path = p3.save_adapter(adapted(), tmp_path / f"adapter{suffix}")
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), 9))
        p3.save_adapter(adapted(seed=1), path)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 9
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    p3.save_adapter(adapted(seed=1), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_settings_beside_another_file_of_that_name_are_not_used(tmp_path, caplog):
    path = older_pt(adapted(lora_alpha=2), tmp_path / "adapter.pt")
    other = adapted(seed=1, lora_alpha=64)
    torch.save(lora.lora_state_dict(other), path)  # loralib's way: no settings
    assert read_adapter(path)[1] is None
    assert "made for another adapter.pt" in caplog.text
    p3.load_adapter(other, path)
    assert_refused(lively_model(), path, "does not say how to build")


# --- What is in the file, and what is not


def tuned_net(bias, freeze=False, head=False):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    net = copy.deepcopy(base)
    p3.inject_lora(net, p3.LoraConfig(r=2, bias=bias, target_modules=["0"]))
    net[3].requires_grad_(head)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    net.requires_grad_(not freeze)
    return net, base


NET_X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_were_trained_are_saved_although_they_are_frozen_now(tmp_path, bias):
    net, base = tuned_net(bias, freeze=True)
    path = p3.save_adapter(net, tmp_path / "a.safetensors")
    p3.load_adapter(base, path)
    assert torch.equal(base(NET_X), net(NET_X))


def test_biases_of_a_file_stay_with_the_adapter_in_a_model_that_trains_none(tmp_path):
    """They are saved again, refused by an export, and gone with the next adapter that has none."""
    net, base = tuned_net("all", freeze=True)
    without, _ = tuned_net("none", freeze=True)
    path = p3.save_adapter(net, tmp_path / "a.safetensors")
    plain = p3.save_adapter(without, tmp_path / "none.safetensors")
    model, again = copy.deepcopy(base), copy.deepcopy(base)
    p3.inject_lora(model, p3.LoraConfig(r=2, bias="none", target_modules=["0"]))
    p3.load_adapter(model, path)
    p3.load_adapter(again, p3.save_adapter(model, tmp_path / "again.pt"))
    assert torch.equal(again(NET_X), net(NET_X))
    with pytest.raises(AdapterError, match=r"trained biases .* cannot be exported"):
        p3.export_peft(model, tmp_path / "peft")
    p3.load_adapter(model, plain)
    assert torch.equal(model(NET_X), without(NET_X))
    assert set(load_file(p3.save_adapter(model, tmp_path / "b.safetensors"))) == {"0.lora_A", "0.lora_B"}


def test_everything_trained_that_is_left_out_is_named(tmp_path, caplog):
    net, _ = tuned_net("none")
    net.requires_grad_(False)
    p3.save_adapter(net, tmp_path / "a.safetensors")
    assert not caplog.messages
    net[3].weight.requires_grad_(True)
    net[1].weight.requires_grad_(True)
    net.train()(NET_X)
    p3.save_adapter(net, tmp_path / "a.safetensors")
    parameters, buffers = caplog.messages
    assert "leaves out trained parameters: 1.weight, 3.weight;" in parameters
    assert "1.running_mean" in buffers and "1.running_var" in buffers and "1.num_batches_tracked" in buffers


# --- Wrapped models


def inner_compiled(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "compiled inside": inner_compiled,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("inject_first", [True, False])
def test_wrapped_models_have_the_names_of_the_model_inside_in_every_file(tmp_path, wrap, inject_first):
    config = p3.LoraConfig(r=4, lora_alpha=8)
    model = adapted_model(head_scale=1) if inject_first else tiny_model()
    wrapped = wrap(model)
    if not inject_first:
        p3.inject_lora(wrapped, config)
        load_adapter_state(wrapped, adapter_state_dict(adapted_model()), "another model")
    want = adapted_model(head_scale=1)
    for save in (
        lambda model, name: p3.save_adapter(model, tmp_path / f"{name}.safetensors"),
        lambda model, name: p3.export_peft(model, tmp_path / f"{name}-peft").path / "adapter_model.safetensors",
        lambda model, name: (
            p3.save_merged(model, None, tmp_path / f"{name}-merged") and tmp_path / f"{name}-merged/model.safetensors"
        ),
    ):
        expected = load_file(save(want, "plain"))
        assert set(expected) == set(load_file(save(wrapped, "wrapped")))
    assert adapter_metadata(wrapped) == adapter_metadata(want)
    plain, other = tiny_model(), wrap(tiny_model())
    p3.load_adapter(plain, tmp_path / "wrapped.safetensors")
    p3.load_adapter(other, tmp_path / "plain.safetensors")
    for loaded in (plain, other):
        assert same_tensors(adapter_state_dict(loaded), adapter_state_dict(wrapped))
    p3.load_adapter(other, tmp_path / "wrapped.safetensors", name="second")
    p3.import_peft(other, tmp_path / "wrapped-peft", name="third")
    p3.set_adapter(other, "third")
    assert set(adapter_state_dict(other)) == set(adapter_state_dict(want))
    with p3.disabled(other), p3.disabled(wrapped):
        ids = torch.arange(5, 20)[None]
        assert torch.equal(other(input_ids=ids).logits, wrapped(input_ids=ids).logits)


def test_a_file_of_an_older_version_that_names_a_wrapper_loads(tmp_path):
    model = adapted_model()
    metadata = adapter_metadata(model)
    metadata["layers"] = {f"_orig_mod.{path}": layer for path, layer in metadata["layers"].items()}
    state = {f"_orig_mod.{name}": tensor for name, tensor in adapter_state_dict(model).items()}
    path = tmp_path / "old.safetensors"
    path.write_bytes(tensor_file(".safetensors", state, {HEADER_KEY: json.dumps(metadata)}))
    for loaded in (tiny_model(), adapted_model(seed=1)):
        p3.load_adapter(loaded, path)
        assert same_tensors(adapter_state_dict(loaded), adapter_state_dict(model))


def test_a_peft_folder_names_import_peft(tmp_path):
    p3.export_peft(adapted_model(), tmp_path / "peft")
    for path in (tmp_path / "peft", tmp_path / "peft/adapter_model.safetensors"):
        with pytest.raises(AdapterError, match="PEFT's format; load its folder with import_peft"):
            p3.load_adapter(tiny_model(), path)
