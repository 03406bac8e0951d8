"""What a run shows: a banner of everything resolved, a progress bar, ``metrics.jsonl``, a picture of the loss."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks.report import Finding
from ..config import TrainingConfig
from ..errors import TrainingError
from .state import TrainingState

logger = logging.getLogger("phi3lora")


class Reporter:
    """Writes for one run. ``metrics.jsonl`` holds exactly ``state.history``, also after a resume."""

    def __init__(self, config: TrainingConfig, state: TrainingState, is_main: bool = True) -> None:
        self.config, self.state = config, state
        self.quiet = not is_main or config.log_level in ("warning", "error", "critical")
        self.warns = is_main and config.log_level not in ("error", "critical")
        self._bar_off = not is_main or bool(config.disable_tqdm)
        self.path = Path(config.output_dir) / "metrics.jsonl"
        self._writes = True
        self._trackers: list[Tracker] = []
        self._bar: Any = None

    def __enter__(self) -> Reporter:
        self._write("w", self.state.history)
        self._trackers = open_trackers(self.config)
        total, done = self.state.total_steps, self.state.global_step
        self._bar = tqdm(total=total, initial=done, disable=self._bar_off, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Every value that was resolved or inherited, once, before the first step."""
        if not self.quiet:
            width = max(map(len, facts))
            print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()), flush=True)

    def problems(self, findings: Sequence[Finding]) -> None:
        """What a look at the run before it starts found wrong, a line each."""
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            tqdm.write(finding.lines(width, colour=False))

    def step_done(self) -> None:
        """Move the bar by one."""
        self._bar.update(1)

    def line(self, values: dict[str, Any]) -> None:
        """One line of ``metrics.jsonl``, also to the trackers and, in short, beside the bar.

        What is NaN or infinite (a skipped step's gradient norm, say) becomes null: JSON has no other word for it.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.state.history.append(values)
        self._write("a", [values])
        for tracker in self._trackers:
            tracker.write(values)
        shown = {name: _short(values[key]) for key, name in _SHOWN.items() if values.get(key) is not None}
        if shown:
            self._bar.set_postfix(shown)

    def _write(self, mode: str, lines: Sequence[Mapping[str, Any]]) -> None:
        """Into ``metrics.jsonl``. A full disk costs the file, not the run: the checkpoints have the lines too."""
        if not self._writes:
            return
        try:
            with open(self.path, mode) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self._writes = False
            logger.error("%s is not written any more: %s", self.path, error)

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        if not self.quiet:
            tqdm.write(text)


_SHOWN = {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s", "eval_loss": "eval_loss"}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def draw_loss(history: Sequence[Mapping[str, Any]], path: str | Path) -> Path | None:
    """The loss over the steps as a PNG (extra ``plot``).

    None without matplotlib, with fewer than two points, or (told) where it cannot be written.
    """
    train = [(line["step"], line["loss"]) for line in history if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in history if line.get("eval_loss") is not None]
    if len(train) < 2:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.5, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="held out")
        axes.legend(frameon=False)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        logger.error("the picture of the loss is not written: %s", error)
        return None
    return Path(path)


# ----------------------------------------------------------------------------------------------------
# TensorBoard and Weights & Biases (extra ``tracking``), each a thin writer; imported only when asked for.


class Tracker(Protocol):
    """Takes the lines of ``metrics.jsonl``."""

    def write(self, line: dict[str, Any]) -> None:
        """One line, with its ``step``."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """Scalars under ``output_dir/tensorboard``."""

    def __init__(self, config: TrainingConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(f"{config.output_dir}/tensorboard")

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run; ``WANDB_MODE=offline`` and its other variables work as usual."""

    def __init__(self, config: TrainingConfig) -> None:
        import wandb

        self._run = wandb.init(name=config.run_name, config=config.to_dict(), dir=config.output_dir)

    def write(self, line: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: TrainingConfig) -> None:
    """Raise in one line if a tracker that ``report_to`` names is not installed.

    Raises:
        TrainingError: which, and what to install.
    """
    for name in config.report_to:
        try:
            __import__({"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name])
        except ImportError as error:
            raise TrainingError(f"report_to={name!r} needs {name}: pip install phi3lora[tracking]") from error


def open_trackers(config: TrainingConfig) -> list[Tracker]:
    """The trackers that ``report_to`` names."""
    check_trackers(config)
    kinds: dict[str, Callable[[TrainingConfig], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
    assert isinstance(config.report_to, Sequence)
    return [kinds[name](config) for name in config.report_to]


# ----------------------------------------------------------------------------------------------------
# Numbers that a GPU is still computing, read once they have arrived, so that no step waits for its own loss.

T = TypeVar("T")


class LateValues(Generic[T]):
    """A queue of small tensors, each with a note. On the CPU they arrive at once."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, Any, T]] = deque()

    def add(self, values: Tensor, note: T) -> None:
        """Start copying ``values`` (n,) to the host."""
        if not values.is_cuda:
            self._waiting.append((values, None, note))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        self._waiting.append((host, done, note))

    def arrived(self, wait: bool = False) -> list[tuple[list[float], T]]:
        """Those that are there, in order; with ``wait`` all of them."""
        ready = []
        while self._waiting:
            host, done, note = self._waiting[0]
            if done is not None and not done.query():
                if not wait:
                    break
                done.synchronize()
            self._waiting.popleft()
            ready.append((host.tolist(), note))
        return ready
