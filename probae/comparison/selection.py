"""How many latents, classes or factors: settings of a model compared by held-out log p(x), over folds and seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from probae.arguments import whole
from probae.batches import Batch
from probae.comparison.entry import Entry, paired
from probae.comparison.fits import fitted
from probae.comparison.folds import held_out
from probae.evidence import Auto, Estimator
from probae.evidence.evaluation import estimator_of
from probae.export.figures.evidence import selection_curve
from probae.export.tabular import Tabular, in_text
from probae.runtime.seeding import checked_seed

if TYPE_CHECKING:
    import pandas

Setting = dict[str, Any]


@dataclass(repr=False)
class Selection(Tabular):
    """What `select` returns.

    Attributes:
        settings: each setting of the grid, by its name in the table.
        entries: what each gave, with the held-out log p(x) of every datum.
    """

    settings: dict[str, Setting]
    entries: list[Entry]

    @property
    def best(self) -> Setting:
        """The setting with the highest mean held-out log p(x)."""
        return self.settings[self._best.name]

    @property
    def chosen(self) -> Setting:
        """The setting with the fewest parameters of those within one standard error of the best, paired by datum."""
        simple = sorted(self.entries, key=lambda entry: entry.parameters)
        return next(self.settings[entry.name] for entry in simple if self._is_near(entry))

    @property
    def table(self) -> pandas.DataFrame:
        """A row for each setting, in the order of the grid; nats per datum, higher is better.

        Columns: the setting's own; ``log_evidence``, the mean over held-out data and seeds, its ``bound`` and its ``stderr``;
        ``difference`` to the best, paired by datum, with ``difference_stderr``; ``fit_stderr``, between seeds;
        ``starts_at_best``, the share of EM's starts that ended at the best value of their fit; ``parameters``; ``chosen``.
        """
        import pandas

        return pandas.DataFrame([self._row(entry) for entry in self.entries])

    def plot(self, ax: Any = None) -> Any:
        """Each setting's log p(x) less that of the best, with paired errors; needs ``probae[plots]``."""
        return selection_curve(self.table, list(next(iter(self.settings.values()))), ax)

    @property
    def _best(self) -> Entry:
        return max(self.entries, key=lambda entry: float(entry.values.mean()))

    def _is_near(self, entry: Entry) -> bool:
        difference, error, _ = paired(entry, self._best)
        return entry is self._best or -difference <= error

    def _row(self, entry: Entry) -> dict[str, Any]:
        setting, evidence = self.settings[entry.name], entry.evidence or []
        means = [each.mean for each in evidence]
        difference, error, _ = paired(entry, self._best)
        scatter = sum((mean - sum(means) / len(means)) ** 2 for mean in means) / max(len(means) - 1, 1)
        found = (getattr(getattr(model, "inner", model), "optima", None) for model in entry.models)
        optima = [each for each in found if each is not None]
        shares = [each.found_best / len(each.values) for each in optima]
        return setting | {
            "log_evidence": float(entry.values.mean()),
            "bound": entry.bound,
            "stderr": float(entry.values.std()) / math.sqrt(len(entry.values)),
            "difference": difference,
            "difference_stderr": error,
            "fit_stderr": math.sqrt(scatter / len(means)) if len(means) > 1 else math.nan,
            "starts_at_best": sum(shares) / len(shares) if shares else math.nan,
            "parameters": int(entry.parameters),
            "chosen": setting == self.chosen,
        }

    def to_frame(self) -> pandas.DataFrame:
        """The table."""
        return self.table

    def __repr__(self) -> str:
        chosen = f"within one standard error, with fewest parameters: {_named(self.chosen)}"
        return f"best {_named(self.best)}; {chosen}\n{in_text(self.table, index=False)}"


def select(
    factory: Callable[..., Any],
    grid: Mapping[str, Iterable[Any]],
    x: Any,
    *,
    folds: int = 5,
    seeds: int | Iterable[int] = 1,
    method: str | Estimator = "auto",
    particles: int | None = None,
    seed: int = 0,
    fit: Mapping[str, Any] | None = None,
    progress: bool = False,
    **options: Any,
) -> Selection:
    r"""Choose a model's settings, such as the number of its latents, by held-out log p(x).

    Each datum is held out once, from fits to the other folds. The setting with the highest mean is the best; one with fewer
    parameters is as good where

    .. math:: \bar d \le \operatorname{se}(\bar d), \qquad d_n = \log p_\text{best}(x_n) - \log p(x_n),

    the rule of one standard error, on differences that are paired by datum.

    The fits run one after another, each on one thread; under ``joblib.parallel_config(backend=..., n_jobs=...)`` they are
    spread over processes or a cluster, and the table is the same.

    Args:
        factory: makes a model from a setting, ``lambda latents: probae.PPCA(64, latents)`` say; it is called anew for each
            fit, under that fit's seed.
        grid: name -> values, ``{"latents": range(1, 6)}``; of several names, every combination.
        x: all of the data.
        folds: K.
        seeds: how many fits to each fold, or their seeds: starts, initial weights and minibatches follow from them.
        method, particles, options: of the evidence, as for `log_evidence`.
        seed: deals out the folds, and is that of the evidence.
        fit: options of ``maximum_likelihood`` where the model has it, else of `probae.fit`.
        progress: whether to show a bar.

    Returns:
        `Selection`, with ``.table``, ``.best`` and ``.chosen``: settings for the factory.

    Raises:
        ValueError: if the grid is empty, or a setting's model has no log p(x).
        TypeError: if the factory is not callable, the grid no mapping from names to values, or the factory cannot be sent
            to other processes that were asked for.

    References: Hastie, Tibshirani & Friedman (2009), *The elements of statistical learning*, §7.10; Smyth (2000), *Model
    selection for probabilistic clustering using cross-validated likelihood*.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> result = select(lambda latents: probae.PPCA(4, latents), {"latents": (1, 2)}, x, folds=3)
        >>> len(result.table), sorted(result.chosen)
        (2, ['latents'])
    """
    if not callable(factory):
        raise TypeError(f"factory: expected a function from a setting to a model, got {type(factory).__name__}")
    settings = _settings(grid)
    seed, starts = checked_seed(seed), range(whole("seeds", seeds)) if isinstance(seeds, int) else [*seeds]
    if not starts:
        raise ValueError("seeds: expected one at least")
    starts = [checked_seed(start) for start in starts]
    if len(set(starts)) < len(starts):
        raise ValueError(f"seeds: expected different ones, got {starts!r:.200}")
    estimator = estimator_of(method, particles, options)
    functions = {
        name: [partial(_fitted, factory, setting, start, dict(fit or {})) for start in starts]
        for name, setting in settings.items()
    }

    from tqdm import tqdm

    total = whole("folds", folds, 2) * len(settings) * len(starts)
    with tqdm(total=total, disable=not progress, unit="fit", desc="log p(x)") as bar:
        entries = held_out(functions, x, folds, estimator, Auto(), seed, bar, [], baselines=False)
    for entry in entries:
        if entry.evidence is None:
            raise ValueError(f"select: the model of {entry.name} has no log p(x) to be chosen by: {entry.why_not}")
        if not entry.ranked:
            raise ValueError(f"select: expected exact values or lower bounds of log p(x), got {entry.bound!r} values")
    return Selection(settings, entries)


def _settings(grid: Any) -> dict[str, Setting]:
    """Every combination of the grid, by its name."""
    if not isinstance(grid, Mapping):
        raise TypeError(f"grid: expected a mapping from names to values, got {type(grid).__name__}")
    axes = {str(name): list(values) for name, values in grid.items()}
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if not axes or not settings:
        raise ValueError("grid: expected at least one name with at least one value")
    found = {_named(setting): setting for setting in settings}
    if len(found) < len(settings):
        raise ValueError("grid: two settings print alike")
    return found


def _named(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _fitted(factory: Callable[..., Any], setting: Setting, seed: int, options: dict[str, Any], x: Batch) -> Any:
    return fitted(factory, setting, x, seed, options)
