"""What the guide says of each latent: how far it leaves the prior, and whether the data move it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from probae.batches import Batch, each, length, rows_of
from probae.evidence.result import as_values
from probae.evidence.weights import MEMORY
from probae.export.tabular import Tabular
from probae.pair import Pair
from probae.runtime.seeding import evaluating
from probae.tracing.masks import Site
from probae.tracing.signature import Signature
from probae.tracing.sites import base, samples
from probae.tracing.terms import Traces

if TYPE_CHECKING:
    import pandas

#: the variance over data of a latent's posterior mean above which Burda et al. (2016) call it active
ACTIVE = 0.01
#: numbers of draws that are kept for a `DataTree`, and the fewest draws of a datum that are worth it
KEPT, FEWEST_KEPT = 2**23, 4


@dataclass(frozen=True, repr=False)
class Units(Tabular):
    """The L latents of one site.

    Attributes:
        kl: (L,) E over data of KL(q(z_l | x) ‖ p(z_l)), nats; NaN where the densities have no factor for each latent (a flow),
            or are none (a point, a flat prior).
        kl_mc_stderr: (L,) its Monte-Carlo error; 0 where it is known in closed form.
        activity: (L,) the variance over data of the posterior mean; a class counts by its probabilities, summed.
        discrete: whether the latents are.
        draws: (draws, N, L) of the guide, on the CPU; None where they are too many to keep.
    """

    kl: Tensor
    kl_mc_stderr: Tensor
    activity: Tensor
    discrete: bool
    draws: Tensor | None

    @property
    def active(self) -> Tensor:
        """(L,) whether the data move a latent: its activity is above 0.01."""
        return self.activity > ACTIVE

    def __len__(self) -> int:
        return len(self.activity)

    def to_frame(self) -> pandas.DataFrame:
        """A row per latent: ``kl`` and its ``kl_mc_stderr``, ``activity``, ``active``."""
        import pandas

        columns = {name: getattr(self, name).numpy() for name in ("kl", "kl_mc_stderr", "activity", "active")}
        return pandas.DataFrame(columns).rename_axis("latent")

    def __repr__(self) -> str:
        return f"<{len(self)} latents, {int(self.active.sum())} active>"


class Latents(NamedTuple):
    """What `latents` returns: the `Units` of each site; per datum, (N,), ``reconstruction`` E_q log p(x | z) and ``rate``
    KL(q(z | x) ‖ p(z)) where they are defined; ``log_weights`` (draws, N) of the draws that were kept."""

    units: dict[str, Units]
    reconstruction: Tensor | None
    rate: Tensor | None
    log_weights: Tensor | None


class _Block(NamedTuple):
    """One site and some rows: the sum of KL over rows (K, L), and by row its mean (n, L, C), the mean's variance, the draws."""

    kl: Tensor
    mean: Tensor
    spread: Tensor
    draws: Tensor


def latents(pair: Pair, signature: Signature, batch: Batch, draws: int, seed: int) -> Latents:
    """`Units` of every site of the guide inside the data plate, from a few draws for each datum.

    Closed forms are taken where they are known. What depends on other draws (an inner layer, a global latent) is averaged
    over them, and the variance that the average keeps is taken off the activity.
    """
    size = length(batch)
    blocks: list[dict[str, _Block]] = []
    totals: list[tuple[Tensor, ...]] = []
    with evaluating(pair, seed):
        first = pair.traces(batch if signature.all_rows else each(lambda leaf: leaf[:2], batch))
        sites = {q["name"]: q for q in samples(first.runs[0][0]) if q["name"] in signature.latents}
        numbers = sum(site["value"].numel() for site in sites.values()) * size // first.size
        keep = min(draws, KEPT // max(numbers, 1))
        keep = keep if keep >= FEWEST_KEPT else 0
        rows = size if signature.all_rows else _rows(pair, first, draws)
        for some in rows_of(batch, rows):
            traces = pair.traces(some, draws)
            blocks.append({name: _block(name, traces, keep) for name in sites})
            parts = traces.likelihood().local.mean(0), traces.kl().local.mean(0), traces.log_weights()[:keep]
            totals.append(tuple(as_values(part) for part in parts))
    units = {}
    for name, site in sites.items():
        kls, means, spreads, kept = zip(*(block[name] for block in blocks), strict=True)
        kl = torch.stack(kls).sum(0) / size
        mean = torch.cat(means)
        moved = mean.var(0) if size > 1 else torch.full_like(mean[0], torch.nan)
        activity = moved - torch.cat(spreads).mean(0) / draws
        units[name] = Units(
            kl.mean(0),
            kl.std(0) / draws**0.5,
            activity.clamp_min(0.0).sum(-1),
            _is_discrete(site["fn"]),
            torch.cat(kept, 1) if keep else None,
        )
    reconstruction, rate, weights = (torch.cat(part, -1) for part in zip(*totals, strict=True))
    known = not signature.summed
    proper = known and not (signature.improper or signature.points)
    return Latents(
        units, reconstruction if known else None, rate if proper else None, weights if proper and keep else None
    )


def _rows(pair: Pair, traces: Traces, draws: int) -> int:
    """How many data go into one block: their values and densities, and the widest layers between them."""
    values = sum(site["value"].numel() for trace in traces.runs[0] for site in samples(trace)) // traces.size
    widest = max((parameter.shape[0] for parameter in pair.parameters() if parameter.dim() == 2), default=0)
    memory = MEMORY["cpu" if pair.device is None or pair.device.type == "cpu" else "cuda"]
    return max(1, memory // (8 * draws * (4 * values + 2 * widest)))


def _block(name: str, traces: Traces, keep: int) -> _Block:
    signature = traces.signature
    factors = name not in (*signature.improper, *signature.points)
    parts = []
    for guide, model in traces.runs:
        q, p = guide.nodes[name], model.nodes[name]
        drawn = [site["name"] for site in samples(guide)]
        latent = [site["name"] for site in samples(model) if not site["is_observed"]]
        # a site of the guide alone, such as noise, has a share in the density of the others
        kl = _kl(q, p, drawn == latent) if factors and set(drawn) <= set(latent) else None
        mean, draws = _cells(_mean(q), q, traces), _cells(_classes(q), q, traces)
        kl = torch.full_like(mean, torch.nan) if kl is None else _cells(kl.unsqueeze(-1), q, traces)
        parts.append((kl[..., 0], mean, draws[..., 0]))
    kl, mean, draws = (torch.cat(part) for part in zip(*parts, strict=True))
    return _Block(as_values(kl.sum(1)), as_values(mean.mean(0)), as_values(mean.var(0)), draws[:keep].to("cpu"))


def _kl(q: Site, p: Site, in_order: bool) -> Tensor | None:
    """KL of each latent, (..., L), at one draw of those before it; None where a density has no factor for each.

    As in `Traces.kl`, a closed form integrates a latent given the draws before it, so guide and model must draw in the same
    order; otherwise the draw itself counts.
    """
    if not _same(q["mask"], p["mask"]) or _is_masked(q["fn"]) or _is_masked(p["fn"]):
        return None
    fn, prior = _factors(q["fn"]), _factors(p["fn"])
    if (fn.event_shape or prior.event_shape) and not (_is_one_hot(fn) and _is_one_hot(prior)):
        return None
    kl = None
    if in_order:
        with contextlib.suppress(NotImplementedError):
            kl = kl_divergence(fn, prior)
    if kl is None:
        kl = fn.log_prob(q["value"]) - prior.log_prob(q["value"])
    if q["mask"] is None:
        return kl
    mask = torch.as_tensor(q["mask"], device=kl.device)
    return kl * mask.reshape(mask.shape + (1,) * _axes(q))


def _mean(q: Site) -> Tensor:
    """The mean of each latent given what it depends on, (..., L, C): C probabilities of a class, or one number."""
    fn = base(q["fn"])
    if _is_one_hot(fn) or type(fn).__name__ == "Categorical":
        return fn.probs
    try:
        mean = fn.mean
    except (NotImplementedError, AttributeError):
        mean = None
    # without a mean, as of a flow, the draw is an estimate of it
    return (mean if mean is not None and bool(mean.isfinite().all()) else q["value"]).unsqueeze(-1)


def _classes(q: Site) -> Tensor:
    return (q["value"].argmax(-1) if _is_one_hot(base(q["fn"])) else q["value"]).unsqueeze(-1)


def _cells(value: Tensor, q: Site, traces: Traces) -> Tensor:
    """(K, N, L, C), all plates but that over data being flattened into L."""
    signature, batch = traces.signature, q["fn"].batch_shape
    event = q["fn"].event_shape[: _axes(q)]
    value = value.expand(*batch, *event, value.shape[-1])
    value = value.reshape((1,) * (signature.nesting + 1 - len(batch)) + value.shape)
    value = value.movedim(signature.nesting + 1 + signature.data_plate(q).dim, 1)
    value = value.reshape(*value.shape[:2], -1, value.shape[-1])
    return value.expand(traces.particles // len(traces.runs), traces.size, *value.shape[2:])


def _axes(q: Site) -> int:
    """How many axes of an event number its latents."""
    return len(q["fn"].event_shape) - (len(base(q["fn"]).event_shape) if _is_one_hot(base(q["fn"])) else 0)


def _factors(fn: Any) -> Any:
    """A distribution of each latent, its marginal where the joint one has no factors but is Gaussian."""
    fn = base(fn)
    if type(fn).__name__ in {"MultivariateNormal", "LowRankMultivariateNormal"}:
        return dist.Normal(fn.loc, fn.variance.sqrt(), validate_args=False)
    return fn


def _is_one_hot(fn: Any) -> bool:
    return type(fn).__name__.startswith("OneHotCategorical")


def _same(mask: Any, other: Any) -> bool:
    if mask is None or other is None:
        return mask is other
    return torch.equal(*torch.broadcast_tensors(torch.as_tensor(mask), torch.as_tensor(other)))


def _is_masked(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ == "MaskedDistribution":
            return True
        fn = fn.base_dist
    return False


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(base(fn).support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False
