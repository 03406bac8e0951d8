"""The peers, each on a tiny model: what is trained, what is counted, and what is said of one that gives no figure."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
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


NAMES = ["peft-checkpointing", "peft", "loralib-checkpointing", "chat-peft-checkpointing", "chat-peft"]


@pytest.mark.parametrize("name", NAMES)
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


class Finished:
    def __init__(self, returncode, stdout="", stderr=""):
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr


def table(peers, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--tiny", *arguments])
    assert peers.main() == 0
    return capsys.readouterr().out.splitlines()


def test_the_table_has_a_row_for_each_peer(peers, monkeypatch, capsys):
    figures = {"tok_per_s": 12345, "tok_per_step": 8192, "peak_gib": 40.5, "loss": 10.4}
    commands = []

    def run(command, **options):
        commands.append(command)
        return Finished(0, "what Trainer prints\n" + json.dumps({"peer": command[2], **figures}) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    lines = table(peers, monkeypatch, capsys)
    assert lines[-len(NAMES) :] == [f"| `{name}` | 12,345 | 8,192 | 40.5 | 10.4 |" for name in NAMES]
    assert [command[2] for command in commands] == NAMES


def test_a_peer_that_fails_hangs_or_is_not_installed_leaves_the_others(peers, monkeypatch, capsys):
    def run(command, **options):
        if command[2] == "peft":
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return Finished(1, stderr="Traceback\nOutOfMemoryError: CUDA\n")

    find = importlib.util.find_spec
    monkeypatch.setattr(subprocess, "run", run)
    lines = table(peers, monkeypatch, capsys, "peft", "chat-peft", "--limit-s", "7")
    assert lines[-2:] == ["| `peft` | ran past 7 s | | | |", "| `chat-peft` | failed: OutOfMemoryError: CUDA | | | |"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    lines = table(peers, monkeypatch, capsys, "peft", "loralib-checkpointing")
    assert lines[-2] == "| `peft` | not installed: peft | | | |"
    assert "failed" in lines[-1]


def test_a_peer_runs_in_a_process_of_its_own(peers, monkeypatch, capsys):
    lines = table(peers, monkeypatch, capsys, "peft", "--steps", "2", "--warmup", "0")
    assert lines[-1].startswith("| `peft` | ")
    assert len(lines[-1].split(" | ")) == 5


@pytest.mark.parametrize(
    ("arguments", "words"), [(["llama"], "unknown peer llama; allowed: peft-"), (["--steps", "3"], "--warmup + 2")]
)
def test_arguments_that_cannot_be_are_refused(arguments, words, peers, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers.py", "--tiny", *arguments])
    with pytest.raises(SystemExit):
        peers.main()
    assert words in capsys.readouterr().err
