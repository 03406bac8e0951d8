"""Measure other libraries on the same training, in the same way as ``benchmark.py`` measures phi3lora.

    python examples/benchmarks/peers.py                   # every peer, each in its own process; prints a markdown table
    python examples/benchmarks/peers.py peft chat-peft    # some peers

All peers train the same random model of Phi-3-mini's shape with bf16 weights, r = 16 on all four projections, no
dropout, 4 x 2,048 tokens a step, every token trained, fused AdamW. A peer is Hugging Face's ``Trainer`` with its own
defaults and either ``peft``'s adapters or loralib's layers swapped in as they are, with the fused projections as
``lora.MergedLinear``. (Attention is sdpa; 2,048 tokens exceed Phi-3-mini's window of 2,047, so it gets a mask.)
Adapters are float32 in all of them, and products run in bf16 under autocast.

``chat`` peers take 4 documents of ``benchmark.document_lengths`` a step, padded to the longest, because ``Trainer``
does not pack; only real tokens are counted. tok/s is the median of the steps after warm-up, timed with CUDA events at
the ends of steps.

Unsloth runs where it is installed, on the same shape as a Mistral, which is how it publishes Phi-3. Its chats are
packed: as many documents as a step of ours has, end to end in one row. Their speed depends on FlashAttention 2 being
installed, so the table says which attention it found.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time

if "--in-process" in sys.argv and any("unsloth" in argument for argument in sys.argv[1:]):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else it counts its loads on the Hub, and waits for an answer
    generated_code = tempfile.TemporaryDirectory()  # by default in the working directory
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", generated_code.name)
    import unsloth  # noqa: F401  # it patches transformers and peft, so it must come before them
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from benchmark import ROW_TOKENS, ROWS, SHAPES, document_lengths, measure_apart, random_model
from torch import Tensor, nn

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLIT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ["transformers", "peft", "loralib", "unsloth", "bitsandbytes"]
"""Packages whose versions are printed."""
TINY_TOKENS = 16
"""Tokens of a document with ``--tiny``, which tests this file without a GPU."""


def adapt_by_peft(model: nn.Module, r: int = 16) -> nn.Module:
    """Return the model in ``peft``'s wrapper."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def adapt_by_loralib(model: nn.Module) -> nn.Module:
    """Replace the four projections of every decoder layer by loralib's own layers."""
    import loralib

    segments = {"qkv_proj": [True] * 3, "gate_up_proj": [True] * 2}
    projections = [(path, module) for path, module in model.named_modules() if path.rpartition(".")[2] in TARGETS]
    for path, base in projections:
        parent, _, name = path.rpartition(".")
        merged = {"enable_lora": segments[name]} if name in segments else {}
        layer = (loralib.MergedLinear if merged else loralib.Linear)(
            base.in_features, base.out_features, r=16, lora_alpha=32, bias=False, device=base.weight.device,
            dtype=base.weight.dtype, **merged,
        )  # fmt: skip
        layer.weight = base.weight
        setattr(model.get_submodule(parent), name, layer)
    loralib.mark_only_lora_as_trainable(model)
    return model


def load_by_unsloth(sizes: dict[str, Any], checkpointing: bool, nf4: bool) -> nn.Module:
    """Return a random Mistral of the given sizes with Unsloth's adapters on all projections."""
    from transformers import MistralConfig, MistralForCausalLM
    from unsloth import FastLanguageModel

    from phi3lora.demo import BASE
    from phi3lora.model.load import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:  # it loads from files alone
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            MistralForCausalLM(MistralConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
        load_tokenizer(str(BASE)).save_pretrained(folder)
        loaded: Any = FastLanguageModel.from_pretrained(
            folder, max_seq_length=ROW_TOKENS, dtype=torch.bfloat16, load_in_4bit=nf4
        )
    adapted: nn.Module = FastLanguageModel.get_peft_model(
        loaded[0], r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=SPLIT_TARGETS,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    )  # fmt: skip
    return adapted


def attention_of_unsloth() -> str:
    """Return the attention that Unsloth found when it was imported."""
    import unsloth.models  # noqa: F401  # the next import needs it, and without a GPU nothing has loaded it
    from unsloth.utils import attention_dispatch

    if attention_dispatch.HAS_FLASH_ATTENTION:
        return f"FlashAttention {importlib.metadata.version('flash-attn')}"
    return "xformers" if attention_dispatch.HAS_XFORMERS else "PyTorch's attention"


@dataclass(frozen=True)
class Peer:
    """A peer: how it makes its adapters, and its settings."""

    adapt: Callable[[nn.Module], nn.Module] | None
    """Function that adds adapters to a model; None: the package loads the model itself."""
    package: str
    checkpointing: bool
    chat: bool = False
    nf4: bool = False
    """The base weights in bitsandbytes' 4 bits."""

    def missing(self) -> list[str]:
        """Return the required packages that are not installed."""
        names = [self.package, "accelerate", *(["bitsandbytes"] if self.nf4 else [])]
        return [name for name in names if importlib.util.find_spec(name) is None]


PEERS = {
    "peft-checkpointing": Peer(adapt_by_peft, "peft", checkpointing=True),
    "peft": Peer(adapt_by_peft, "peft", checkpointing=False),
    "loralib-checkpointing": Peer(adapt_by_loralib, "loralib", checkpointing=True),
    "chat-peft-checkpointing": Peer(adapt_by_peft, "peft", checkpointing=True, chat=True),
    "chat-peft": Peer(adapt_by_peft, "peft", checkpointing=False, chat=True),
    "unsloth": Peer(None, "unsloth", checkpointing=False),
    "unsloth-offload": Peer(None, "unsloth", checkpointing=True),
    "unsloth-nf4": Peer(None, "unsloth", checkpointing=False, nf4=True),
    "unsloth-nf4-offload": Peer(None, "unsloth", checkpointing=True, nf4=True),
    "chat-unsloth": Peer(None, "unsloth", checkpointing=False, chat=True),
}


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 128,
}  # fmt: skip
"""Sizes of a model that is small enough for a CPU."""


def tiny_model() -> nn.Module:
    """Return a random ``Phi3ForCausalLM`` of the sizes :data:`TINY` in bf16."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**TINY, pad_token_id=0, bos_token_id=1, eos_token_id=2)).to(torch.bfloat16)


def random_documents(chat: bool, steps: int, vocabulary: int, tiny: bool, packed: bool = False) -> list[Tensor]:
    """Return the token ids of 4 documents a step, or with ``packed`` of a full step's; int64 (n,) each."""
    lengths = document_lengths(chat, steps)
    lengths = lengths[: len(lengths) // steps * steps if packed else ROWS * steps]
    if tiny:
        lengths = [max(2, n * TINY_TOKENS // ROW_TOKENS) for n in lengths]
    generator = np.random.default_rng(0)
    return [torch.from_numpy(generator.integers(0, vocabulary, n)) for n in lengths]


class Padded:
    """Data collator that pads to the longest document, trains every real token and counts the real tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # real tokens of each batch, in training order

    def __call__(self, documents: list[Tensor]) -> dict[str, Tensor]:
        self.tokens.append(sum(map(len, documents)))
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        return {  # each (4, longest)
            "input_ids": pad(documents, padding_value=0),
            "attention_mask": pad([torch.ones_like(document) for document in documents], padding_value=0),
            "labels": pad(documents, padding_value=-100),
        }


class Packed(Padded):
    """Data collator that lays documents end to end in one row, in the form that Unsloth reads."""

    def __call__(self, documents: list[Tensor]) -> dict[str, Tensor]:
        self.tokens.append(sum(map(len, documents)))
        labels = [torch.cat([torch.tensor([-100]), document[1:]]) for document in documents]
        return {  # each (1, tokens)
            "input_ids": torch.cat(documents)[None],
            "position_ids": torch.cat([torch.arange(len(document)) for document in documents])[None],
            "labels": torch.cat(labels)[None],
            "packed_seq_lengths": torch.tensor([len(document) for document in documents], dtype=torch.int32),
        }


def step_clock(cuda: bool) -> Any:
    """Return a ``TrainerCallback`` that marks the end of every step without making a CUDA device wait."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[Any] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self.marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
            if cuda:
                self.marks[-1].record()

        def seconds(self) -> list[float]:
            """Return the seconds of every step but the first."""
            if cuda:
                torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 if cuda else b - a for a, b in pairwise(self.marks)]

    return StepClock()


def measure(name: str, steps: int, warmup: int, tiny: bool = False) -> dict[str, Any]:
    """Measure one peer in this process."""
    from transformers import Trainer, TrainingArguments

    peer = PEERS[name]
    vocabulary = (TINY if tiny else SHAPES["phi-3-mini"])["vocab_size"]
    packs = peer.chat and peer.adapt is None
    documents = random_documents(peer.chat, steps, vocabulary, tiny, packs)
    if peer.adapt is None:
        model = load_by_unsloth(TINY if tiny else SHAPES["phi-3-mini"], peer.checkpointing, peer.nf4)
    else:
        model = tiny_model() if tiny else random_model("phi-3-mini")
        model.config.use_cache = False
        model = peer.adapt(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    collator, clock = Packed() if packs else Padded(), step_clock(cuda=not tiny)
    rows = len(documents) // steps
    own_checkpointing = peer.checkpointing and peer.adapt is not None  # Unsloth has set its own
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=steps, learning_rate=2e-4, bf16=True,
            optim="adamw_torch_fused", gradient_checkpointing=own_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if own_checkpointing else None,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            use_cpu=tiny,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=documents, callbacks=[clock])
        if not tiny:
            torch.cuda.reset_peak_memory_stats()
        loss = trainer.train().training_loss
    steps_measured = list(zip(collator.tokens[1:], clock.seconds(), strict=False))[warmup:]
    peak = 0 if tiny else torch.cuda.max_memory_allocated()
    return {
        "peer": name,
        "tok_per_s": round(statistics.median(tokens / s for tokens, s in steps_measured)),
        "tok_per_step": round(statistics.mean(tokens for tokens, _ in steps_measured)),
        "peak_gib": round(peak / 2**30, 1),
        "loss": round(loss, 3),
        "attention": attention_of_unsloth() if peer.package == "unsloth" else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", default=list(PEERS), metavar="NAME", help=f"one or more of {', '.join(PEERS)}"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=8, help="steps before the measured ones")
    parser.add_argument("--limit-s", type=float, default=240, help="time limit of one peer's process")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; allowed: {', '.join(PEERS)}")
    if options.steps < options.warmup + 2:
        parser.error(f"--steps {options.steps}; allowed: at least --warmup + 2, the first step has no start")
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("a CUDA device is needed")
    if options.in_process:
        print(json.dumps(measure(options.names[0], options.steps, options.warmup, options.tiny)))
        return 0
    card = "CPU" if options.tiny else torch.cuda.get_device_name()
    packages = [name for name in PACKAGES if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{card}, torch {torch.__version__}, {versions}, {time.strftime('%Y-%m-%d')}\n")
    print("| peer | tok/s | real tokens a step | peak GiB | loss |\n|---|---|---|---|---|")
    settings = ["--steps", str(options.steps), "--warmup", str(options.warmup), *(["--tiny"] if options.tiny else [])]
    for name in options.names:
        r: dict[str, Any] | str
        if missing := PEERS[name].missing():
            r = f"not installed: {', '.join(missing)}"
        else:
            r = measure_apart(__file__, [name, *settings], options.limit_s)
        if isinstance(r, str):
            print(f"| `{name}` | {r} | | | |", flush=True)
        else:
            figures = f"{r['tok_per_s']:,} | {r['tok_per_step']:,} | {r['peak_gib']} | {r['loss']}"
            found = f" ({r['attention']})" if r["attention"] else ""
            print(f"| `{name}`{found} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
