"""What sits on a layer moves with it when adapters are injected, switched and deleted, or is refused by name."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import randomize_adapters
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import phi3lora as p3
from phi3lora.errors import AdapterError, ModelError
from phi3lora.lora.inject import inject_layers


class Net(nn.Module):
    """One layer of each class, in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 36)
        self.conv = nn.Conv2d(1, 2, 3)
        self.fused = nn.Linear(32, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        images = self.embed(tokens).unflatten(1, (1, 6, 6))
        return self.out(torch.tanh(self.fused(self.conv(images).flatten(1))))


PATHS = ["embed", "conv", "fused", "out"]
TOKENS = torch.tensor([1, 2, 9])
every_layer = pytest.mark.parametrize("path", PATHS)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def inject(model: nn.Module, targets: list[str] | str = PATHS) -> p3.InjectionReport:
    segments = {"fused": (8, 4)} if isinstance(model, Net) and "fused" in targets else None
    return p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=targets, segments=segments))


def facts(model: nn.Module) -> dict:
    """Everything about a model that a refusal must leave alone."""
    found = {f"module {name}": (id(m), m.training, {**vars(m)}) for name, m in model.named_modules()}
    for name, module in model.named_modules():
        for content in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_state_dict_hooks"):
            found[f"{name} {content}"] = {key: id(item) for key, item in vars(module)[content].items()}
    for name, p in model.named_parameters():
        found[f"parameter {name}"] = (p.requires_grad, id(p), p.dtype, None if p.is_meta else p.flatten().tolist())
    return found


def refused(model: nn.Module, targets: list[str] | str, message: str) -> None:
    before = facts(model)
    with pytest.raises(ModelError, match=message) as caught:
        inject(model, targets)
    assert facts(model) == before and "\n" not in str(caught.value)


def through_every_swap(model: nn.Module, tmp_path):
    """Yield after injection, after switching there and back, and after the last adapter is gone."""
    inject(model)
    yield "injected"
    path = p3.save_adapter(model, tmp_path / "a.safetensors")
    p3.load_adapter(model, path, name="b")
    yield "loaded"
    p3.set_adapter(model, "b")
    yield "switched"
    p3.set_adapter(model, "default")
    yield "back"
    p3.delete_adapter(model, "b")
    p3.delete_adapter(model, "default")
    yield "deleted"


# --- Hooks


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # an embedding's input has no gradient
@every_layer
def test_call_hooks_run_on_the_new_layer_and_their_handles_remove_them(path, tmp_path):
    model, calls = net(), []
    plain = model(TOKENS)
    layer = model.get_submodule(path)
    layer.gain = 2.0

    def called(kind):
        return lambda module, *_: calls.append((kind, module is model.get_submodule(path)))

    handles = [
        layer.register_forward_hook(lambda module, inputs, y: y * module.gain),
        layer.register_forward_hook(lambda module, inputs, kwargs, y: called("kwargs")(module), with_kwargs=True),
        layer.register_forward_hook(called("always"), always_call=True),
        layer.register_forward_pre_hook(called("pre")),
        layer.register_full_backward_hook(called("backward")),
        layer.register_full_backward_pre_hook(called("backward pre")),
    ]
    want = model(TOKENS)
    assert not torch.allclose(want, plain)
    for stage in through_every_swap(model, tmp_path):
        gc.collect()  # the layer that was there before is gone
        calls.clear()
        with torch.enable_grad():
            y = model(TOKENS)
            if stage == "deleted":  # nothing trains any more
                model.out.bias.requires_grad = model.embed.weight.requires_grad = True
                y = model(TOKENS)
        torch.testing.assert_close(y, want)
        y.sum().backward()
        kinds = {"kwargs", "always", "pre", "backward", "backward pre"}
        assert set(calls) == {(kind, True) for kind in kinds}, stage
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(TOKENS), plain)


def test_a_hook_put_on_or_removed_between_swaps_holds_for_every_adapter(tmp_path):
    model, calls = net(), []
    for stage in through_every_swap(model, tmp_path):
        if stage == "injected":
            handle = model.out.register_forward_hook(lambda *_: calls.append(1))
        elif stage == "switched":
            assert not model(TOKENS).isnan().any() and calls
            handle.remove()
            calls.clear()
        elif stage != "loaded":
            model(TOKENS)
            assert not calls


@every_layer
def test_state_dict_hooks_see_the_layer_that_holds_the_weight(path, tmp_path):
    model, calls = net(), []
    layer = model.get_submodule(path)
    layer.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append(("pre", module, prefix)))
    layer.register_state_dict_post_hook(lambda module, state, prefix, meta: calls.append(("post", module, prefix)))
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: calls.append(("load", module, prefix)))
    layer.register_load_state_dict_post_hook(lambda module, keys: calls.append(("loaded", module, None)))
    for stage in through_every_swap(model, tmp_path):
        gc.collect()
        calls.clear()
        model.load_state_dict(model.state_dict())
        holder = "conv.conv" if path == "conv" and stage != "deleted" else path
        assert [kind for kind, *_ in calls] == ["pre", "post", "load", "loaded"], stage
        assert all(module is model.get_submodule(holder) for _, module, _ in calls), stage
        assert {prefix for *_, prefix in calls} == {f"{holder}.", None}


def test_accelerates_hook_moves_with_the_layer_and_is_gone_once_removed(tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubled(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(2 * x for x in args), kwargs

    model = net()
    plain = model(TOKENS)
    hooks.add_hook_to_module(model.out, Doubled())
    want = model(TOKENS)
    for stage in through_every_swap(model, tmp_path):
        torch.testing.assert_close(model(TOKENS), want)
        randomize_adapters(model, std=1)
        if stage != "deleted":
            assert not torch.allclose(model(TOKENS), want)  # the adapter runs inside the hook
            for layer in (model.out, model.fused, model.embed, model.conv):
                (layer.lora_A if layer is model.embed else layer.lora_B).data.zero_()
    inject(model)
    hooks.remove_hook_from_module(model.out)
    torch.testing.assert_close(model(TOKENS), plain)
    p3.delete_adapter(model, "default")
    torch.testing.assert_close(model(TOKENS), plain)


# --- Attributes and contents


@every_layer
def test_what_a_user_put_on_a_layer_stays_there(path, tmp_path):
    model = net()
    layer = model.get_submodule(path)
    layer.tag = ["a user's"]
    layer.norm = nn.LayerNorm(3)
    layer.gain = nn.Parameter(torch.ones(3))
    layer.register_buffer("mask", torch.zeros(3), persistent=False)
    layer.register_buffer("scale_factor", torch.zeros(3))
    kept = {name: getattr(layer, name) for name in ("tag", "norm", "gain", "mask", "scale_factor")}
    keys = model.state_dict().keys()
    for stage in through_every_swap(model, tmp_path):
        where = model.get_submodule(path)
        where = where.conv if path == "conv" and stage != "deleted" else where
        assert all(getattr(where, name) is value for name, value in kept.items()), stage
        own = {key.replace("conv.conv", "conv") for key in model.state_dict() if "lora_" not in key}
        assert own == set(keys)
    model.get_submodule(path).eval()
    inject(copy.deepcopy(model))


def test_an_attribute_removed_from_one_adapters_layer_does_not_come_back_with_another(tmp_path):
    model = net()
    model.out.tag = 1
    for stage in through_every_swap(model, tmp_path):
        if stage == "loaded":
            del model.out.tag
        elif stage != "injected":
            assert not hasattr(model.out, "tag")


@pytest.mark.parametrize("name", ["scaling", "segments", "r", "delta", "lora_dropout", "lora_A", "conv"])
def test_a_name_that_adapted_layers_need_is_refused(name):
    for value in (3, nn.Identity(), nn.Parameter(torch.ones(1))):
        model = net()
        setattr(model.out, name, value)
        message = "adapters of another library|'out' cannot be adapted: it has an attribute"
        refused(model, ["fused", "out"], message)


# --- Refused


def replaced_forward(layer):
    whole = layer.forward
    layer.forward = lambda x: 2 * whole(x)


def replaced_below_accelerates_hook(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    replaced_forward(layer)
    hooks.add_hook_to_module(layer, hooks.ModelHook())


@every_layer
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced_forward, "cannot be adapted: forward of this instance was replaced .* use a forward hook"),
        (replaced_below_accelerates_hook, "cannot be adapted: forward of this instance was replaced"),
        (lambda layer: layer.compile(), r"cannot be adapted: it was compiled by its own compile\(\)"),
    ],
)
def test_a_method_that_is_bound_to_the_old_layer_is_refused(path, change, message):
    model = net()
    change(model.get_submodule(path))
    refused(model, PATHS, f"'{path}' {message}")


def test_a_forward_replaced_after_injection_refuses_the_switch(tmp_path):
    model = net()
    inject(model)
    p3.load_adapter(model, p3.save_adapter(model, tmp_path / "a.safetensors"), name="b")
    replaced_forward(model.out)
    for change in (lambda: p3.set_adapter(model, "b"), lambda: p3.load_adapter(model, tmp_path / "a.safetensors", "c")):
        before = facts(model)
        with pytest.raises(AdapterError, match="forward of 'out' was replaced"):
            change()
        assert facts(model) == before
    del model.out.forward
    p3.set_adapter(model, "b")


COMPUTED = {
    "weight_norm": (weight_norm, "weight_g, weight_v"),
    "spectral_norm": (spectral_norm, "weight_orig, weight_u"),
    "pruned weight": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight_orig, weight_mask"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "bias_orig, bias_mask"),
    "parametrised norm": (parametrizations.weight_norm, "Parametrized.*: remove its parametrizations"),
    "parametrised spectral": (parametrizations.spectral_norm, "Parametrized.*: remove its parametrizations"),
    "own parametrisation": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()), "its parametrizations first"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("path", ["out", "conv"])
def test_a_computed_weight_is_refused_as_a_target_and_skipped_by_all_linear(kind, path):
    make, message = COMPUTED[kind]
    model = net()
    make(model.get_submodule(path))
    refused(model, ["fused", path], f"'{path}' of class .*{message}")
    want = model.train(False)(TOKENS)
    report = inject(model, "all-linear")
    assert report.skipped.keys() == ({"out"} if path == "out" else set())
    assert [row.module for row in report] == ["fused"] + (["out"] if path == "conv" else [])
    torch.testing.assert_close(model(TOKENS), want)


@pytest.mark.parametrize("whole", [True, False])
def test_offloaded_weights_are_refused_and_plain_meta_models_are_not(whole):
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerate.cpu_offload(model if whole else model.out)
    refused(model, ["out"], "the weight of 'out' is offloaded by accelerate")
    assert not model(TOKENS).isnan().any()
    with torch.device("meta"):
        meta = net()
    assert len(inject(meta)) == len(PATHS)
    on_one_device = accelerate.dispatch_model(net(), {"": "cpu"}, force_hooks=True)
    want = on_one_device(TOKENS)
    inject(on_one_device)
    torch.testing.assert_close(on_one_device(TOKENS), want)


def test_the_last_of_several_layers_refused_leaves_the_first_ones_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, (3, 1)))
    model[0].weight.requires_grad = False
    model.eval()[1].train()
    refused(model, ["0", "1", "2"], r"'2' cannot be adapted: .*kernel_size=\(3, 1\)")
    refused(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), ["0", "1"], "of class LayerNorm")
    linear = {"class": "Linear", "r": 2, "lora_alpha": 2, "use_rslora": False}
    merged = {**linear, "class": "MergedLinear", "segments": [1, 2], "enable_lora": [True, True]}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = facts(model)
    with pytest.raises(ModelError, match="add up to 3"):
        inject_layers(model, {"0": linear, "1": merged}, p3.LoraConfig(bias="all"))
    assert facts(model) == before


def test_an_error_of_memory_leaves_the_model_as_it_was(monkeypatch):
    model, whole = net(), torch.zeros

    def full(*args, **kwargs):
        if args and args[0] == (5, 2):
            raise torch.OutOfMemoryError("full")
        return whole(*args, **kwargs)

    before = facts(model)
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError):
        inject(model)
    assert facts(model) == before
