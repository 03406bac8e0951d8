"""Subsets of q, k, v, o, gate, up, down, plain and rsLoRA, on three kinds of tiny model: others compute our logits.

Each subset is read by the real PEFT and the real transformers. One layer is enough, for a layer's tensors are written
from that layer alone; test_peft_export.py has two layers with different ranks. All 127 subsets run as slow tests.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from conftest import adapters_of, randomize_adapters, same_tensors
from peft_folders import MEMBERS, as_llama, base_model, logits, with_peft, with_transformers
from torch import Tensor

import phi3lora as p3
from phi3lora.adapters.adapter_file import adapter_metadata

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUBSETS = [list(names) for n in range(1, 8) for names in itertools.combinations(NAMES, n)]
FEW = [
    ["q_proj"], ["v_proj"], ["q_proj", "v_proj"], ["k_proj", "v_proj", "o_proj"], ["gate_proj"],
    ["up_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj"], list(NAMES),
]  # fmt: skip

runs = pytest.mark.parametrize(
    ("kind", "rslora", "subsets"),
    [("grouped-query", False, FEW), ("tied", True, FEW)]
    + [pytest.param(kind, rslora, SUBSETS, marks=pytest.mark.slow) for kind in MEMBERS for rslora in (False, True)],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} subsets" if isinstance(value, list) else None,
)


class Case(NamedTuple):
    """One subset, and a model whose adapters on it change the logits."""

    name: str
    model: Any
    base: Any
    """The plain model; :func:`copy.deepcopy` before it is changed."""
    logits: Tensor


def cases(kind: str, rslora: bool, subsets: Sequence[list[str]]) -> Iterator[Case]:
    base = base_model({**MEMBERS[kind], "num_hidden_layers": 1}, head_scale=1 if kind == "tied" else 10)
    before = logits(base)
    for names in subsets:
        model = copy.deepcopy(base)
        p3.inject_lora(model, p3.LoraConfig(r=3, lora_alpha=6, use_rslora=rslora, target_modules=names))
        randomize_adapters(model, std=0.3)
        after = logits(model)
        assert (after - before).abs().max() > 0.01, names  # else equal logits would prove nothing
        yield Case("+".join(names), model, base, after)


def half(kind: str, rslora: bool, subsets: list[list[str]]) -> list[list[str]]:
    """Every second subset: the two values of ``rslora`` have all of them together."""
    return subsets[rslora != (kind == "tied") :: 2]


def assert_equal_logits(theirs, case: Case) -> None:
    torch.testing.assert_close(logits(theirs), case.logits, atol=1e-4, rtol=0, msg=lambda m: f"{case.name}: {m}")


def assert_comes_back(folder, case: Case) -> None:
    again = copy.deepcopy(case.base)
    report = p3.import_peft(again, folder)
    assert adapter_metadata(again) == adapter_metadata(case.model), case.name
    assert same_tensors(adapters_of(again), adapters_of(case.model)), case.name
    assert again.lora_config == case.model.lora_config, case.name
    assert report.trainable_parameters == sum(t.numel() for t in adapters_of(case.model).values()), case.name


@runs
def test_peft_and_transformers_compute_our_logits_and_the_folder_comes_back(tmp_path, kind, rslora, subsets):
    for case in cases(kind, rslora, subsets):
        folder = tmp_path / case.name
        p3.export_peft(case.model, folder)
        assert_equal_logits(with_peft(copy.deepcopy(case.base), folder), case)
        assert_equal_logits(with_transformers(copy.deepcopy(case.base), folder), case)
        assert_comes_back(folder, case)


@runs
def test_the_other_layouts_are_the_same_in_peft_and_come_back(tmp_path, kind, rslora, subsets):
    """Over the kinds, each subset is exported both as "pattern" and as "split"."""
    for i, case in enumerate(cases(kind, rslora, half(kind, rslora, subsets))):
        layout = ("pattern", "split")[(i + (kind == "multi-head")) % 2]
        folder = tmp_path / case.name
        p3.export_peft(case.model, folder, layout=layout)
        base = as_llama(case.base) if layout == "split" else copy.deepcopy(case.base)
        assert_equal_logits(with_peft(base, folder), case)
        assert_comes_back(folder, case)
