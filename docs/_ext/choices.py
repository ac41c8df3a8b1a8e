"""What a model of the catalogue is made of, read from the model as it is built, and in what two models differ."""

from __future__ import annotations

from functools import cache
from typing import Any

import pyro.poutine as poutine
import torch
from torch import nn

from probae.adapter import as_pair
from probae.comparison.fits import has_maximum_likelihood
from probae.datasets import Schema
from probae.models import CATALOGUE
from probae.objectives import Objective
from probae.objectives.objective import Scaled, Sum

CHOICES = ("prior", "likelihood", "guide", "networks", "given", "objective")
_SCALES = {
    "shared": "one scale",
    "feature": "a scale per feature",
    "predicted": "predicted scales",
    "isotropic": "a scale per component",
    "diagonal": "a scale per component and feature",
}


def schema_for(name: str, kind: str) -> Schema:
    """Data of a kind that a model takes: their sizes play no part in what it is made of."""
    line = CATALOGUE[name]
    shape = (8, 8) if line.sequences else (64,)
    maximum = min(16, line.most or 16) if kind == "counts" else None
    return Schema(shape, kind, maximum, classes=10 if line.labels else None)  # type: ignore[arg-type]


def built(name: str, kind: str) -> Any:
    """The model itself, without what turns its density into a mass of whole numbers."""
    pair = as_pair(CATALOGUE[name].build(schema_for(name, kind), 8))
    return getattr(pair, "inner", pair)


def shared_kind(name: str, other: str) -> str | None:
    """A kind of data that two models take, counts first."""
    kinds = set(CATALOGUE[name].kinds) & set(CATALOGUE[other].kinds)
    return next((kind for kind in ("counts", "real", "binary") if kind in kinds), None)


@cache
def choices(name: str, kind: str) -> dict[str, str]:
    """Each choice of a model in words, for a kind of data."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        pair = built(name, kind)
        found = {
            "prior": _module(pair, "prior") or _latents(pair, name, kind),
            "likelihood": _likelihood(pair, name, kind),
            "guide": _guide(pair, name, kind),
            "networks": _networks(pair),
            "given": "labels" if CATALOGUE[name].labels else "",
            "objective": "maximum likelihood" if has_maximum_likelihood(pair) else _objective(pair.default_objective()),
        }
    return {choice: found[choice] for choice in CHOICES if found[choice]}


def differences(name: str, other: str) -> dict[str, tuple[str, str]] | None:
    """The choices in which two models differ, each with both values; None where no data suit both."""
    kind = shared_kind(name, other)
    if kind is None:
        return None
    mine, theirs = choices(name, kind), choices(other, kind)
    pairs = {choice: (mine.get(choice, "none"), theirs.get(choice, "none")) for choice in CHOICES}
    return {choice: both for choice, both in pairs.items() if both[0] != both[1]}


def neighbours(name: str, least: int = 3, most: int = 6) -> list[tuple[str, dict[str, tuple[str, str]]]]:
    """The other models that differ in a choice or none, nearest first; fewer than ``least`` are joined by the next ones."""
    found = [(other, differences(name, other)) for other in CATALOGUE if other != name]
    known = sorted(
        [(other, differing) for other, differing in found if differing is not None], key=lambda pair: len(pair[1])
    )
    near = sum(len(differing) <= 1 for _, differing in known)
    next_ones = sum(len(differing) <= 2 for _, differing in known)
    return known[: min(most, max(1, near, min(least, next_ones)))]


def _module(pair: Any, name: str) -> str:
    module = getattr(pair, name, None)
    return type(module).__name__.removesuffix("Head") if isinstance(module, nn.Module) else ""


def _guide(pair: Any, name: str, kind: str) -> str:
    """The head of the code; the exact posterior; else what the guide draws from, at an optimum if that is a point."""
    if head := _module(pair, "code"):
        return head
    if pair.tractable:
        return "exact"
    drawn = ", ".join(_sites(pair.guide, name, kind, observed=False))
    return "best code" if drawn == "Delta" else drawn


def _latents(pair: Any, name: str, kind: str) -> str:
    return ", ".join(_sites(pair.model, name, kind, observed=False))


def _likelihood(pair: Any, name: str, kind: str) -> str:
    head = getattr(pair, "head", None)
    law = type(head).__name__ if head is not None else ", ".join(_sites(pair.model, name, kind, observed=True))
    scale = getattr(head, "kind", None) if getattr(head, "learned", True) else "a fixed scale"
    if head is None:
        scale = getattr(pair, "noise", None)
        if (log_scale := getattr(pair, "log_scale", None)) is not None and scale is None:
            scale = "feature" if log_scale.dim() else "shared"
    return f"{law}, {_SCALES.get(scale, scale)}" if scale else law


def _sites(program: Any, name: str, kind: str, observed: bool) -> list[str]:
    """The distributions of a program's sites over data, by name."""
    schema = schema_for(name, kind)
    batch = [torch.zeros(2, *schema.shape)] + ([torch.zeros(2).long()] if CATALOGUE[name].labels else [])
    sites = poutine.trace(program).get_trace(*batch).nodes.values()
    drawn = [
        s for s in sites if s["type"] == "sample" and not isinstance(s["fn"], poutine.subsample_messenger._Subsample)
    ]
    return [_law(site["fn"]) for site in drawn if site["is_observed"] == observed]


def _law(distribution: Any) -> str:
    """The name of the distribution under what only shapes or moves it."""
    for inner in ("base_dist", "base"):
        if hasattr(distribution, inner):
            return _law(getattr(distribution, inner))
    return type(distribution).__name__.removeprefix("OneHot")


def _networks(pair: Any) -> str:
    encoder, decoder = (_network(getattr(pair, name, None)) for name in ("encoder", "decoder"))
    if getattr(pair, "tied", False):
        return f"{encoder}, tied weights"
    both = {"encoder": encoder, "decoder": decoder}
    return encoder if encoder == decoder else ", ".join(f"{role}: {what}" for role, what in both.items() if what)


def _network(network: Any) -> str:
    if network is None:
        return ""
    linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    if len(linear) > 1:
        return f"hidden layers of {' and '.join(str(layer.out_features) for layer in linear[:-1])}"
    return "affine" if linear else type(network).__name__.lower()


def _objective(objective: Objective) -> str:
    if isinstance(objective, Sum):
        return " + ".join(_objective(term) for term in objective.terms)  # type: ignore[arg-type]
    if isinstance(objective, Scaled):
        return f"{float(objective.factor):.3g} × {_objective(objective.term)}"
    corrupted = getattr(objective, "corruption", None) is not None
    return type(objective).__name__ + (" at corrupted data" if corrupted else "")
