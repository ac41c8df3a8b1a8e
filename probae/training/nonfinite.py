"""What to say when a loss or a gradient is NaN or infinite: the site, the rows, and what to try."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probae.batches import Batch, length, rows_at
from probae.data.streams import Minibatch
from probae.runtime.seeding import evaluating, seeded
from probae.tracing.sites import samples
from probae.tracing.terms import Traces
from probae.training.steps import Steps

_ADVICE = "Try a smaller lr, clip=10.0, or a floor under the likelihood's scale"
_SHOWN = 5


class Found(NamedTuple):
    """What is not finite, "density" or "gradient", of which site, at which rows of the minibatch."""

    what: str
    site: str | None
    rows: list[int]


class NonFinite:
    """A minibatch whose loss or gradient is not finite, looked at again."""

    def __init__(self, take: Steps, minibatch: Minibatch):
        self.take, self.pair, self.index, self.rows = take, take.pair, minibatch.index, minibatch.rows()

    def found(self) -> Found | None:
        """Where the trouble lies at the parameters as they are, or None if it does not show there."""
        try:
            return self._density() or self._gradient()
        except (
            ValueError,
            RuntimeError,
            ArithmeticError,
        ):  # what lies at these parameters cannot be run: nothing to name
            return None

    def told(self, found: Found | None, loss: float, step: int) -> str:
        """The message."""
        if found is None:
            return f"the loss became {loss} at step {step}; it was finite at the last recorded parameters. {_ADVICE}"
        places = found.rows if self.index is None else [int(self.index[i]) for i in found.rows[:_SHOWN]]
        shown = ", ".join(map(str, places[:_SHOWN])) + (", …" if len(found.rows) > _SHOWN else "")
        where = "rows of the batch" if self.index is None else "rows of the data"
        site = f"site {found.site!r}" if found.site else "the loss"
        start = f"the loss became {loss}" if found.what == "density" else "the gradient is not finite"
        return f"{start} at step {step}: {site} has no finite {found.what} at {where} {shown}. {_ADVICE}"

    def _density(self) -> Found | None:
        """The first site whose draws or densities are not finite, and at which rows."""
        with evaluating(self.pair):
            traces = self.pair.traces(self.rows)
            for run in traces.runs:
                for site in (site for trace in run for site in samples(trace)):
                    density = Traces([run], traces.signature, 1, traces.size).part([site], 1)
                    bad = ~torch.isfinite(density.local.sum(0) + density.global_.sum())
                    if bad.any():
                        return Found("density", site["name"], bad.nonzero()[:, 0].tolist())
        return None

    def _gradient(self) -> Found | None:
        """The rows whose own loss has a gradient that is not finite, and the first site whose density has."""
        with seeded(0, self.pair.device):
            if not torch.isfinite(self.take.loss(self.rows, self.take.step)):
                return None
        bad = self._bad(list(range(length(self.rows))))
        if not bad:
            return None
        trained = [p for p in self.take.parameters if p.requires_grad]
        with seeded(0, self.pair.device):
            traces = self.pair.traces(rows_at(self.rows, torch.tensor(bad[:1])))
            for run in traces.runs:
                for site in (site for trace in run for site in samples(trace)):
                    density = Traces([run], traces.signature, 1, traces.size).part([site], 1)
                    total = density.local.sum() + density.global_.sum()
                    if total.requires_grad and not _finite(total, trained):
                        return Found("gradient", site["name"], bad)
        return Found("gradient", None, bad)

    def _bad(self, rows: list[int]) -> list[int]:
        """The rows with such a gradient: halves without one are left aside."""
        with seeded(0, self.pair.device):
            loss = self.take.loss(self._at(rows), self.take.step)
        if _finite(loss, [p for p in self.take.parameters if p.requires_grad]):
            return []
        if len(rows) == 1:
            return rows
        half = len(rows) // 2
        first = self._bad(rows[:half])
        return first if len(first) > _SHOWN else first + self._bad(rows[half:])

    def _at(self, rows: list[int]) -> Batch:
        return rows_at(self.rows, torch.tensor(rows))


def _finite(loss: Tensor, parameters: list[Tensor]) -> bool:
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
