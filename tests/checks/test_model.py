"""A layer whose parent reads its weight directly: the doctor names it, and the trial step finds no gradient there."""

from __future__ import annotations

import torch.nn.functional as F
from conftest import tiny_model
from faulty import examine, fresh_model
from transformers.models.phi3.modeling_phi3 import Phi3MLP

import phi3lora as p3
from phi3lora.lora.inject import unreached_layers


class ReadingMLP(Phi3MLP):
    """A feed-forward that multiplies by ``down_proj.weight`` itself."""

    def forward(self, hidden_states):
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return F.linear(up * self.activation_fn(gate), self.down_proj.weight)


def test_a_parent_that_reads_a_weight_is_reported_with_and_without_steps(tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.__class__ = ReadingMLP
    report = p3.inject_lora(model, p3.LoraConfig(r=4, lora_alpha=8))
    assert report.bypassed == {"model.layers.1.mlp.down_proj": "ReadingMLP"}
    found = examine(tmp_path, model)["bypassed"]
    assert found.status == "warning" and "\n" not in found.text
    assert found.text.startswith(
        "ReadingMLP reads the weight of 1 adapted layers itself (model.layers.1.mlp.down_proj)"
    )
    flow = examine(tmp_path, model, try_steps=True)["gradient flow"]
    assert flow.status == "error" and "no gradient reaches the adapters of model.layers.1.mlp.down_proj" in flow.text
    assert examine(tmp_path, fresh_model())["bypassed"].status == "ok"
    model(**model.dummy_inputs).logits.sum().backward()
    assert unreached_layers(model) == ["model.layers.1.mlp.down_proj"]
