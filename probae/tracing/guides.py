"""What the terms of a guide are worth: a density of its draws, or something else that Pyro counts all the same.

A guide may draw at auxiliary sites what its latents are made of (autoguides do), add `pyro.factor`, or observe a site. Training
counts all of it, as Pyro does. Importance weights need the density of the draws, so here it is found out whether the terms are
one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probae.tracing.masks import Site
from probae.tracing.protocol import Pair
from probae.tracing.signature import Signature
from probae.tracing.sites import base, free_of, is_factor, is_point, samples

_LARGEST = 512  # numbers of a trial run whose Jacobian is computed
_SMALL = 1e-3  # what rounding makes of a log Jacobian in float32
_INSTEAD = "use method='refined' or 'ais', which need no guide"


class Terms(NamedTuple):
    """What a guide's terms are worth: latents at which it is a point; why the density of its draws is not known; why its terms
    are no density of them."""

    points: tuple[str, ...]
    no_density: str | None
    not_normalised: str | None


def terms(pair: Pair, rows: Any, guide: Any, latent: dict[str, Site], signature: Signature) -> Terms:
    """Look at a guide's run on some rows, given the model's latents."""
    drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
    made = [s for s in drawn.values() if s["name"] in latent and isinstance(base(s["fn"]), Delta)]
    own = [site for site in drawn.values() if site["infer"].get("is_auxiliary")]
    again = _Again(pair, rows, latent) if own and made else None
    made = [site for site in made if again is not None and site["name"] in again.made]
    of_draws = {site["name"] for site in made}
    points = tuple(n for n, s in drawn.items() if n in latent and n not in of_draws and is_point(s["fn"]))
    no_density = _no_density(own, made, latent, signature, {} if again is None else again.made)
    return Terms(points, no_density, None if no_density else _not_normalised(guide, made, again))


def _no_density(
    own: list[Site], made: list[Site], latent: dict[str, Site], signature: Signature, made_of: dict[str, set[str]]
) -> str | None:
    if not own:
        return None
    shared = {site["name"] for site in own if not signature.is_local(site)}
    for site in made:
        joint = made_of[site["name"]]
        if joint <= shared and signature.is_local(latent[site["name"]]):
            return (
                f"the guide draws {site['name']!r}, a latent of each datum, at the site {min(joint)!r} for all data at once: "
                "it has no density for each datum. Use a guide with a density for each (AutoNormal, or a plate over the data), "
                f"or {_INSTEAD}"
            )
    numbers = sum(free_of(latent[s["name"]]).inverse_shape(s["value"].shape).numel() for s in made)
    if sum(site["value"].numel() for site in own) == numbers:
        return None
    return (
        f"the guide's site {own[0]['name']!r} is auxiliary, and its latents are not made of it one to one: its density at "
        "them needs that site integrated out. Noise of the guide's own is drawn by torch, not at a site"
    )


def _not_normalised(guide: Any, made: list[Site], again: _Again | None) -> str | None:
    """A `pyro.factor` is right beside auxiliary draws where it is minus the log Jacobian of the latents made of them, and wrong
    elsewhere. A site that the guide observes is no draw at all."""
    observed = [s for s in samples(guide) if s["is_observed"]]
    seen = [s["name"] for s in observed if not is_factor(s["fn"])]
    if seen:
        return (
            f"the guide observes the site {seen[0]!r}: Pyro counts it in the loss, but it is no draw, and the guide no density "
            f"with it. Leave it out of the guide that is evaluated, or {_INSTEAD}"
        )
    gap = None if again is None else again.gap()
    if (gap is None and not observed) or (gap is not None and gap < _SMALL):
        return None  # of many numbers: an autoguide, which says its own Jacobian
    if observed:
        return (
            f"the guide adds pyro.factor({observed[0]['name']!r}), which is not minus the log Jacobian of auxiliary draws: "
            "Pyro counts it in the loss, but the guide is no density with it. Leave it out of the guide that is evaluated, or "
            f"{_INSTEAD}"
        )
    return (
        f"the guide makes {made[0]['name']!r} of auxiliary draws, and the log density that it gives there is not minus the log "
        f"Jacobian: give the Delta its log_density, or add a pyro.factor; or {_INSTEAD}"
    )


class _Again:
    """A second run of a guide, whose auxiliary draws are leaves of the autograd graph.

    Attributes:
        made: the latents that are made of them, each with the names of its draws.
    """

    def __init__(self, pair: Pair, rows: Any, latent: dict[str, Site]):
        with torch.enable_grad(), _Leaves() as handler:
            self.guide = pair.run(pair.guide, rows, 1, None)
        self.names, self.leaves, self.latent = list(handler.found), list(handler.found.values()), latent
        found = {s["name"]: self._depends_on(s["value"]) for s in samples(self.guide) if s["name"] in latent}
        self.made = {name: sources for name, sources in found.items() if sources}

    def _depends_on(self, value: Tensor) -> set[str]:
        if not self.leaves or not value.requires_grad:
            return set()
        with torch.enable_grad():
            found = torch.autograd.grad(value.sum(), self.leaves, retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(self.names, found, strict=True) if gradient is not None}

    def gap(self) -> float | None:
        """How far the log density that the guide gives is from minus the log Jacobian, relative; None where it is not known."""
        made = [s for s in samples(self.guide) if s["name"] in self.made]
        transforms = [free_of(self.latent[s["name"]]) for s in made]
        with torch.enable_grad():
            free = [t.inv(s["value"]) for t, s in zip(transforms, made, strict=True)]
            u = torch.cat([f.flatten() for f in free])
            if len(u) > _LARGEST or sum(leaf.numel() for leaf in self.leaves) != len(u):
                return None
            rows = [torch.autograd.grad(number, self.leaves, retain_graph=True, materialize_grads=True) for number in u]
        jacobian = torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])
        slope = torch.linalg.slogdet(jacobian.double()).logabsdet
        given = torch.zeros_like(slope)
        for transform, f, site in zip(transforms, free, made, strict=True):
            slope = slope + transform.log_abs_det_jacobian(f, site["value"]).sum()
            given = given + site["fn"].log_prob(site["value"]).sum()
        for site in samples(self.guide):
            if site["is_observed"]:
                given = given + site["fn"].log_prob(site["value"]).sum()
        return float((given + slope).detach().abs() / slope.detach().abs().clamp_min(1.0))


class _Leaves(Messenger):
    """Makes each auxiliary draw a leaf of the autograd graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"].get("is_auxiliary") and not msg["is_observed"] and msg["value"].is_floating_point():
            msg["value"] = msg["value"].detach().requires_grad_()
            self.found[msg["name"]] = msg["value"]


def is_messenger(pair: Pair) -> bool:
    """Whether the guide is one of Pyro's guide messengers, whose trace holds the model's observations as well."""
    programs = getattr(pair, "_programs", None)
    return programs is not None and isinstance(programs["guide"], poutine.guide.GuideMessenger)


def forget_plates(pair: Pair) -> None:
    """An EasyGuide keeps the plates of a run that failed for the next one, which may have other rows."""
    guides: list[Any] = [module for module in pair.modules() if _is(module, "EasyGuide")]
    for guide in guides:
        guide.plates.clear()


def _is(module: Any, *names: str) -> bool:
    # by name: Pyro's contributions are not imported for the question
    return any(kind.__name__ in names for kind in type(module).__mro__)


def sets_up_from_data(pair: Pair) -> bool:
    """Whether a guide makes its parameters or plates at its first run, by the data that it then sees."""
    for module in pair.modules():
        if _is(module, "AutoMessenger"):
            return True
        if _is(module, "AutoGuide", "EasyGuide") and getattr(module, "prototype_trace", None) is None:
            return True
    return False
