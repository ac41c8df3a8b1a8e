"""Models × held-out data: one table of log p(x), with paired differences and their standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from probae.adapter import as_pair
from probae.arguments import whole
from probae.batches import as_batch, is_by_rows, leaves
from probae.comparison.baselines import checked_training, fit_baselines
from probae.comparison.comparable import require_one_kind, require_one_measure, require_these_data
from probae.comparison.entry import Checked, Entry, data_for, evaluated, given
from probae.comparison.folds import held_out, in_blocks
from probae.comparison.result import Comparison, notes_on
from probae.data.streams.densified import Rows, blocks_of
from probae.evidence import Auto, Estimator, Evidence
from probae.evidence.evaluation import estimator_of
from probae.evidence.weights import prepare
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed


def compare(
    models: Mapping[str, Any],
    x: Any,
    *,
    train: Any = None,
    folds: int | None = None,
    method: str | Estimator = "auto",
    particles: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Comparison:
    """Rank models by held-out log p(x) on the same data, with paired differences.

    Per-datum evidence scatters by tens of nats, mostly in the same way for all models: a difference between two of them is
    known far better when it is taken datum by datum, and that is the error to look at.

    With ``folds`` the fits run one after another, each on one thread; under ``joblib.parallel_config(backend=...,
    n_jobs=...)`` they are spread over processes or a cluster, and the table is the same.

    Args:
        models: name -> a fitted model, pair or `Run`; or an `Evidence` of x that was computed before; or a list of several
            fits of one kind, whose scatter gives the error between fits. With ``folds``, name -> a function from training
            data to a fitted model, or a list of such functions.
        x: N held-out data in memory, the same for all, or sparse, made dense block by block; with ``folds`` all of the data.
            A tuple may hold what some models condition on, (x, labels): each model takes as many arrays as its programs have
            arguments.
        train: training data, one array (N, D): with them come baselines (independent features, a full-covariance Gaussian,
            and a mixture of ten Gaussians where scikit-learn is installed), dequantised where the models are of counts. One
            that cannot be fitted, such as a Gaussian of features that depend on each other, is left out with a note.
        folds: K, for data too few to hold some out: each datum is held out once, from the fits to the other folds, models
            and baselines alike.
        method, particles, seed, options: as for `log_evidence`; ``seed`` deals out the folds too.
        progress: whether to show a bar.

    Returns:
        `Comparison`, with ``.table``, ``.notes``, ``.plot()`` and ``.to_datatree()``. Models without an evidence (a flat
        prior) are listed with their reconstruction log-likelihood alone.

    Raises:
        ValueError: if there is nothing to compare, or what was given does not compare: densities and masses, evidence of
            other data or of another pre-processing of them, training data of another kind than x.

    Example:
        >>> import probae
        >>> x = torch.randn(100, 4)
        >>> models = {f"{n} latents": probae.PPCA(4, n).maximum_likelihood(x) for n in (1, 2)}
        >>> len(compare(models, x).table)
        2
        >>> fits = {f"{n} latents": lambda x, n=n: probae.PPCA(4, n).maximum_likelihood(x) for n in (1, 2)}
        >>> len(compare(fits, x, folds=5).data)
        100
    """
    fits = _named(models)
    estimator, seed = estimator_of(method, particles, options), checked_seed(seed)
    direct = Auto() if particles is None else Auto(particles=particles)  # of baselines
    if is_by_rows(x) and (folds is not None or train is not None):
        raise ValueError(
            "x: with folds= or train=, expected dense data, since baselines and folds need all of them: "
            "x.toarray() of a sparse matrix, x.to_df() of an AnnData"
        )
    left_out: list[str] = []
    if folds is None:
        entries = _of_fitted(fits, x, train, estimator, direct, seed, progress, left_out)
    else:
        folds = whole("folds", folds, 2)
        if train is not None:
            raise ValueError("train: with folds= all of the data are x, and each fold's fits see the rest of them")
        for name, functions in fits.items():
            if not all(callable(f) and not _is_fitted(f) for f in functions):
                raise TypeError(
                    f"models: with folds=, expected functions from training data to a fitted model, as {name!r}"
                )
        total = folds * sum(map(len, fits.values()))
        with _bar(total=total, disable=not progress, unit="fit", desc="log p(x)") as bar:
            entries = held_out(fits, x, folds, estimator, direct, seed, bar, left_out)
        left_out.append(f"each datum was held out once: the values of {folds} folds are of as many fits")
    return _compared(entries, x, left_out, {"estimator": estimator, "seed": seed, "folds": folds})


@isolated
def _of_fitted(
    fits: Mapping[str, list[Any]],
    x: Any,
    train: Any,
    estimator: Estimator,
    direct: Estimator,
    seed: int,
    progress: bool,
    left_out: list[str],
) -> list[Entry]:
    """An entry for each name, and for each baseline where there are training data."""
    some = next(blocks_of(x))  # of sparse data the first block stands for all, where kinds and measures are checked
    for name, found in fits.items():
        for fit in found:
            if isinstance(fit, Evidence):
                require_these_data(name, fit, x)
            else:
                as_pair(fit).require_columns(data_for(fit, x))
    checked = {
        name: [prepare(fit, data_for(fit, some)) for fit in found if not isinstance(fit, Evidence)]
        for name, found in fits.items()
    }
    require_one_measure(
        [(name, measure) for name, found in fits.items() for measure in _measures(found, checked[name])]
    )
    if train is not None:
        checked_training(train)
        require_one_kind(train, x)
    bar = _bar(fits.items(), disable=not progress, unit="model", desc="log p(x)")
    entries = [_entry(name, found, x, estimator, seed, checked[name]) for name, found in bar]
    if train is not None:
        data = as_batch(some, torch.float64)
        for name, model in fit_baselines(train, entries[0].measure == "mass", seed, data, left_out).items():
            if name in fits:
                raise ValueError(f"models: the name {name!r} belongs to a baseline")
            entries.append(evaluated(name, [model], x, True, direct, seed))
    return entries


@isolated
def _compared(entries: list[Entry], x: Any, notes: list[str], settings: dict[str, Any]) -> Comparison:
    data = torch.empty(Rows(x).size, 0) if is_by_rows(x) else next(leaves(as_batch(x, torch.float64)))[1]
    comparison = Comparison(entries, data if data.dim() > 1 else torch.empty(len(data), 0))
    comparison.settings = settings
    comparison.notes = [*notes_on(comparison), *notes]
    return comparison


def _bar(*args: Any, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(*args, **options)


def _named(models: Any) -> dict[str, list[Any]]:
    """Name -> fits."""
    if not isinstance(models, Mapping) or not models:
        raise ValueError("models: expected a dictionary from names to fitted models, with at least one")
    found: dict[str, list[Any]] = {}
    for name, fits in models.items():
        if str(name) in found:
            raise ValueError(f"models: two models have the name {str(name)!r}")
        found[str(name)] = list(fits) if isinstance(fits, Sequence) else [fits]
        if not found[str(name)]:
            raise ValueError(f"models: the list of fits of {name!r} is empty")
    return found


def _is_fitted(model: Any) -> bool:
    """Whether something is a model or evidence, rather than a function that fits one."""
    return isinstance(model, Evidence) or callable(getattr(model, "model", None)) or hasattr(model, "history")


def _entry(name: str, fits: list[Any], x: Any, estimator: Estimator, seed: int, checked: Sequence[Checked]) -> Entry:
    kinds = {isinstance(fit, Evidence) for fit in fits}
    if len(kinds) > 1:
        raise ValueError(f"models: the fits of {name!r} are models and evidence: expected one of the two")
    if kinds == {True}:
        return given(name, fits)
    if is_by_rows(x):
        return in_blocks(name, fits, x, estimator, seed)
    return evaluated(name, fits, x, False, estimator, seed, checked)


def _measures(fits: list[Any], checked: Sequence[Checked]) -> list[str]:
    """``"mass"`` or ``"density"``, of each fit."""
    return [fit.measure for fit in fits if isinstance(fit, Evidence)] + [signature.measure for *_, signature in checked]
