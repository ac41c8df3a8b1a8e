"""Results as ``xarray.DataTree``s, for ArviZ's modular packages to summarise and plot; needs ``probae[arviz]``.

Dimensions are named: ``datum``, ``latent``, ``model``, ``fit``, and ArviZ's own ``chain`` and ``draw``. Of a group without
chains, ArviZ is told what to take the mean over: ``arviz_stats.summary(tree, group="evidence", sample_dims=["datum"],
kind="stats")``.

A group ``log_likelihood`` holds the *marginal* log p(x_n | θ), the latents integrated out, at the one θ that was fitted. With
log p(x_n | z_n) in its place, leave-one-out scores would reward memorising (Merkle, Furr & Rabe-Hesketh 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import probae
from probae.export.results import Comparison, Diagnosis, Entry, Evidence


def evidence_tree(evidence: Evidence) -> Any:
    """An `Evidence` as a DataTree.

    Groups: ``evidence``, with ``log_evidence`` and ``mc_stderr`` (datum) and what else it has per datum; ``log_likelihood``,
    with the same values as ``x`` (chain, draw, datum), one chain of one draw.

    Raises:
        ImportError: if xarray is not installed, saying how to install it.
    """
    groups = {"evidence": _evidence(evidence), "log_likelihood": _marginal({"x": evidence.values})}
    return _tree(groups, _about(evidence))


def comparison_tree(comparison: Comparison) -> Any:
    """A `Comparison` as a DataTree.

    Groups: ``comparison``, the columns of its table by ``model``; and one by the name of each model, with ``log_evidence``
    and ``mc_stderr`` (fit, datum), or without an evidence the reason in the attributes. A slash in a name becomes an
    underscore, and a name that is taken gets one more.

    Raises:
        ImportError: if xarray is not installed, saying how to install it.
    """
    xarray = _xarray()
    table = comparison.table
    columns = {name: ("model", column.to_numpy()) for name, column in table.items()}
    groups: dict[str, Any] = {"comparison": xarray.Dataset(columns, {"model": list(table.index)})}
    for entry in comparison.entries:
        name = entry.name.replace("/", "_")
        name = f"'{name}'" if name in {"", ".", ".."} else name  # these are other nodes of a tree
        while name in groups:
            name += "_"
        groups[name] = _entry(entry)
    attributes = {"notes": "\n".join(comparison.notes)}
    return _tree(groups, attributes)


def diagnosis_tree(diagnosis: Diagnosis) -> Any:
    """A `Diagnosis` as a DataTree, as far as it was defined.

    Groups: ``posterior``, draws of the *guide* q(z | x), by site (chain, draw, datum, latent); ``sample_stats``, their
    ``log_weight`` (chain, draw, datum), by which they are draws of the posterior; ``weights``, with ``pareto_k`` and ``ess``
    (datum) of all particles; ``bounds``, with ``elbo``, ``iwae`` and their Monte-Carlo errors; ``terms``, with
    ``reconstruction`` and ``rate``; ``log_likelihood``, the IWAE bound (chain, draw, datum); ``latents_<site>``, with
    ``kl``, ``kl_mc_stderr``, ``activity`` and ``active`` (latent); ``gaps`` (datum). With several sites, the latents of a
    site are the dimension ``<site>_latent`` in ``posterior``.

    Raises:
        ImportError: if xarray is not installed, saying how to install it.
    """
    xarray = _xarray()
    found = diagnosis.latents
    groups: dict[str, Any] = {}
    draws = {name: unit.draws for name, unit in diagnosis.units.items() if unit.draws is not None}
    if draws:
        dims = {name: "latent" if len(draws) == 1 else f"{name}_latent" for name in draws}
        variables = {name: (("chain", "draw", "datum", dims[name]), _array(part[None])) for name, part in draws.items()}
        groups["posterior"] = _numbered(variables).assign_attrs(
            what="draws of the guide q(z | x), not of the posterior"
        )
    if found.log_weights is not None:
        groups["sample_stats"] = _numbered(
            {"log_weight": (("chain", "draw", "datum"), _array(found.log_weights[None]))}
        )
    if diagnosis.elbo is not None and diagnosis.iwae is not None:
        groups["weights"] = _by_datum({"pareto_k": diagnosis.pareto_k, "ess": diagnosis.ess}).assign_attrs(
            particles=diagnosis.particles, good_k=diagnosis.limit
        )
        bounds: dict[str, Tensor] = {}
        for name, evidence in (("elbo", diagnosis.elbo), ("iwae", diagnosis.iwae)):
            bounds |= {name: evidence.values, f"{name}_mc_stderr": evidence.mc_stderr}
        groups["bounds"] = _by_datum(bounds).assign_attrs(bound="lower")
        groups["log_likelihood"] = _marginal({"x": diagnosis.iwae.values})
    groups["terms"] = _by_datum({"reconstruction": found.reconstruction, "rate": found.rate})
    for name, unit in diagnosis.units.items():
        columns = {key: getattr(unit, key) for key in ("kl", "kl_mc_stderr", "activity", "active")}
        groups[f"latents_{name}"] = _numbered({key: ("latent", _array(value)) for key, value in columns.items()})
    if diagnosis.gaps is not None:
        gaps = {name: getattr(diagnosis.gaps, name) for name in ("total", "amortisation", "approximation")}
        known = {name: gap for name, gap in gaps.items() if gap is not None}
        values = {name: ("datum", _array(gap.values)) for name, gap in known.items()}
        errors = {f"{name}_mc_stderr": ("datum", _array(gap.mc_stderr)) for name, gap in known.items()}
        groups["gaps"] = xarray.Dataset(values | errors, {"datum": _array(diagnosis.gaps.data)})
    attributes = {"advice": diagnosis.advice, "particles": diagnosis.particles, "measure": diagnosis.signature.measure}
    return _tree(groups, attributes)


def elpd(result: Comparison | Diagnosis) -> Any:
    """Held-out log p(x) as ArviZ's ``ELPDData``, which ``arviz_stats.compare`` and ``arviz_plots.plot_khat`` take.

    Returns:
        By model, for a `Comparison`: ``arviz_stats.compare`` adds stacking weights to the same differences and errors, of
        sums over the data. One alone for a `Diagnosis`: the IWAE bound with the k̂ of its weights.

    Raises:
        ImportError: if ArviZ is not installed, saying how to install it.
        ValueError: if a diagnosis has no weights.
    """
    if hasattr(result, "entries"):
        return {entry.name: _elpd(entry.values) for entry in result.entries if entry.evidence}
    if result.iwae is None:
        raise ValueError(f"there is no log p(x): {result.why_not}")
    return _elpd(result.iwae.values, result.pareto_k, result.particles, result.limit)


def inference_data(tree: Any) -> Any:
    """A DataTree as ``InferenceData``, for ArviZ before 1.0 (the newest that Python 3.11 has); group by group.

    Raises:
        ImportError: if the ArviZ that is installed has no ``InferenceData``: it takes the DataTree itself.
    """
    try:
        import arviz

        kind = arviz.InferenceData
    except (ImportError, AttributeError) as error:
        raise ImportError(
            "InferenceData is of ArviZ before 1.0 (pip install 'arviz<1'); ArviZ's modular packages take the DataTree itself"
        ) from error
    groups = {name: node.to_dataset() for name, node in tree.children.items()}
    return kind(attrs=dict(tree.attrs), **groups)


def _elpd(values: Tensor, pareto_k: Tensor | None = None, particles: int = 0, limit: float = math.nan) -> Any:
    try:
        from arviz_stats import ELPDData
    except ImportError as error:
        raise _missing(error) from error
    xarray = _xarray()

    def by_datum(part: Tensor | None) -> Any:
        return None if part is None else xarray.DataArray(_array(part), {"datum": range(len(part))}, "datum")

    total, spread = float(values.sum()), math.sqrt(len(values) * float(values.var(unbiased=False)))
    bad = pareto_k is not None and bool((pareto_k > limit).any())
    return ELPDData(
        "loo_kfold", total, spread, 0.0, particles, len(values), "log", bad, limit, by_datum(values),
        by_datum(pareto_k), n_folds=1,
    )  # fmt: skip


def _entry(entry: Entry) -> Any:
    xarray = _xarray()
    attributes = {"model": entry.name, "role": "baseline" if entry.baseline else "model", "measure": entry.measure}
    if not entry.evidence:
        return xarray.Dataset(attrs=attributes | {"why_not": entry.why_not or ""})
    fits = [_evidence(evidence) for evidence in entry.evidence]
    shared = set.intersection(*(set(fit.data_vars) for fit in fits))
    fits = xarray.concat([fit[[name for name in fit.data_vars if name in shared]] for fit in fits], "fit")
    return fits.assign_coords(fit=range(len(entry.evidence))).assign_attrs(attributes | _about(entry.evidence[0]))


def _evidence(evidence: Evidence) -> Any:
    """What an estimator returned for each datum."""
    each: dict[str, Tensor | None] = {"log_evidence": evidence.values, "mc_stderr": evidence.mc_stderr}
    return _by_datum(each | {"reliable": evidence.reliable} | evidence.details).assign_attrs(_about(evidence))


def _about(evidence: Evidence) -> dict[str, Any]:
    return {name: getattr(evidence, name) for name in ("method", "bound", "measure", "particles", "note")}


def _marginal(values: Mapping[str, Tensor]) -> Any:
    data = {name: (("chain", "draw", "datum"), _array(part[None, None])) for name, part in values.items()}
    return _numbered(data).assign_attrs(what="marginal log p(x | θ), the latents integrated out")


def _by_datum(values: Mapping[str, Tensor | None]) -> Any:
    return _numbered({name: ("datum", _array(part)) for name, part in values.items() if part is not None})


def _numbered(variables: dict[str, Any]) -> Any:
    """A Dataset whose dimensions count from zero."""
    data = _xarray().Dataset(variables)
    return data.assign_coords({name: np.arange(size) for name, size in data.sizes.items()})


def _tree(groups: dict[str, Any], attributes: dict[str, Any]) -> Any:
    tree = _xarray().DataTree.from_dict(groups)
    about = {"creation_library": "probae", "creation_library_version": probae.__version__, "units": "nats"}
    tree.attrs = about | attributes
    return tree


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (
        values.to(torch.int8) if values.dtype is torch.bool else values
    ).numpy()  # ArviZ takes no quantiles of booleans


def _xarray() -> Any:
    try:
        import xarray
    except ImportError as error:
        raise _missing(error) from error
    return xarray


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"a DataTree for ArviZ needs {error.name}: pip install 'probae[arviz]'")
