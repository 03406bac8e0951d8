"""Tokens through the kernels, in float32 in Triton's interpreter, against those through transformers' layers."""

from __future__ import annotations

import pytest
import torch
from conftest import ATTENTION_VARIANTS, lively_model, random_documents, randomize_adapters, require_four_bit

import phi3lora as p3
from phi3lora.inference.decoding import KernelSteps, PlainSteps
from phi3lora.lora.base_weight import quantize_base
from phi3lora.model.attention import use_packed_attention

pytest.importorskip("triton")
from test_decoder import loop_bounds  # noqa: F401
from triton.runtime.interpreter import InterpretedFunction

from phi3lora.kernels import few_rows, token_step

PROMPTS = random_documents(7, 3, 5)


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch):
    """The interpreter runs one program after another, so few programs are fast."""
    monkeypatch.setattr(few_rows, "ROW_BLOCKS", [{"BN": 128, "BK": 64, "num_warps": 4}])
    monkeypatch.setattr(few_rows, "FEW_ROWS_BLOCKS", [{"BN": 128, "BK": 64, "STAGES": 1, "num_warps": 4}])


def logits_of_two_tokens(model, make_steps, rows, length=64):
    """Return the logits after the prompts, and after one more token of each."""
    tokens = torch.tensor([20, 30, 40])[:rows]
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS[:rows]])
    with torch.no_grad():
        steps = make_steps(model.eval(), rows, length)
        first = steps.prefill(list(range(rows)), PROMPTS[:rows])
        return torch.stack([first, steps.decode(tokens, lengths, int(lengths.max()) + 1)])


def assert_same_logits(model, rows):
    expected = logits_of_two_tokens(model, PlainSteps, rows)
    torch.testing.assert_close(logits_of_two_tokens(model, KernelSteps, rows), expected, rtol=1e-4, atol=1e-4)


def variant(name="grouped-query", targets="all-linear", base=None, r=4):
    model = lively_model(**{"hidden_size": 64, "intermediate_size": 48, **ATTENTION_VARIANTS[name]})
    if base is not None:
        require_four_bit()
        quantize_base(model, base)
    p3.inject_lora(model, p3.LoraConfig(r=r, lora_alpha=8, target_modules=targets))
    randomize_adapters(model)
    use_packed_attention(model)
    return model


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["multi-head", "tied", "partial-rotary", "sliding-window"])
def test_the_kernels_give_the_logits_of_transformers_layers(name, rows):
    assert_same_logits(variant(name), rows)


def test_for_many_rows_the_frozen_product_is_cublas_s(monkeypatch):
    monkeypatch.setattr(few_rows, "_FEW", 2)  # more rows than this
    assert_same_logits(variant(targets=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]), 3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"targets": ["q_proj", "v_proj", "up_proj"]}, {"targets": ["o_proj", "k_proj", "down_proj"], "r": 24},
     {"base": "nf4"}],
    ids=str,
)  # fmt: skip
def test_any_subset_any_rank_and_nf4(options, rows):
    assert_same_logits(variant(**options), rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter names the kernels and their constants")
@pytest.mark.parametrize("rows", [1, 3])
def test_every_kernel_of_an_answer_is_compiled_before_the_first_prompt(rows, monkeypatch):
    def kinds(arguments):
        return tuple(a.dtype if isinstance(a, torch.Tensor) else type(a) for a in arguments)

    def warmup(kernel, *arguments, grid, **constants):
        asked.add((kernel.fn.__name__, kinds(arguments), *sorted(constants.items())))

    def launch(kernel, blocks, grid, *arguments, **constants):
        launched.add((kernel.fn.__name__, kinds(arguments), *sorted({**constants, **blocks[0]}.items())))

    asked, launched = set(), set()
    monkeypatch.setattr(token_step, "_COMPILED", set())
    monkeypatch.setattr(InterpretedFunction, "warmup", warmup)
    with torch.no_grad():
        steps = KernelSteps(variant().eval(), rows, 64)
        for _ in range(2):
            steps.token_step.compile(rows)
        assert not any(tensor.any() for tensor in steps.cache)  # nothing was launched
        for module in (few_rows, token_step):
            monkeypatch.setattr(module, "launch", launch)
        steps.prefill(list(range(rows)), [[1] * 20] * rows)
        steps.decode(torch.arange(rows), torch.full((rows,), 20), 21)
    assert launched and launched <= asked
