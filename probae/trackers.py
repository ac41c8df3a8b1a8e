"""Following a run: one small protocol, and adapters for TensorBoard, MLflow and Weights & Biases.

``probae.fit(..., trackers=[probae.trackers.TensorBoard("runs/a")])`` records at every record of the history the loss, the
validation value and its terms, and the learning rates. What is logged after the fit joins the same run:
``tracker.log_metrics(5_000, {"evidence": evidence.mean})``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

from probae.arguments import as_path


class Tracker(Protocol):
    """What `probae.fit` tells of a run. Any object with these four methods is one."""

    def log_parameters(self, parameters: Mapping[str, Any], step: int = 0) -> None:
        """Say what the run is, before its first step; ``step`` is the one after which a checkpoint goes on, 0 of a new run."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name, after a step."""

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """A figure of matplotlib's."""

    def close(self) -> None:
        """The fit has ended; what is logged afterwards opens the run again."""


class TensorBoard:
    """Event files that TensorBoard shows: ``tensorboard --logdir runs``.

    Args:
        folder: of this run.

    Raises:
        ImportError: without tensorboard, ``pip install 'probae[tensorboard]'``.

    Example:
        >>> tracker = TensorBoard("runs/vae")
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = as_path("folder", folder)
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("TensorBoard needs tensorboard: pip install 'probae[tensorboard]'") from error
        self._writer: Any = None
        self._after: int | None = None

    def log_parameters(self, parameters: Mapping[str, Any], step: int = 0) -> None:
        """A table under *Text*; what an earlier run wrote after the step is hidden."""
        self.close()
        self._after = step
        rows = [f"| {name} | {value} |" for name, value in parameters.items()]
        self._open().add_text("parameters", "\n".join(["| | |", "|-|-|", *rows]), step)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars, on disk at once."""
        writer = self._open()
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """A figure under *Images*; it stays open."""
        self._open().add_figure(name, figure, step, close=False)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._after = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if self._after is None else self._after + 1
            self._writer = SummaryWriter(str(self.folder), purge_step=purge)
        return self._writer


class MLflow:
    """A run of an MLflow experiment: a server, or files of this machine.

    Args:
        experiment: its name; made if it is not there.
        name: of the run. A fit that goes on from a checkpoint goes on in the latest run of that name.
        uri: of the server or store; by default MLflow's own setting.

    Raises:
        ImportError: without MLflow, ``pip install 'probae[mlflow]'``.

    Attributes:
        run_id: of the run, once it has begun.

    Example:
        >>> tracker = MLflow("digits", name="vae")  # doctest: +SKIP
    """

    def __init__(self, experiment: str, *, name: str = "probae", uri: str | None = None):
        try:
            from mlflow import MlflowClient
        except ImportError as error:
            raise ImportError("MLflow needs mlflow: pip install 'probae[mlflow]'") from error
        self.experiment, self.name = experiment, name
        self._client = MlflowClient(uri)
        self.run_id: str | None = None

    def log_parameters(self, parameters: Mapping[str, Any], step: int = 0) -> None:
        """Parameters of a new run; one that goes on has them already."""
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        self.run_id = self._latest(experiment) if step else None
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        self.run_id = self._client.create_run(experiment, run_name=self.name).info.run_id
        for name, value in parameters.items():
            self._client.log_param(self.run_id, name, value)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics at a step."""
        for name, value in metrics.items():
            self._client.log_metric(self._run(), name, value, step=step)

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """A picture among the artefacts."""
        self._client.log_figure(self._run(), figure, f"figures/{name}-{step:08d}.png")

    def close(self) -> None:
        """Mark the run as finished."""
        if self.run_id is not None:
            self._client.set_terminated(self.run_id)

    def _run(self) -> str:
        if self.run_id is None:
            self.log_parameters({})
        assert self.run_id is not None
        return self.run_id

    def _latest(self, experiment: str) -> str | None:
        runs = self._client.search_runs([experiment], order_by=["attributes.start_time DESC"])
        return next((run.info.run_id for run in runs if run.info.run_name == self.name), None)


class WandB:
    """A run of Weights & Biases.

    Args:
        project: its name.
        name: of the run.
        id: of the run; a fit that goes on from a checkpoint goes on in the run of that id.
        options: further ones of ``wandb.init``: ``mode="offline"``, ``dir=...``.

    Raises:
        ImportError: without wandb, ``pip install 'probae[wandb]'``.

    Example:
        >>> tracker = WandB("digits", id="vae-0", mode="offline")  # doctest: +SKIP
    """

    def __init__(self, project: str, *, name: str | None = None, id: str | None = None, **options: Any):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("WandB needs wandb: pip install 'probae[wandb]'") from error
        self._init, self._image = wandb.init, wandb.Image
        self._options = {"project": project, "name": name, **options}
        self.id = id
        self._run: Any = None

    def log_parameters(self, parameters: Mapping[str, Any], step: int = 0) -> None:
        """The run's config."""
        self._open().config.update(dict(parameters), allow_val_change=True)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics at a step."""
        self._open().log(dict(metrics), step=step)

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """A figure as an image."""
        self._open().log({name: self._image(figure)}, step=step)

    def close(self) -> None:
        """Send what is left."""
        if self._run is not None:
            self._run.finish()
        self._run = None

    def _open(self) -> Any:
        if self._run is None:
            self._run = self._init(id=self.id, resume="allow", **self._options)
            self.id = self._run.id
        return self._run
