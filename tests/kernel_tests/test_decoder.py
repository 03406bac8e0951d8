"""The fused layers against transformers' own, in float32: on a CPU in Triton's interpreter, kernel by kernel."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import packed_batch, random_documents, randomize_adapters, require_four_bit, tiny_model
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

import phi3lora as p3
from phi3lora.kernels import decoder
from phi3lora.kernels.decoder import decoder_unsupported_reason, fused_decoder
from phi3lora.kernels.recording import Recordings, _Recording
from phi3lora.lora.base_weight import Dense, quantize_base
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.attention import packed_forward_kwargs, packed_layout, use_packed_attention
from phi3lora.model.backend import PLAIN, Backend, use_backend

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/kernel_tests/test_gpu.py tests the same on a GPU", allow_module_level=True)
from triton.runtime import interpreter  # noqa: E402

from phi3lora.kernels import launch as launching  # noqa: E402
from phi3lora.kernels import low_rank, norm, reduce, rotary, swiglu  # noqa: E402
from phi3lora.kernels.adapter import Adapter  # noqa: E402
from phi3lora.kernels.cross_entropy import cross_entropy_  # noqa: E402
from phi3lora.kernels.low_rank import lora_weight_gradient, project, project_backward_  # noqa: E402
from phi3lora.kernels.norm import backward_blocks  # noqa: E402
from phi3lora.kernels.reduce import PartialSums  # noqa: E402
from phi3lora.kernels.swiglu import part_columns  # noqa: E402
from phi3lora.lora.product import adapted_segments  # noqa: E402

_patch = interpreter._patch_lang_tensor


def _patched(tensor, scope, *rest):
    """Triton 3.6's interpreter turns a loop bound into an int in a way that NumPy 2.4 no longer allows."""
    _patch(tensor, scope, *rest)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch):
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", _patched)


slow = pytest.mark.slow
FUSED = Backend("fused")
BATCH = packed_batch([random_documents(11, 6), random_documents(9, 5, 3)], 18)
SIZE = {"hidden_size": 64, "intermediate_size": 48}


def adapted(r: int = 4, targets="all-linear", dropout: float = 0.0, base=None, one_A=False, layers=None, **changes):
    """A model with adapters; with ``one_A``, q, k and v share one lora_A, as do gate and up, as in PEFT's adapters."""
    model = tiny_model(**{**SIZE, **changes})
    if base is not None:
        quantize_base(model, base)
    where = {"target_modules": targets, "layers_to_transform": layers}
    p3.inject_lora(model, p3.LoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, **where))
    for layer in model.model.layers if one_A else ():
        for parent, name in ((layer.self_attn, "qkv_proj"), (layer.mlp, "gate_up_proj")):
            setattr(parent, name, p3.Linear.adapt(getattr(parent, name).base_layer(), r, 8))
    randomize_adapters(model)
    use_packed_attention(model)
    return model.train()


def other_segments(projection) -> nn.Module:
    """The same layer with its output cut in halves, which the kernels do not support."""
    halves = 2 * [projection.out_features // 2]
    return p3.MergedLinear.adapt(projection.base_layer(), 4, segments=halves, enable_lora=[True, True])


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


# --- Hidden states and gradients


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 16, "num_key_value_heads": 4},
        {"r": 24, "num_key_value_heads": 1},
        {"num_attention_heads": 2, "partial_rotary_factor": 0.5},
        {"sliding_window": 4, "tie_word_embeddings": True},
        {"targets": ["q_proj", "v_proj", "up_proj"]},
        {"targets": ["o_proj"]},
        {"targets": ["down_proj", "k_proj"]},
        {"targets": ["gate_proj"]},
        {"targets": ["q_proj", "v_proj", "o_proj"], "base": "nf4"},
        {"one_A": True},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()) or "grouped-query",
)
def test_the_fused_layers_compute_what_transformers_layers_do(options):
    if "base" in options:
        require_four_bit()
    model = adapted(**options)
    assert decoder_unsupported_reason(model.model) is None
    assert_equal_to_rounding(hidden_and_gradients(model, True), hidden_and_gradients(model, False))


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective", "full", pytest.param("offload", marks=slow)])
def test_the_last_layer_of_some_tokens_equals_some_tokens_of_the_last_layer(monkeypatch, mode, hooked):
    model, results = adapted(), []
    wanted = torch.tensor([3, 4, 5, 9, 20, 31])
    rows: list[int] = []
    matmul = Dense.matmul
    monkeypatch.setattr(Dense, "matmul", lambda self, x: rows.append(len(x)) or matmul(self, x))
    if hooked:
        model.model.layers[1].register_forward_hook(lambda *_: None)
    for inside in (True, False):
        model.zero_grad()
        with activation_checkpointing(model, mode), use_backend(model, FUSED):
            hidden = fused_decoder(model, BATCH, wanted) if inside else fused_decoder(model, BATCH)[wanted]
            (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        results.append((hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    assert_equal_to_rounding(*results)
    assert (6 in rows) != hooked


class Replayed(Recordings):
    """Recordings whose replays call ``decode`` again on what a recording keeps, because a CPU has no graphs."""

    def _record(self, decode, parameters, inputs):
        self._gradients = self._gradients or [torch.empty_like(p) for p in parameters if p.requires_grad]
        leaves = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        kept = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        output = torch.empty_like(inputs["h"].flatten(0, 1))
        d_output, hidden = torch.empty_like(output), []

        def forward():
            with torch.enable_grad():
                hidden[:] = [decode(leaves, **kept)]
            output.copy_(hidden[0].detach())

        def backward():
            for leaf, gradient in zip((leaf for leaf in leaves if leaf.requires_grad), self._gradients, strict=True):
                leaf.grad = gradient.zero_()
            hidden.pop().backward(d_output)

        graphs = (SimpleNamespace(replay=replay) for replay in (forward, backward))
        return _Recording(kept, output, d_output, self._gradients, *graphs)


def hidden_and_summed_gradients(model, micro_batches):
    model.zero_grad()
    found = []
    for i, batch in enumerate(micro_batches):
        hidden = fused_decoder(model, batch, torch.arange(2 + i, 30))
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()
        found.append(hidden.detach().clone())
    return torch.cat(found), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["none", pytest.param("full", marks=slow), pytest.param("offload", marks=slow)])
def test_replays_see_each_batch_and_each_change_of_the_adapters(monkeypatch, mode):
    monkeypatch.setattr(decoder, "Recordings", Replayed)
    model, other = adapted(), packed_batch([random_documents(9, 8), random_documents(4, 5, 6, seed=1)], 18)
    layer = model.model.layers[1].mlp.down_proj

    def change(step: int) -> None:
        if step == 1:
            randomize_adapters(model, seed=1)
            layer.enabled = False
        elif step == 2:
            layer.enabled, layer.scaling = True, 3.0
            layer.lora_B.requires_grad_(False)
            layer.lora_A.data = layer.lora_A.data * 2

    with activation_checkpointing(model, mode), use_backend(model, FUSED):
        for step in range(3):
            change(step)
            results = []
            for record in (False, True):
                monkeypatch.setattr(decoder, "_may_be_recorded", lambda *_, record=record: record)
                results.append(hidden_and_summed_gradients(model, [BATCH, other, BATCH]))
            assert_equal_to_rounding(*reversed(results))
            assert decoder._RECORDINGS[model.model].turn > 0


@pytest.mark.parametrize("record", [False, True])
def test_kept_gradients_outlive_the_next_replay(monkeypatch, record):
    monkeypatch.setattr(decoder, "Recordings", Replayed)
    monkeypatch.setattr(decoder, "_may_be_recorded", lambda *_: record)
    model, kept, then = adapted(num_hidden_layers=1), [], []
    parameters = [p for p in model.parameters() if p.requires_grad]

    def keep(found) -> None:
        kept.append(found)
        then.append(found.clone())

    parameters[0].register_hook(keep)
    with use_backend(model, FUSED):
        for end in (20, 25, 30):
            hidden = fused_decoder(model, BATCH, torch.arange(5, end))
            weights = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
            for gradient in torch.autograd.grad((hidden * weights).sum(), parameters[1:]):
                keep(gradient)
            fused_decoder(model, BATCH, torch.arange(5, end)).mean().backward()
    assert len(kept) == 3 * len(parameters)
    assert all(map(torch.equal, kept, then))


def test_disabled_adapters_are_left_out():
    model = adapted()
    with torch.no_grad():
        on = fused_hidden(model)
        with p3.disabled(model):
            off, plain = fused_hidden(model), plain_hidden(model)
    torch.testing.assert_close(off, plain, rtol=1e-4, atol=1e-4)
    assert (on - off).abs().max() > 1e-3


@pytest.fixture(scope="module")
def dropped():
    """A model with dropout, and its hidden states and gradients with nothing recomputed, from seed 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", _patched)
        model = adapted(dropout=0.3)
        torch.manual_seed(3)
        hidden, gradients = hidden_and_gradients(model, True)
    return model, (hidden, {name: g.clone() for name, g in gradients.items()})


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=slow), pytest.param("offload", marks=slow)])
def test_recomputing_changes_the_gradients_by_rounding_alone(dropped, mode):
    model, kept = dropped
    torch.manual_seed(3)
    assert_equal_to_rounding(hidden_and_gradients(model, True, mode), kept)


@pytest.mark.parametrize("mode", ["none", "selective", pytest.param("offload", marks=slow)])
def test_a_second_backward_through_a_kept_graph_gives_the_same_gradients(mode):
    model = adapted(num_hidden_layers=1)
    model.zero_grad()
    with activation_checkpointing(model, mode):
        loss = fused_hidden(model).square().sum()
        loss.backward(retain_graph=True)
        once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        loss.backward()
    for name, gradient in once.items():
        torch.testing.assert_close(model.get_parameter(name).grad, 2 * gradient)


@pytest.mark.parametrize(("mode", "products"), [("none", 4), ("selective", 4 + 1), ("full", 4 + 3), ("offload", 4 + 3)])
def test_no_more_is_recomputed_than_the_backward_needs(monkeypatch, mode, products):
    """A layer has four products: selective recomputes gate/up, the other modes all but the last."""
    done = []
    matmul = Dense.matmul
    monkeypatch.setattr(Dense, "matmul", lambda self, x: done.append(1) or matmul(self, x))
    hidden_and_gradients(adapted(num_hidden_layers=1), True, mode)
    assert len(done) == products


@pytest.mark.parametrize("mode", ["none", "selective", "offload"])
def test_kernels_are_compiled_on_the_calling_thread_and_leave_no_trace(monkeypatch, mode):
    """The block, which here computes, sees each launch of both directions; it would miss those of other threads."""
    inside: list[bool] = []
    launched = []

    @contextmanager
    def compiled_together():
        inside.append(True)
        yield
        inside.pop()

    def on_device_of(tensor):
        launched.append((bool(inside), threading.current_thread()))
        return nullcontext()

    monkeypatch.setattr(launching, "compiled_together", compiled_together)
    monkeypatch.setattr(launching, "on_device_of", on_device_of)
    model = adapted(dropout=0.3, num_hidden_layers=3)
    state = torch.get_rng_state()
    compile_kernels(model, mode)
    assert set(launched) == {(True, threading.current_thread())}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def compile_kernels(model, mode: str) -> None:
    h = model.model.embed_tokens(BATCH["input_ids"])
    cos, sin = (t.expand(len(h), -1, -1).flatten(0, 1) for t in model.model.rotary_emb(h, BATCH["position_ids"]))
    layout = packed_layout(model.config, BATCH)
    with use_backend(model, FUSED), activation_checkpointing(model, mode):
        decoder._compile_kernels(model.model, h, cos.contiguous(), sin.contiguous(), torch.arange(5), layout)


def launches(monkeypatch) -> list[str]:
    """Return a list that gets the names of the kernels that are asked for; none runs, and new memory is NaN."""
    asked: list[str] = []
    for module in (low_rank, norm, reduce, rotary, swiglu):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: asked.append(kernel.fn.__name__))
    monkeypatch.setattr(launching, "compiled_together", nullcontext)
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, torch.nan, **options))
    return asked


@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("layers", [[0], [1], [2], [3, 4], None])
def test_kernels_are_compiled_wherever_the_adapters_are(monkeypatch, layers, mode):
    asked = launches(monkeypatch)
    compile_kernels(adapted(layers=layers, num_hidden_layers=5), mode)
    assert {"_swiglu_forward", "_swiglu_backward", "_rotary_forward", "_lora_weight_gradient"} <= set(asked)


def test_numbers_that_no_kernel_wrote_are_no_anomaly(monkeypatch):
    asked = launches(monkeypatch)
    with torch.autograd.set_detect_anomaly(True):
        compile_kernels(adapted(num_hidden_layers=3), "none")
    assert "_norm_backward" in asked


@pytest.mark.parametrize("record", [False, True])
def test_what_is_compiled_first_is_what_the_step_computes(monkeypatch, record):
    """A recording computes all tokens, in a layout of few sizes: another would build attention's graphs in vain."""
    compiled, computed, few = [], [], []
    model, wanted = adapted(num_hidden_layers=1), torch.arange(5)
    decode = decoder._decode
    monkeypatch.setattr(decoder, "_begins_to_learn", lambda *_: True)
    monkeypatch.setattr(decoder, "_may_be_recorded", lambda *_: record)
    monkeypatch.setattr(decoder, "_compile_kernels", lambda decoder, h, cos, sin, *rest: compiled.append(rest))
    monkeypatch.setattr(
        decoder, "packed_layout", lambda *a, **options: few.append(options.get("few_sizes")) or packed_layout(*a)
    )

    def counted(decoder, parameters, h, cos, sin, wanted=None, **layout):
        computed.append((wanted, layout))
        return decode(decoder, parameters, h, cos, sin, wanted, **layout)

    monkeypatch.setattr(decoder, "_decode", counted)
    with use_backend(model, FUSED):
        fused_decoder(model, BATCH, wanted)
    assert few == [record]
    assert compiled[0][0] is computed[0][0] is (None if record else wanted)
    assert compiled[0][1] == computed[0][1]


@pytest.mark.parametrize(("tokens", "expected"), [(8192, True), (8193, False)])
def test_kernels_are_not_compiled_ahead_where_memory_counts(tokens, expected):
    model = adapted(num_hidden_layers=1).train()
    h = SimpleNamespace(is_cuda=True, shape=torch.Size((1, tokens, 64)))
    assert decoder._begins_to_learn(model.model, h, list(model.parameters())) is expected


# --- Layers as modules: hooks, wrappers, and which models


def test_a_hook_on_a_layer_sees_the_hidden_states_of_transformers_layer():
    """Inputs, outputs and the gradients of both; and an output that a hook replaces goes on to the next layer."""
    seen: list[list[torch.Tensor]] = []
    results = []
    for fused in (True, False):
        model, found = adapted(), []
        first, second = model.model.layers
        first.register_forward_hook(lambda _, args, out, found=found: found.extend([args[0], out]))
        second.register_forward_pre_hook(lambda _, args, found=found: found.extend(args))
        second.register_full_backward_hook(lambda _, d_in, d_out, found=found: found.extend([*d_in, *d_out]))
        first.register_forward_hook(lambda _, args, out: out * 2)
        assert decoder_unsupported_reason(model.model) is None
        results.append(hidden_and_gradients(model, fused))
        seen.append(found)
    assert_equal_to_rounding(*results)
    assert [t.shape for t in seen[0]] == [t.shape for t in seen[1]] == 5 * [torch.Size([2, 18, 64])]
    for found, expected in zip(*seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_hook_on_a_recomputed_layer_runs_once():
    model, calls = adapted(num_hidden_layers=1), []
    expected = hidden_and_gradients(model, False)
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert_equal_to_rounding(hidden_and_gradients(model, True, "full"), expected)
    assert len(calls) == 1


class Wrapped(Phi3DecoderLayer):
    """FSDP2 wraps a layer like this: another class, the same forward."""


class Changed(Phi3DecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) + 1


def test_a_wrapper_s_subclass_is_computed_and_a_subclass_with_a_forward_of_its_own_is_not():
    model = adapted(num_hidden_layers=1)
    expected = hidden_and_gradients(model, False)
    model.model.layers[0].__class__ = Wrapped
    assert decoder_unsupported_reason(model.model) is None
    assert_equal_to_rounding(hidden_and_gradients(model, True, "full"), expected)
    model.model.layers[0].__class__ = Changed
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


def test_a_change_of_the_model_inside_the_block_is_noticed(monkeypatch):
    monkeypatch.setattr("phi3lora.model.backend.unsupported_reason", lambda m, _: decoder_unsupported_reason(m.model))
    model = adapted()

    def current() -> Backend:
        with use_backend(model) as backend:
            return backend

    with use_backend(model) as chosen:
        assert chosen == current() == FUSED
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert current().kind == "plain" and "a hook on a Phi3MLP" in current().reason
        hook.remove()
        model.model.layers[0].register_forward_hook(lambda *_: None)
        assert current() == FUSED
        attention = model.model.layers[1].self_attn
        attention.qkv_proj = other_segments(attention.qkv_proj)
        assert "segments of its own" in current().reason
        with use_backend(model, PLAIN) as plain:
            assert plain == current() == PLAIN


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.layers[0].mlp.register_forward_hook(lambda *_: None), "a hook on a Phi3MLP"),
        (lambda m: m.register_forward_pre_hook(lambda *_: None), "a hook on a Phi3Model"),
        (lambda m: m.norm.register_full_backward_pre_hook(lambda *_: None), "a hook on a Phi3RMSNorm"),
        (lambda m: setattr(m.layers[0].mlp, "forward", lambda x: x), "its forward was replaced"),
        (lambda m: setattr(m.layers[0], "forward", lambda x: x), "the forward of a Phi3DecoderLayer was replaced"),
        (lambda m: setattr(m.layers[0].self_attn, "o_proj", nn.Linear(64, 64).requires_grad_(False)), "or has a bias"),
        (lambda m: setattr(m.layers[0].self_attn, "qkv_proj", other_segments(m.layers[0].self_attn.qkv_proj)),
         "segments of its own"),
        (lambda m: m.layers[0].compile(), "compiled layers"),
        (lambda m: setattr(m.layers[1].mlp, "activation_fn", nn.GELU()), "activation GELU"),
        (lambda m: setattr(m.layers[1], "post_attention_layernorm", nn.LayerNorm(64)), "not transformers' Phi-3 layer"),
        (lambda m: setattr(m.layers[1].resid_mlp_dropout, "p", 0.1), "residual dropout 0.1"),
        (lambda m: setattr(m.config, "num_hidden_layers", 1), "num_hidden_layers=1 with 2 layers"),
        (lambda m: m.layers[1].input_layernorm.weight.requires_grad_(True), "base weights that train"),
        (lambda m: m.norm.weight.requires_grad_(True), "base weights that train"),
        (lambda m: setattr(m.layers[1].mlp.down_proj, "r", 129), "r=129"),
        (lambda m: setattr(m.config, "hidden_size", 16), "hidden_size=16"),
        (lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None), "a hook on all modules"),
    ],
)  # fmt: skip
def test_changed_decoders_are_unsupported(change, reason):
    decoder = adapted().model
    assert decoder_unsupported_reason(decoder) is None
    changed = change(decoder)
    found = decoder_unsupported_reason(decoder)
    if isinstance(changed, RemovableHandle):  # one of them is on all modules of the process
        changed.remove()
    assert reason in (found or "")


# --- Dropout


def test_dropout_has_one_mask_in_forward_and_backward():
    """The gradient of a loss along a direction is what the loss gains along it, under the same masks."""
    model = adapted(dropout=0.4, hidden_size=32, num_hidden_layers=1)

    def loss() -> torch.Tensor:
        torch.manual_seed(9)
        hidden = fused_hidden(model)
        return (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).double().sum()

    model.zero_grad()
    loss().backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("lora_A"):  # whose gradients need the masks
            continue
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            parameter += 3e-3 * direction
            above = loss()
            parameter -= 6e-3 * direction
            below = loss()
            parameter += 3e-3 * direction
        assert ((above - below) / 6e-3).item() == pytest.approx(parameter.grad.norm().item(), rel=2e-2), name


def test_dropout_keeps_the_share_and_the_mean():
    r, width = 16, 512
    A = torch.eye(r, width)
    segments = adapted_segments([8], [True], r)
    adapter = Adapter(A, torch.zeros(8, r), A, torch.zeros(8, r), r, r, segments, 1.0, 0.25, 1234)
    z = project(torch.ones(512, width), adapter)  # the first 16 columns of dropout(1)
    torch.testing.assert_close(z.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert z.mean() == pytest.approx(1.0, abs=0.02)
    back = project_backward_(torch.zeros(512, width), torch.ones(512, r), adapter)
    assert torch.equal(back[:, :r] > 0, z > 0)
    sums = PartialSums()
    summed = lora_weight_gradient(sums, torch.ones(512, 1), torch.ones(512, width), adapter)
    sums.reduce()
    torch.testing.assert_close(summed[0, :r], z.sum(0))


def test_a_forward_without_dropout_draws_no_random_numbers():
    model = adapted(dropout=0.5, num_hidden_layers=1).eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        fused_hidden(model)
    assert torch.equal(torch.get_rng_state(), state)


# --- Single kernels


def test_cross_entropy_and_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(7, 301) * 5
    logits[0] += 1e4  # a row that overflows unless its maximum is subtracted
    labels = torch.randint(0, 301, (7,))
    leaf = logits.clone().double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    losses.sum().backward()
    found = cross_entropy_(logits, labels)
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=1e-3, atol=1e-3)


def test_a_row_with_a_nan_or_a_label_outside_the_vocabulary_has_no_loss():
    logits = torch.zeros(3, 40)
    logits[0, 3] = float("nan")
    assert cross_entropy_(logits, torch.tensor([1, 40, 39])).isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("inner", [48, 64, 128, 576, 8192, 17920])
@pytest.mark.parametrize("tokens", [1, 100, 2048, 8192, 65536])
def test_swiglu_s_parts_cover_the_columns_in_loops_of_two_turns(tokens, inner):
    part = part_columns(tokens, inner)
    parts = -(-inner // part)
    assert part % 64 == 0 and (parts == 1 or part >= 128) and (parts - 1) * part < inner <= parts * part
    programs = parts * -(-tokens // 64)
    assert programs <= max(264, -(-tokens // 64)) and (programs >= 66 or parts == 1 or part < 256)


def test_swiglu_in_parts_has_the_numbers_of_one_part(monkeypatch):
    torch.manual_seed(0)
    r, inner = 16, 320
    A, B, z, y = torch.randn(r, inner), torch.randn(2 * inner, r), torch.randn(70, r), torch.randn(70, 2 * inner)
    before = Adapter(A, B, A, B, r, r, adapted_segments([2 * inner], [True], r), 0.5, 0.0, 0)
    after = Adapter(A, B, A, B, r, r, adapted_segments([inner], [True], r), 1.0, 0.3, 7)
    whole, parts = [], []
    for found, columns in ((whole, inner), (parts, 128)):
        monkeypatch.setattr(swiglu, "part_columns", lambda *_, columns=columns: columns)
        found.extend(swiglu.swiglu(y, z, before, after))
    g, u = (y + 0.5 * z @ B.t()).split(inner, 1)
    torch.testing.assert_close(parts[0], F.silu(g) * u)
    torch.testing.assert_close(parts[0], whole[0])
    torch.testing.assert_close(parts[1], whole[1])


@pytest.mark.parametrize("hidden", [32, 48, 64, 192, 3072])
def test_no_loop_of_the_norm_s_backward_turns_only_once(hidden):
    assert min(-(-hidden // block["BN"]) for block in backward_blocks(hidden)) >= 2
