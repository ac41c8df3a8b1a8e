"""Models × held-out data: one table of log p(x), with paired differences and their standard errors."""

from __future__ import annotations

import contextlib
import html
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.batches import as_batch, length
from probae.checks import check
from probae.evidence import Evidence, log_evidence, no_bound
from probae.models.baselines import GaussianMixture, Independent
from probae.pair import Pair, as_pair
from probae.seeding import still
from probae.transforms import Dequantised

if TYPE_CHECKING:
    import pandas

INDEPENDENT = "independent features"
CLASSES = 4096  # whole numbers up to here have a class each in the independent baseline


@dataclass
class Entry:
    """One name of a comparison: its fits, and what they gave.

    Attributes:
        name, models: the name, and one fitted model or several.
        evidence: one `Evidence` per fit, or None where there is no log p(x), for the reason in ``why_not``.
        reconstruction: the mean of E_q log p(x | z), nats per datum; NaN without a guide.
        seconds: of evaluation.
        baseline: whether it came with the comparison.
    """

    name: str
    models: list[Any]
    evidence: list[Evidence] | None
    why_not: str | None
    reconstruction: float
    measure: str
    seconds: float
    baseline: bool

    @property
    def values(self) -> Tensor:
        """log p(x_n), (N,), averaged over the fits."""
        return torch.stack([e.values for e in self.evidence or []]).mean(0)

    @property
    def shared_mc_stderr(self) -> float:
        """The Monte-Carlo error of the mean that all data share, of draws of global latents; 0 without any."""
        errors = [e.shared_mc_stderr or 0.0 for e in self.evidence or []]
        return math.hypot(*errors) / max(len(errors), 1)

    @property
    def parameters(self) -> int:
        """Trainable numbers of one fit."""
        return sum(p.numel() for p in as_pair(self.models[0]).parameters() if p.requires_grad)


@dataclass(repr=False)
class Comparison:
    """What `compare` returns: ``entries``, the ``table``, and ``notes``, sentences on how to read it."""

    entries: list[Entry]
    data: Tensor
    notes: list[str] = field(default_factory=list)

    @property
    def table(self) -> pandas.DataFrame:
        """A row per model, best first; nats per datum, higher is better.

        Columns: ``log_evidence``, its ``bound``; ``stderr``, over all data (sampling and Monte Carlo); ``mc_stderr``, for
        these data; ``difference`` to the best and ``difference_stderr``, paired by datum; ``over_independent``, the paired
        difference to independent features, and its error; ``fits`` and ``fit_stderr``, between the fits of one name;
        ``reconstruction``, E_q log p(x | z); ``parameters``; ``seconds`` of evaluation; ``method``; ``role``.
        """
        import pandas

        ranked = sorted(self.entries, key=lambda e: -float(e.values.mean()) if e.evidence else math.inf)
        best = next((e for e in ranked if e.evidence), None)
        independent = next((e for e in ranked if e.name == INDEPENDENT and e.baseline), None)
        rows = [self._row(entry, best, independent) for entry in ranked]
        return pandas.DataFrame(rows).set_index("model")

    def _row(self, entry: Entry, best: Entry | None, independent: Entry | None) -> dict[str, Any]:
        row: dict[str, Any] = {"model": entry.name, "log_evidence": math.nan, "bound": "–"}
        numbers = "stderr mc_stderr difference difference_stderr over_independent over_independent_stderr fit_stderr"
        row |= dict.fromkeys(numbers.split(), math.nan)
        if entry.evidence:
            errors = [e.mean_mc_stderr for e in entry.evidence]
            fits = torch.tensor([e.mean for e in entry.evidence], dtype=torch.float64)
            mean = Evidence(entry.values, torch.zeros_like(entry.values), "exact", "", "")
            row |= {
                "log_evidence": mean.mean,
                "bound": entry.evidence[0].bound,
                "stderr": math.hypot(mean.mean_stderr, entry.shared_mc_stderr),
                "mc_stderr": math.sqrt(sum(e * e for e in errors)) / len(errors),
                "fit_stderr": float(fits.std()) / math.sqrt(len(fits)) if len(fits) > 1 else math.nan,
            }
            row["difference"], row["difference_stderr"] = paired(entry, best)
            if independent is not None:
                row["over_independent"], row["over_independent_stderr"] = paired(entry, independent)
        row["fits"] = len(entry.models)
        row["reconstruction"] = entry.reconstruction
        row["parameters"], row["seconds"] = entry.parameters, entry.seconds
        row["method"] = entry.evidence[0].method if entry.evidence else "–"
        row["role"] = "baseline" if entry.baseline else "model" if entry.evidence else "no evidence"
        return row

    def evidence(self) -> pandas.DataFrame:
        """log p(x_n) by datum (rows) and model (columns), averaged over fits."""
        import pandas

        columns = {entry.name: entry.values.numpy() for entry in self.entries if entry.evidence}
        return pandas.DataFrame(columns).rename_axis("datum")

    def plot(self, ax: Any = None) -> Any:
        """The evidence of each model with intervals of two standard errors; needs ``probae[plots]``."""
        from probae.figures import evidence_figure

        return evidence_figure(self.table, ax)

    def to_datatree(self) -> Any:
        """An ``xarray.DataTree`` for ArviZ, with a group for each model; needs ``probae[arviz]``."""
        from probae.datatree import comparison_tree

        return comparison_tree(self)

    def __repr__(self) -> str:
        import pandas

        table = self.table
        shown = table[["log_evidence", "bound", "stderr", "mc_stderr", "difference", "difference_stderr"]].copy()
        if table["over_independent"].notna().any():
            shown["over_independent"] = table["over_independent"]
        shown["reconstruction"] = table["reconstruction"]
        with pandas.option_context("display.max_colwidth", None, "display.width", None):
            text = shown.to_string(float_format=lambda v: f"{v:.2f}", na_rep="–")
        return "\n".join([f"log p(x), nats per datum, {len(self.data)} data", text, *(f"· {n}" for n in self.notes)])

    def _repr_html_(self) -> str:
        import pandas

        notes = "".join(f"<li>{html.escape(note, quote=False)}</li>" for note in self.notes)
        with pandas.option_context("display.max_colwidth", None):
            return self.table.to_html(float_format=lambda v: f"{v:.2f}", na_rep="–") + f"<ul>{notes}</ul>"


def compare(
    models: Mapping[str, Any],
    x: Any,
    *,
    train: Any = None,
    method: str = "auto",
    particles: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Rank models by held-out log p(x) on the same data, with paired differences.

    Per-datum evidence scatters by tens of nats, mostly in the same way for all models: a difference between two of them is
    known far better when it is taken datum by datum, and that is the error to look at.

    Args:
        models: name -> a fitted model, pair or `Run`, or a list of several fits of it.
        x: N held-out data, the same for all.
        train: training data: with them come baselines (independent features, a full-covariance Gaussian, and a mixture of
            ten Gaussians where scikit-learn is installed), dequantised where the models are of counts.
        method, particles, seed: as for `log_evidence`.
        progress: whether to show a bar.

    Returns:
        `Comparison`, with ``.table``, ``.notes``, ``.plot()`` and ``.to_datatree()``. Models without an evidence (a flat
        prior, a point guide) are listed with their reconstruction log-likelihood alone.

    Raises:
        ValueError: if there is nothing to compare, or densities would be ranked against masses.

    Example:
        >>> import probae
        >>> x = torch.randn(100, 4)
        >>> models = {f"{n} latents": probae.PPCA(4, n).maximum_likelihood(x) for n in (1, 2)}
        >>> len(compare(models, x).table)
        2
    """
    if not isinstance(models, Mapping) or not models:
        raise ValueError("models: expected a dictionary from names to fitted models, with at least one")
    given: dict[str, list[Any]] = {}
    for name, fits in models.items():
        if str(name) in given:
            raise ValueError(f"models: two names print as {str(name)!r}")
        given[str(name)] = list(fits) if isinstance(fits, Sequence) else [fits]
        if not given[str(name)]:
            raise ValueError(f"models: the list of fits of {name!r} is empty")
    data = as_batch(x, torch.float64)
    _require_one_measure([(name, _measure(fit, x)) for name, fits in given.items() for fit in fits])

    from tqdm import tqdm

    options = {"method": method, "particles": particles, "seed": seed}
    bar = tqdm(given.items(), disable=not progress, unit="model", desc="log p(x)")
    entries = [_entry(name, fits, x, False, options) for name, fits in bar]
    if train is not None:
        mass = any(entry.measure == "mass" for entry in entries)
        largest = int(data.nan_to_num(0.0).max()) if mass and isinstance(data, Tensor) else 0
        gaps = isinstance(data, Tensor) and data.isnan().any()
        for name, model in baselines(train, mass, seed, largest, bool(gaps)).items():
            if name in given:
                raise ValueError(f"models: the name {name!r} belongs to a baseline")
            entries.append(_entry(name, [model], x, True, {**options, "method": "auto"}))
    comparison = Comparison(entries, data if isinstance(data, Tensor) else torch.empty(length(data), 0))
    comparison.notes = _notes(comparison)
    return comparison


def _measure(model: Any, x: Any) -> str:
    """``"mass"`` or ``"density"``, after checking the pair against the data."""
    pair = as_pair(model)
    return check(pair, as_batch(x, pair.dtype, pair.device)).measure


def _require_one_measure(measures: list[tuple[str, str]]) -> None:
    kinds: dict[str, dict[str, None]] = {}
    for name, measure in measures:
        kinds.setdefault(measure, {})[name] = None
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise ValueError(
            f"a density cannot be ranked against a mass: their log p(x) have different units ({listed}). For whole numbers, "
            "make masses of the densities by probae.Dequantised(model), or use likelihoods.DiscretisedNormal"
        )


def paired(entry: Entry, other: Entry | None) -> tuple[float, float]:
    """The mean difference of an entry's log p(x) to another's, datum by datum, and its standard error."""
    if other is None or entry is other:
        return 0.0, 0.0
    difference = entry.values - other.values
    if len(difference) < 2:
        return float(difference.mean()), math.nan
    sampling = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()), math.hypot(sampling, entry.shared_mc_stderr, other.shared_mc_stderr)


def _entry(name: str, fits: list[Any], x: Any, baseline: bool, options: dict[str, Any]) -> Entry:
    start = time.perf_counter()
    pairs = [as_pair(fit) for fit in fits]
    batch = as_batch(x, pairs[0].dtype, pairs[0].device)
    layouts = [check(pair, as_batch(x, pair.dtype, pair.device)) for pair in pairs]
    why_not = [None if pair.tractable else no_bound(layout) for pair, layout in zip(pairs, layouts, strict=True)]
    if len({reason is None for reason in why_not}) > 1:
        reason = next(filter(None, why_not))
        raise ValueError(f"models: of the fits of {name!r} some have a log p(x) and some have none: {reason}")
    evidence = None if why_not[0] else [log_evidence(fit, x, **options) for fit in fits]
    seconds = time.perf_counter() - start
    known = pairs[0].has_guide and layouts[0].latents
    reconstruction = _reconstruction(pairs[0], batch, options["seed"]) if known else math.nan
    return Entry(name, fits, evidence, why_not[0], reconstruction, layouts[0].measure, seconds, baseline)


def _reconstruction(pair: Pair, batch: Any, seed: int, particles: int = 8) -> float:
    with still(pair, seed):
        return float(pair.traces(batch, particles).likelihood().local.double().mean())


def baselines(train: Any, mass: bool, seed: int = 0, largest: int = 0, gaps: bool = False) -> dict[str, Pair]:
    """Fitted baselines for data: independent features, a full-covariance Gaussian, a mixture of up to ten.

    Args:
        train: training data (N, D).
        mass: whether they are whole numbers, whose mass is compared; Gaussians are then dequantised.
        seed: of the noise that dequantises, and of the mixture's start.
        largest: a whole number that the independent features must know, though the training data may not reach it.
        gaps: whether values are missing in held-out data. Where they are, there or in the training data, whole numbers
            have independent features alone for a baseline.
    """
    x = as_batch(train, torch.get_default_dtype())
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ValueError("train: baselines take one array (N, D)")
    features, missing = x.shape[1], "mask" if gaps or x.isnan().any() else None
    classes = max(int(x.nan_to_num(0.0).max()), largest, 1) + 1 if mass else None

    def fitted_to(model: Any, **options: Any) -> Pair:
        return (
            Dequantised(model).maximum_likelihood(x, seed, **options)
            if mass
            else model.maximum_likelihood(x, **options)
        )

    if classes is not None and classes <= CLASSES:
        fitted: dict[str, Pair] = {INDEPENDENT: Independent(features, classes, missing=missing).maximum_likelihood(x)}
    else:
        fitted = {INDEPENDENT: fitted_to(Independent(features, missing=missing))}
    if (
        missing is not None and mass
    ):  # a Gaussian with gaps takes D³ work for each particle of the noise that dequantises
        return fitted
    fitted["full Gaussian"] = fitted_to(GaussianMixture(features, missing=missing))
    components = min(10, len(x) // 2)
    # scikit-learn is optional, and the table shows which baselines it has
    with contextlib.suppress(ImportError):
        if components > 1:
            # EM with full covariances takes N D² work for each component and iteration
            diagonal = len(x) * features**2 > 1e9
            mixture = fitted_to(GaussianMixture(features, components, diagonal, missing=missing), start=seed)
            fitted[f"mixture of {components} {'diagonal ' if diagonal else ''}Gaussians"] = mixture
    return fitted


def _notes(comparison: Comparison) -> list[str]:
    """How to read the table: what beats what, and where the likelihood is to blame."""
    table, notes = comparison.table, []
    if (table["bound"] == "lower").any():
        notes.append("a lower bound may sit below log p(x) by more than its error; an exact value does not")
    for entry in comparison.entries:
        if entry.why_not:
            notes.append(f"{entry.name}: no log p(x): {entry.why_not.split(':')[0]}; its reconstruction is no evidence")
    below = table[table["over_independent"] < -2 * table["over_independent_stderr"]].index
    if len(below):
        worse = "worse than independent features, which have no latents at all"
        notes.append(f"{', '.join(below)}: {worse}{_ends(comparison.data)}")
    return notes


def _ends(x: Tensor) -> str:
    """What is wrong with a Gaussian of counts that pile up, where they do."""
    if x.numel() == 0 or not bool((x == x.round()).all()):
        return ""
    low, high = x.min(), x.max()
    share = float(((x == low) | (x == high)).double().mean())
    if share < 0.2 or high - low < 2:
        return ""
    return (
        f": {share:.0%} of the counts are {int(low)} or {int(high)}, the ends of their range, where a Gaussian cannot put its "
        "mass. On such data the likelihood matters more than the latents"
    )
