"""The peers, each on a tiny model: what is trained, what is counted, and the row of one that gives no figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
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


def table(peers, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--tiny", *arguments])
    assert peers.main() == 0
    return capsys.readouterr().out.splitlines()


def test_a_peer_that_fails_hangs_or_is_not_installed_leaves_the_others(peers, monkeypatch, capsys):
    def run(command, **options):
        if command[2] == "chat-peft":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOutOfMemoryError: CUDA\n")

    find = importlib.util.find_spec
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "loralib" else find(name))
    names = ("peft", "chat-peft", "loralib-checkpointing")
    assert table(peers, monkeypatch, capsys, *names, "--limit-s", "7")[-3:] == [
        "| `peft` | failed: OutOfMemoryError: CUDA | | | |",
        "| `chat-peft` | ran past 7 s | | | |",
        "| `loralib-checkpointing` | not installed: loralib | | | |",
    ]


@pytest.mark.slow
def test_a_peer_runs_in_a_process_of_its_own(peers, monkeypatch, capsys):
    lines = table(peers, monkeypatch, capsys, "peft", "--steps", "2", "--warmup", "0")
    assert lines[-1].startswith("| `peft` | ")
    assert len(lines[-1].split(" | ")) == 5
