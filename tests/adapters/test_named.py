"""Several adapters on one base: each computes what it does in a model of its own, and switching changes no number."""

from __future__ import annotations

import copy
import pickle

import loralib as lora
import pytest
import torch
from conftest import chat_dataset, lively_model, quiet_config, randomize_adapters, require_four_bit, same_tensors
from safetensors.torch import load_file
from torch import nn

import phi3lora as p3
from phi3lora.adapters.adapter_file import read_adapter
from phi3lora.errors import AdapterError
from phi3lora.lora.base_weight import quantize_base
from phi3lora.lora.inject import lora_layers

IDS = torch.arange(10, 30)[None]
ADAPTERS = {
    "attention": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "everything": {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "feed-forward": {"r": 3, "lora_alpha": 9, "lora_dropout": 0.5,
                     "target_modules": ["k_proj", "gate_proj", "down_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each adapter as a file."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        model = lively_model()
        p3.inject_lora(model, p3.LoraConfig(**settings))
        randomize_adapters(model, seed)
        p3.save_adapter(model, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in ADAPTERS}


def with_all(files) -> nn.Module:
    model = lively_model()
    for name, path in files.items():
        p3.load_adapter(model, path, name=name)
    return model


def alone(path) -> nn.Module:
    model = lively_model()
    p3.load_adapter(model, path)
    return model


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize("precision", [None, "nf4"])
def test_each_adapter_is_bit_for_bit_as_in_a_model_of_its_own(files, tmp_path, precision):
    if precision:
        require_four_bit()

    def base_model() -> nn.Module:
        model = lively_model()
        if precision:
            quantize_base(model, precision)
        return model

    def alone(path) -> nn.Module:
        model = base_model()
        p3.load_adapter(model, path)
        return model

    model = base_model()
    assert p3.list_adapters(model) == {}
    base, parameters, adapters = frozen(model), dict(model.named_parameters()), {}
    for name, path in files.items():
        p3.load_adapter(model, path, name=name)
    assert p3.list_adapters(model) == {"attention": True, "everything": False, "feed-forward": False}
    for name in [*ADAPTERS, *reversed(ADAPTERS), "attention"]:
        p3.set_adapter(model, name)
        own = alone(files[name])
        assert torch.equal(model(IDS).logits, own(IDS).logits), name
        assert same_tensors(model.state_dict(), own.state_dict())
        saved, want = read_adapter(p3.save_adapter(model, tmp_path / "active.safetensors")), read_adapter(files[name])
        assert same_tensors(saved[0], want[0]) and saved[1] == want[1]
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in own.named_parameters()]
        assert {n for n, p in model.named_parameters() if p.requires_grad} == lora.lora_state_dict(own).keys()
        assert model.lora_config == own.lora_config
        assert len(list(model.modules())) == len(list(own.modules()))  # the inactive ones are outside the tree
        assert next(iter(p3.list_adapters(model).items())) == (name, True)
        with p3.disabled(model):
            assert torch.equal(model(IDS).logits, base_model()(IDS).logits)
        trained = [p for p in model.parameters() if p.requires_grad]  # an optimizer's
        assert all(a is b for a, b in zip(trained, adapters.setdefault(name, trained), strict=True))
    assert same_tensors(frozen(model), base)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())


def test_training_changes_the_active_adapter_alone_and_it_keeps_what_it_learned(files, tmp_path):
    model = with_all(files)
    p3.set_adapter(model, "feed-forward")
    own = alone(files["feed-forward"])
    base = frozen(model)
    for net, folder in ((model, "among others"), (own, "alone")):
        p3.train(net, chat_dataset(8), quiet_config(tmp_path / folder, max_steps=2))
    learned = model(IDS).logits
    assert torch.equal(learned, own(IDS).logits)
    assert not torch.equal(learned, alone(files["feed-forward"])(IDS).logits)
    for name in ("attention", "everything"):
        p3.set_adapter(model, name)
        assert torch.equal(model(IDS).logits, alone(files[name])(IDS).logits)
    p3.set_adapter(model, "feed-forward")
    assert torch.equal(model(IDS).logits, learned)
    assert same_tensors(frozen(model), base)


def test_modes_and_dropout_follow_the_model(files):
    model = with_all(files)
    model.train()
    p3.set_adapter(model, "feed-forward")
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(IDS).logits, model(IDS).logits)  # dropout
    model.eval()
    p3.set_adapter(model, "attention")
    p3.set_adapter(model, "feed-forward")
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_all_adapters_and_shares_none(files, copied):
    model = with_all(files)
    other = copied(model)
    randomize_adapters(other, 9)
    p3.set_adapter(other, "everything")
    randomize_adapters(other, 9)
    assert p3.list_adapters(other) == {"everything": True, "feed-forward": False, "attention": False}
    for name in ADAPTERS:
        p3.set_adapter(model, name)
        p3.set_adapter(other, name)
        same = torch.equal(model(IDS).logits, other(IDS).logits)
        assert same == (name == "feed-forward"), name


def test_an_adapter_moves_to_the_models_device_when_it_is_activated(files):
    model = with_all(files).to("meta")  # the other device that every machine has
    p3.set_adapter(model, "everything")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(IDS.to("meta")).logits.shape == (1, 20, 512)


def test_a_model_cast_to_bf16_keeps_inactive_adapters_in_float32(files):
    model = with_all(files).to(torch.bfloat16)
    p3.set_adapter(model, "everything")
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {torch.float32}
    own = lively_model().to(torch.bfloat16)
    p3.load_adapter(own, files["everything"])
    assert torch.equal(model(IDS).logits, own(IDS).logits)


def test_the_active_adapter_is_merged(files, tmp_path):
    model = with_all(files)
    p3.set_adapter(model, "feed-forward")
    own = alone(files["feed-forward"])
    with p3.merged(model), p3.merged(own):
        assert torch.equal(model(IDS).logits, own(IDS).logits)
    p3.save_merged(model, None, tmp_path / "merged")
    p3.save_merged(alone(files["feed-forward"]), None, tmp_path / "alone")
    assert same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("merged", "alone")))


def test_every_kind_of_layer_is_switched(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict(
            {"words": nn.Embedding(9, 4), "up": nn.Linear(4, 6), "image": nn.Conv2d(1, 2, 3), "plain": nn.Linear(6, 2)}
        )

    def run(model):
        up = model["up"](model["words"](torch.arange(9)))
        return torch.cat([model["plain"](up).flatten(), model["image"](torch.ones(1, 1, 5, 5)).flatten()])

    paths = []
    for seed, targets in enumerate((["words", "up", "image"], ["image", "up", "plain"], ["words", "plain"])):
        model = net()
        segments = {"up": (4, 2)} if seed == 0 else None
        p3.inject_lora(model, p3.LoraConfig(r=seed + 1, target_modules=targets, segments=segments))
        randomize_adapters(model, seed)
        paths.append((p3.save_adapter(model, tmp_path / f"{seed}.safetensors"), run(model), model.state_dict()))
    model = net()
    for i, (path, _, _) in enumerate(paths):
        p3.load_adapter(model, path, name=str(i))
    for i in (1, 2, 0, 2, 1, 0):
        p3.set_adapter(model, str(i))
        assert torch.equal(run(model), paths[i][1])
        assert same_tensors(model.state_dict(), paths[i][2])
    for name in "210":
        p3.delete_adapter(model, name)
    assert torch.equal(run(model), run(net()))
    assert model.state_dict().keys() == net().state_dict().keys()
    assert [type(m) for m in model.values()] == [type(m) for m in net().values()]


# --- Names


def test_injected_adapters_are_called_default_and_loading_another_keeps_requires_grad(files):
    model = lively_model()
    p3.inject_lora(model, p3.LoraConfig(**ADAPTERS["attention"]))
    p3.load_adapter(model, files["attention"])
    assert p3.list_adapters(model) == {"default": True}
    model.lm_head.weight.requires_grad = True
    next(iter(lora_layers(model).values())).lora_A.requires_grad = False
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    p3.load_adapter(model, files["everything"], "other")
    assert p3.list_adapters(model) == {"default": True, "other": False}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains


def test_loading_under_an_inactive_name_replaces_it_and_under_the_active_one_is_checked(files):
    model = with_all(files)
    p3.load_adapter(model, files["attention"], name="everything")
    p3.set_adapter(model, "everything")
    assert torch.equal(model(IDS).logits, alone(files["attention"])(IDS).logits)
    with pytest.raises(AdapterError, match=r"was made for other adapters|does not fit"):
        p3.load_adapter(model, files["feed-forward"], name="everything")


def test_unknown_names_list_the_loaded_ones(files):
    model = with_all(files)
    for function in (p3.set_adapter, p3.delete_adapter):
        with pytest.raises(AdapterError, match=r"'atention'.* Did you mean 'attention'.* 'everything', 'feed-forward'"):
            function(model, "atention")
        with pytest.raises(AdapterError, match=r"Loaded: none; load_adapter"):
            function(lively_model(), "default")
    with pytest.raises(AdapterError, match="cannot be called ''"):
        p3.load_adapter(model, files["attention"], name="")


def test_deleting(files):
    model = with_all(files)
    with pytest.raises(AdapterError, match=r"'attention' is active; .* 'everything', 'feed-forward'"):
        p3.delete_adapter(model, "attention")
    p3.delete_adapter(model, "everything")
    p3.set_adapter(model, "feed-forward")
    p3.delete_adapter(model, "attention")
    assert p3.list_adapters(model) == {"feed-forward": True}
    p3.delete_adapter(model, "feed-forward")
    assert p3.list_adapters(model) == {}
    plain = lively_model()
    assert same_tensors(model.state_dict(), plain.state_dict())
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    p3.inject_lora(model, p3.LoraConfig(r=2))  # a base like any other
    assert p3.list_adapters(model) == {"default": True}


# --- Errors leave everything as it was


@pytest.mark.parametrize(("block", "name"), [(p3.disabled, "disabled"), (p3.merged, "merged")])
def test_nothing_is_switched_inside_a_block(files, block, name):
    model = with_all(files)
    want = model(IDS).logits
    with block(model):
        with pytest.raises(AdapterError, match=rf"inside a {name}\(model\) block"):
            p3.set_adapter(model, "everything")
        with pytest.raises(AdapterError, match=rf"inside a {name}\(model\) block"):
            p3.load_adapter(model, files["everything"], name="fourth")
        p3.set_adapter(model, "attention")  # which is active already
    assert torch.equal(model(IDS).logits, want)
    only = alone(files["attention"])
    with block(only), pytest.raises(AdapterError, match="block; leave the block first"):
        p3.delete_adapter(only, "default")


def test_a_file_that_does_not_fit_leaves_all_adapters_as_they_were(files, tmp_path):
    model, deeper = with_all(files), lively_model(num_hidden_layers=3)
    p3.inject_lora(deeper, p3.LoraConfig(r=2))
    path = p3.save_adapter(deeper, tmp_path / "deeper.safetensors")
    before, trains = model.state_dict(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(p3.ModelError, match=r"no layer 'model.layers.2\.\S+' to adapt"):
        p3.load_adapter(model, path, name="deeper")
    net = nn.ModuleDict({"elsewhere": nn.Linear(2, 2)})
    p3.inject_lora(net, p3.LoraConfig(r=2, target_modules=["elsewhere"]))
    with pytest.raises(p3.ModelError, match="no layer 'elsewhere' to adapt"):
        p3.load_adapter(model, p3.save_adapter(net, tmp_path / "elsewhere.pt"), name="elsewhere")
    torch.save(lora.lora_state_dict(model), tmp_path / "plain.pt")
    with pytest.raises(AdapterError, match="does not say how to build its layers"):
        p3.load_adapter(model, tmp_path / "plain.pt", name="plain")
    assert list(p3.list_adapters(model)) == list(ADAPTERS)
    assert same_tensors(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == trains
    p3.set_adapter(model, "everything")
    assert torch.equal(model(IDS).logits, alone(files["everything"])(IDS).logits)


def test_adapters_that_train_biases_are_refused_beside_others(tmp_path):
    def net(bias: str) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4))
        p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["0"], bias=bias))
        return model

    paths = {bias: p3.save_adapter(net(bias), tmp_path / f"{bias}.safetensors") for bias in ("none", "all")}
    model = net("none")
    bias = model[0].bias.clone()
    with pytest.raises(AdapterError, match=r"trained biases \(0\.bias\) .* 'other' would share with 'default'"):
        p3.load_adapter(model, paths["all"], name="other")
    assert torch.equal(model[0].bias, bias)
    assert not model[0].bias.requires_grad
    with pytest.raises(AdapterError, match=r"trained biases \(0\.bias\)"):
        p3.load_adapter(net("all"), paths["none"], name="other")


# --- Biases and buffers


class Net(nn.Module):
    """Adapted layers between a norm with statistics, biases and a head."""

    def __init__(self):
        super().__init__()
        self.encoder, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.encoder(x))))


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))


def trained_net(bias="all", freeze=False, head=False, wrap=lambda net: net):
    """Return a net whose adapters and biases were trained, and its base."""
    torch.manual_seed(0)
    base = Net()
    net = copy.deepcopy(base)
    p3.inject_lora(net, p3.LoraConfig(r=2, bias=bias, target_modules=["encoder"]))
    if head:
        net.head.requires_grad_(True)
    train_net(net)
    if freeze:
        net.requires_grad_(False)
    return wrap(net.eval()), base.eval()


def train_net(net):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(X).pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("freeze", [False, True])
def test_disabled_and_delete_adapter_give_the_base_with_its_biases_and_statistics(bias, freeze):
    net, base = trained_net(bias, freeze)
    tuned, state = net(X), {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert not torch.allclose(tuned, base(X))
    for _ in range(2):
        with p3.disabled(net), p3.disabled(net):
            assert torch.equal(net(X), base(X))
            net.train()(X)  # statistics that move inside the block
        net.eval()
        assert torch.equal(net(X), tuned)
        assert same_tensors(net.state_dict(), state)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net):
        p3.delete_adapter(twin, "default")
        assert same_tensors(twin.state_dict(), base.state_dict())
        assert twin.__dict__.keys() == base.__dict__.keys()
        assert not twin._load_state_dict_post_hooks


def test_a_graph_made_before_a_disabled_block_has_its_own_biases_in_the_backward():
    net, _ = trained_net("all")
    net.zero_grad()
    net.train()(X).sum().backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    net.zero_grad()
    loss = net(X).sum()
    with p3.disabled(net), torch.no_grad():
        net(X)
    loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in net.named_parameters() if p.requires_grad}, want)


def test_weights_loaded_after_the_injection_are_the_base_and_an_adapter_is_not():
    trained, base = trained_net("all")
    net = Net().eval()  # other random numbers
    p3.inject_lora(net, p3.LoraConfig(r=2, bias="all", target_modules=["encoder"]))
    net.load_state_dict(base.state_dict(), strict=False)  # pretrained first, LoRA second
    adapter = {name: tensor for name, tensor in trained.state_dict().items() if "lora_" in name or "bias" in name}
    net.load_state_dict(adapter, strict=False)
    net.norm.load_state_dict(trained.norm.state_dict())
    assert torch.equal(net(X), trained(X))
    with p3.disabled(net):
        assert torch.equal(net(X), base(X))


# --- Blocks inside one another


def test_disabled_inside_merged_is_refused_and_merged_inside_disabled_is_the_base(files):
    model, base = alone(files["everything"]), lively_model()
    with p3.merged(model), pytest.raises(AdapterError, match="inside a merged"), p3.disabled(model):
        pass
    with p3.disabled(model), p3.merged(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize(("block", "name"), [(p3.disabled, "disabled"), (p3.merged, "merged")])
def test_nothing_is_loaded_or_written_inside_a_block(files, tmp_path, block, name):
    model = alone(files["everything"])
    exported = tmp_path / "peft"
    p3.export_peft(model, exported)
    want = model(IDS).logits
    for function in (
        lambda: p3.load_adapter(model, files["everything"]),
        lambda: p3.import_peft(model, exported),
        lambda: p3.save_merged(model, None, tmp_path / "merged"),
        lambda: p3.export_peft(model, tmp_path / "new"),
    ):
        with block(model), pytest.raises(AdapterError, match=rf"inside a {name}\(model\) block|{name}\(model\)"):
            function()
    with block(model):
        saved = p3.save_adapter(model, tmp_path / "same.safetensors")
    assert same_tensors(load_file(saved), load_file(files["everything"]))
    assert torch.equal(model(IDS).logits, want)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft", "same.safetensors"]


def test_no_adapter_appears_inside_a_disabled_block_of_a_plain_model(files):
    model = lively_model()
    with p3.disabled(model), pytest.raises(AdapterError, match=r"load_adapter .* inside a disabled\(model\) block"):
        p3.load_adapter(model, files["everything"])
    p3.load_adapter(model, files["everything"])
    assert p3.list_adapters(model) == {"default": True}


def test_trained_biases_are_not_saved_inside_disabled_where_the_base_s_are(tmp_path):
    net, _ = trained_net("all")
    with p3.disabled(net), pytest.raises(AdapterError, match=r"biases .* inside a disabled\(model\) block"):
        p3.save_adapter(net, tmp_path / "a.pt")
