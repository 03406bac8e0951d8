"""Trackers: TensorBoard and Weights & Biases (extra ``tracking``), imported only when the config names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..config import TrainingConfig
from ..errors import TrainingError, install_hint


class Tracker(Protocol):
    """A receiver of the lines of ``metrics.jsonl``."""

    def write(self, line: dict[str, Any]) -> None:
        """Record a line at its ``step``."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """A tracker that writes scalars to ``output_dir/tensorboard``."""

    def __init__(self, config: TrainingConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(f"{config.output_dir}/tensorboard")

    def write(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A tracker that logs to a Weights & Biases run; ``WANDB_MODE=offline`` and its other variables work as usual."""

    def __init__(self, config: TrainingConfig) -> None:
        import wandb

        self._run: Any = wandb.init(name=config.run_name, config=config.to_dict(), dir=config.output_dir)

    def write(self, line: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        self._run.finish()


def check_trackers(config: TrainingConfig) -> None:
    """Raise a one-line error if a tracker in ``report_to`` is not installed.

    Raises:
        TrainingError: the tracker, and what to install.
    """
    for name in config.report_to:
        try:
            __import__({"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name])
        except ImportError as error:
            raise TrainingError(f"report_to={name!r} needs {name}: {install_hint('tracking')}") from error


def open_trackers(config: TrainingConfig) -> list[Tracker]:
    """Open the trackers in ``report_to``."""
    kinds: dict[str, Callable[[TrainingConfig], Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
    return [kinds[name](config) for name in config.report_to]
