"""A full GPU in words: what was wanted, what each mode would take, what to change."""

from __future__ import annotations

import pytest
import torch
from conftest import adapted_model, chat_dataset, quiet_config

import phi3lora as p3
from phi3lora.training import step

WANTED = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB."


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        (
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
            [r'"full"', r'"offload"', "per_device_train_batch_size=3, gradient_accumulation_steps=4", "nf4"],
        ),
        ({"per_device_train_batch_size": 1, "activation_checkpointing": "full"}, [r'"offload"', "max_length"]),
    ],
)
def test_the_error_says_what_was_wanted_and_the_way_out(tmp_path, monkeypatch, settings, ways):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError(WANTED + "\nmore lines of torch's")

    monkeypatch.setattr(step, "causal_lm_loss", full)
    with pytest.raises(p3.TrainingError) as caught:
        p3.train(adapted_model(), chat_dataset(), quiet_config(tmp_path, max_steps=1, **settings))
    message = str(caught.value)
    assert message.startswith(WANTED) and "\n" not in message
    assert "Predicted peak by mode: none " in message
    for way in ways:
        assert way in message.replace("'", '"')
    if settings["per_device_train_batch_size"] == 1:
        assert "per_device_train_batch_size" not in message
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_stay_as_they_are(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("another")

    monkeypatch.setattr(step, "causal_lm_loss", broken)
    with pytest.raises(RuntimeError, match="another"):
        p3.train(adapted_model(), chat_dataset(), quiet_config(tmp_path, max_steps=1))
