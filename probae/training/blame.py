"""What to say when a loss is no number: the site, the rows, and what to try."""

from __future__ import annotations

import torch
from torch import Tensor

from probae.batches import Batch
from probae.pair import Pair
from probae.seeding import still
from probae.sites import samples
from probae.traces import Traces

_ADVICE = "try a smaller lr, clip=10.0, or a floor under the likelihood's scale"


def blame(pair: Pair, rows: Batch, index: Tensor | None, loss: float, step: int) -> str:
    """The message for a loss that is not finite, found by running the pair on the minibatch at its last good parameters.

    Args:
        rows: the minibatch.
        index: where its rows lie in the data, if that is known.
        loss: what came.
        step: the number of the step.
    """
    found = _site(pair, rows)
    if found is None:
        return f"the loss is {loss} at step {step}, where parameters that were good before lead to it: {_ADVICE}"
    name, bad = found
    places = bad.nonzero()[:, 0] if index is None else index[bad.nonzero()[:, 0].to(index.device)]
    shown = ", ".join(str(int(i)) for i in places[:5]) + (", …" if len(places) > 5 else "")
    where = "rows of the batch" if index is None else "rows of the data"
    return f"the loss is {loss} at step {step}: site {name!r} has no finite density at {where} {shown}: {_ADVICE}"


def _site(pair: Pair, rows: Batch) -> tuple[str, Tensor] | None:
    """The first site whose draws or densities are not finite, and at which rows."""
    try:
        with still(pair):
            traces = pair.traces(rows)
            for run in traces.runs:
                for site in (site for trace in run for site in samples(trace)):
                    density = Traces([run], traces.layout, 1, traces.size).part([site], 1)
                    bad = ~torch.isfinite(density.local.sum(0) + density.global_.sum())
                    if bad.any():
                        return site["name"], bad
    except (ValueError, RuntimeError, ArithmeticError):  # what lies at these parameters cannot be run: nothing to name
        return None
    return None
