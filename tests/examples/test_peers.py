"""The peers, each on a tiny model: what is trained, what is counted, and the row of one that gives no figure."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
import time
import types
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import peers

    return peers


@pytest.mark.parametrize("name", ["peft-checkpointing", "peft", "loralib-checkpointing", "chat-peft"])
def test_a_peer_trains_its_adapters_alone(name, peers, monkeypatch):
    peer, kept, forwards = peers.PEERS[name], {}, []

    def adapt(model):
        kept["base"] = {id(p): (p, p.detach().clone()) for p in model.parameters()}
        kept["model"] = adapted = peer.adapt(model)
        layer = model.model.layers[0].self_attn.qkv_proj
        layer.register_forward_hook(lambda *_: forwards.append(1))
        return adapted

    monkeypatch.setitem(peers.PEERS, name, dataclasses.replace(peer, adapt=adapt))
    found = peers.measure(name, steps=3, warmup=0, tiny=True)
    assert found["peer"] == name
    assert found["tok_per_s"] > 0
    assert 0 < found["tok_per_step"] <= 4 * 16
    assert (found["tok_per_step"] == 4 * 16) == (not peer.chat)
    assert found["loss"] == pytest.approx(torch.tensor(128.0).log().item(), abs=0.3), "random ids of 128"
    assert len(forwards) == 3 * (2 if peer.checkpointing else 1)

    trained = {n: p for n, p in kept["model"].named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 2, "A and B of four projections of two layers"
    assert all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert all(p.any() for p in trained.values()), "B has moved from zero"
    frozen = [p for p in kept["model"].parameters() if not p.requires_grad]
    assert len(frozen) == len(kept["base"])
    assert all(p.dtype == torch.bfloat16 and torch.equal(*kept["base"][id(p)]) for p in frozen)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", ["unsloth", "unsloth-nf4", "chat-unsloth"])
def test_unsloth_runs_where_it_is_installed_and_says_which_attention_it_found(name, flash, peers, monkeypatch):
    import peft
    from transformers import AutoModelForCausalLM

    settings, batches = {}, []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(folder, **options):
            settings.update(options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=options["dtype"])
            forward = model.forward

            def recorded(packed_seq_lengths=None, **inputs):
                batches.append({**inputs, "packed_seq_lengths": packed_seq_lengths})
                return forward(**inputs)

            model.forward = recorded
            return model, None

        @staticmethod
        def get_peft_model(model, use_gradient_checkpointing, **options):
            settings["checkpointing"] = use_gradient_checkpointing
            return peft.get_peft_model(model, peft.LoraConfig(**options))

    dispatch = types.ModuleType("unsloth.utils.attention_dispatch")
    dispatch.HAS_FLASH_ATTENTION, dispatch.HAS_XFORMERS = flash, False
    packages = {name: types.ModuleType(name) for name in ("unsloth", "unsloth.models", "unsloth.utils")}
    packages["unsloth"].FastLanguageModel, packages["unsloth.utils"].attention_dispatch = FastLanguageModel, dispatch
    for path, module in packages.items():
        monkeypatch.setitem(sys.modules, path, module)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8" if name == "flash-attn" else real(name))
    found = peers.measure(name, steps=3, warmup=0, tiny=True)
    assert found["attention"] == ("FlashAttention 2.8" if flash else "PyTorch's attention")
    assert found["tok_per_s"] > 0 and settings["checkpointing"] is False
    assert settings["load_in_4bit"] is (name == "unsloth-nf4")
    if name != "chat-unsloth":
        assert found["tok_per_step"] == 4 * 16
        return
    lengths = batches[0]["packed_seq_lengths"].tolist()  # chats are packed, not padded
    assert batches[0]["input_ids"].shape == (1, sum(lengths)) and len(lengths) > 4
    first = [sum(lengths[:i]) for i in range(len(lengths))]
    assert all(batches[0]["position_ids"][0, i] == 0 and batches[0]["labels"][0, i] == -100 for i in first)


def test_only_real_tokens_are_counted_and_trained(peers):
    collate = peers.Padded()
    batch = collate([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert collate.tokens == [4]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_all_peers_see_the_documents_of_the_benchmark(peers):
    for chat in (False, True):
        documents = peers.random_documents(chat, 5, 100, tiny=False)
        assert [len(d) for d in documents] == peers.document_lengths(chat, 5)[:20]


def test_long_rows_measure_fewer_steps_unless_told_otherwise(peers):
    import benchmark

    assert benchmark.steps_of("bf16", None, None) == (24, 8)
    assert benchmark.steps_of("nf4-65536", None, None) == (4, 1)
    assert benchmark.steps_of("nf4-65536", 3, 0) == (3, 0)
    with pytest.raises(SystemExit, match="--steps 4; allowed: at least --warmup"):
        benchmark.steps_of("bf16", 4, None)


def table(peers, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--tiny", *arguments])
    assert peers.main() == 0
    return capsys.readouterr().out.splitlines()


def test_a_peer_that_fails_hangs_or_is_not_installed_leaves_the_others(peers, monkeypatch, capsys, tmp_path):
    python = tmp_path / "python"  # the limit must end what it has started, too
    python.write_text(
        """#!/bin/sh
        case "$2" in
            chat-peft) sleep 60 ;;
            peft) echo Traceback >&2; echo 'OutOfMemoryError: CUDA' >&2; exit 1 ;;
            *) echo Done ;;
        esac
        """
    )
    python.chmod(0o755)
    find = importlib.util.find_spec
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "loralib" else find(name))
    names = ("peft", "chat-peft", "loralib-checkpointing", "peft-checkpointing")
    started = time.monotonic()
    assert table(peers, monkeypatch, capsys, *names, "--limit-s", "3")[-4:] == [
        "| `peft` | failed: OutOfMemoryError: CUDA | | | |",
        "| `chat-peft` | ran past 3 s | | | |",
        "| `loralib-checkpointing` | not installed: loralib | | | |",
        "| `peft-checkpointing` | ended without a figure | | | |",
    ]
    assert time.monotonic() - started < 45, "it waited for the sleep of 60 s"


@pytest.mark.slow
def test_a_peer_runs_in_a_process_of_its_own(peers, monkeypatch, capsys):
    lines = table(peers, monkeypatch, capsys, "peft", "--steps", "2", "--warmup", "0")
    assert lines[-1].startswith("| `peft` | ")
    assert len(lines[-1].split(" | ")) == 5
