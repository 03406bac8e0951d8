"""The fused passes against transformers' own layers, in float32: on a CPU in Triton's interpreter, kernel by kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import adapted_model, packed_batch, random_documents, randomize_adapters, require_four_bit, tiny_model
from torch import nn
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import phi3lora as p3
from phi3lora.kernels.decoder import decoder_unsupported_reason, fused_decoder
from phi3lora.lora.base_weight import Dense, quantize_base
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.attention import NAME, packed_forward_kwargs, use_packed_attention
from phi3lora.model.backend import PLAIN, Backend, choose_backend, use_backend

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/model/test_fast_path.py tests the same on a GPU", allow_module_level=True)
from triton.runtime import interpreter  # noqa: E402

from phi3lora.kernels.cross_entropy import cross_entropy_  # noqa: E402
from phi3lora.kernels.low_rank import lora_weight_gradient, project, project_backward_  # noqa: E402
from phi3lora.kernels.norm import backward_blocks  # noqa: E402
from phi3lora.kernels.reduce import PartialSums  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patched(tensor, scope, *rest):
    """Triton 3.6's interpreter turns a loop bound into an int in a way that NumPy 2.4 no longer allows."""
    _patch(tensor, scope, *rest)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", _patched)


BATCH = packed_batch([random_documents(11, 6), random_documents(9, 5, 3)], 18)


def adapted(r: int = 4, targets="all-linear", dropout: float = 0.0, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 48, **changes}
    model = tiny_model(**sizes)
    p3.inject_lora(model, p3.LoraConfig(r=r, lora_alpha=8, target_modules=targets, lora_dropout=dropout))
    randomize_adapters(model)
    use_packed_attention(model)
    return model.train()


FUSED = Backend("fused")


def fused_hidden(model) -> torch.Tensor:
    with use_backend(model, FUSED):
        return fused_decoder(model, BATCH)


def plain_hidden(model) -> torch.Tensor:
    kwargs = packed_forward_kwargs(model, BATCH, torch.float32)
    return model.get_decoder()(input_ids=BATCH["input_ids"], **kwargs).last_hidden_state.flatten(0, 1)


def hidden_and_gradients(model, fused: bool, mode: str = "none"):
    model.zero_grad()
    with activation_checkpointing(model, mode):
        hidden = fused_hidden(model) if fused else plain_hidden(model)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        (hidden * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_to_rounding(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    ("r", "changes"),
    [
        (4, {}),
        (16, {"num_key_value_heads": 4}),
        (24, {"num_key_value_heads": 1}),
        (4, {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
        (4, {"sliding_window": 4}),
        (4, {"tie_word_embeddings": True}),
    ],
    ids=["grouped-query", "multi-head r=16", "multi-query r=24", "partial rotary", "sliding window", "tied"],
)
def test_the_passes_compute_what_transformers_layers_do(r, changes):
    model = adapted(r, **changes)
    assert_equal_to_rounding(hidden_and_gradients(model, True), hidden_and_gradients(model, False))


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "up_proj"], ["o_proj"], ["down_proj", "k_proj"], ["gate_proj"], ["qkv_proj"]]
)
def test_any_subset_of_the_targets(targets):
    model = adapted(targets=targets)
    assert_equal_to_rounding(hidden_and_gradients(model, True), hidden_and_gradients(model, False))


def test_one_adapter_on_a_whole_fused_matrix():
    """As a PEFT adapter on ``qkv_proj`` has it: one A for all segments."""
    model = adapted()
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "qkv_proj"), (layer.mlp, "gate_up_proj")):
            setattr(parent, name, p3.Linear.adapt(getattr(parent, name).base_layer(), 4, 8))
    randomize_adapters(model, seed=1)
    assert_equal_to_rounding(hidden_and_gradients(model, True), hidden_and_gradients(model, False))


def test_a_base_in_four_bits():
    require_four_bit()
    model = tiny_model(hidden_size=64)
    quantize_base(model, "nf4")
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj"]))
    randomize_adapters(model)
    use_packed_attention(model)
    assert decoder_unsupported_reason(model.train().model) is None  # adapted layers and plain ones in nf4
    assert_equal_to_rounding(hidden_and_gradients(model, True), hidden_and_gradients(model, False))


def test_adapters_switched_off_are_left_out():
    model = adapted()
    from phi3lora.adapters.named import disabled

    with torch.no_grad(), disabled(model):
        off = fused_hidden(model)
    with torch.no_grad():
        on = fused_hidden(model)
        with disabled(model):
            plain = plain_hidden(model)
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_recomputing_changes_the_gradients_by_rounding_alone(mode):
    model = adapted(dropout=0.3)
    torch.manual_seed(3)
    kept = hidden_and_gradients(model, True)
    torch.manual_seed(3)
    assert_equal_to_rounding(hidden_and_gradients(model, True, mode), kept)


class Wrapped(Phi3DecoderLayer):
    """As FSDP2 wraps a layer: another class, the same forward, hooks around it."""


class Changed(Phi3DecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 1


def test_a_hook_on_a_layer_sees_the_hidden_states_of_transformers_layer():
    """Inputs, outputs and the gradients of both, in number, shape and value; with them training is as before."""
    seen: dict[bool, list[torch.Tensor]] = {}
    results = []
    for fused in (True, False):
        model, found = adapted(), seen.setdefault(fused, [])
        first, second = model.model.layers
        first.register_forward_hook(lambda _, args, out, found=found: found.extend([args[0], out]))
        second.register_forward_pre_hook(lambda _, args, found=found: found.extend(args))
        second.register_full_backward_hook(lambda _, d_in, d_out, found=found: found.extend([*d_in, *d_out]))
        first.register_forward_hook(lambda _, args, out: out * 2)
        assert decoder_unsupported_reason(model.model) is None
        results.append(hidden_and_gradients(model, fused))
    assert_equal_to_rounding(*results)
    assert [t.shape for t in seen[True]] == [t.shape for t in seen[False]] == 5 * [torch.Size([2, 18, 64])]
    for found, expected in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_a_hook_on_a_recomputed_layer_runs_once(mode):
    model, calls = adapted(), []
    expected = hidden_and_gradients(model, True)
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert_equal_to_rounding(hidden_and_gradients(model, True, mode), expected)
    assert len(calls) == 1


def test_a_wrapper_s_subclass_is_computed_and_a_subclass_with_a_forward_of_its_own_is_not():
    model = adapted()
    expected = hidden_and_gradients(model, True)
    for layer in model.model.layers:
        layer.__class__ = Wrapped
    assert decoder_unsupported_reason(model.model) is None
    assert_equal_to_rounding(hidden_and_gradients(model, True, "full"), expected)
    model.model.layers[1].__class__ = Changed
    assert "a Changed that is not transformers' Phi-3 layer" in decoder_unsupported_reason(model.model)


def test_the_layers_forward_is_replaced_inside_the_block_alone():
    model = adapted()
    first, second = model.model.layers
    second.forward = own = second.forward
    with torch.no_grad():
        expected = plain_hidden(model)
        with pytest.raises(KeyboardInterrupt), use_backend(model, FUSED):
            assert "forward" in vars(first) and second.forward is not own
            assert torch.equal(plain_hidden(model), expected)  # any other call is transformers' own
            raise KeyboardInterrupt
    assert "forward" not in vars(first) and second.forward is own


def test_what_happens_to_the_model_inside_the_block_is_noticed(monkeypatch):
    monkeypatch.setattr("phi3lora.model.backend.unsupported_reason", lambda m, _: decoder_unsupported_reason(m.model))
    model = adapted()
    with use_backend(model) as outer:
        assert outer == FUSED
        with use_backend(model) as inner:
            assert inner == FUSED
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        with use_backend(model) as inner:
            assert inner.kind == "plain" and "a hook on a Phi3MLP" in inner.reason
        hook.remove()
        model.model.layers[0].register_forward_hook(lambda *_: None)
        with use_backend(model) as inner:
            assert inner == FUSED
        attention = model.model.layers[1].self_attn
        attention.qkv_proj = p3.MergedLinear.adapt(
            attention.qkv_proj.base_layer(), 4, segments=(64, 64), enable_lora=[True, True]
        )
        with use_backend(model) as inner:
            assert "segments of its own" in inner.reason
        with use_backend(model, PLAIN) as inner:
            assert inner == PLAIN


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_a_second_backward_through_a_kept_graph_gives_the_same_gradients(mode):
    model = adapted()
    model.zero_grad()
    with activation_checkpointing(model, mode):
        loss = fused_hidden(model).square().sum()
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


@pytest.mark.parametrize(("mode", "products"), [("none", 8), ("selective", 8 + 2), ("full", 8 + 6), ("offload", 8 + 6)])
def test_no_more_is_recomputed_than_the_backward_needs(monkeypatch, mode, products):
    """Of two layers' four products: selective recomputes gate/up, the others all but the last."""
    done = []
    matmul = Dense.matmul
    monkeypatch.setattr(Dense, "matmul", lambda self, x: done.append(1) or matmul(self, x))
    hidden_and_gradients(adapted(), True, mode)
    assert len(done) == products


def test_dropout_has_one_mask_in_forward_and_backward():
    """The gradient of a loss along a direction is what the loss gains along it, under the same masks."""
    model = adapted(dropout=0.4, hidden_size=32)

    def loss() -> torch.Tensor:
        torch.manual_seed(9)
        hidden = fused_hidden(model)
        return (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).double().sum()

    model.zero_grad()
    loss().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "layers.0" not in name:
            continue
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter += 1e-2 * direction
            above = loss()
            parameter -= 2e-2 * direction
            below = loss()
            parameter += 1e-2 * direction
        assert ((above - below) / 2e-2).item() == pytest.approx(parameter.grad.norm().item(), rel=2e-2), name


def test_dropout_keeps_the_share_and_the_mean():
    from phi3lora.kernels.adapter import Adapter

    r, width = 16, 512
    A = torch.eye(r, width)
    adapter = Adapter(A, torch.zeros(8, r), A, torch.zeros(8, r), r, r, ((0, 8),), 1.0, 0.25, 1234)
    z = project(torch.ones(1024, width), adapter)  # the first 16 columns of dropout(1)
    torch.testing.assert_close(z.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert z.mean() == pytest.approx(1.0, abs=0.02)
    back = project_backward_(torch.zeros(1024, width), torch.ones(1024, r), adapter)
    assert torch.equal(back[:, :r] > 0, z > 0)
    sums = PartialSums()
    summed = lora_weight_gradient(sums, torch.ones(1024, 1), torch.ones(1024, width), adapter)
    sums.reduce()
    torch.testing.assert_close(summed[0, :r], z.sum(0))


def test_cross_entropy_and_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(7, 301) * 5
    logits[0] += 1e4  # a row that overflows without its maximum taken off
    labels = torch.randint(0, 301, (7,))
    leaf = logits.clone().double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    losses.sum().backward()
    found = cross_entropy_(logits, labels)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=1e-3, atol=1e-3)


def test_a_row_of_logits_that_is_not_finite_has_a_loss_that_is_not():
    logits = torch.zeros(2, 40)
    logits[0, 3] = float("nan")
    losses = cross_entropy_(logits, torch.tensor([1, 1]))
    assert losses[0].isnan()
    assert losses[1].isfinite()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.layers[0].mlp.register_forward_hook(lambda *_: None), "a hook on a Phi3MLP"),
        (lambda m: m.register_forward_pre_hook(lambda *_: None), "a hook on a Phi3Model"),
        (lambda m: m.norm.register_full_backward_pre_hook(lambda *_: None), "a hook on a Phi3RMSNorm"),
        (lambda m: setattr(m.layers[0].mlp, "forward", lambda x: x), "its forward was replaced"),
        (lambda m: setattr(m.layers[0].self_attn, "o_proj", nn.Linear(64, 64).requires_grad_(False)), "or has a bias"),
        (lambda m: m.layers[0].compile(), "compiled layers"),
        (lambda m: setattr(m.layers[1].mlp, "activation_fn", nn.GELU()), "activation GELU"),
        (lambda m: setattr(m.layers[1], "post_attention_layernorm", nn.LayerNorm(64)), "not transformers' Phi-3 layer"),
        (lambda m: setattr(m.layers[1].resid_mlp_dropout, "p", 0.1), "residual dropout 0.1"),
        (lambda m: setattr(m.config, "num_hidden_layers", 1), "num_hidden_layers=1 with 2 layers"),
        (lambda m: m.layers[1].input_layernorm.weight.requires_grad_(True), "base weights that train"),
        (lambda m: m.norm.weight.requires_grad_(True), "base weights that train"),
    ],
)
def test_layers_that_are_not_quite_transformers_own_are_left_to_it(change, reason):
    decoder = adapted().model
    assert decoder_unsupported_reason(decoder) is None
    change(decoder)
    assert reason in (decoder_unsupported_reason(decoder) or "")


@pytest.mark.parametrize("hidden", [32, 48, 64, 192, 3072])
def test_no_loop_of_the_norm_s_backward_turns_only_once(hidden):
    turns = [-(-hidden // block["BN"]) for block in backward_blocks(hidden)]
    assert turns
    assert min(turns) >= 2


def test_a_model_narrower_than_the_blocks_is_left_to_transformers_layers():
    assert "hidden_size=16" in decoder_unsupported_reason(
        adapted(hidden_size=16, num_attention_heads=1, num_key_value_heads=1).model
    )


def test_segments_and_ranks_the_kernels_do_not_know():
    assert "r=129" in decoder_unsupported_reason(adapted(r=129).model)
    model = adapted()
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = p3.MergedLinear.adapt(
        attention.qkv_proj.base_layer(), 4, segments=(64, 64), enable_lora=[True, True]
    )
    assert "segments of its own" in decoder_unsupported_reason(model.model)


def test_a_forward_without_dropout_draws_no_random_numbers():
    model = adapted(dropout=0.5).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        fused_hidden(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_label_outside_the_vocabulary_has_no_loss():
    losses = cross_entropy_(torch.zeros(2, 40), torch.tensor([40, 39]))
    assert losses[0].isnan()
    assert losses[1].isfinite()


def test_on_a_cpu_transformers_layers_are_used():
    model = adapted_model()
    model.set_attn_implementation(NAME)
    assert choose_backend(model) == Backend("plain", "not on a CUDA device")
