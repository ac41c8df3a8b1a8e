"""One vectorised run of a pair, read as terms: what each site adds to the log weight of each particle and datum.

The data axis is a dimension of its own, and so are the particles: a site inside the data plate is *local* and gives
``(K, N)``, with every other plate summed out; a site outside it is *global* and gives ``(K,)``.

`Traces.likelihood`, `Traces.prior` and `Traces.posterior` count what Pyro counts: every site, factors and observed ones too,
and no density under a mask. `Traces.log_weights` are ratios of densities: latents under a mask are left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from probae.batches import Batch
from probae.tracing.masks import Site, kept, log_density
from probae.tracing.signature import Signature
from probae.tracing.sites import is_flat, samples


class Part(NamedTuple):
    """A sum of site terms: ``local`` (K, N) inside the data plate, ``global_`` (K,) outside. Nats."""

    local: Tensor
    global_: Tensor

    def __sub__(self, other: Part) -> Part:
        return Part(self.local - other.local, self.global_ - other.global_)

    def __add__(self, other: Part) -> Part:  # type: ignore[override]
        return Part(self.local + other.local, self.global_ + other.global_)


class Traces:
    """The traces of guide and model for K particles, and the sums over their sites; ``seen`` is the batch of each guide."""

    def __init__(
        self,
        runs: Sequence[tuple[Any, Any]],
        signature: Signature,
        particles: int,
        size: int,
        seen: Sequence[Batch] = (),
    ):
        self.runs, self.signature, self.particles, self.size, self.seen = runs, signature, particles, size, seen

    def likelihood(self) -> Part:
        """log p of the observed sites given the latents."""
        return self._sum(lambda guide, model: ((s, log_prob(s)) for s in samples(model) if s["is_observed"]))

    def prior(self, proper: bool = False) -> Part:
        """log p of the latent sites; where ``proper``, those under a mask keep their own law, which integrates to one."""

        def terms(guide: Any, model: Any) -> Iterator[tuple[Site, Tensor]]:
            for site in samples(model):
                if not site["is_observed"]:
                    yield _proper(site) if proper and site["name"] in self.signature.masked else (site, log_prob(site))

        return self._sum(terms)

    def posterior(self, proper: bool = False) -> Part:
        """log q of the guide's sites; as `prior` where ``proper``."""

        def terms(guide: Any, model: Any) -> Iterator[tuple[Site, Tensor]]:
            for site in samples(guide):
                if proper and site["name"] in self.signature.masked:
                    yield _proper(site)
                else:
                    # what is observed without a path is no draw: as in Pyro, `score` alone has its gradient
                    yield site, log_prob(site).detach() if _unreparameterised(site) else log_prob(site)

        return self._sum(terms)

    def proposal(self) -> Part:
        """log q of the draws that have a density: of those that the model's mask keeps, without the guide's mask."""

        def terms(guide: Any, model: Any) -> Iterator[tuple[Site, Tensor]]:
            for site in samples(guide):
                other = model.nodes.get(site["name"])
                if site["name"] in self.signature.masked and other is not None:
                    yield {**site, "mask": None}, log_density(site, kept(other))
                else:
                    yield site, log_prob(site)

        return self._sum(terms)

    def log_weights(self) -> Tensor:
        """log p(x, z) − log q(z | x), (K, N)."""
        return (self.likelihood() + self.prior() - self.proposal()).local

    def kl(self) -> Part:
        """log q − log p of the latents, in closed form at each site where one is known.

        A closed form at a site integrates that site out given the draws before it, so it is right only when guide and
        model draw in the same order; otherwise all sites are sampled.
        """

        def terms(guide: Any, model: Any) -> Iterator[tuple[Site, Tensor]]:
            drawn = [s["name"] for s in samples(guide) if not s["is_observed"]]
            latent = [s["name"] for s in samples(model) if not s["is_observed"]]
            for site in samples(guide):
                if site["is_observed"]:
                    yield site, log_prob(site).detach() if _unreparameterised(site) else log_prob(site)
                    continue
                other = model.nodes.get(site["name"])
                exact = closed_form(site, other) if drawn == latent and other is not None else None
                if exact is not None:
                    yield site, exact
                else:
                    yield site, log_prob(site)
                    if other is not None:
                        yield other, -log_prob(other)

        return self._sum(terms)

    def part(self, sites: Iterable[Site], particles: int) -> Part:
        """The sum of the log densities of sites of one run."""
        return self._sum_run(((site, log_prob(site)) for site in sites), particles)

    def score(self) -> Part | None:
        """log q of the sites that cannot be reparameterised (discrete ones), or None if all can."""
        names = self.without_path()
        if not names:
            return None
        return self._sum(lambda guide, model: ((s, log_prob(s)) for s in samples(guide) if s["name"] in names))

    def unreparameterised(self) -> Part | None:
        """log q of what the guide observes or adds by `pyro.factor` without a path, or None: Pyro scores these as well."""
        if not any(_unreparameterised(s) for guide, _ in self.runs for s in samples(guide)):
            return None
        return self._sum(lambda guide, model: ((s, log_prob(s)) for s in samples(guide) if _unreparameterised(s)))

    def without_path(self) -> list[str]:
        """The guide's sites whose draws have no gradient."""
        return [s["name"] for s in samples(self.runs[0][0]) if not s["is_observed"] and not s["fn"].has_rsample]

    def _sum(self, terms: Callable[[Any, Any], Iterator[tuple[Site, Tensor]]]) -> Part:
        particles = self.particles if len(self.runs) == 1 else 1
        parts = [self._sum_run(terms(guide, model), particles) for guide, model in self.runs]
        if len(parts) == 1:
            return parts[0]
        return Part(torch.cat([p.local for p in parts]), torch.cat([p.global_ for p in parts]))

    def _sum_run(self, terms: Iterator[tuple[Site, Tensor]], particles: int) -> Part:
        local: Tensor | None = None
        global_: Tensor | None = None
        like = next(s["value"] for _, model in self.runs for s in samples(model))
        for site, value in terms:
            value = scale_and_mask(value, _residual_scale(site, self.signature), site["mask"])
            if value.dim() < self.signature.nesting + 1:
                value = value.reshape((1,) * (self.signature.nesting + 1 - value.dim()) + value.shape)
            plate = self.signature.data_plate(site)
            if plate is not None:
                # the data plate last, every other plate of the programs summed out
                value = value.movedim(plate.dim, -1).flatten(1, -2).sum(1) if value.dim() > 2 else value
                local = value if local is None else local + value
            else:
                value = value.flatten(1).sum(1)
                global_ = value if global_ is None else global_ + value
        zero = like.new_zeros((), dtype=like.dtype if like.is_floating_point() else torch.get_default_dtype())
        return Part(
            (zero if local is None else local).expand(particles, self.size),
            (zero if global_ is None else global_).expand(particles),
        )


def log_prob(site: Site, value: Tensor | None = None) -> Tensor:
    """The site's log density, neither scaled nor masked."""
    return site["fn"].log_prob(site["value"] if value is None else value, *site["args"], **site["kwargs"])


def _proper(site: Site) -> tuple[Site, Tensor]:
    return {**site, "mask": None}, log_density(site)


def _unreparameterised(site: Site) -> bool:
    return site["is_observed"] and not site["fn"].has_rsample


def _residual_scale(site: Site, signature: Signature) -> Any:
    """The site's scale without the one that subsampling the data gives it: terms are per datum."""
    scale, frame = site["scale"], signature.data_plate(site)
    if frame is not None and frame.full_size is not None:
        scale = scale * frame.size / frame.full_size
    return 1.0 if not isinstance(scale, Tensor) and math.isclose(scale, 1.0, rel_tol=1e-12) else scale


def scaled_sites(traces: Traces) -> list[str]:
    """Sites whose density the programs scale (tempering, subsampled features): their weights are no density ratio."""
    sites = [s for run in traces.runs for trace in run for s in samples(trace)]
    scales = {s["name"]: _residual_scale(s, traces.signature) for s in sites}
    return [n for n, s in scales.items() if bool((torch.as_tensor(s) != 1).any())]


def closed_form(q: Site, p: Site) -> Tensor | None:
    """KL(q ‖ p) at a site, where it has a closed form, else None."""
    # a closed form holds where the same numbers of both count, and what is not looked at is taken to differ
    alike = q["mask"] is p["mask"] and q["scale"] is p["scale"]
    if not isinstance(q["scale"], Tensor) and not isinstance(p["scale"], Tensor):
        alike = q["mask"] is p["mask"] and q["scale"] == p["scale"]
    inner = _inner_masks(q["fn"]), _inner_masks(p["fn"])
    alike = alike and len(inner[0]) == len(inner[1]) and all(a is b for a, b in zip(*inner, strict=True))
    if not alike or q["fn"].event_dim != p["fn"].event_dim or is_flat(p["fn"]):
        return None
    try:
        return kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None


def _inner_masks(fn: Any) -> list[Any]:
    found = []
    while hasattr(fn, "base_dist"):
        if hasattr(fn, "_mask"):
            found.append(fn._mask)
        fn = fn.base_dist
    return found
