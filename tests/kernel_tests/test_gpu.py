"""On a GPU: fused kernels, compiled layers and fp8 against transformers' plain layers: loss and each gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import packed_batch, random_documents, randomize_adapters, tiny_model
from torch.nn.functional import cosine_similarity
from transformers import Phi3ForCausalLM

import phi3lora as p3
from phi3lora.lora.base_weight import base_format, base_weight_of, quantize_base
from phi3lora.lora.inject import remove_lora
from phi3lora.model.activations import activation_checkpointing
from phi3lora.model.attention import use_packed_attention
from phi3lora.model.backend import Backend, choose_backend, use_backend

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LAYOUTS = {"chats": [random_documents(100, 20), random_documents(64, 50, 10)], "full rows": [random_documents(128)] * 2}
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}


def adapted(kv_heads: int = 2, sizes=None, std: float = 0.1, **lora):
    model = tiny_model(**{**MODEL, "num_key_value_heads": kv_heads, **(sizes or {})})
    p3.inject_lora(model.to(DEVICE, torch.bfloat16), p3.LoraConfig(**{"r": 8, **lora}))
    randomize_adapters(model, std=std)
    return model.train()


def exact_loss_and_gradients(model, batch):
    """Compute in float32, with eager attention, from the same adapters (r = 8) and frozen weights, dequantised."""
    twin = Phi3ForCausalLM(model.config).to(DEVICE)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        for path, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                twin.get_submodule(path).weight.copy_(base_weight_of(layer).dequantize())
    p3.inject_lora(twin, p3.LoraConfig(r=8))
    twin.load_state_dict(p3.lora_state_dict(model), strict=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        return loss_and_gradients(twin.train(), batch, fused=False)
    finally:
        torch.set_float32_matmul_precision(before)


def distances(found, exact) -> dict[str, float]:
    """Return 1 - cosine of each adapter's gradient."""
    assert found[1].keys() == exact[1].keys()
    return {name: 1 - cosine_similarity(found[1][name], g, dim=0).item() for name, g in exact[1].items()}


def assert_as_exact(fast, plain, exact, slack: float = 1e-4) -> None:
    """Allow the fast way 1.5 times the plain way's distance from the exact gradients, and a little."""
    limits = distances(plain, exact)
    for name, distance in distances(fast, exact).items():
        assert distance <= 1.5 * limits[name] + slack, name


def loss_and_gradients(model, batch, **options) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, count = p3.causal_lm_loss(model, batch, **options)
    (loss / count).backward()
    return loss.item(), {name: p.grad.flatten().double() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(fast, plain, cosine: float = 0.999, relative: float = 1e-3) -> None:
    assert fast[0] == pytest.approx(plain[0], rel=relative)
    for name, gradient in plain[1].items():
        assert cosine_similarity(fast[1][name], gradient, dim=0) >= cosine, name


def test_a_first_step_finds_its_layers_kernels_compiled(monkeypatch):
    triton = pytest.importorskip("triton")
    if torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin < 227 * 1024:
        pytest.skip("the first block of a kernel does not fit, so another is compiled at its launch")
    ahead, late = [], []

    def compiles(*, fn, is_manual_warmup, **_):
        (ahead if is_manual_warmup else late).append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", compiles)
    loss_and_gradients(adapted(r=24), packed_batch(LAYOUTS["chats"], 128))
    assert ahead and [name for name in late if "loss" not in name] == []


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fused", "compiled"])
def test_faster_layers_have_the_plain_layers_loss_and_gradients(kind, layout, kv_heads):
    batch = packed_batch(LAYOUTS[layout], 128)
    model = adapted(kv_heads, std=0.05)  # with 0.1, plain layers in bf16 are further than 0.999 from the exact ones
    exact = exact_loss_and_gradients(model, batch)
    model.set_attn_implementation("eager")
    plain = loss_and_gradients(model, batch)
    assert_close(plain, exact)
    model.set_attn_implementation("sdpa")  # which use_packed_attention replaces by ours
    use_packed_attention(model)
    assert choose_backend(model).kind == "fused"
    with use_backend(model, Backend(kind)):
        fast = loss_and_gradients(model, batch)
    assert_close(fast, exact)
    assert_as_exact(fast, plain, exact)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_hooked_layers_are_fused_and_see_hidden_states(mode):
    batch, model, seen = packed_batch(LAYOUTS["chats"], 128), adapted(), []
    expected = loss_and_gradients(model, batch)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    assert choose_backend(model).kind == "fused"
    with activation_checkpointing(model, mode):
        assert_close(loss_and_gradients(model, batch), expected, cosine=0.9999)
    assert len(seen) == 3 and all(t.shape == (2, 128, 256) for pair in seen for t in pair)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


@pytest.mark.parametrize("mode", ["selective", "full", "offload"])
def test_recomputing_changes_the_fused_gradients_by_rounding_alone(mode):
    batch, model = packed_batch(LAYOUTS["chats"], 128), adapted()
    kept = loss_and_gradients(model, batch)
    with activation_checkpointing(model, mode):
        recomputed = loss_and_gradients(model, batch)
    assert_close(recomputed, kept, cosine=0.9999)
    if mode == "selective":
        assert all(torch.equal(kept[1][name], gradient) for name, gradient in recomputed[1].items())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], ["o_proj"], ["down_proj", "k_proj"]])
def test_some_targets_alone(targets):
    batch, model = packed_batch(LAYOUTS["chats"], 128), adapted(target_modules=targets, r=24)
    assert_close(loss_and_gradients(model, batch), loss_and_gradients(model, batch, fused=False))


@pytest.mark.parametrize("hidden", [32, 64, 96, 128])
@pytest.mark.parametrize("r", [4, 32])
def test_models_that_are_one_block_wide(hidden, r):
    """Triton unrolls a loop of one turn, and one of those was compiled into a read of a random address."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 2}
    batch, model = packed_batch(LAYOUTS["chats"], 128), adapted(2, sizes, r=r)
    fused, plain = loss_and_gradients(model, batch), loss_and_gradients(model, batch, fused=False)
    assert choose_backend(model).kind == "fused"
    assert_close(fused, plain, cosine=0.998)
    assert_close(loss_and_gradients(model, batch), fused, cosine=0.99999)


@pytest.mark.parametrize("precisions", [(None, "fp8"), ("nf4", "nf4-fp8")], ids=["fp8", "nf4-fp8"])
def test_fp8_gradients_point_where_those_of_16_bit_products_do(precisions):
    batch, model = packed_batch(LAYOUTS["chats"], 128), tiny_model(**MODEL).to(DEVICE, torch.bfloat16)
    exact = None
    for precision in precisions:
        if precision:
            remove_lora(model)
            quantize_base(model, precision)
            assert base_format(model) == precision
        p3.inject_lora(model, p3.LoraConfig(r=8))
        randomize_adapters(model, std=0.05)
        exact = exact or exact_loss_and_gradients(model.train(), batch)  # of the 16-bit products' weights
    fused, plain = loss_and_gradients(model, batch), loss_and_gradients(model, batch, fused=False)
    for found in (fused, plain):
        assert_close(found, exact, cosine=0.98, relative=0.02)
    assert_as_exact(fused, plain, exact, slack=2e-3)


def test_dropout_differs_each_time_and_keeps_the_mean():
    batch, model = packed_batch(LAYOUTS["chats"], 128), adapted(lora_dropout=0.2, r=16)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    with torch.no_grad():
        losses = torch.tensor([p3.causal_lm_loss(model, batch)[0] for _ in range(64)])
        for layer in layers:
            layer.p = 0.0
        without = p3.causal_lm_loss(model, batch)[0]
    assert losses.std() > 0
    assert losses.mean() == pytest.approx(without.item(), rel=0.02)


def test_dropout_masks_depend_on_the_seed_and_are_recomputed():
    batch, model = packed_batch(LAYOUTS["full rows"], 128), adapted(lora_dropout=0.3, r=16)
    torch.manual_seed(5)
    loss, gradients = loss_and_gradients(model, batch)
    torch.manual_seed(5)
    with activation_checkpointing(model, "full"):
        assert_close(loss_and_gradients(model, batch), (loss, gradients), cosine=0.9999)
    torch.manual_seed(6)
    _, other = loss_and_gradients(model, batch)
    assert any(cosine_similarity(gradients[n], g, dim=0) < 0.999 for n, g in other.items())
