"""How well a guide does."""

from __future__ import annotations

from typing import Any

import numpy as np

from probae.export.figures.style import BASELINE, MODEL, PAGE, panels
from probae.export.results import Diagnosis


def diagnosis_panels(diagnosis: Diagnosis) -> Any:
    """A `Diagnosis`: k̂ and effective sample sizes over the data, KL over the latents, and what the ELBO is below log p(x) by.

    k̂ comes with its limit, dotted; latents are sorted, the active ones in blue; gaps have ± 2 standard errors. What the guide
    has no weights or gaps for is left out.

    Example:
        >>> import probae, torch
        >>> found = probae.diagnose(probae.VAE(4, 2), torch.randn(20, 4), particles=30)
        >>> len(diagnosis_panels(found).axes)
        3
    """
    k, ess, latents = diagnosis.pareto_k, diagnosis.ess, diagnosis.latents_frame()
    weights = k is not None and ess is not None
    parts: dict[str, Any] = {n: getattr(diagnosis.gaps, n, None) for n in ("amortisation", "approximation", "total")}
    gaps = {name: gap for name, gap in parts.items() if gap is not None}
    count = 2 * weights + 1 + bool(gaps)
    rows = 2 if count == 4 else 1
    across = count // rows
    with panels(rows, across, PAGE * across / 3, 2.2 * rows) as (figure, axes):
        places = iter(axes.flat)
        if k is not None and ess is not None:
            known = np.sort(k[k.isfinite()].numpy())
            _over_data(next(places), known, "Pareto k̂", f"limit {diagnosis.limit:.2f} (dotted)", diagnosis.limit)
            ax = next(places)
            _over_data(ax, np.sort(ess.numpy()), "effective sample size", f"of {diagnosis.particles} particles")
            ax.set_yscale("symlog", linthresh=1)
        _latents(next(places), latents, diagnosis.active_count)
        if gaps:
            ax = next(places)
            means, errors = ([getattr(gap, name) for gap in gaps.values()] for name in ("mean", "mean_stderr"))
            ax.barh(list(gaps), means, xerr=[2 * error for error in errors], color=MODEL, capsize=2)
            ax.set(xlabel="nats per datum,\n± 2 standard errors", title="the ELBO below log p(x)")
    return figure


def _over_data(ax: Any, values: Any, what: str, title: str, limit: float | None = None) -> None:
    """Sorted values over the share of the data."""
    ax.plot(np.linspace(0, 1, len(values)), values, color=MODEL)
    if limit is not None:
        ax.axhline(limit, color=BASELINE, linestyle=":")
    ax.set(xlabel="share of the data", ylabel=what, title=title)


def _latents(ax: Any, latents: Any, active: int) -> None:
    # without densities there is no KL, but the codes move
    column = "kl" if len(latents) and latents["kl"].notna().any() else "activity"
    ranked = latents.sort_values(column, ascending=False)
    colours = [MODEL if on else BASELINE for on in ranked["active"]]
    ax.bar(range(len(ranked)), ranked[column].fillna(0.0), color=colours)
    what = "KL to the prior, nats" if column == "kl" else "variance of the code over data"
    ax.set(xlabel="latent, sorted", ylabel=what, title=f"{active} of {len(ranked)} active (blue)")
