"""The continuous latents of each datum as one vector without constraints: what refinement and annealing move through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform, Transform

from probae.batches import Batch, each, length
from probae.evidence.enumeration import states, values_of
from probae.evidence.weights import no_evidence, require_unscaled
from probae.pair import Pair
from probae.runtime.memory import allocated
from probae.runtime.seeding import evaluating
from probae.tracing.enumeration import log_joint_at
from probae.tracing.masks import Site
from probae.tracing.probing import run_at
from probae.tracing.signature import Signature
from probae.tracing.sites import free_of, samples, support_of
from probae.tracing.terms import Traces, log_prob

#: draws of the prior, for two data, that are looked at; and how many of a draw's numbers may lie at an edge, about the
#: nats by which a bound may be off
_EDGE_DRAWS, _EDGE_SHARE = 256, 0.02


class Terms(NamedTuple):
    """log p(u), Jacobian included, and log p(x | u), both (K, N), nats; discrete latents are summed out of both."""

    prior: Tensor
    likelihood: Tensor


@dataclass(frozen=True)
class _Coordinates:
    """Where a site lies in u: its transform from the free vector, and the shapes of a datum's value, free and as drawn."""

    transform: Transform
    free: torch.Size
    drawn: torch.Size
    event_dim: int
    data_dim: int


class Space:
    r"""Coordinates u of all continuous latents of a datum: :math:`z = T(u)`, T of `biject_to` each site's support.

    Small discrete latents are summed out of every density here; latents outside the data plate are held at ``given``.

    Args:
        pair, signature: as they were checked.
        batch: some rows of the data; other rows may follow.

    Attributes:
        size: L, the number of coordinates of a datum.

    Raises:
        ValueError: if there is no continuous latent, the prior is flat, there are too many discrete states, the support of a
            site depends on another latent, or latents that all data share cannot be drawn.
    """

    def __init__(self, pair: Pair, batch: Batch, signature: Signature):
        if reason := no_evidence(signature):
            raise ValueError(reason)
        if signature.globals_ and not pair.has_guide:
            raise ValueError(f"the pair has no guide to draw {list(signature.globals_)} from, which all data share")
        if signature.globals_ and not signature.vectorised:
            raise ValueError(
                f"the programs draw {list(signature.globals_)}, which all data share, and take no particle axis: use 'iwae'"
            )
        if signature.varies:
            raise ValueError(
                "the programs draw more sites for some data than for others, so the data have no coordinates in common: use "
                "method='iwae', or draw as many for all of them, those beyond a datum's end under a mask"
            )
        self.pair, self.signature = pair, signature
        self.vectorised = signature.vectorised
        with evaluating(pair):
            rows = batch if signature.all_rows else each(lambda leaf: leaf[:2], batch)
            first, second = (self._prior_trace(rows, 1, {}) for _ in range(2))
            require_unscaled(Traces([(poutine.Trace(), first)], signature, 1, length(rows)))
        latent = {s["name"]: s for s in samples(first) if s["name"] in signature.latents}
        discrete = [name for name, site in latent.items() if _is_discrete(site)]
        self.summed = [name for name in discrete if name in signature.summed]
        discrete = [name for name in discrete if name not in self.summed]
        self.sites: dict[str, _Coordinates] = {}
        for name, site in latent.items():
            if name not in (*discrete, *self.summed):
                _require_fixed(site, second.nodes[name])
                self.sites[name] = self._coordinates(site)
        if not self.sites:
            raise ValueError(
                f"there is no continuous latent to move: the latents are {list(signature.latents) or 'none'}; use "
                "method='enumerate', 'iwae' or 'exact'"
            )
        self.size = sum(c.free.numel() for c in self.sites.values())
        if discrete and signature.nesting > 1:
            raise ValueError(
                f"the discrete latents {discrete} lie among plates inside the data plate: use method='iwae'"
            )
        self.states = self._states(batch, discrete) if discrete else {}
        self.widest = max((len(values_of(latent[name])) for name in self.summed), default=1)
        self.guided = self._drawn_by_guide(rows, discrete) if discrete and pair.has_guide else {}
        self._require_resolution(rows)

    def shared(self, rows: Batch, particles: int) -> dict[str, Tensor]:
        """A draw from the guide, for each particle, of the latents that all data share; none where there are none."""
        if not (names := self.signature.globals_):
            return {}
        guide = run_at(self.pair, self.pair.guide, rows, particles, self.signature, {})
        values = {name: guide.nodes[name]["value"] for name in names}
        return {n: (v if particles > 1 else v[None]).contiguous() for n, v in values.items()}

    def bytes(self, batch: Batch) -> int:
        """What one further particle of a datum takes, by runs on a few rows: densities and their gradients."""
        rows = batch if self.signature.all_rows else each(lambda leaf: leaf[:2], batch)

        def gradient(particles: int) -> None:
            with torch.enable_grad():
                u = torch.zeros(particles, length(rows), self.size, device=self.pair.device, dtype=self.pair.dtype)
                terms = self.terms(u.requires_grad_(), rows, self.shared(rows, particles))
                torch.autograd.grad((terms.prior + terms.likelihood).sum(), u)

        with evaluating(self.pair):
            one, several = (allocated(lambda k=k: gradient(k)) for k in (1, 3))  # type: ignore[misc]
        return max(1, (several - one) // (2 * length(rows)))

    # -- densities ---------------------------------------------------------------------------------------------------

    def terms(self, u: Tensor, batch: Batch, given: dict[str, Tensor] | None = None) -> Terms:
        """The densities at u (K, N, L), differentiable in it."""
        values, jacobian = self.values(u)
        particles, size = u.shape[:2]
        values, count = _at_states({**values, **(given or {})}, self.states, particles, size)
        prior, likelihood = (
            part.reshape(count, particles, size) for part in self._terms(batch, values, count * particles)
        )
        if count == 1:
            return Terms(prior[0] + jacobian, likelihood[0])
        # the sum over states may change both: p(u) is a mixture where continuous latents depend on discrete ones
        marginal = torch.logsumexp(prior, 0)
        return Terms(marginal + jacobian, torch.logsumexp(prior + likelihood, 0) - marginal)

    def log_guide(self, u: Tensor, batch: Batch, given: dict[str, Tensor] | None = None) -> Tensor:
        """log q(u | x) (K, N), Jacobian included, differentiable in u; discrete latents that the guide draws are summed out."""
        values, jacobian = self.values(u)
        particles, rows = u.shape[:2]
        values, count = _at_states({**values, **(given or {})}, self.guided, particles, rows)
        batch, values, together, size = self._shaped(batch, values, count * particles)
        guide = run_at(self.pair, self.pair.guide, batch, together, self.signature, values)
        local = Traces([(guide, guide)], self.signature, together, size).posterior(proper=True).local
        log_q = local.reshape(count, particles, rows)
        return (log_q[0] if count == 1 else torch.logsumexp(log_q, 0)) + jacobian

    def unguided(self, rows: Batch) -> str | None:
        """Why the guide's density is not known at coordinates that others drew, or None."""
        pair, signature = self.pair, self.signature
        if not pair.has_guide:
            return "the pair has no guide"
        if signature.points:
            return f"the guide is a point at site {signature.points[0]!r} and has no density"
        if reason := signature.no_density or signature.not_normalised:
            return reason
        with evaluating(pair, 0):
            guide = pair.run(pair.guide, rows, 1, signature)
        drawn = [s for s in samples(guide) if not s["is_observed"]]
        if own := [s["name"] for s in drawn if s["infer"].get("is_auxiliary")]:
            return f"the guide's density needs its own site {own[0]!r} integrated out"
        with evaluating(pair, 1):
            again = run_at(pair, pair.guide, rows, 1, signature, {s["name"]: s["value"] for s in drawn})
        for site in drawn:
            if not torch.equal(log_prob(site), log_prob(again.nodes[site["name"]])):
                return (
                    f"the guide draws noise of its own, by torch, that its density at site {site['name']!r} depends on"
                )
        return None

    # -- coordinates -------------------------------------------------------------------------------------------------

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents by site, (K, ..., N, ...) as the programs have them, and log |dz/du| (K, N)."""
        found, jacobian, at = {}, u.new_zeros(u.shape[:2]), 0
        for name, site in self.sites.items():
            part = u[..., at : at + site.free.numel()]
            at += site.free.numel()
            free = part.reshape(*u.shape[:2], *site.free)
            z = site.transform(free)
            slopes = site.transform.log_abs_det_jacobian(free, z)
            jacobian = jacobian + slopes.reshape(*u.shape[:2], -1).sum(-1)
            found[name] = self._as_drawn(z, site)
        return found, jacobian

    def coordinates(self, values: dict[str, Tensor], particles: int, size: int) -> Tensor:
        """u (K, N, L) of latents as the programs draw them."""
        parts = []
        for name, site in self.sites.items():
            free = site.transform.inv(self._by_datum(values[name], site, particles, size))
            parts.append(free.reshape(particles, size, -1))
        return torch.cat(parts, -1)

    def from_prior(self, batch: Batch, particles: int, given: dict[str, Tensor] | None = None) -> Tensor:
        """u (K, N, L) drawn from the prior."""
        trace = self._prior_trace(batch, particles, given or {})
        return self.coordinates({n: trace.nodes[n]["value"] for n in self.sites}, particles, length(batch))

    def from_guide(self, batch: Batch, particles: int, given: dict[str, Tensor] | None = None) -> Tensor:
        """u (K, N, L) drawn from the guide."""
        rows, values, together, _ = self._shaped(batch, given or {}, particles)
        guide = run_at(self.pair, self.pair.guide, rows, together, self.signature, values)
        return self.coordinates({n: guide.nodes[n]["value"] for n in self.sites}, particles, length(batch))

    # -- the programs ------------------------------------------------------------------------------------------------

    def _states(self, batch: Batch, discrete: list[str]) -> dict[str, Tensor]:
        try:
            return states(self.pair, batch, self.signature, discrete)
        except ValueError as error:
            raise ValueError(f"the discrete latents {discrete} cannot be summed out: {error}") from error

    def _require_resolution(self, rows: Batch) -> None:
        """Raise a ValueError if the prior puts more than a little of its mass where numbers cannot tell it from the edge.

        There neither the density that is computed nor the coordinates are those of the draws.
        """
        with evaluating(self.pair):
            trace = self._prior_trace(rows, _EDGE_DRAWS, self.shared(rows, _EDGE_DRAWS))
        for name, site in self.sites.items():
            z = self._by_datum(trace.nodes[name]["value"], site, _EDGE_DRAWS, length(rows))
            lost = float(_at_the_edge(z, site.transform).sum()) / (_EDGE_DRAWS * length(rows))
            if lost > _EDGE_SHARE:
                raise ValueError(
                    f"site {name!r}: {lost:.2g} values of a draw from the prior are rounded to the edge of the support in "
                    f"{z.dtype}. Their density there is not known. Use float64, a latent of another scale (its logarithm, "
                    "say), or method='iwae'"
                )

    def _drawn_by_guide(self, rows: Batch, discrete: list[str]) -> dict[str, Tensor]:
        """The states of the discrete latents that the guide draws too; it may leave some to the model."""
        with evaluating(self.pair):
            guide = self.pair.run(self.pair.guide, rows, 1, self.signature)
        names = [name for name in discrete if name in guide.nodes]
        return states(self.pair, rows, self.signature, names) if names else {}

    def _prior_trace(self, batch: Batch, particles: int, given: dict[str, Tensor]) -> Any:
        rows, values, together, _ = self._shaped(batch, given, particles)
        return run_at(self.pair, self.pair.model, rows, together, self.signature, values)

    def _terms(self, batch: Batch, values: dict[str, Tensor], particles: int) -> tuple[Tensor, Tensor]:
        """log p(z) and log p(x | z), what the programs sum out being summed out."""
        rows, values, together, size = self._shaped(batch, values, particles)
        if self.summed:
            prior, joint = log_joint_at(self.pair, rows, values, together, size, self.signature)
            return prior, joint - prior
        model = run_at(self.pair, self.pair.model, rows, together, self.signature, values)
        traces = Traces([(poutine.Trace(), model)], self.signature, together, size)
        return traces.prior(proper=True).local, traces.likelihood().local

    def _shaped(
        self, batch: Batch, values: dict[str, Tensor], particles: int
    ) -> tuple[Batch, dict[str, Tensor], int, int]:
        """Programs without a particle axis see each particle as further rows of data."""
        size = length(batch)
        if particles == 1:
            return batch, {name: v[0] for name, v in values.items()}, 1, size
        if self.vectorised:
            return batch, values, particles, size
        if self.signature.all_rows or self.signature.nesting > 1:
            raise ValueError(
                "the programs take no particle axis, and run only on all of the data at once: use method='iwae'"
            )
        rows = each(lambda leaf: leaf.repeat(particles, *(1 for _ in leaf.shape[1:])), batch)
        return rows, {name: v.flatten(0, 1) for name, v in values.items()}, 1, particles * size

    def _coordinates(self, site: Site) -> _Coordinates:
        fn, signature = site["fn"], self.signature
        value = site["value"]
        lead = value.dim() - fn.event_dim
        batch_shape = (1,) * (signature.nesting - lead) + tuple(value.shape[:lead])
        data_dim, inner = signature.data_plate(site).dim, list(batch_shape)
        del inner[data_dim]
        drawn = torch.Size(inner) + value.shape[lead:]
        transform = free_of(site)
        free = transform.inverse_shape(drawn)
        if len(free) > len(drawn):
            raise ValueError(
                f"the support of site {site['name']!r} is given for each datum: it has no fixed coordinates; use method='iwae'"
            )
        return _Coordinates(transform, free, drawn, fn.event_dim, data_dim)

    def _by_datum(self, value: Tensor, site: _Coordinates, particles: int, size: int) -> Tensor:
        """A site's value with the data axis second: (K, N, other plates, event)."""
        nesting = self.signature.nesting
        plates = list(site.drawn[: nesting - 1])
        plates.insert(nesting + site.data_dim, size)
        event = site.drawn[nesting - 1 :]
        if value.numel() < particles * size * site.drawn.numel():  # a point is the same for all particles
            value = value.expand(particles, *plates, *event)
        value = value.reshape(particles, *plates, *event)
        return value.movedim(1 + nesting + site.data_dim, 1)

    def _as_drawn(self, z: Tensor, site: _Coordinates) -> Tensor:
        return z.movedim(1, 1 + self.signature.nesting + site.data_dim)


def _at_the_edge(z: Tensor, transform: Transform) -> Tensor:
    """Which numbers of z the dtype cannot tell from the edge of the support: moving u by one does not move them, or the way
    there and back does."""
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    free = transform.inv(z)
    back = transform(free)
    info = torch.finfo(z.dtype)
    lost = ~z.isfinite() | ((back - z).abs() > torch.maximum(back.abs(), z.abs()) / 2)
    if free.shape == z.shape and transform.domain.event_dim == 0:
        slope = transform.log_abs_det_jacobian(free, z).exp()
        return lost | ~free.isfinite() | (slope <= 2 * info.eps * z.abs()) | (slope <= 2 * info.tiny)
    if isinstance(transform, StickBreakingTransform):  # what is left of the stick is one less the sum of what is gone
        left = z.flip(-1).cumsum(-1).flip(-1)
        lost = lost | (z <= 2 * info.tiny) | ((left <= 2 * info.eps) & (z < 1))
    return lost


def _at_states(
    values: dict[str, Tensor], grids: dict[str, Tensor], particles: int, size: int
) -> tuple[dict[str, Tensor], int]:
    """The values at every joint state, states outermost, and how many there are."""
    if not grids:
        return values, 1
    count = len(next(iter(grids.values())))
    found = {name: v.repeat(count, *(1 for _ in v.shape[1:])) for name, v in values.items()}
    for name, grid in grids.items():
        found[name] = grid[:, None].expand(count, particles, size, *grid.shape[2:]).flatten(0, 1)
    return found, count


def _require_fixed(site: Site, again: Site) -> None:
    """Raise a ValueError if a site's support moves with what was drawn before it."""
    first, second = free_of(site), free_of(again)
    free = torch.zeros(first.inverse_shape(site["value"].shape)).to(site["value"])
    for at in (free, free + 1):
        a, b = first(at), second(at)
        if a.shape != b.shape or not torch.equal(a, b):
            raise ValueError(
                f"the support of site {site['name']!r} depends on other latents, so it has no fixed coordinates: use "
                "method='iwae'"
            )


def _is_discrete(site: Site) -> bool:
    try:
        return support_of(site["fn"]).is_discrete
    except NotImplementedError as error:
        raise ValueError(
            f"the support of site {site['name']!r} is not known ({error}), so it has no coordinates: use method='iwae'"
        ) from error
