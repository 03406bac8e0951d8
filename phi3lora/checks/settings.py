"""Checks of the settings, and of the memory, the disk space and the time that they need."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ..config import TrainingConfig
from ..display import Pieces
from ..errors import counted
from ..lora.base_weight import base_format, count_trainable, reason_against_fp8
from ..lora.inject import lora_layers
from ..model.estimate import GIB, MemoryPlan, cache_bytes_per_token, flops_per_token, mean_context_tokens
from ..model.load import model_device
from ..training.learning import reach, too_small
from ..training.optim import optimizer_bytes, warmup_steps
from ..training.output_folder import check_output_dir
from ..training.setup import PlannedRun, interval
from .report import Finding, error, ok, warning
from .trial import Trial

_LONG_RUN_STEPS = 500  # transformers' default interval of checkpoints


def check_scaling(planned: PlannedRun) -> Finding:
    layers = list(lora_layers(planned.model).values())
    factors = sorted({layer.scaling for layer in layers})
    text = f"adapters are scaled by {', '.join(f'{factor:g}' for factor in factors) or 'nothing'}"
    unusual = next((layer for layer in layers if not 0.1 <= layer.scaling <= 8), None)
    if unusual is not None:
        root = "sqrt(r)" if unusual.use_rslora else "r"
        return warning(
            f"{text} (lora_alpha={unusual.lora_alpha:g}, r={unusual.r}, alpha / {root}); usual values are 0.25 to 4, "
            f"and learning rates are chosen for those"
        )
    return ok(text)


def check_learning_rate(planned: PlannedRun) -> Finding:
    rate, optim = planned.config.learning_rate, planned.config.optim
    text = f"{optim}, learning rate {rate:g}"
    if rate == 0:
        return warning(f"{text}: nothing will change")
    if optim != "sgd" and rate < 1e-5:
        return warning(f"{text} is a rate for full fine-tuning; adapters usually take 5e-5 to 5e-4")
    if optim != "sgd" and rate > 1e-2:
        return warning(f"{text} is far above what adapters usually take (5e-5 to 5e-4)")
    return ok(text)


def check_schedule(planned: PlannedRun) -> Finding:
    config, total = planned.config, planned.steps.total
    warmup = warmup_steps(config, total)
    text = f"{config.lr_scheduler_type}, {counted(warmup, 'warm-up step')} of {total:,}"
    if warmup and warmup >= total:
        return warning(f"{text}: the run ends before the learning rate reaches {config.learning_rate:g}")
    return ok(text)


def check_amount(planned: PlannedRun) -> Finding:
    """Check that the run is long enough, at its learning rate, to change what the layers compute."""
    config, total = planned.config, planned.steps.total
    problem = too_small(planned.model, config, total) if config.learning_rate > 0 else None
    if problem is not None:
        return warning(problem)
    share = reach(planned.model, config, total)
    return ok(f"{total:,} steps" + (f" can change an adapted layer's output by {100 * share:.2g} %" if share else ""))


def check_saving(planned: PlannedRun) -> Finding:
    config, total = planned.config, planned.steps.total
    if config.save_strategy == "no" and total > _LONG_RUN_STEPS:
        return warning(f"save_strategy='no' in a run of {total:,} steps: if the run is killed, everything is lost")
    interval = {"no": "none", "epoch": "one an epoch", "steps": f"one every {config.save_steps:g} steps"}
    kept = f", {config.save_total_limit} kept" if config.save_total_limit and config.save_strategy != "no" else ""
    return ok(f"checkpoints: {interval[config.save_strategy]}{kept}")


def check_settings(planned: PlannedRun) -> Finding:
    """Warn of settings that differ from their defaults and wait for another one."""
    config, defaults = planned.config, TrainingConfig()
    evaluates = config.eval_strategy != "no" or config.eval_on_start
    saves = config.save_strategy != "no" or config.load_best_model_at_end
    chooses = config.eval_strategy != "no" and (saves or config.early_stopping_patience is not None)
    evaluations, adam = "eval_strategy='steps' or 'epoch'", "an optim other than 'sgd'"
    answers = "evaluations with answers (predict_with_generate=True)"
    best = f"{evaluations}, and checkpoints or early stopping"
    warms_up, warm_up = config.lr_scheduler_type != "constant", "an lr_scheduler_type other than 'constant'"
    trackers = "report_to='wandb', 'trackio' or 'mlflow'"
    needs = {  # setting -> (whether it has an effect, what it needs for one)
        "num_train_epochs": (config.max_steps <= 0, "max_steps=-1"),
        "warmup_steps": (warms_up, warm_up),
        "warmup_ratio": (not config.warmup_steps and warms_up, f"warmup_steps=0 and {warm_up}"),
        "adam_beta1": (config.optim != "sgd", adam),
        "adam_beta2": (config.optim != "sgd", adam),
        "adam_epsilon": (config.optim != "sgd", adam),
        "logging_steps": (
            config.logging_strategy == "steps" or (config.eval_strategy == "steps" and not config.eval_steps),
            "logging_strategy='steps'",
        ),
        "run_name": (set(config.report_to) - {"tensorboard"}, trackers),
        "project": (set(config.report_to) - {"tensorboard"}, trackers),
        "per_device_eval_batch_size": (evaluates, evaluations),
        "eval_steps": (config.eval_strategy == "steps", "eval_strategy='steps'"),
        "predict_with_generate": (evaluates, evaluations),
        "eval_max_samples": (evaluates and planned.has_answers, answers),
        "eval_max_new_tokens": (evaluates and planned.has_answers, answers),
        "save_steps": (config.save_strategy == "steps", "save_strategy='steps'"),
        "save_total_limit": (saves, "save_strategy='steps' or 'epoch'"),
        "metric_for_best_model": (chooses, best),
        "greater_is_better": (chooses, best),
        "early_stopping_threshold": (config.early_stopping_patience is not None, "early_stopping_patience"),
        "resume_with_changes": (config.resume_from_checkpoint, "resume_from_checkpoint"),
    }
    idle = [
        f"{name}={getattr(config, name)!r} has no effect without {needed}"
        for name, (has_effect, needed) in needs.items()
        if not has_effect and getattr(config, name) not in (None, 0, getattr(defaults, name))
    ]
    return warning("; ".join(idle)) if idle else ok("no setting waits for another one")


def check_memory(planned: PlannedRun) -> Finding:
    plan, mode = planned.memory, planned.checkpointing
    table = _memory_table(planned, plan)
    text = (
        f"activation checkpointing {mode}, layers {planned.memory_backend.kind}: "
        f"{_format_gib(plan.peak_gib[mode])} GiB predicted"
    )
    if planned.answer_cache_tokens:
        cache = planned.answer_cache_tokens * cache_bytes_per_token(planned.model) / GIB
        text += f" (an evaluation's answers: {_format_gib(cache)} GiB of keys and values)"
    if plan.available_gib is None:
        return ok(f"{text}; no GPU here to compare with (set device_memory_gib to ask about one)", table)
    text += f" of {plan.available_gib:.1f}"
    if plan.fits(mode):
        return ok(text, table)
    fitting = next((other for other in plan.peak_gib if plan.fits(other)), None)
    remedy = f"activation_checkpointing={fitting!r} fits" if fitting else "use smaller batches or base_precision='nf4'"
    if plan.peak_gib[mode] > plan.available_gib:
        return error(f"{text}, does not fit; {remedy}", table)
    return warning(f"{text}, very tight; {remedy}", table)


def _memory_table(planned: PlannedRun, as_loaded: MemoryPlan) -> Pieces:
    """Return the predicted peaks in GiB, by base precision and mode; ``x`` marks what does not fit."""
    device = model_device(planned.model)
    formats = ["fp8", "nf4"] if device.type != "cuda" or reason_against_fp8(device) is None else ["nf4"]
    loaded = base_format(planned.model) or "as loaded"
    plans = {loaded: as_loaded, **{name: planned.predict_memory(name) for name in formats if name != loaded}}
    modes = list(as_loaded.peak_gib)
    widths = [max(len(mode), 5) + 1 for mode in modes]
    lines = ["GiB".ljust(10) + "".join(f"{mode:>{n}} " for mode, n in zip(modes, widths, strict=True)).rstrip()]
    for name, plan in plans.items():
        cells = (
            f"{_format_gib(plan.peak_gib[mode]):>{n}}{' ' if plan.fits(mode) else 'x'}"
            for mode, n in zip(modes, widths, strict=True)
        )
        lines.append(name.ljust(10) + "".join(cells).rstrip())
    if as_loaded.available_gib is not None:
        lines.append(f"x: over 92 % of {as_loaded.available_gib:.1f} GiB, does not fit")
    return (("\n".join(lines), False),)


def _format_gib(gib: float) -> str:
    return f"{gib:.1f}" if gib >= 1 else f"{gib:.2f}"


def check_output(planned: PlannedRun) -> Finding:
    """Check that the output folder is writable and holds no other run's checkpoints. No file is left in it."""
    check_output_dir(planned.config)
    return ok(f"{planned.config.output_dir} can be written to")


def check_disk(planned: PlannedRun) -> Finding:
    path = Path(planned.config.output_dir).absolute()
    folder = next(part for part in (path, *path.parents) if part.is_dir())
    each, count = checkpoint_bytes(planned), checkpoints_at_once(planned)
    needed, free = each * count, shutil.disk_usage(folder).free
    text = f"{counted(count, 'checkpoint')} of {_format_bytes(each)}, {_format_bytes(free)} free"
    if needed > free:
        return error(f"{text}: set save_total_limit, or choose another output_dir")
    return warning(f"{text}: that is most of the free space") if needed > 0.8 * free else ok(text)


def checkpoint_bytes(planned: PlannedRun) -> int:
    """Predict a checkpoint's size: adapters, optimizer state, names and headers of 1 or 2 KiB a tensor, generators."""
    state = optimizer_bytes(planned.config.optim)
    each = 2048 if state else 512
    return int(count_trainable(planned.model) * (4 + state) + each * len(planned.trained) + 32 * 1024)


def checkpoints_at_once(planned: PlannedRun) -> int:
    """Predict the largest number of checkpoints on disk; an old one is deleted only after the new one is complete."""
    config, total = planned.config, planned.steps.total
    if config.save_strategy == "steps":
        count = math.ceil(total / interval(config.save_steps, total))
    elif config.save_strategy == "no":
        count = 1  # an interrupted run saves one in any case
    elif config.max_steps > 0:
        count = math.ceil(total / max(len(planned.steps.steps_of_epoch(0)), 1))
    else:
        count = math.ceil(config.num_train_epochs)
    if config.load_best_model_at_end:
        count += math.ceil(total / interval(config.eval_steps or config.logging_steps, total))
    limit = config.save_total_limit
    return count if limit is None else min(count, limit + 1 + config.load_best_model_at_end)


def _format_bytes(count: float) -> str:
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"


def estimate_time(planned: PlannedRun, trial: Trial | None) -> Finding:
    steps, lengths = planned.steps, planned.dataset.lengths
    tokens = int(lengths.sum()) * steps.total / max(len(steps.steps_of_epoch(0)), 1)
    flops = tokens * flops_per_token(planned.model, mean_context_tokens(lengths))
    text = f"{steps.total:,} steps, {tokens:,.0f} tokens, {flops:.2g} operations"
    if trial is None:
        return ok(f"{text}; time unknown: no step was measured")
    processes = planned.world.size
    duration = _format_seconds(trial.seconds * flops / trial.flops / processes)
    text += f" in {processes} processes" if processes > 1 else ""
    return ok(f"about {duration} for {text}, at the speed of one step of {trial.tokens:,} tokens")


def _format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
