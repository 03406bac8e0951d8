"""TensorBoard and Weights & Biases (extra ``tracking``), each a thin writer; imported only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..config import TrainingConfig
from ..errors import TrainingError


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
