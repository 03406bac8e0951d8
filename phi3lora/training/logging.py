"""Output of a run: banner, progress bar, ``metrics.jsonl``, loss picture; and metrics read late."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks.report import Finding
from ..config import TrainingConfig
from ..model.estimate import peak_flops
from .checkpoint import TrainingState
from .history import HistoryFile
from .trackers import Tracker, open_trackers

logger = logging.getLogger("phi3lora")

T = TypeVar("T")

_POSTFIX = {"loss": "loss", "learning_rate": "lr", "tokens_per_s": "tok/s", "eval_loss": "eval_loss"}
"""Names of metrics, and what the progress bar calls them."""


class Reporter:
    """The output of one run. ``metrics.jsonl`` always holds exactly ``state.history``, also after a resume.

    Args:
        config: the run's settings.
        state: the run's state; log lines are appended to its history.
        flops_per_token: floating-point operations of one token, for ``mfu`` (model FLOPs utilisation).
        is_main: whether this process prints, shows a bar and writes; the others only keep the history.
    """

    def __init__(
        self, config: TrainingConfig, state: TrainingState, flops_per_token: float = 0.0, is_main: bool = True
    ) -> None:
        self.config, self.state, self.flops_per_token = config, state, flops_per_token
        self.quiet = not is_main or config.log_level in ("warning", "error", "critical")
        self.warns = is_main and config.log_level not in ("error", "critical")
        self._hide_bar = not is_main or bool(config.disable_tqdm)
        self.is_main = is_main
        self.lines = HistoryFile(Path(config.output_dir) / "metrics.jsonl", state)
        self._trackers: list[Tracker] = []
        self._bar: Any = None
        self.restart_clock()

    def __enter__(self) -> Reporter:
        if self.is_main:
            self.lines.start()
            self._trackers = open_trackers(self.config)
        total, done = self.state.total_steps, self.state.global_step
        self._bar = tqdm(total=total, initial=done, disable=self._hide_bar, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
        self.lines.close()

    def banner(self, facts: Mapping[str, Any]) -> None:
        """Print every resolved setting, once, before the first step."""
        if not self.quiet:
            width = max(map(len, facts))
            print("\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()), flush=True)

    def findings(self, findings: Sequence[Finding]) -> None:
        """Print the problems that the checks before a run found, one a line."""
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            tqdm.write(finding.lines(width, colour=False))

    def print(self, text: str) -> None:
        """Print a line of text above the progress bar."""
        if not self.quiet:
            tqdm.write(text)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._bar.update(1)

    def restart_clock(self) -> None:
        """Measure speed from here: evaluations and checkpoints do not count."""
        self._clock_s, self._clock_tokens = time.perf_counter(), self.state.tokens_seen

    def speed(self, tokens_seen: int, device: torch.device) -> dict[str, float]:
        """Return tokens per second since the last call; on a GPU also its peak memory and ``mfu`` if known."""
        now = time.perf_counter()
        rate = (tokens_seen - self._clock_tokens) / max(now - self._clock_s, 1e-9)
        self._clock_s, self._clock_tokens = now, tokens_seen
        figures = {"tokens_per_s": rate}
        if device.type == "cuda":
            figures["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            peak = peak_flops(device)
            if peak is not None:
                figures["mfu"] = rate * self.flops_per_token / peak
        return figures

    def log(self, line: dict[str, Any]) -> None:
        """Write a line to ``metrics.jsonl`` and the trackers, and its main numbers beside the bar.

        A NaN or infinite value, such as a skipped step's gradient norm, becomes null: JSON cannot spell it.
        """
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.state.history.append(line)
        self.lines.append()
        for tracker in self._trackers:
            tracker.write(line)
        values = {name: line[key] for key, name in _POSTFIX.items() if line.get(key) is not None}
        if values:
            texts = {name: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for name, x in values.items()}
            self._bar.set_postfix(texts)


def draw_loss(history: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw the loss over the steps as a PNG (extra ``plot``), and return its path.

    Returns None without matplotlib, with fewer than two points, or (logged) if the file cannot be written.
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
        logger.error("the picture of the loss could not be written: %s", error)
        return None
    return path


# --- Numbers that a GPU is still computing


class DeferredMetrics(Generic[T]):
    """A queue of small tensors that are read once the GPU has computed them, so that no step waits for its own loss.

    Each tensor carries a record of the step it belongs to. On the CPU every value is ready at once.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Any, T]] = deque()

    def add(self, values: Tensor, record: T) -> None:
        """Start copying ``values`` (n,) to the host."""
        if not values.is_cuda:
            self._queue.append((values, None, record))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._queue.append((host, copied, record))

    def ready(self, wait: bool = False) -> list[tuple[list[float], T]]:
        """Remove and return the values that have been copied, in order; with ``wait`` all of them."""
        found = []
        while self._queue:
            host, copied, record = self._queue[0]
            if copied is not None and not copied.query():
                if not wait:
                    break
                copied.synchronize()
            self._queue.popleft()
            found.append((host.tolist(), record))
        return found
