"""Tiny models, a byte-level tokenizer with each family member's chat template, and chats."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tests run in parallel processes; also makes float sums repeatable

PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_MINI_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# name -> (template, special tokens that swallow white space to their right, other special tokens, eos, pad)
TEMPLATES = {
    "phi-3": (PHI3_TEMPLATE, ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"], [], "<|endoftext|>"),
    "phi-4": (PHI4_TEMPLATE, [], ["<|im_start|>", "<|im_sep|>", "<|im_end|>"], "<|im_end|>"),
    "phi-4-mini": (PHI4_MINI_TEMPLATE, [], ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|tool|>"],
                   "<|endoftext|>"),
}  # fmt: skip

CORPUS = ["The quick brown fox says hello to the user and waits for an answer. " * 4, "What is the price? 42 dollars."]


def make_tokenizer(name: str = "phi-3") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens with the markers and template of a family member."""
    template, swallowing, plain, eos = TEMPLATES[name]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    )
    core.add_special_tokens([AddedToken(t, rstrip=True, special=True) for t in swallowing])
    core.add_special_tokens([AddedToken(t, special=True) for t in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<|endoftext|>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(**changes) -> Phi3Config:
    """A Phi-3 of 2 layers, grouped-query heads (4 and 2), hidden 32."""
    values = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "original_max_position_embeddings": 512, "pad_token_id": 3, "eos_token_id": 3, "bos_token_id": 1,
    }  # fmt: skip
    return Phi3Config(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> Phi3ForCausalLM:
    """A random model of :func:`tiny_config`, in eval mode."""
    torch.manual_seed(seed)
    return Phi3ForCausalLM(tiny_config(**changes)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> Phi3ForCausalLM:
    return tiny_model()


def chat_rows(count: int = 24) -> list[dict]:
    """Short chats of one or two turns, of differing lengths."""
    rows = []
    for i in range(count):
        turns = [("user", f"What is item {i}?"), ("assistant", f"It is number {i * 7}." + " Really." * (i % 4))]
        if i % 3 == 0:
            turns += [("user", "Say hello."), ("assistant", "hello " * (i % 5 + 1))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


@pytest.fixture
def rows() -> list[dict]:
    return chat_rows()
