"""Trackers, each through its own library (extra ``tracking``): TensorBoard, Weights & Biases, Trackio, MLflow.

They record the lines of ``metrics.jsonl``, which stays the run's own record: a tracker that fails later on, because its
server is gone, is named in one warning, and the run goes on without it. All four work without a network::

    tensorboard   output_dir/tensorboard
    wandb         output_dir/wandb with WANDB_MODE=offline; `wandb sync` uploads it later
    trackio       its own folder (TRACKIO_DIR); `trackio show` reads it
    mlflow        MLFLOW_TRACKING_URI, by default a database in the working directory; `mlflow ui` reads it
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
from typing import Any, Protocol

from ..config import TrainingConfig
from ..errors import TrainingError, error_line, install_hint

logger = logging.getLogger("phi3lora")

Scalars = dict[str, int | float]
"""Name of a figure -> its value."""


class Tracker(Protocol):
    """A receiver of a run's figures."""

    def write(self, figures: Scalars, step: int) -> None:
        """Record the figures of a step."""

    def close(self, failed: bool) -> None:
        """Flush and close; ``failed``: an error ended the run."""


class TensorBoard:
    """A tracker that writes event files to ``output_dir/tensorboard``; a resumed run continues them."""

    def __init__(self, config: TrainingConfig, done_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = f"{config.output_dir}/tensorboard"
        self._writer: Any = SummaryWriter(folder, purge_step=done_steps + 1 if done_steps else None)

    def write(self, figures: Scalars, step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A tracker that logs to a Weights & Biases run: the one that is open, or a new one in ``project``.

    ``WANDB_MODE=offline``, ``WANDB_RUN_ID`` and its other variables work as usual.
    """

    def __init__(self, config: TrainingConfig, done_steps: int) -> None:
        import wandb

        self._is_ours = getattr(wandb, "run", None) is None
        self._run: Any = getattr(wandb, "run", None) or wandb.init(
            project=os.environ.get("WANDB_PROJECT", config.project),
            name=config.run_name,
            config=config.to_dict(),
            dir=config.output_dir,
            settings={"silent": True} if _is_quiet(config) else None,
        )

    def write(self, figures: Scalars, step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        if self._is_ours:
            self._run.finish(exit_code=int(failed))


class Trackio:
    """A tracker that logs to a Trackio run in ``project``, on this machine unless ``TRACKIO_SPACE_ID`` is set."""

    def __init__(self, config: TrainingConfig, done_steps: int) -> None:
        import trackio

        self._trackio: Any = trackio
        self._is_quiet = _is_quiet(config)
        with self._messages():
            self._run: Any = trackio.init(project=config.project, name=config.run_name, config=config.to_dict())

    def write(self, figures: Scalars, step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, failed: bool) -> None:
        with self._messages():
            self._trackio.finish()

    def _messages(self) -> contextlib.AbstractContextManager[Any]:
        """Return a block in which a quiet run swallows what Trackio prints."""
        return contextlib.redirect_stdout(io.StringIO()) if self._is_quiet else contextlib.nullcontext()


class MLflow:
    """A tracker that logs to an MLflow run: the one that is open, or a new one in the experiment ``project``.

    ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and ``MLFLOW_RUN_ID`` work as usual.
    """

    def __init__(self, config: TrainingConfig, done_steps: int) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        active = mlflow.active_run()
        self._is_ours = active is None
        run = active or mlflow.start_run(run_name=config.run_name, experiment_id=self._experiment(config.project))
        self._run_id = run.info.run_id
        if self._is_ours and not done_steps:  # a parameter of a run that is continued cannot change
            mlflow.log_params(config.to_dict())

    def _experiment(self, name: str) -> str | None:
        if any(
            variable in os.environ for variable in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")
        ):
            return None
        known = self._mlflow.get_experiment_by_name(name)
        return str(known.experiment_id if known else self._mlflow.create_experiment(name))

    def write(self, figures: Scalars, step: int) -> None:
        self._mlflow.log_metrics(figures, step=step, run_id=self._run_id)

    def close(self, failed: bool) -> None:
        if self._is_ours:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


_KINDS: dict[str, tuple[str, type[Any]]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "wandb": ("wandb", WandB),
    "trackio": ("trackio", Trackio),
    "mlflow": ("mlflow", MLflow),
}
"""Name in ``report_to`` -> the module that it needs, and its tracker."""


def _is_quiet(config: TrainingConfig) -> bool:
    return config.log_level in ("warning", "error", "critical")


def tracker_names(config: TrainingConfig) -> list[str]:
    """Return the trackers in ``report_to``; ``"all"`` stands for those that are installed."""
    if "all" not in config.report_to:
        return list(dict.fromkeys(config.report_to))
    packages = {"torch.utils.tensorboard": "tensorboard"}
    return [name for name, (module, _) in _KINDS.items() if importlib.util.find_spec(packages.get(module, module))]


def check_trackers(config: TrainingConfig) -> None:
    """Raise a one-line error if a tracker in ``report_to`` is not installed.

    Raises:
        TrainingError: the tracker, and what to install.
    """
    for name in tracker_names(config):
        try:
            importlib.import_module(_KINDS[name][0])
        except ImportError as error:
            raise TrainingError(f"report_to={name!r} needs {name}: {install_hint('tracking')}") from error


class Trackers:
    """The open trackers of a run.

    Args:
        config: the run's settings.
        done_steps: optimizer steps done before a resume.

    Raises:
        TrainingError: a tracker does not start (no login, no network); those opened before it are closed.
    """

    def __init__(self, config: TrainingConfig, done_steps: int = 0) -> None:
        self._open: dict[str, Tracker] = {}
        self._given_up: set[str] = set()
        for name in tracker_names(config):
            try:
                self._open[name] = _KINDS[name][1](config, done_steps)
            except Exception as error:  # each library has errors of its own
                self.close(failed=True)
                offline = "; WANDB_MODE=offline records on this machine" if name == "wandb" else ""
                raise TrainingError(f"report_to={name!r} does not start: {error_line(error)}{offline}") from error

    def write(self, line: dict[str, Any]) -> None:
        """Record the numbers of a line of ``metrics.jsonl`` at its step."""
        figures = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
        for name, tracker in self._open.items():
            if name in self._given_up:
                continue
            try:
                tracker.write(figures, line["step"])
            except Exception as error:
                self._given_up.add(name)  # its run is closed at the end: the next run would go on in an open one
                logger.warning(
                    "%s failed at step %s: %s; the run goes on without this tracker, and metrics.jsonl has every line",
                    *(name, line["step"], error_line(error)),
                )

    def close(self, failed: bool = False) -> None:
        """Flush and close all."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close(failed)
            except Exception as error:
                if name not in self._given_up:  # one warning for each
                    logger.warning("%s did not close: %s", name, error_line(error))
