"""Settings that are allowed and rarely meant."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from ..lora.base_weight import base_format, reason_against_fp8
from ..lora.inject import lora_layers
from ..model.estimate import GIB, MemoryPlan, flops_per_token, mean_context_tokens
from ..model.load import model_device
from ..training.optim import optimizer_bytes, warmup_steps
from ..training.setup import check_output_dir
from .findings import Details, Verdict, error, ok, warning
from .planned_run import PlannedRun
from .trial import Trial

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


# ----------------------------------------------------------------------------------------------------
# Memory, disk and time: what the run will take of each, and what is there.


def memory(planned: PlannedRun) -> Verdict:
    """Whether the mode at hand fits the card, and which others would: a table by mode and base precision."""
    plan, mode = planned.memory(), planned.checkpointing
    table = _memory_table(planned, plan)
    how = f"activation checkpointing {mode}, layers {planned.memory_path}: {_gib(plan.peak_gib[mode])} GiB predicted"
    if plan.available_gib is None:
        return ok(f"{how}; no card here to hold it against (device_memory_gib= asks about one)", table)
    text = f"{how} of {plan.available_gib:.1f}"
    if plan.fits(mode):
        return ok(text, table)
    fitting = [other for other in plan.peak_gib if plan.fits(other)]
    remedy = (
        f"activation_checkpointing={fitting[0]!r} fits" if fitting else "take smaller batches or base_precision='nf4'"
    )
    if plan.peak_gib[mode] > plan.available_gib:
        return error(f"{text}, does not fit; {remedy}", table)
    return warning(f"{text}, very tight; {remedy}", table)


def _memory_table(planned: PlannedRun, as_loaded: MemoryPlan) -> Details:
    """Predicted peaks in GiB; what does not fit has a cross."""
    device = model_device(planned.model)
    formats = ["fp8", "nf4"] if device.type != "cuda" or reason_against_fp8(device) is None else ["nf4"]
    loaded = base_format(planned.model) or "as loaded"
    plans = {loaded: as_loaded, **{name: planned.memory(name) for name in formats if name != loaded}}
    modes = list(as_loaded.peak_gib)
    lines = ["GiB".ljust(10) + "".join(f"{mode:>12} " for mode in modes).rstrip()]
    for name, plan in plans.items():
        cells = (f"{_gib(plan.peak_gib[mode]):>12}{' ' if plan.fits(mode) else 'x'}" for mode in modes)
        lines.append(name.ljust(10) + "".join(cells).rstrip())
    if as_loaded.available_gib is not None:
        lines.append(f"x: over 92 % of {as_loaded.available_gib:.1f} GiB, does not fit")
    return (("\n".join(lines), False),)


def output(planned: PlannedRun) -> Verdict:
    """The output folder: nobody else's, and writable. Nothing is left in it."""
    check_output_dir(planned.config)
    folder = _existing(Path(planned.config.output_dir))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as why:
        return error(f"output_dir={planned.config.output_dir!r} cannot be written to: {why.strerror}")
    return ok(f"{planned.config.output_dir} can be written to")


def disk(planned: PlannedRun) -> Verdict:
    """Room for the checkpoints that will be there at one time."""
    each, count = checkpoint_bytes(planned), checkpoints_at_once(planned)
    needed, free = each * count, shutil.disk_usage(_folder(Path(planned.config.output_dir))).free
    text = f"{count} checkpoint{'s' * (count != 1)} of {_size(each)}, {_size(free)} free"
    if needed > free:
        return error(f"{text}: set save_total_limit, or take another output_dir")
    return warning(f"{text}: that is most of it") if needed > 0.8 * free else ok(text)


def checkpoint_bytes(planned: PlannedRun) -> int:
    """Of one checkpoint: adapters, optimizer state, a KiB or two of names and headers a tensor, generators."""
    trained = [p for p in planned.model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    state = optimizer_bytes(planned.config.optim)
    return int(numbers * (4 + state) + (2048 if state else 512) * len(trained) + 32 * 1024)


def checkpoints_at_once(planned: PlannedRun) -> int:
    """How many are on disk when the most are: an older one goes after the newer one is there."""
    config, total = planned.config, planned.steps.total
    counts = {"no": 1, "epoch": math.ceil(config.num_train_epochs)}  # an interrupted run saves one in any case
    if config.max_steps > 0:
        counts["epoch"] = math.ceil(total / max(len(planned.steps.steps_of_epoch(0)), 1))
    count = counts.get(config.save_strategy) or math.ceil(total / _interval(config.save_steps, total))
    if config.load_best_model_at_end:
        count += math.ceil(total / _interval(config.eval_steps or config.logging_steps, total))
    limit = config.save_total_limit
    return count if limit is None else min(count, limit + 1 + config.load_best_model_at_end)


def _interval(every: float, total: int) -> int:
    return max(1, math.ceil(every * total) if every < 1 else int(every))


def duration(planned: PlannedRun, trial: Trial | None) -> Verdict:
    """How long the steps will take, by operations, from a step that was measured."""
    steps = planned.steps
    per_epoch = max(len(steps.steps_of_epoch(0)), 1)
    lengths = planned.dataset.lengths
    tokens = int(lengths.sum()) * steps.total / per_epoch
    work = tokens * flops_per_token(planned.model, mean_context_tokens(lengths))
    text = f"{steps.total:,} steps, {tokens:,.0f} tokens, {work:.2g} operations"
    if trial is None:
        return ok(f"{text}; time unknown: no step was measured")
    seconds = trial.seconds * work / trial.flops
    return ok(f"about {_time(seconds)} for {text}, at the speed of one step of {trial.tokens:,} tokens")


def _folder(path: Path) -> Path:
    """The nearest folder of a path that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _existing(path: Path) -> Path:
    """The nearest part of a path that exists, a folder or not."""
    return next(part for part in (path.absolute(), *path.absolute().parents) if part.exists())


def _gib(number: float) -> str:
    return f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def _size(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
