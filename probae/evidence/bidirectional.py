"""Bidirectional Monte Carlo: log p(x) from below and from above, on data that the model itself drew."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import size
from probae.batches import Batch, checksums, leaves, length, rebuilt, rows_at
from probae.evidence.ais import AIS, Annealer, Block, evidence
from probae.evidence.reliability import reliable_chains
from probae.evidence.result import Evidence
from probae.evidence.weights import padded
from probae.export.tabular import PerDatum
from probae.pair import Pair
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed, evaluating
from probae.tracing.checks import check
from probae.tracing.probing import run_at
from probae.tracing.sites import is_factor, samples
from probae.tracing.terms import log_prob

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Sandwich(PerDatum):
    """Bounds on log p(x_n) from both sides.

    Attributes:
        lower, upper: `Evidence`, of bounds ``"lower"`` and ``"upper"``.
        x: the data that the model drew, in the form that it takes.
    """

    lower: Evidence
    upper: Evidence
    x: Any

    @property
    def gap(self) -> Tensor:
        """Upper less lower bound, (N,) nats; Monte-Carlo error can make one of them negative, their expectation is not."""
        return self.upper.values - self.lower.values

    @property
    def mean_gap(self) -> float:
        """Its mean over the data: how far the lower bound can be from log p(x), on average, in expectation."""
        return float(self.gap.mean())

    @property
    def mean_gap_stderr(self) -> float:
        """The standard error of that mean; NaN for a single datum."""
        return float(self.gap.std()) / math.sqrt(len(self.gap)) if len(self.gap) > 1 else math.nan

    def to_frame(self) -> pandas.DataFrame:
        """A row per datum: ``lower``, ``lower_mc_stderr``, ``upper``, ``upper_mc_stderr``, ``gap``."""
        import pandas

        columns = {"lower": self.lower.values, "lower_mc_stderr": self.lower.mc_stderr}
        columns |= {"upper": self.upper.values, "upper_mc_stderr": self.upper.mc_stderr, "gap": self.gap}
        return pandas.DataFrame({name: values.numpy() for name, values in columns.items()}).rename_axis("datum")

    def __repr__(self) -> str:
        return (
            f"<log p(x) of {len(self.gap)} data that the model drew: from {self.lower.mean:.4f} to {self.upper.mean:.4f} nats "
            f"per datum, gap {self.mean_gap:.4f} ± {self.mean_gap_stderr:.4f}>"
        )


@isolated
def sandwich(
    model: Any, n: int = 100, like: Any = None, *, seed: int = 0, compile: bool | str = "auto", **options: Any
) -> Sandwich:
    r"""Bounds on log p(x) from both sides, on n data that the model draws, by annealing forwards and backwards.

    .. math:: E[\log \hat p] \le \log p(x), \quad \hat p = \tfrac1C \sum_c w_c; \qquad
              E[-\log \hat r] \ge \log p(x), \quad \hat r = \tfrac1C \sum_c 1 / w'_c

    w are the weights of chains from the start of the path, as for ``method="ais"``. w' are those of chains that run the
    path backwards from the latent z which x was drawn with: given x, that is an exact draw from the posterior, so that
    1/w' estimates 1/p(x) without bias. Both runs share the step sizes of a pilot run, which sees neither z nor their draws.

    *What it certifies*: for data of this model, the mean gap bounds the mean error of these settings of ``"ais"``, in
    expectation; within its standard error that holds whatever the guide is and however badly the chains mix.
    *What it does not*: anything about other data. The posteriors of real data may be harder to reach than those of the
    model's own, so that a small gap here is evidence, not proof, of a small error there. A single datum's upper bound
    holds in expectation alone; its chains share one z, and its ``mc_stderr`` leaves that out (``reliable`` is False). The
    standard error of the mean gap has it.

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``; a guide is not needed.
        n: how many data to draw.
        like: a batch whose form the draws take, for a pair of plain programs, which read the number of data from it.
        seed: of the data and of all draws.
        compile: how a leapfrog step is run, as for `log_weights`.
        options: ``chains=16``, ``distributions=1000``, …, as for ``log_evidence(method="ais")``.

    Returns:
        `Sandwich`, with ``lower``, ``upper``, ``gap`` and the data ``x``.

    Raises:
        ValueError: if the prior is flat, the latents are not continuous, or some are shared by all data; if the model's
            draws cannot be put in the place of data.

    References: Grosse, Ghahramani & Adams (2015), *Sandwiching the marginal likelihood using bidirectional Monte Carlo*;
    Wu et al. (2017).

    Example:
        >>> import probae
        >>> bounds = sandwich(probae.PPCA(features=4, latents=2), n=5, chains=4, distributions=20)
        >>> bounds.lower.bound, bounds.upper.bound, len(bounds.gap)
        ('lower', 'upper', 5)
    """
    annealing = AIS.of(options, "sandwich")
    pair, n, seed = as_pair(model), size("n", n), checked_seed(seed)
    if like is None:
        like = pair.sample(n, seed=seed)
    rows = pair.as_batch(like)
    batch, values = _drawn(pair, rows_at(rows, torch.arange(n) % length(rows)), seed)
    signature = check(pair, batch)
    annealer = Annealer(pair, batch, signature, annealing, seed, compile, runs=2)
    exact = annealer.inside(annealer.space.coordinates(values, 1, n))[0]

    def both(block: Block) -> tuple[Tensor, ...]:
        start = annealer.rows * block.number
        u = padded(exact[start : start + annealer.rows], annealer.rows)
        back = block.back(u.expand(annealing.chains, -1, -1).contiguous())
        return *block.forward(), *back, block.tuned.pilot

    below, accepted, above, accepted_above, pilot = annealer.gathered(both)
    lower = evidence(below, accepted, "lower", "ais", signature.measure)
    upper = evidence(above, accepted_above, "upper", "reverse ais", signature.measure)
    rows, unknown = checksums(batch), torch.zeros(n, dtype=torch.bool)
    believed = reliable_chains(pilot, annealing.pilots / annealing.distributions)
    return Sandwich(replace(lower, rows=rows, reliable=believed), replace(upper, rows=rows, reliable=unknown), batch)


def _drawn(pair: Pair, batch: Batch, seed: int) -> tuple[Batch, dict[str, Tensor]]:
    """Data from the model in the place of those of a batch, and the latents that they were drawn with."""
    signature = check(pair, batch)
    if signature.globals_:
        raise ValueError(
            f"the data share the latents {list(signature.globals_)}: bounds from both sides are about independent data; hold "
            "these latents fixed"
        )
    with evaluating(pair, seed):
        given = pair.run(pair.model, batch, 1, signature)
        try:
            trace = pair.run(poutine.uncondition(pair.model), batch, 1, signature)
        except NotImplementedError as error:
            raise ValueError(
                "the model's data cannot be drawn with their latents (those of a Dequantised pair have noise for a latent, "
                "which the data decide): take the inner pair"
            ) from error
    tensors = [leaf for _, leaf in leaves(batch)]
    for site in samples(given):
        if not site["is_observed"]:
            continue
        places = [i for i, leaf in enumerate(tensors) if _same_place(site["value"], leaf, pair.missing is not None)]
        if is_factor(site["fn"]) or not places:
            raise ValueError(
                f"site {site['name']!r} does not observe an array of the batch as it is, so the model's draws cannot take its "
                "place"
            )
        tensors[places[0]] = trace.nodes[site["name"]]["value"].to(tensors[places[0]].dtype).clone()
    drawn, values = rebuilt(batch, tensors), {name: trace.nodes[name]["value"] for name in signature.latents}
    with evaluating(pair):
        again = run_at(pair, pair.model, drawn, 1, signature, values)
    for site in samples(again):
        if site["is_observed"] and not torch.allclose(log_prob(site), log_prob(trace.nodes[site["name"]]), 1e-4, 1e-4):
            raise ValueError(
                f"site {site['name']!r}: its density depends on the data that the model is given, as that of an autoregressive "
                "decoder does: one run of the model draws no data from it"
            )
    return drawn, {name: value[None] for name, value in values.items()}


def _same_place(a: Any, b: Tensor, copied: bool) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or (copied and torch.equal(a, b))  # gaps are filled in a copy
