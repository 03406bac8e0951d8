"""Continuous batching against transformers' own ``generate``: the same tokens, whatever runs beside a prompt."""

from __future__ import annotations

import pytest
import torch
from conftest import ATTENTION_VARIANTS, lively_model, longrope_model, make_tokenizer, randomize_adapters
from transformers import GenerationConfig

import phi3lora as p3
from phi3lora.inference.decoding import KernelSteps, PlainSteps, Stream, decode
from phi3lora.inference.sampling import Sampling
from phi3lora.lora.base_weight import quantize_base
from phi3lora.model.attention import use_packed_attention
from phi3lora.model.load import longrope_boundary

TOKENIZER = make_tokenizer()
STOPS = list(range(5, 512, 15))  # so that answers end after 15 tokens on average


def documents(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 500, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = documents(3, 17, 9, 1, 26, 12, 9)


def variant(name="grouped-query", targets="all-linear", base=None, **changes):
    model = lively_model(**{**ATTENTION_VARIANTS[name], **changes})
    if base is not None:
        quantize_base(model, base)
    p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    randomize_adapters(model)
    return model.eval()


def by_transformers(model, prompts, count, penalty=1.0):
    """Answer each prompt alone with ``model.generate``, up to its stop token."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=STOPS, pad_token_id=3, repetition_penalty=penalty
        )
        with torch.no_grad():
            answers.append(
                model.generate(ids, attention_mask=ids.new_ones(ids.shape), generation_config=settings)[
                    0, len(prompt) :
                ].tolist()
            )
    return answers


def by_rows(model, prompts, count, slots, **options):
    with torch.no_grad():
        return decode(model, prompts, max_new_tokens=count, slots=slots, stops=STOPS, **options)


def recomputed(model, prompt, n):
    """The likeliest tokens, each from a forward of the whole text without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("attention", ["sdpa", "phi3lora", "eager"])
@pytest.mark.parametrize("name", ATTENTION_VARIANTS)
def test_answers_equal_those_of_transformers_whatever_the_number_of_rows(name, attention):
    model = variant(name)
    use_packed_attention(model)
    model.set_attn_implementation(attention)
    expected = by_transformers(model, PROMPTS, 20)
    assert len(set(map(len, expected))) > 1 or name != "grouped-query"  # some answers end early
    for slots in (1, 3, 16):
        assert by_rows(model, PROMPTS, 20, slots) == expected


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "down_proj"]], ids=str)
def test_any_subset_of_the_layers_may_be_adapted_and_adapters_may_be_off(targets):
    model = variant(targets=targets)
    expected = by_transformers(model, PROMPTS, 8)
    assert by_rows(model, PROMPTS, 8, 3) == expected
    with p3.disabled(model):
        off = by_rows(model, PROMPTS, 8, 3)
        assert off == by_transformers(model, PROMPTS, 8) != expected
    with p3.merged(model):
        assert by_rows(model, PROMPTS, 8, 3) == expected


def test_flags_of_the_config_do_not_change_answers():
    model = variant()
    expected = by_transformers(model, PROMPTS, 8)
    for flag in ("return_dict", "output_hidden_states", "_output_attentions"):
        setattr(model.config, flag, not getattr(model.config, flag))
    assert by_rows(model, PROMPTS, 8, 3) == expected


def test_an_adapter_that_changed_between_two_calls_is_seen():
    model = variant()
    before = by_rows(model, PROMPTS, 8, 3)
    randomize_adapters(model, seed=1)
    after = by_rows(model, PROMPTS, 8, 3)
    assert before != after == by_transformers(model, PROMPTS, 8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_answers_equal_those_of_transformers_under_autocast(dtype, attention):
    model = variant().to(dtype)
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", torch.bfloat16):
        assert by_rows(model, PROMPTS, 4, 1) == by_transformers(model, PROMPTS, 4)


def test_a_longrope_model_answers_on_both_sides_of_its_boundary_and_across_it():
    model = longrope_model(boundary=40, head_scale=30.0).eval()
    prompts = documents(5, 39, 40, 41, 60, 30, 33, 12)
    answers = by_rows(model, prompts, 10, 4)
    for prompt, answer in zip(prompts, answers, strict=True):  # 5.17's generate keeps the short factors past it
        assert answer and answer == recomputed(model, prompt, len(answer))


def test_rows_are_filled_while_prompts_wait_and_few_steps_are_computed(monkeypatch):
    model, steps = variant(), []
    real = PlainSteps.decode
    monkeypatch.setattr(
        PlainSteps, "decode", lambda self, tokens, *rest: steps.append(len(tokens)) or real(self, tokens, *rest)
    )
    prompts = documents(*[5] * 24)
    answers = by_rows(model, prompts, 40, 4)
    assert max(steps) == 4
    assert sum(steps) == sum(len(answer) - 1 for answer in answers)  # not one step too many


def test_an_answer_that_ended_while_its_row_moved_takes_no_more_steps(monkeypatch):
    """As on a GPU: the host reads a step late, and rows move in between when fewer of them are left."""
    model, steps, count = variant(), [], 16
    prompts = documents(*[5] * count)
    expected = by_rows(model, prompts, 200, count)
    read, real = Stream._issue, PlainSteps.decode

    def issue(self, rows):
        read(self, rows)
        self.on_their_way[-1] = self.on_their_way[-1]._replace(tokens=self.tokens.clone())

    monkeypatch.setattr(Stream, "_issue", issue)
    monkeypatch.setattr(PlainSteps, "lag", 1)
    monkeypatch.setattr(PlainSteps, "bucket", KernelSteps.bucket)
    monkeypatch.setattr(PlainSteps, "decode", lambda self, *step: steps.append(1) or real(self, *step))
    for stop in range(5, 5 + 40):
        stops = [stop, *STOPS]
        steps.clear()
        with torch.no_grad():
            answers = decode(model, prompts, max_new_tokens=200, slots=count, stops=stops)
        assert answers == [cut(answer, stops) for answer in expected]
        assert len(steps) <= max(map(len, answers)) + 1


def cut(answer, stops):
    return answer[: next((i for i, token in enumerate(answer, 1) if token in stops), None)]


# --- On a GPU, through the kernels and CUDA graphs

SIZE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 100, "factor": 4.0,
    "short_factor": [1.0] * 32, "long_factor": [5.0] * 32,
}  # fmt: skip
ON_A_GPU = [
    *({"name": name} for name in ATTENTION_VARIANTS if name != "longrope"), {"rope_parameters": LONGROPE},
    {"base": "nf4"}, {"base": "fp8"}, {"targets": ["q_proj", "v_proj"]}, {"targets": ["o_proj", "down_proj"]},
]  # fmt: skip


def largest_gap(model, prompt, answer) -> float:
    """Return by how much a token of the answer is less likely, in nats, than the best one of transformers' layers."""
    ids = torch.tensor([[*prompt, *answer]], device="cuda")
    boundary = longrope_boundary(model.config) or ids.shape[1]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        logits[:boundary] = model(input_ids=ids[:, :boundary]).logits[0]
    scores = logits[len(prompt) - 1 : -1].float().log_softmax(-1)  # (new, V)
    chosen = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return (scores.max(-1).values - chosen).max().item()


@pytest.mark.gpu
@pytest.mark.parametrize("options", ON_A_GPU, ids=str)
def test_on_a_gpu_every_token_is_the_likeliest_to_rounding(options):
    options = dict(options)
    base = options.pop("base", None)
    model = variant(**options, **SIZE).to("cuda", torch.bfloat16)
    model.lm_head.weight.data.mul_(4)
    if base is not None:
        p3.delete_adapter(model, "default")
        quantize_base(model, base)
        p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) * 0.05
    use_packed_attention(model)
    prompts = documents(40, 3, 200, 77, 9, 130)
    state = torch.cuda.get_rng_state()
    for slots in (1, 4, 16):
        answers = by_rows(model, prompts, 60, slots)
        assert len(answers) == len(prompts) and all(answers)
        gaps = [largest_gap(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        print(options, base, slots, "largest gaps", [round(gap, 4) for gap in gaps])
        assert max(gaps) < (0.5 if base == "fp8" else 0.15)
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
def test_on_a_gpu_changed_adapters_are_seen_and_seeds_do_not_depend_on_the_rows():
    model = variant(**SIZE).to("cuda", torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    use_packed_attention(model)
    first = by_rows(model, PROMPTS, 20, 4)
    assert by_rows(model, PROMPTS, 20, 4) == first
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data.mul_(-3)
    assert by_rows(model, PROMPTS, 20, 4) != first
    with p3.disabled(model):
        off = by_rows(model, PROMPTS, 20, 4)
    with p3.merged(model):
        assert by_rows(model, PROMPTS, 20, 4) != off
    sampling = Sampling(1.0, 0.9, 50, 11)
    alone = by_rows(model, PROMPTS, 20, 1, sampling=sampling)
    assert sum(by_rows(model, PROMPTS, 20, 4, sampling=sampling)[i] == alone[i] for i in range(7)) >= 5
