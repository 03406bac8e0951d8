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
from collections.abc import Callable
from typing import Any, NamedTuple

from ..config import TrainingConfig
from ..errors import TrainingError, error_line, install_hint

logger = logging.getLogger("phi3lora")

Scalars = dict[str, int | float]
"""Name of a figure -> its value."""


class Tracker(NamedTuple):
    """A receiver of a run's figures."""

    write: Callable[[Scalars, int], object]
    """Function that records the figures of a step."""
    close: Callable[[bool], object]
    """Function that flushes and closes; its argument says whether an error ended the run."""


def _open_tensorboard(config: TrainingConfig, done_steps: int) -> Tracker:
    """Write event files to ``output_dir/tensorboard``; a resumed run continues them."""
    from torch.utils.tensorboard import SummaryWriter

    purge_step = done_steps + 1 if done_steps else None
    writer: Any = SummaryWriter(f"{config.output_dir}/tensorboard", purge_step=purge_step)

    def write(figures: Scalars, step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, lambda failed: writer.close())


def _open_wandb(config: TrainingConfig, done_steps: int) -> Tracker:
    """Log to the Weights & Biases run that is open, or to a new one in ``project``.

    ``WANDB_MODE=offline``, ``WANDB_RUN_ID`` and its other variables work as usual.
    """
    import wandb

    theirs = getattr(wandb, "run", None)
    run = theirs or wandb.init(
        project=os.environ.get("WANDB_PROJECT", config.project),
        name=config.run_name,
        config=config.to_dict(),
        dir=config.output_dir,
        settings={"silent": True} if is_quiet(config) else None,
    )
    return Tracker(
        lambda figures, step: run.log(figures, step=step),
        lambda failed: None if theirs else run.finish(exit_code=int(failed)),
    )


def _open_trackio(config: TrainingConfig, done_steps: int) -> Tracker:
    """Log to a Trackio run in ``project``, on this machine unless ``TRACKIO_SPACE_ID`` is set."""
    import trackio

    def without_messages(call: Callable[..., Any], **arguments: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) if is_quiet(config) else contextlib.nullcontext():
            return call(**arguments)

    run = without_messages(trackio.init, project=config.project, name=config.run_name, config=config.to_dict())
    return Tracker(lambda figures, step: run.log(figures, step=step), lambda failed: without_messages(trackio.finish))


def _open_mlflow(config: TrainingConfig, done_steps: int) -> Tracker:
    """Log to the MLflow run that is open, or to a new one in the experiment ``project``.

    ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME`` and ``MLFLOW_RUN_ID`` work as usual.
    """
    import mlflow

    theirs, experiment = mlflow.active_run(), None
    is_named = any(f"MLFLOW_{name}" in os.environ for name in ("EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID"))
    if theirs is None and not is_named:
        known = mlflow.get_experiment_by_name(config.project)
        experiment = str(known.experiment_id if known else mlflow.create_experiment(config.project))
    run_id = (theirs or mlflow.start_run(run_name=config.run_name, experiment_id=experiment)).info.run_id
    if theirs is None and not done_steps:  # a parameter of a run that is continued cannot change
        mlflow.log_params(config.to_dict())
    return Tracker(
        lambda figures, step: mlflow.log_metrics(figures, step=step, run_id=run_id),
        lambda failed: None if theirs else mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


_KINDS: dict[str, tuple[str, Callable[[TrainingConfig, int], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _open_tensorboard),
    "wandb": ("wandb", _open_wandb),
    "trackio": ("trackio", _open_trackio),
    "mlflow": ("mlflow", _open_mlflow),
}
"""Name in ``report_to`` -> the module that it needs, and the function that opens the tracker."""


def is_quiet(config: TrainingConfig) -> bool:
    """Return whether a run prints nothing but warnings."""
    return config.log_level in ("warning", "error", "critical")


def tracker_names(config: TrainingConfig) -> list[str]:
    """Return the trackers in ``report_to``; ``"all"`` stands for those that are installed."""
    if "all" not in config.report_to:
        return list(dict.fromkeys(config.report_to))
    packages = {"torch.utils.tensorboard": "tensorboard"}
    return [name for name, (module, _) in _KINDS.items() if importlib.util.find_spec(packages.get(module, module))]


def check_trackers(config: TrainingConfig) -> None:
    """Raise a TrainingError that says what to install if a tracker in ``report_to`` is not installed."""
    for name in tracker_names(config):
        try:
            importlib.import_module(_KINDS[name][0])
        except ImportError as error:
            raise TrainingError(f"report_to={name!r} needs {name}: {install_hint('tracking')}") from error


class Trackers:
    """The open trackers of a run, of which ``done_steps`` were done before a resume.

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
