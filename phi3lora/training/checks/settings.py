"""Settings that are allowed and rarely meant."""

from __future__ import annotations

from ...model.injection import lora_layers
from ..optim import warmup_steps
from .findings import Verdict, ok, warning
from .planned_run import PlannedRun

LONG_RUN_STEPS = 500
"""transformers' default distance of two checkpoints."""


def scaling(planned: PlannedRun) -> Verdict:
    """``lora_alpha / r``: 1 or 2 are usual."""
    layers = list(lora_layers(planned.model).values())
    factors = sorted({layer.scaling for layer in layers})
    text = f"adapters are scaled by {', '.join(f'{factor:g}' for factor in factors) or 'nothing'}"
    odd = [layer for layer in layers if not 0.1 <= layer.scaling <= 8]
    if odd:
        root = "sqrt(r)" if odd[0].use_rslora else "r"
        return warning(
            f"{text} (lora_alpha={odd[0].lora_alpha:g}, r={odd[0].r}, alpha / {root}); usual are 0.25 to 4, "
            f"and the learning rate is chosen for those"
        )
    return ok(text)


def learning_rate(planned: PlannedRun) -> Verdict:
    """Adapters want about ten times the rate of full fine-tuning."""
    rate, optim = planned.config.learning_rate, planned.config.optim
    text = f"{optim}, learning rate {rate:g}"
    if rate == 0:
        return warning(f"{text}: nothing will change")
    if optim != "sgd" and rate < 1e-5:
        return warning(f"{text} is a rate for full fine-tuning; adapters usually take 5e-5 to 5e-4")
    if optim != "sgd" and rate > 1e-2:
        return warning(f"{text} is far above what adapters usually take (5e-5 to 5e-4)")
    return ok(text)


def schedule(planned: PlannedRun) -> Verdict:
    """Whether the learning rate gets to its peak."""
    config, total = planned.config, planned.steps.total
    warmup = 0 if config.lr_scheduler_type == "constant" else warmup_steps(config, total)
    text = f"{config.lr_scheduler_type}, {warmup:,} warm-up steps of {total:,}"
    if warmup and warmup >= total:
        return warning(f"{text}: the run ends before the learning rate gets to {config.learning_rate:g}")
    return ok(text)


def saving(planned: PlannedRun) -> Verdict:
    """Whether a cut run could go on."""
    config, total = planned.config, planned.steps.total
    if config.save_strategy == "no" and total > LONG_RUN_STEPS:
        return warning(f"save_strategy='no' in a run of {total:,} steps: if it is killed, all is lost")
    every = {"no": "none", "epoch": "one an epoch", "steps": f"one every {config.save_steps:g} steps"}
    kept = f", {config.save_total_limit} kept" if config.save_total_limit and config.save_strategy != "no" else ""
    return ok(f"checkpoints: {every[config.save_strategy]}{kept}")
