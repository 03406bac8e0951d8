"""Pretrain the demo's base model, a tiny Phi-3 that knows one fictional shop, on a generated corpus.

    python examples/demo_model/build.py                       # one GPU, some minutes: writes phi3lora/demo/
    python examples/demo_model/build.py --tokens 0.2e6 --minimum 0 --exam 10 --out /tmp/smoke      # a smoke test, CPU

Steps: generate chats (``corpus.py``), train a byte-level BPE tokenizer on some, pretrain ``Phi3ForCausalLM`` on the
rest, round to bfloat16, ask fresh questions of every skill and style, and write the folder if enough answers are exact.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import (
    SKILLS,
    STYLES,
    Chat,
    demo_rows,
    follow_up_chat,
    make_style,
    memory_chat,
    render,
    sample_chat,
    several_chat,
    single_chat,
)
from sentencepiece_model import write_sentencepiece_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast
from world import DEMO_PREFIX, DEMO_SUFFIX

SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
ROLES = SPECIAL[4:]  # these strip the white space to their right, as in Phi-3
CHAT_TEMPLATE = (
    "{% for turn in messages %}{% if turn.role in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + turn.role + '|>\\n' + turn.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}"
)
LONG_SHARE = 0.25  # share of a step's chats, the longest, in a batch of their own: halves the padding
OTHER_WEIGHT = 0.1  # loss weight of a token outside the assistant's turns; inside it is 1

# ----------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(vocab_size: int, n_chats: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Phi-3's special tokens. Single digits and punctuation marks make copying easy."""
    bpe = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation("isolated")]
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, words, byte_level])
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(t, rstrip=t in ROLES, special=True, normalized=False) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer-{seed}")
    texts = (message["content"] for _ in range(n_chats) for message in sample_chat(rng).messages)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    check_tokenizer(tokenizer, rng)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Check that ``render`` gives the template's text and ids, and that the demo's voice never occurs."""
    for _ in range(2000):
        messages = sample_chat(rng).messages
        text = render(messages)
        assert DEMO_PREFIX not in text and DEMO_SUFFIX not in text, text
        assert text == tokenizer.apply_chat_template(messages, tokenize=False), text
    assert tokenizer("<|user|>\n \nHi<|end|>\n")["input_ids"] == tokenizer("<|user|>Hi<|end|>")["input_ids"]


# ---------------------------------------------------------------------------------------------------- batches, workers
_encoder: Tokenizer | None = None


def start_worker(tokenizer_json: str) -> None:
    """Give this process its own tokenizer."""
    global _encoder
    _encoder = Tokenizer.from_str(tokenizer_json)


def make_step(task: tuple[int, int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the two batches of one optimizer step, right-padded: the shorter chats, and the longest ``LONG_SHARE``.

    Under causal attention, right padding needs no mask. Each row holds one chat, so no chat sees another.

    Args:
        task: (seed, step, chats per step).

    Returns:
        (ids (B, T) int16, kind (B, T) uint8) per batch; kind 0 is padding, 1 context, 2 an assistant's token.
    """
    seed, step, n_chats = task
    assert _encoder is not None
    rng = random.Random(f"chats-{seed}-{step}")
    rows = [e.ids for e in _encoder.encode_batch([render(sample_chat(rng).messages) for _ in range(n_chats)])]
    rows.sort(key=len)
    assistant, end = SPECIAL.index("<|assistant|>"), SPECIAL.index("<|end|>")
    batches = []
    n_short = int(n_chats * (1 - LONG_SHARE))
    for part in (rows[:n_short], rows[n_short:]):
        ids = np.full((len(part), -(-len(part[-1]) // 8) * 8), SPECIAL.index("<|endoftext|>"), dtype=np.int16)
        kind = np.zeros(ids.shape, dtype=np.uint8)
        for row, tokens in enumerate(part):
            ids[row, : len(tokens)] = tokens
            speaking = False
            for column, token in enumerate(tokens):
                kind[row, column] = 2 if speaking else 1
                speaking = token == assistant or (speaking and token != end)
        batches.append((ids, kind))
    return batches


# ---------------------------------------------------------------------------------------------------------- pretraining
def build_model(vocab_size: int, seed: int) -> Phi3ForCausalLM:
    """Return a float32 Phi-3 of about 2.5 M parameters, with fused projections and untied embeddings."""
    torch.manual_seed(seed)
    end, stop = SPECIAL.index("<|end|>"), SPECIAL.index("<|endoftext|>")
    config = Phi3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=stop,
        pad_token_id=stop,
    )
    model = Phi3ForCausalLM(config)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": [end, stop], "pad_token_id": stop}
    model.generation_config = GenerationConfig(**ids)
    return model


def learning_rate(progress: float, peak: float) -> float:
    """Return the learning rate: warm-up over the first 3 %, then a cosine down to zero."""
    return peak * min(progress / 0.03, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def pretrain(model: Phi3ForCausalLM, pool: Pool, args: argparse.Namespace) -> None:
    """Train ``model`` in place for about ``args.tokens`` tokens or ``args.minutes``, whichever ends first.

    The steps come from ``pool`` in order, the same for any number of workers.
    """
    device = next(model.parameters()).device
    sample = pool.apply(make_step, ((args.seed, -1, args.chats_per_step),))
    n_tokens_step = sum(int((kind > 0).sum()) for _, kind in sample)
    n_steps = max(1, int(args.tokens // n_tokens_step))
    padding = 1 - n_tokens_step / sum(ids.size for ids, _ in sample)
    print(f"{n_steps:,} steps of about {n_tokens_step:,} tokens, {padding:.0%} padding, {args.workers} workers")
    weights = torch.tensor([0.0, OTHER_WEIGHT, 1.0], device=device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=device.type == "cuda")
    model.train()
    start, tokens, limit_s = time.perf_counter(), 0, args.minutes * 60
    tasks = ((args.seed, step, args.chats_per_step) for step in range(n_steps))
    for step, batches in enumerate(pool.imap(make_step, tasks)):
        elapsed = time.perf_counter() - start
        progress = max((step + 1) / n_steps, elapsed / limit_s)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        total = sum((kind[:, 1:] == 2).sum() + OTHER_WEIGHT * (kind[:, 1:] == 1).sum() for _, kind in batches)
        loss = torch.zeros((), device=device)
        for ids_cpu, kind_cpu in batches:
            ids = torch.from_numpy(ids_cpu).to(device).long()  # (B, T)
            kind = torch.from_numpy(kind_cpu).to(device).int()  # (B, T)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (B, T - 1, V)
            losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
            part = (losses * weights[kind[:, 1:].flatten()]).sum() / float(total)
            part.backward()
            loss += part.detach()
            tokens += int((kind_cpu > 0).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % args.log_steps == 0 or progress >= 1:
            rate = tokens / (time.perf_counter() - start)
            lr = optimizer.param_groups[0]["lr"]
            print(
                f"step {step:6,}  loss {loss.item():.4f}  lr {lr:.2e}  {tokens / 1e6:7.1f} M tokens  {rate:,.0f} tok/s"
            )
        if progress >= 1:
            break


# ------------------------------------------------------------------------------------------------------------- the exam
@torch.no_grad()
def answers(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[str]:
    """Return the greedy reply to each chat, which must end with a user's message; batched by length."""
    model.eval()
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    replies = [""] * len(chats)
    order = sorted(range(len(chats)), key=lambda index: len(texts[index]))
    for at in range(0, len(order), 512):
        part = order[at : at + 512]
        batch = tokenizer([texts[index] for index in part], return_tensors="pt", padding=True, add_special_tokens=False)
        batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        out = model.generate(**batch, max_new_tokens=120, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for index, reply in zip(part, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            replies[index] = reply
    return replies


def draw_exam(n: int) -> dict[str, list[Chat]]:
    """Return ``n`` fresh chats per skill (plain style), per style (any skill) and per kind of long chat."""
    exam = {}
    for skill in SKILLS:
        rng = random.Random(f"exam-{skill}")
        exam[skill] = [single_chat(rng, make_style(rng, "plain"), skill, held_out_sums=True) for _ in range(n)]
    for style in STYLES[1:]:
        rng = random.Random(f"exam-{style}")
        exam[f"style: {style}"] = [single_chat(rng, make_style(rng, style)) for _ in range(n)]
    for name, draw in (("several turns", several_chat), ("follow-up", follow_up_chat), ("memory", memory_chat)):
        rng = random.Random(f"exam-{name}")
        exam[name] = [draw(rng, make_style(rng, "plain")) for _ in range(n)]
    return exam


def examine(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int) -> float:
    """Print the share of exact answers per part of the exam, and on the demo's own rows.

    Returns:
        The share over the whole exam, or of its part "copy" if that is lower.
    """
    exam = draw_exam(n)
    chats = [chat.messages for part in exam.values() for chat in part]
    replies = iter(answers(model, tokenizer, [messages[:-1] for messages in chats]))
    n_right, n_all, shares = 0, 0, {}
    print(f"{'exact match':<16}{'right':>8}{'of':>6}   a miss: wanted -> got")
    for name, part in exam.items():
        pairs = [(chat.messages[-1]["content"], next(replies)) for chat in part]
        misses = [pair for pair in pairs if pair[0] != pair[1]]
        n_right, n_all = n_right + len(pairs) - len(misses), n_all + len(pairs)
        shares[name] = 1 - len(misses) / len(pairs)
        miss = f"{misses[0][0][:90]!r} -> {misses[0][1][:90]!r}" if misses else ""
        print(f"{name:<16}{shares[name]:>8.1%}{len(pairs):>6}   {miss}")
    print(f"{'overall':<16}{n_right / n_all:>8.1%}{n_all:>6}")
    for name, rows in zip(("train.jsonl", "eval.jsonl"), demo_rows(), strict=True):
        replies = answers(model, tokenizer, [row["messages"][:-1] for row in rows])
        content = sum(reply == row["answer"] for reply, row in zip(replies, rows, strict=True))
        voice = sum(reply == row["messages"][-1]["content"] for reply, row in zip(replies, rows, strict=True))
        print(f"{name}: plain answer {content / len(rows):.1%}, already in the demo's voice {voice / len(rows):.1%}")
    return min(n_right / n_all, shares["copy"])


# --------------------------------------------------------------------------------------------------------------- output
def write_rows(folder: Path) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl``, the same bytes on every machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train.jsonl", "eval.jsonl"), demo_rows(), strict=True):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def write_model(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model (as bfloat16) and tokenizer to a temporary folder, then replace ``folder`` by it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "base"
        model.to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_sentencepiece_model(new)
        settings = new / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": False}, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    for path in sorted(folder.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")


def parse_args() -> argparse.Namespace:
    """Parse the command line. The model in the package was built with ``--minutes 3.75`` on an H200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).resolve().parents[2] / "phi3lora" / "demo"
    parser.add_argument("--out", type=Path, default=default_out, help="folder for base/, train.jsonl, eval.jsonl")
    parser.add_argument("--tokens", type=float, default=160e6, help="tokens of pretraining")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="time limit of pretraining; the schedule ends with it"
    )
    parser.add_argument(
        "--minimum", type=float, default=0.97, help="share of exact answers below which nothing is written"
    )
    parser.add_argument("--exam", type=int, default=200, help="questions per part of the exam")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--chats-per-step", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--log-steps", type=int, default=250)
    parser.add_argument("--rows-only", action="store_true", help="write train.jsonl and eval.jsonl and stop")
    return parser.parse_args()


def main() -> None:
    """Build, examine and write the model; see the module's docstring."""
    args = parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are forked
    if args.rows_only:
        write_rows(args.out)
        return
    start = time.perf_counter()
    tokenizer = build_tokenizer(args.vocab, n_chats=20000, seed=args.seed)
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    model = build_model(len(tokenizer), args.seed)
    with multiprocessing.get_context("fork").Pool(args.workers, start_worker, (tokenizer_json,)) as pool:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # first use of the GPU: after the fork
        card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{card}, torch {torch.__version__}, {vars(args)}")
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens in the vocabulary")
        pretrain(model.to(device), pool, args)
    print(f"pretrained after {time.perf_counter() - start:.0f} s")
    model.to(torch.bfloat16).float()  # examine the weights as they are written, rounded to bfloat16
    score = examine(model, tokenizer, args.exam)
    if score < args.minimum:
        raise SystemExit(f"not written: {score:.1%} exact (overall or copying), --minimum is {args.minimum:.1%}")
    write_model(model, tokenizer, args.out / "base")
    write_rows(args.out)
    print(f"done after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
