"""The loss of a packed batch against Hugging Face's own loss on each document."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import ATTENTION_VARIANTS, lively_model, packed_batch, random_documents, randomize_adapters, tiny_model
from test_attention import DOCUMENTS, ROWS
from torch import Tensor, nn

import phi3lora as p3
from phi3lora.errors import ModelError
from phi3lora.model.attention import register
from phi3lora.model.backend import PLAIN
from phi3lora.model.forward import BATCH_KEYS, supervised_hidden_states

COUNT = sum(len(ids) - 1 for ids in DOCUMENTS)

variants = pytest.mark.parametrize("changes", ATTENTION_VARIANTS.values(), ids=ATTENTION_VARIANTS)


def adapted_lively_model(**changes) -> nn.Module:
    """A model whose adapters do something."""
    model = lively_model(**changes)
    p3.inject_lora(model, p3.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"]))
    randomize_adapters(model)
    return model


def adapter_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def separate_loss(model: nn.Module, documents: list[list[int]]) -> Tensor:
    """The sum of transformers' own losses, one document at a time."""
    total = torch.zeros((), device=model.device)
    for ids in documents:
        if len(ids) > 1:
            row = torch.tensor([ids], device=model.device)
            total = total + model(input_ids=row, labels=row, use_cache=False).loss.float() * (len(ids) - 1)
    return total


def assert_same_loss_and_gradients(model: nn.Module, packed: Tensor, want: Tensor, reference: nn.Module) -> None:
    torch.testing.assert_close(packed, want, rtol=1e-5, atol=1e-4)
    got, wanted = adapter_gradients(model, packed), adapter_gradients(reference, want)
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0.01, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


@variants
@pytest.mark.parametrize("implementation", ["phi3lora", "sdpa", "eager"])
def test_packed_equals_separate_in_loss_and_gradients(implementation, changes):
    model = adapted_lively_model(**changes)
    reference = copy.deepcopy(model)
    register()
    model.set_attn_implementation(implementation)
    loss, count = p3.causal_lm_loss(model, packed_batch(ROWS, 15))
    assert count == COUNT
    assert_same_loss_and_gradients(model, loss, separate_loss(reference, DOCUMENTS), reference)


@pytest.mark.parametrize("layout", [[(ROWS[:1], 15), (ROWS[1:2], 9), (ROWS[2:], 15)], [([*ROWS, []], 40)]])
def test_neither_batch_size_nor_padding_changes_the_sum(layout):
    model = adapted_lively_model()
    assert model.config._attn_implementation == "sdpa"  # transformers' default, which the first loss replaces
    whole, count = p3.causal_lm_loss(model, packed_batch(ROWS, 15))
    assert model.config._attn_implementation == "phi3lora"
    parts = [p3.causal_lm_loss(model, packed_batch(*batch)) for batch in layout]
    assert count == sum(n for _, n in parts)
    assert_same_loss_and_gradients(model, sum(loss for loss, _ in parts), whole, model)


def test_only_supervised_positions_come_out_each_with_the_token_that_follows():
    model, batch = lively_model(), packed_batch([DOCUMENTS[:2]], 16)
    batch["labels"][0, 3:6] = -100
    batch["labels"][batch["position_ids"] == 0] = 17  # not trained: nothing of its own document precedes it
    hidden, labels = supervised_hidden_states(model, batch, PLAIN)
    want_positions = [0, 1, 5, 6, 7, 9, 10, 11, 12]  # labels at 1, 2, 6, 7, 8 of the first, 1..4 of the second
    assert labels.tolist() == [(DOCUMENTS[0] + DOCUMENTS[1])[p + 1] for p in want_positions]
    alone = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in DOCUMENTS[:2]]
    torch.testing.assert_close(hidden, torch.cat(alone)[want_positions], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_loss_is_float32_in_bf16_and_under_autocast(autocast):
    model = adapted_lively_model()
    reference = separate_loss(model, DOCUMENTS).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = p3.causal_lm_loss(model if autocast else model.to(torch.bfloat16), packed_batch(ROWS, 15))
    assert loss.dtype == torch.float32 and not loss.requires_grad
    torch.testing.assert_close(loss, reference, rtol=0.02, atol=0)


@pytest.mark.parametrize("key", [*BATCH_KEYS, "attention_mask"])
def test_a_batch_in_another_layout_is_refused(key):
    batch = packed_batch(ROWS, 15)
    if batch.pop(key, None) is None:
        batch[key] = torch.ones_like(batch["input_ids"])
    with pytest.raises(ModelError, match="a packed batch has input_ids"):
        p3.causal_lm_loss(tiny_model(), batch)


def test_an_attention_that_cannot_keep_documents_apart_is_refused():
    model = tiny_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="'flash_attention_2' cannot keep packed documents apart"):
        p3.causal_lm_loss(model, packed_batch(ROWS, 15))


GPU_CHANGES = {"grouped-query": {}, "multi-head": {"num_key_value_heads": 4}, "sliding-window": {"sliding_window": 40}}


@pytest.mark.gpu
@pytest.mark.parametrize("changes", GPU_CHANGES.values(), ids=GPU_CHANGES)
def test_varlen_packed_equals_separate_in_loss_and_gradients(changes):
    """bf16: equal within the error that separate bf16 sequences have themselves, in norm."""
    model = adapted_lively_model(hidden_size=128, intermediate_size=96, **changes).to("cuda")
    exact = copy.deepcopy(model)
    model.to(torch.bfloat16)
    documents = random_documents(130, 61, 1, 7, 200)
    loss, count = p3.causal_lm_loss(model, packed_batch([documents[:4], documents[4:]], 210))
    want = separate_loss(exact, documents)
    torch.testing.assert_close(loss / count, want / count, rtol=0.01, atol=0)
    got, wanted = adapter_gradients(model, loss), adapter_gradients(exact, want)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() < 0.1 * gradient.norm(), name


# --- Other architectures

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 3, "eos_token_id": 3,
         "bos_token_id": 1}  # fmt: skip


def other_model(architecture: str, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**SIZES, **changes)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {}),
        ("Qwen2", {}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    ],
)
def test_the_loss_of_another_architecture_is_its_own_with_scaled_and_capped_logits(architecture, changes):
    model = other_model(architecture, **changes)
    batch = packed_batch(ROWS, 16)
    loss, count = p3.causal_lm_loss(model, batch)
    assert count == COUNT
    want = separate_loss(model, DOCUMENTS)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)
    p3.inject_lora(model, p3.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomize_adapters(model)
    got = adapter_gradients(model, p3.causal_lm_loss(model, batch)[0])
    torch.testing.assert_close(got, adapter_gradients(model, separate_loss(model, DOCUMENTS)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["Phi3", "Llama"])
@pytest.mark.parametrize("flag", ["return_dict", "output_hidden_states", "_output_attentions"])
def test_flags_of_the_config_change_neither_the_loss_nor_what_is_kept(architecture, flag):
    model, batch = other_model(architecture), packed_batch(ROWS, 16)
    want, _ = p3.causal_lm_loss(model, batch)
    again = other_model(architecture)
    setattr(again.config, flag, not getattr(again.config, flag))
    kept = []
    again.get_decoder().register_forward_hook(lambda module, given, output: kept.append(output))
    assert torch.equal(p3.causal_lm_loss(again, batch, fused=False)[0], want)
    assert kept[0].hidden_states is kept[0].attentions is None  # of the packed batch
    assert getattr(again.config, flag) is not getattr(model.config, flag)


def test_logits_that_another_architecture_computes_in_another_way_are_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.logits = output.logits * 0.5
            return output

    torch.manual_seed(0)
    model = Odd(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ModelError, match=r"Odd computes its logits .* in a way that is not known"):
        p3.causal_lm_loss(model, packed_batch(ROWS, 16))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.ModuleDict({"inner": model})])
def test_a_wrapper_is_refused_with_the_way_to_the_model_inside(wrap):
    with pytest.raises(ModelError, match=r"not a causal language model .* model.module"):
        p3.causal_lm_loss(wrap(tiny_model()), packed_batch(ROWS, 16))


def test_documents_longer_than_the_window_of_some_layers_are_refused():
    model = other_model("Gemma2", head_dim=8, sliding_window=12)
    loss, _ = p3.causal_lm_loss(model, packed_batch(ROWS, 16))
    torch.testing.assert_close(loss, separate_loss(model, DOCUMENTS), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=r"window of 12 tokens .* a document of 13 tokens"):
        p3.causal_lm_loss(model, packed_batch([random_documents(13)], 16))
