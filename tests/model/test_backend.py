"""How the decoder layers are computed: what is chosen, what is installed, and what is left afterwards."""

from __future__ import annotations

import pytest
import torch
from conftest import packed_batch, random_documents, tiny_model

import phi3lora as p3
from phi3lora.model import backend as backends
from phi3lora.model.backend import PLAIN, Backend, choose_backend, use_backend

HOOK = "a hook on a Phi3MLP"


@pytest.mark.parametrize(
    ("reason", "options", "expected"),
    [
        ("here", {}, "plain (not on a CUDA device)"),
        ("here", {"compile": True}, "compiled (compile=True)"),
        ("here", {"compile": False}, "plain (compile=False)"),
        ("here", {"compile": True, "offload": True}, "plain (offload cannot be compiled)"),
        ("here", {"compile": False, "offload": True}, "plain (compile=False)"),
        (None, {}, "fused"),
        (HOOK, {}, f"plain ({HOOK}; compile=True is faster than plain)"),
        (HOOK, {"offload": True}, f"plain ({HOOK})"),
        ("compiled layers", {}, "plain (compiled layers)"),
    ],
)
def test_what_is_chosen_and_why(monkeypatch, reason, options, expected):
    """Here, and where kernels and the compiler run but for a reason: it then names the next best."""
    if reason != "here":
        monkeypatch.setattr(backends, "unsupported_reason", lambda *_: reason)
        monkeypatch.setattr(backends, "_compiles_on", lambda device: True)
    assert str(choose_backend(tiny_model(), **options)) == expected


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
