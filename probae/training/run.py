"""What training returns."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probae.export.figures.training import training_curves
from probae.export.results import Evidence
from probae.objectives import Objective

if TYPE_CHECKING:
    import pandas


@dataclass(repr=False)
class Run:
    """What `fit` returns.

    Attributes:
        model: the trained model, the very object that was given, in eval mode.
        objective: the objective it was trained on.
        records: what was recorded, a dict per record; `history` has them as a frame.
        monitor: what the column ``validation`` holds: ``"log p(x)"``, ``"elbo"``, ``"iwae"``, ``"objective"``, the name
            of a function of the objective's own, or None.
        best_step: the step whose parameters were kept, where validation data were given.
        stopped: why training ended: ``"steps"``, ``"patience"``, ``"callback"`` or ``"interrupted"``.
        compile: why the steps were taken as they were; ``history`` says how, in the column ``ran``.
        note: what there is to know besides, of a model whose optimum needs no steps say.
    """

    model: Any
    objective: Objective
    records: list[dict[str, Any]] = field(default_factory=list)
    monitor: str | None = None
    best_step: int | None = None
    stopped: str = "steps"
    compile: str = ""
    note: str = ""

    @property
    def history(self) -> pandas.DataFrame:
        """A row per recorded step: ``step``, ``loss`` (its mean since the row before), ``validation``, ``seconds``, ``ran``.

        ``ran`` is how the step was taken: ``"eager"``, ``"flat"``, ``"compiled"`` or, on a GPU, ``"captured"``.
        """
        import pandas

        return pandas.DataFrame(self.records, columns=["step", "loss", "validation", "seconds", "ran"])

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the training steps, validation included."""
        return self.records[-1]["seconds"] if self.records else 0.0

    def plot(self, bounds: Mapping[str, Evidence] | None = None, ax: Any = None) -> Any:
        """Training and validation by step, with bounds on log p(x) as lines; needs ``probae[plots]``.

        Args:
            bounds: name -> `Evidence`, ``{"log p(x), test": probae.log_evidence(model, x_test)}`` say.
            ax: axes to draw on.
        """
        return training_curves(self, bounds, ax)

    def _repr_html_(self) -> str:
        shown = self.history.tail(5).to_html(index=False, float_format=lambda value: f"{value:.4f}", na_rep="–")
        return f"<p>{html.escape(repr(self))}</p>{shown}"

    def __repr__(self) -> str:
        if not self.records:
            return f"<Run of {type(self.model).__name__}: no step recorded, stopped by {self.stopped}>"
        last = self.records[-1]
        best = ""
        if self.monitor is not None and self.best_step is not None:
            value = next(r["validation"] for r in self.records if r["step"] == self.best_step)
            best = f", best validation {self.monitor} {value:.4f} at step {self.best_step}"
        note = f"; {self.note}" if self.note else ""
        return (
            f"<Run of {type(self.model).__name__}: {int(last['step'])} steps in {last['seconds']:.1f} s, "
            f"loss {last['loss']:.4f}{best}, ended by {self.stopped}; {last['ran']}: {self.compile}{note}>"
        )
