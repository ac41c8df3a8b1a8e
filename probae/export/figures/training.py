"""How training went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probae.export.figures.style import ACCENT, BASELINE, MODEL, colour, drawing, label, legend
from probae.export.results import Evidence, Run

#: how validation is called in a legend; the others are a user's functions, in units of their own
_MONITORS = {"log p(x)": "log p(x)", "elbo": "ELBO", "iwae": "IWAE bound", "objective": "minus the loss"}


def training_curves(run: Run, bounds: Mapping[str, Evidence] | None = None, ax: Any = None) -> Any:
    r"""Training and validation by step, nats per datum, higher is better; the dotted line is the step that was kept.

    Training is minus the loss, :math:`-\text{loss}(t)`, averaged since the record before: the ELBO where that is the
    objective. Validation is what the run watched. The axis begins at the lowest value after the first tenth of the records,
    so that the first steps do not hide the rest.

    Args:
        run: what `probae.fit` returns.
        bounds: name -> `Evidence`, drawn as lines with bands of ± 2 standard errors: the exact log p(x), or IWAE bounds.
        ax: axes to draw on.

    Raises:
        ValueError: if no step was recorded.

    Example:
        >>> import probae, torch
        >>> run = probae.fit(probae.VAE(4, 2), torch.randn(40, 4), steps=4, progress=False)
        >>> training_curves(run).get_ylabel()
        'nats per datum'
    """
    history = run.history
    if not len(history):
        raise ValueError("training_curves: no step was recorded, so there is no curve")
    step, earned = history["step"].to_numpy(float), -history["loss"].to_numpy(float)
    watched = history["validation"].astype(float).to_numpy()
    seen = np.isfinite(watched)
    own_units = run.monitor is not None and run.monitor not in _MONITORS
    with drawing(ax) as ax:
        marker = "o" if len(step) < 3 else None
        ax.plot(step, earned, color=BASELINE, marker=marker, label="training, minus the loss")
        if seen.any():
            place = ax.twinx() if own_units else ax
            name = f"validation, {_MONITORS.get(str(run.monitor), str(run.monitor))}"
            (line,) = place.plot(step[seen], watched[seen], color=MODEL, marker=marker, label=label(name))
            if own_units:
                place.set_ylabel(label(name), color=MODEL)
                ax.plot([], [], color=line.get_color(), label=line.get_label())
        shown = [*_late(earned), *([] if own_units else _late(watched[seen]))]
        for i, (name, evidence) in enumerate((bounds or {}).items()):
            mean, error = evidence.mean, 2 * np.nan_to_num(evidence.mean_stderr)
            ax.axhline(mean, color=colour(i + 2), linestyle="--", label=label(name))
            ax.axhspan(mean - error, mean + error, color=colour(i + 2), alpha=0.2, linewidth=0)
            shown += [mean - error, mean + error]
        if run.best_step is not None:
            ax.axvline(run.best_step, color=ACCENT, linestyle=":", label=f"kept, step {int(run.best_step)}")
        if shown and max(shown) > min(shown):
            room = 0.05 * (max(shown) - min(shown))
            ax.set_ylim(min(shown) - room, max(shown) + room)
        ax.set(xlabel="step", ylabel="nats per datum")
        legend(ax)
    return ax


def _late(values: np.ndarray) -> list[float]:
    """The least and the largest finite value after the first tenth."""
    late = values[len(values) // 10 :]
    late = late[np.isfinite(late)]
    return [float(late.min()), float(late.max())] if len(late) else []
