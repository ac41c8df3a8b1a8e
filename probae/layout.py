"""Where the sites of a pair lie, found by running it on a few rows, with its guide checked against its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor

from probae.batches import Batch, each, leaves, length, shapes
from probae.seeding import seeded, still
from probae.sites import (
    Layout,
    Site,
    base,
    describe_support,
    free_of,
    hides,
    inside,
    is_enumerated,
    is_factor,
    is_flat,
    is_point,
    rows_in_plate,
    samples,
    support_of,
)
from probae.traces import Traces

_ROWS = 4096  # of the data that a first run sees

#: what a user's program may raise on data that it was not written for
PROGRAM_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AssertionError, AttributeError, ArithmeticError)


def lay_out(pair: Any, batch: Batch, seed: int = 0) -> Layout:
    """Run the programs of a `Pair` on a few rows, check guide against model, and say where the sites lie.

    Raises:
        ValueError: naming the site, if the guide misses a latent, has one that the model has not, or draws another shape
            or outside the prior's support; if a site has an axis that no plate declares; if there is no data plate.
    """
    # a number of rows that no other axis has: a plate over a wrong axis then shows itself
    taken = {size for _, leaf in leaves(batch) for size in leaf.shape[1:]}
    free = [n for n in range(5, 7 + len(taken)) if n not in taken]
    with still(pair, seed):
        # what programs make at their first run, such as a parameter for each datum, takes its size from the data
        rows = _few(batch, min(length(batch), _ROWS))
        guide, model = run_both(pair, rows, None)
        few = _few(batch, min(length(batch), free[0]))
        with contextlib.suppress(ValueError):  # programs of a fixed size run on all of the data alone
            guide, model = run_both(pair, few, None)
            rows = few
        count = length(rows)
        plate = _data_plate([*samples(guide), *samples(model)], count, rows)
        check_sites(guide, model, pair.has_guide)
        local = Layout(frozenset({plate.name, *getattr(pair, "data_plates", ())}), plate.dim, _nesting(guide, model))
        drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
        latents = [s for s in samples(model) if not s["is_observed"] and local.is_local(s)]
        shared = [s for s in samples(model) if not s["is_observed"] and not local.is_local(s)]
        observed = [s for s in samples(model) if s["is_observed"] and not is_factor(s["fn"])]
        layout = replace(
            local,
            latents=tuple(s["name"] for s in latents),
            globals_=tuple(s["name"] for s in shared),
            observed=tuple(s["name"] for s in observed),
            improper=tuple(s["name"] for s in latents if is_flat(s["fn"]) or hides(s, drawn.get(s["name"]))),
            points=tuple(s["name"] for s in latents if _is_point(s["name"], drawn)),
            blind=_blind(drawn, {s["name"]: s for s in (*latents, *shared)}),
            measure=getattr(pair, "measure", None) or _measure(observed),
            subsampled=_subsampled(plate, count),
            summed=tuple(s["name"] for s in samples(model) if _summed(s, drawn)),
            whole=rows is not few,
            enumerated=any(is_enumerated(s) for t in (guide, model) for s in samples(t) if not s["is_observed"]),
        )
        # two numbers of rows: a module that takes the data axis for channels passes with one of them by chance
        fewer = [rows] if layout.whole else [_few(batch, n) for n in {count, min(length(batch), free[1])}]
        return replace(layout, vectorised=all(_vectorises(pair, few, layout) for few in fewer))


def run_both(pair: Any, rows: Batch, layout: Layout | None) -> tuple[Any, Any]:
    """The traces of guide and model; whatever their own errors are, they come back as ValueErrors that name the program."""
    guide: Any = poutine.Trace()
    if pair.has_guide:
        with blamed("guide", rows):
            guide = pair.run(pair.guide, rows, 1, layout)
    with blamed("model", rows):
        return guide, pair.run(pair.model, rows, 1, layout, poutine.replay, trace=guide)


@contextlib.contextmanager
def blamed(name: str, rows: Batch) -> Iterator[None]:
    """A user's program runs here: whatever its own errors are, they come out as ValueErrors that name it."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"the model's latents could not be drawn ({error}): a flat prior needs a guide that draws its site"
        ) from error
    except PROGRAM_ERRORS as error:
        raise ValueError(f"the {name} failed on rows of the data, of shape {shapes(rows)}: {error}") from error


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
        if not _covers(p["fn"], q["fn"]) or not inside(p, q["value"]).all():
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


def _covers(p: Any, q: Any) -> bool:
    """Whether the support of p can hold that of q, as far as their kinds tell."""
    try:
        wide, narrow = support_of(p), support_of(q)
    except (NotImplementedError, AttributeError):
        return True
    if isinstance(base(q), Delta) or is_flat(p):  # autoguides draw elsewhere, and put a Delta with its density here
        return True
    bounded = type(wide).__name__ != "_Real"
    return wide.is_discrete == narrow.is_discrete and not (bounded and type(narrow).__name__ == "_Real")


def _auxiliary(drawn: dict[str, Site]) -> list[Site]:
    return [site for site in drawn.values() if site["infer"].get("is_auxiliary")]


def _is_point(name: str, drawn: dict[str, Site]) -> bool:
    """Whether the guide has no density for a latent: not where an autoguide has drawn the very value at an auxiliary site."""
    if name not in drawn or not is_point(drawn[name]["fn"]):
        return False
    elsewhere = [site["value"].flatten() for site in _auxiliary(drawn)]
    return not elsewhere or not bool(torch.isin(drawn[name]["value"], torch.cat(elsewhere)).all())


def _blind(drawn: dict[str, Site], latent: dict[str, Site]) -> str | None:
    """Why auxiliary sites hide the guide's density at the latents, if they do.

    Autoguides draw at them what latents are made of, one to one; anything else would have to be integrated out.
    """
    if not (own := _auxiliary(drawn)):
        return None
    made = [latent[s["name"]] for s in drawn.values() if s["name"] in latent and isinstance(base(s["fn"]), Delta)]
    numbers = sum(free_of(site).inverse_shape(site["value"].shape).numel() for site in made)
    if sum(site["value"].numel() for site in own) == numbers:
        return None
    return (
        f"the guide's site {own[0]['name']!r} is auxiliary, and its latents are not made of it one to one: its density at "
        "them needs that site integrated out. Noise of the guide's own is drawn by torch, not at a site"
    )


def _summed(site: Site, drawn: dict[str, Site]) -> bool:
    return not site["is_observed"] and site["name"] not in drawn and is_enumerated(site)


def _subsampled(plate: Any, count: int) -> str | None:
    if not (0 <= plate.size < (plate.full_size or 0) and plate.full_size == count):
        return None
    return (
        f"the programs subsample their data, {plate.size} of {plate.full_size} in plate {plate.name!r}: what is computed "
        "would not be about the data that were given. Evaluate programs whose plate has all of them"
    )


def _measure(observed: list[Site]) -> str:
    kinds = {bool(s["fn"].support.is_discrete) for s in observed}
    return "mixed" if len(kinds) > 1 else "mass" if kinds == {True} else "density"


def _few(batch: Batch, count: int) -> Batch:
    return each(lambda leaf: _without_gaps(leaf, leaf[:count]), batch)


def _without_gaps(leaf: Tensor, rows: Tensor) -> Tensor:
    """Rows of numbers: what is missing takes a value that its column has elsewhere, since programs may take no other."""
    if not leaf.is_floating_point() or (good := torch.isfinite(rows)).all():
        return rows
    largest = torch.where(torch.isfinite(leaf), leaf, -torch.inf).amax(0)
    return torch.where(good, rows, torch.where(torch.isfinite(largest), largest, 0.0))


def _nesting(guide: Any, model: Any) -> int:
    return max(-f.dim for s in [*samples(guide), *samples(model)] for f in s["cond_indep_stack"] if f.dim is not None)


def _data_plate(sites: list[Site], count: int, rows: Batch) -> Any:
    # a plate by another name is known by its size; that of the observed sites comes first
    sites = sorted(sites, key=lambda s: not s["is_observed"] or is_factor(s["fn"]))
    frames = [f for s in sites for f in s["cond_indep_stack"] if f.dim is not None]
    # a plate without a size has -1
    named = [f for f in frames if f.name == "data"] or [f for f in frames if {-1, count} & {f.size, f.full_size}]
    if not named:
        raise ValueError(
            "the model has no plate over the data: expected `with pyro.plate('data', N, dim=-1)` around the sites of each "
            f"datum; got {sorted({f.name for f in frames}) or 'no plates'}"
        )
    plate = named[0]
    if plate.size not in (-1, count) and plate.full_size in (None, plate.size):
        raise ValueError(
            f"plate {plate.name!r} has size {plate.size}, but the batch has {count} rows ({shapes(rows)}): take the plate's "
            "size from the batch"
        )
    return plate


def _vectorises(pair: Any, rows: Batch, layout: Layout) -> bool:
    """Whether K particles at once give the terms that each of them gives alone."""
    particles = next(k for k in (3, 4) if k != length(rows))

    def run(values: dict[str, Any], k: int) -> Traces:
        guide: Any = poutine.Trace()
        if pair.has_guide:
            with seeded(0, pair.device):  # plain noise in a guide, as a denoising one has, is then the same
                guide = run_at(pair, pair.guide, rows, k, layout, values)
        with seeded(1, pair.device):
            drawn = {s["name"]: s["value"] for s in samples(guide) if not s["is_observed"]}
            model = run_at(pair, pair.model, rows, k, layout, values | drawn)
        return Traces([(guide, model)], layout, k, rows_in_plate(model, layout, rows))

    def latents(traces: Traces) -> dict[str, Any]:
        return {s["name"]: s["value"] for trace in traces.runs[0] for s in samples(trace) if not s["is_observed"]}

    try:
        shapes_alone = {name: value.shape for name, value in latents(run({}, 1)).items()}
        together = run({}, particles)
        drawn = latents(together)
        for k in range(particles):
            alone = run({name: value[k].reshape(shapes_alone[name]) for name, value in drawn.items()}, 1)
            for part in ("likelihood", "prior", "posterior"):
                for a, b in zip(getattr(together, part)(), getattr(alone, part)(), strict=True):
                    if not torch.allclose(a[k], b[0], rtol=1e-3, atol=1e-3, equal_nan=True):
                        return False
        return True
    except PROGRAM_ERRORS:  # the programs take no particle axis
        return False


def run_at(pair: Any, program: Any, batch: Batch, particles: int, layout: Layout, values: dict[str, Any]) -> Any:
    """Trace a program at given values of its latents, which stay latents."""
    trace = pair.run(program, batch, particles, layout, poutine.condition, data=values)
    for site in samples(trace):
        site["is_observed"] = site["is_observed"] and site["name"] not in values
    return trace
