"""Output of a run: banner, log lines, ``metrics.jsonl``, trackers; losses that arrive late; skipped steps."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks.report import Finding
from ..config import TrainingConfig
from ..data.batches import Step
from ..display import terminal_columns, text_facts, use_colour
from ..errors import TrainingError
from ..model.estimate import peak_flops
from .checkpoint import TrainingState
from .history import HistoryFile
from .progress import Progress, open_progress
from .trackers import Trackers, is_quiet

logger = logging.getLogger("phi3lora")


class Reporter:
    """The output of one run. ``metrics.jsonl`` always holds exactly ``state.history``, also after a resume.

    ``flops_per_token`` is for ``mfu`` (model FLOPs utilisation). Processes that are not ``is_main`` only keep the
    history: they print and write nothing.
    """

    def __init__(
        self, config: TrainingConfig, state: TrainingState, flops_per_token: float = 0.0, is_main: bool = True
    ) -> None:
        self.config, self.state, self.flops_per_token = config, state, flops_per_token
        self.quiet = not is_main or is_quiet(config)
        self.warns = is_main and config.log_level not in ("error", "critical")
        self.is_main = is_main
        self.lines = HistoryFile(Path(config.output_dir) / "metrics.jsonl", state)
        self._trackers: Trackers | None = None
        self._progress = Progress(state, self.quiet)
        self.restart_clock()

    def __enter__(self) -> Reporter:
        if self.is_main:
            self._trackers = Trackers(self.config, self.state.global_step)  # may fail, with nothing opened
            self.lines.start()
        self._progress = open_progress(self.config, self.state, self.quiet, self.is_main).__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._progress.__exit__(kind, *error)
        if self._trackers is not None:
            self._trackers.close(failed=kind is not None)
        self.lines.close()

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Print names and values: the resolved settings before the first step, the outcome after the last."""
        if not self.quiet:
            print(text_facts(facts), flush=True)

    def findings(self, findings: Sequence[Finding]) -> None:
        """Print the problems that the checks before a run found."""
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            print(finding.lines(width, use_colour(), terminal_columns()), flush=True)

    def print(self, text: str) -> None:
        """Print a line of text above the progress bar."""
        self._progress.print(text)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        self._progress.step()

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
        """Write a line to ``metrics.jsonl``, the trackers and the screen.

        A NaN or infinite value, such as a skipped step's gradient norm, becomes null: JSON cannot spell it.
        """
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.state.history.append(line)
        self.lines.append()
        if self._trackers is not None:
            self._trackers.write(line)
        self._progress.log(line)


# --- Numbers that a GPU is still computing


@dataclass
class StepRecord:
    """Facts about a step that are known before its loss arrives."""

    step: Step
    """Documents of the step, and its supervised tokens."""
    number: int
    """Optimizer steps done, including this one."""
    learning_rate: float
    tokens_seen: int
    """Tokens trained on in the whole run, including this step."""
    log: bool
    """True if a log line is due."""


class DeferredMetrics:
    """A queue of small tensors that are read once the GPU has computed them, so that no step waits for its own loss.

    Each tensor carries a record of the step it belongs to. On the CPU every value is ready at once.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, Any, StepRecord]] = deque()

    def add(self, values: Tensor, record: StepRecord) -> None:
        """Start copying ``values`` (n,) to the host."""
        if not values.is_cuda:
            self._queue.append((values, None, record))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._queue.append((host, copied, record))

    def ready(self, wait: bool = False) -> list[tuple[list[float], StepRecord]]:
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


def report_skipped(
    record: StepRecord, loss_sum: float, norm: float, config: TrainingConfig, state: TrainingState, tokenizer: Any
) -> None:
    """Warn of a step that was skipped because its loss or gradient was not finite.

    Raises:
        TrainingError: it is the last of ``max_nonfinite_steps`` in a row. The tokenizer, if any, quotes a document.
    """
    in_a_row, dataset = state.nonfinite_in_a_row, record.step.plan.dataset
    documents = [i for micro in record.step.micro_batches for row in micro for i in row]
    rows = dataset.row_names(documents)
    listed = f"[{', '.join(rows[:16])}]{' ...' if len(rows) > 16 else ''}"
    details = f"loss {loss_sum / record.step.supervised_tokens}, gradient norm {norm}; rows {listed} of the data"
    logger.warning("step %d was skipped: %s", record.number, details)
    if in_a_row < min(config.max_nonfinite_steps, state.total_steps):
        return
    text = ""
    if tokenizer is not None:
        text = f" First document: {tokenizer.decode(dataset[documents[0]]['input_ids'])[:200]!r}."
    raise TrainingError(
        f"the loss or gradient was NaN or infinite {in_a_row} steps in a row, the last at step {record.number} "
        f"({details}).{text} These steps did not change the adapters. Lower learning_rate "
        f"({config.learning_rate}), use bf16 instead of fp16, or check the base weights; "
        f"max_nonfinite_steps={config.max_nonfinite_steps} in a row end the run"
    )
