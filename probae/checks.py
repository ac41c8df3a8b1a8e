"""What is checked before any work: the sites of a pair against each other, and all of the data against the sites."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from probae.batches import Batch, call, each, leaves, length, rows_of, shapes
from probae.pair import Pair
from probae.seeding import seeded
from probae.traces import Layout, Site, base, is_flat, is_point, samples

_ROWS = 4096  # rows of data checked at a time


def check(pair: Pair, batch: Batch) -> Layout:
    """Check a pair and all of its data; returns where the sites lie.

    Raises:
        ValueError: naming the site, with what was expected and what came, if the guide misses a latent of the model, has
            one that the model has not, or draws another shape or outside the prior's support; if there is no data
            plate; if data are missing, infinite, of a wrong shape, or outside the support of the observed site.
    """
    validate = getattr(pair, "validate", None)
    if callable(validate):
        call(validate, batch)
    layout = pair.layout(batch)
    where = f"site {layout.observed[0]!r}" if layout.observed else "the data"
    for name, leaf in leaves(batch):
        _check_finite(leaf, where if isinstance(batch, Tensor) else f"the batch's leaf {name!r}")
    with quiet(pair):
        for number, rows in enumerate(rows_of(batch, _ROWS)):
            model = _trace(pair, rows, layout)[1]
            for site in samples(model):
                if site["is_observed"]:
                    _check_support(site, number * _ROWS)
    return layout


@contextmanager
def quiet(pair: Pair, seed: int = 0) -> Iterator[None]:
    """Run a pair without gradient, in eval mode and under a random stream of its own, and restore all three."""
    modes = {module: module.training for module in pair.modules()}
    pair.eval()
    try:
        with torch.no_grad(), seeded(seed, pair.device):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def lay_out(pair: Pair, batch: Batch) -> Layout:
    """Run the programs on a few rows, check guide against model, and say where the sites lie.

    Raises:
        ValueError: as in `check`, for what a few rows can show.
    """
    # a number of rows that no other axis has: a plate over a wrong axis then shows itself
    taken = {size for _, leaf in leaves(batch) for size in leaf.shape[1:]}
    count = min(length(batch), next(n for n in range(5, 5 + len(taken) + 1) if n not in taken))
    rows = each(lambda leaf: torch.nan_to_num(leaf[:count], 0.0, 0.0, 0.0), batch)
    with quiet(pair):
        guide, model = _trace(pair, rows, None)
        frames = [f for s in [*samples(guide), *samples(model)] for f in s["cond_indep_stack"] if f.dim is not None]
        named = [f for f in frames if f.name == "data"] or [f for f in frames if f.size == count]
        if not named:
            raise ValueError(
                "the model has no plate over the data: expected `with pyro.plate('data', N, dim=-1)` around the sites "
                f"of each datum; got {sorted({f.name for f in frames}) or 'no plates'}"
            )
        plate = named[0]
        if plate.size != count and plate.full_size in (None, plate.size):
            raise ValueError(
                f"plate {plate.name!r} has size {plate.size}, but the batch has {count} rows ({shapes(rows)}): take the "
                "plate's size from the batch"
            )
        _check_sites(guide, model, has_guide=pair.has_guide)
        drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"]}
        auxiliary = any(s["infer"].get("is_auxiliary") for s in drawn.values())
        latents = [s for s in samples(model) if not s["is_observed"]]
        observed = [s for s in samples(model) if s["is_observed"]]
        layout = Layout(
            data_dim=plate.dim,
            nesting=max(-f.dim for f in frames),
            latents=(),
            globals_=(),
            observed=tuple(s["name"] for s in observed if type(base(s["fn"])).__name__ != "Unit"),
            points=(),
            improper=(),
            measure=getattr(pair, "measure", None) or _measure(observed),
            vectorised=True,
        )
        local = [s for s in latents if layout.is_local(s)]
        layout = _replace(
            layout,
            latents=tuple(s["name"] for s in local),
            globals_=tuple(s["name"] for s in latents if not layout.is_local(s)),
            improper=tuple(s["name"] for s in local if is_flat(s["fn"])),
            points=tuple(
                s["name"] for s in local if s["name"] in drawn and not auxiliary and is_point(drawn[s["name"]]["fn"])
            ),
        )
        return _replace(layout, vectorised=_vectorises(pair, rows, layout, plate.size))


def _replace(layout: Layout, **changes: Any) -> Layout:
    return Layout(**{**layout.__dict__, **changes})


def _trace(pair: Pair, rows: Batch, layout: Layout | None) -> tuple[Any, Any]:
    guide: Any = poutine.Trace()
    for name in ("guide", "model"):
        try:
            if name == "guide":
                if pair.has_guide:
                    guide = pair.run(pair.guide, rows, 1, layout)
            else:
                model = pair.run(pair.model, rows, 1, layout, poutine.replay, trace=guide)
        except NotImplementedError as error:
            raise ValueError(
                f"the model's latents could not be drawn ({error}): a flat prior needs a guide that draws its site"
            ) from error
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, KeyError, AttributeError) as error:
            raise ValueError(f"the {name} failed on rows of the data, of shape {shapes(rows)}: {error}") from error
    return guide, model


def _check_sites(guide: Any, model: Any, has_guide: bool) -> None:
    drawn = {s["name"]: s for s in samples(guide) if not s["is_observed"] and not s["infer"].get("is_auxiliary")}
    latent = {s["name"]: s for s in samples(model) if not s["is_observed"]}
    if missing := [name for name in latent if name not in drawn and has_guide]:
        raise ValueError(
            f"the guide misses the latent site {missing[0]!r} of the model: expected the guide's sites to be "
            f"{sorted(latent)}, got {sorted(drawn)}"
        )
    if extra := [name for name in drawn if name not in latent]:
        raise ValueError(
            f"the guide has a site {extra[0]!r} that is no latent site of the model: expected {sorted(latent)}, got "
            f"{sorted(drawn)} (a site of the guide alone, such as noise, needs infer={{'is_auxiliary': True}})"
        )
    for name in drawn:
        q, p = drawn[name], latent[name]
        expected, got = tuple(p["fn"].shape()), tuple(q["fn"].shape())
        if expected != got or p["fn"].event_dim != q["fn"].event_dim:
            raise ValueError(
                f"site {name!r}: expected the guide's shape to be the model's, {expected} with {p['fn'].event_dim} event "
                f"dimension(s), got {got} with {q['fn'].event_dim}: use .to_event(1) for vectors in both"
            )
        if not _inside(p, q["value"]).all():
            raise ValueError(
                f"site {name!r}: the guide ({type(base(q['fn'])).__name__}) draws values outside the support of the "
                f"prior ({type(base(p['fn'])).__name__}): expected {_describe(p['fn'])}"
            )
    for site in model.nodes.values():
        if site["type"] == "sample" and site["is_observed"] and "fn" in site and hasattr(site["fn"], "event_dim"):
            expected, got = tuple(site["fn"].shape()), tuple(site["value"].shape)
            # a batch shape may be broadcast by the plates of the site, an event shape never
            event = expected[len(expected) - site["fn"].event_dim :]
            if type(base(site["fn"])).__name__ != "Unit" and got[len(got) - len(event) :] != event:
                raise ValueError(f"site {site['name']!r}: expected data of shape {expected}, got {got}")


def _vectorises(pair: Pair, rows: Batch, layout: Layout, size: int) -> bool:
    particles = next(k for k in (3, 2, 7) if k != size and k != length(rows))
    try:
        guide = pair.run(pair.guide, rows, particles, layout) if pair.has_guide else poutine.Trace()
        model = pair.run(pair.model, rows, particles, layout, poutine.replay, trace=guide)
        sites = [s for s in [*samples(guide), *samples(model)] if layout.is_local(s)]
        return all(s["fn"].batch_shape[layout.data_dim] == size for s in sites)
    except Exception:  # the programs' own errors, of whatever type: they mean that they take no particle axis
        return False


def _check_finite(leaf: Tensor, where: str) -> None:
    if leaf.is_floating_point() and not (finite := torch.isfinite(leaf)).all():
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        raise ValueError(
            f"{where}: expected finite numbers, got {int((~finite).sum())} that are NaN or infinite, the first "
            f"({leaf[first]}) at index {first}"
        )


def _inside(site: Site, value: Tensor) -> Tensor:
    try:
        return site["fn"].support.check(value)
    except (NotImplementedError, AttributeError):
        return torch.ones(())


def _check_support(site: Site, start: int) -> None:
    if type(base(site["fn"])).__name__ == "Unit":
        return
    inside = _inside(site, site["value"])
    if site["mask"] is not None:
        inside = inside | ~torch.as_tensor(site["mask"], device=inside.device)
    if not inside.all():
        row = int((~inside).nonzero()[0][-1]) if inside.dim() else 0
        raise ValueError(
            f"site {site['name']!r} ({type(base(site['fn'])).__name__}): expected {_describe(site['fn'])}, got "
            f"{_first_outside(site, row)} in row {start + row}"
        )


def _first_outside(site: Site, row: int) -> str:
    """The offending number itself, where the support can be checked number by number."""
    fn, value = base(site["fn"]), site["value"]
    try:
        outside = value[~fn.support.check(value).expand(value.shape)]
        return f"{outside.flatten()[0].item():g}"
    except (NotImplementedError, AttributeError, RuntimeError, IndexError):
        return f"another value, {value.reshape(-1, *value.shape[-site['fn'].event_dim :])[row].flatten()[:4].tolist()}…"


def _describe(fn: Any) -> str:
    support = base(fn).support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.boolean:
        return "0 or 1"
    lower, upper = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    ends = [f"{float(torch.as_tensor(end).max()):g}" if end is not None else None for end in (lower, upper)]
    kind = "whole numbers" if support.is_discrete else "real numbers"
    if ends[0] is not None:
        return f"{kind} from {ends[0]} to {ends[1]}" if ends[1] is not None else f"{kind} of at least {ends[0]}"
    return kind if type(support).__name__ == "_Real" else f"values in {support}"


def _measure(observed: list[Site]) -> str:
    kinds = {bool(s["fn"].support.is_discrete) for s in observed if type(base(s["fn"])).__name__ != "Unit"}
    return "mixed" if len(kinds) > 1 else "mass" if kinds == {True} else "density"
