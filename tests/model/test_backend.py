"""How the decoder layers are computed: what is chosen, what is installed, and what is left afterwards."""

from __future__ import annotations

import pytest
import torch
from conftest import packed_batch, random_documents, tiny_model

import phi3lora as p3
from phi3lora.model import backend as backends
from phi3lora.model.backend import PLAIN, Backend, choose_backend, use_backend


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "plain (not on a CUDA device)"),
        ({"compile": True}, "compiled (compile=True)"),
        ({"compile": False}, "plain (compile=False)"),
        ({"compile": True, "offload": True}, "plain (offload cannot be compiled)"),
        ({"compile": False, "offload": True}, "plain (compile=False)"),
    ],
)
def test_what_is_chosen_and_why(options, expected):
    assert str(choose_backend(tiny_model(), **options)) == expected


@pytest.mark.parametrize(
    ("reason", "offload", "expected"),
    [
        (None, False, "fused"),
        ("a hook on a Phi3MLP", False, "plain (a hook on a Phi3MLP; compile=True is faster than plain)"),
        ("a hook on a Phi3MLP", True, "plain (a hook on a Phi3MLP)"),
        ("compiled layers", False, "plain (compiled layers)"),
    ],
)
def test_where_kernels_could_run_the_reason_names_the_next_best(monkeypatch, reason, offload, expected):
    monkeypatch.setattr(backends, "unsupported_reason", lambda *_: reason)
    monkeypatch.setattr(backends, "_compiles_on", lambda device: True)
    assert str(choose_backend(tiny_model(), offload=offload)) == expected


def test_compiled_layers_are_compiled_inside_the_block_alone():
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt), use_backend(model, Backend("compiled")):
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
        with use_backend(model) as inner:
            assert inner.kind == "compiled"
        raise KeyboardInterrupt
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_the_choice_is_made_once_where_one_is_installed_and_anew_for_each_call_where_none_is(monkeypatch):
    chosen = []
    monkeypatch.setattr(backends, "choose_backend", lambda model: chosen.append(1) or PLAIN)
    model, batch = tiny_model(), packed_batch([random_documents(9)], 9)
    with torch.no_grad():
        for _ in range(2):
            p3.causal_lm_loss(model, batch)
        p3.causal_lm_loss(model, batch, fused=False)
        assert len(chosen) == 2
        with use_backend(model):
            for _ in range(2):
                p3.causal_lm_loss(model, batch)
        assert len(chosen) == 3
