"""Memory, disk and time: what the run will take of each, and what is there."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from ...model.flops import flops_per_token, mean_context_tokens
from ...model.frozen import base_format, reason_against_fp8
from ...model.loading import model_device
from ...model.memory import GIB, MemoryPlan
from ..optim import optimizer_bytes
from ..output_dir import check_output_dir
from .findings import Details, Verdict, error, ok, warning
from .gradient_flow import Trial
from .planned_run import PlannedRun


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
