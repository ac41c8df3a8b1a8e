"""Whether guide and model agree, site by site, and each site with its plates and its support."""

from __future__ import annotations

from typing import Any

from pyro.distributions import Delta
from torch.distributions import TransformedDistribution

from probae.tracing.masks import Site
from probae.tracing.signature import Signature
from probae.tracing.sites import base, describe_support, inside, is_enumerated, is_factor, is_flat, samples, support_of

_DRAWS = 16  # of the guide, by which its support is judged


def check_sites(guide: Any, model: Any, has_guide: bool) -> None:
    """Raise a ValueError that names the first site at which guide and model, or a site and its plates, disagree."""
    for site in [*samples(guide), *samples(model)]:
        declared = {frame.dim for frame in site["cond_indep_stack"]}
        for dim, size in zip(range(-1, -99, -1), reversed(site["fn"].batch_shape), strict=False):
            if size != 1 and dim not in declared:
                raise ValueError(
                    f"site {site['name']!r} has an axis of size {size} at dimension {dim} that no plate declares: batch "
                    f"shape {tuple(site['fn'].batch_shape)}; use .to_event(1) for vectors, or a plate for independent draws"
                )
    drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"] and not s["infer"].get("is_auxiliary")}
    latent = {s["name"]: s for s in samples(model) if not s["is_observed"]}
    if missing := [n for n, site in latent.items() if n not in drawn and has_guide and not is_enumerated(site)]:
        raise ValueError(
            f"the guide misses the latent site {missing[0]!r} of the model: expected the guide's sites to be "
            f"{sorted(latent)}, got {sorted(drawn)}"
        )
    if extra := [name for name in drawn if name not in latent]:
        raise ValueError(
            f"the guide has a site {extra[0]!r} that is no latent site of the model: expected {sorted(latent)}, got "
            f"{sorted(drawn)} (noise of the guide's own is drawn by torch, not at a site)"
        )
    for name in drawn:
        q, p = drawn[name], latent[name]
        expected, got = tuple(p["fn"].shape()), tuple(q["fn"].shape())
        if expected != got or p["fn"].event_dim != q["fn"].event_dim:
            raise ValueError(
                f"site {name!r}: expected the guide's shape to be the model's, {expected} with {p['fn'].event_dim} event "
                f"dimension(s), got {got} with {q['fn'].event_dim}: use .to_event(1) for vectors in both"
            )
        if not _draws_inside(p, q):
            raise ValueError(
                f"site {name!r}: the guide ({type(base(q['fn'])).__name__}) draws values outside the support of the "
                f"prior ({type(base(p['fn'])).__name__}): expected {describe_support(p['fn'])}"
            )
    for site in samples(model):
        if site["is_observed"]:
            check_event(site)


def check_event(site: Site) -> None:
    """Raise a ValueError unless an observed value has its distribution's event shape (batch axes may broadcast)."""
    expected, got = tuple(site["fn"].shape()), tuple(site["value"].shape)
    event = expected[len(expected) - site["fn"].event_dim :]
    if not is_factor(site["fn"]) and got[len(got) - len(event) :] != event:
        raise ValueError(f"site {site['name']!r}: expected data of shape {expected}, got {got}")


def check_places(drawn: dict[str, Site], latent: dict[str, Site], signature: Signature) -> None:
    """Raise a ValueError that names the first latent that one program has for each datum, and the other for all of them."""
    for name, site in latent.items():
        if name in drawn and signature.is_local(site) != signature.is_local(drawn[name]):
            inner, outer = ("model", "guide") if signature.is_local(site) else ("guide", "model")
            raise ValueError(
                f"site {name!r} lies in the plate over the data in the {inner}, and outside of it in the {outer}: draw it in "
                "both inside `with pyro.plate('data', len(x))`, or in both outside"
            )


def _draws_inside(p: Site, q: Site) -> bool:
    """Whether the guide draws inside the support of the prior: by the kinds of their supports, and by some draws."""
    if not inside(p, q["value"]).all():
        return False
    if isinstance(base(q["fn"]), Delta) or is_flat(p["fn"]):  # autoguides draw elsewhere
        return True
    try:
        wide, narrow = support_of(p["fn"]), support_of(q["fn"])
        too_wide = type(narrow).__name__ == "_Real" and type(wide).__name__ != "_Real"
        # torch may give transformed draws a wider support than they have
        if wide.is_discrete != narrow.is_discrete or (
            too_wide and not isinstance(base(q["fn"]), TransformedDistribution)
        ):
            return False
        return bool(inside(p, q["fn"].sample((_DRAWS,))).all())
    except (NotImplementedError, AttributeError):
        return True
