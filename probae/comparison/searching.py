"""`search`: hyper-parameters by Optuna, scored by log p(x) of validation data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from probae.arguments import as_path, flag, whole
from probae.batches import as_batch
from probae.comparison.fits import fitted
from probae.comparison.journal import study
from probae.evidence import Estimator, Evidence, log_evidence
from probae.evidence.evaluation import estimator_of
from probae.export.tabular import Tabular
from probae.runtime.fingerprints import Checksum, fingerprints, of_data
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed, derived
from probae.training import Run

if TYPE_CHECKING:
    import pandas

_FIT = "fit."  # what precedes the names of options of fit
_COLUMNS = ("log_evidence", "stderr", "bound", "state", "seconds")


@dataclass(repr=False)
class Search(Tabular):
    """What `search` returns.

    Attributes:
        trials: a dict for each, in their order: ``parameters``; ``log_evidence``, the mean over validation data in nats per
            datum, its ``stderr`` and ``bound``; ``state``, ``"complete"``, ``"pruned"`` or ``"diverged"``; ``seconds``.
    """

    trials: list[dict[str, Any]]
    _again: Callable[[dict[str, Any]], Any] = field(repr=False)

    @property
    def best(self) -> dict[str, Any]:
        """The parameters with the highest mean log p(x) of validation data.

        Raises:
            ValueError: if no trial was complete.
        """
        return dict(self._best["parameters"])

    def refit(self) -> Any:
        """The best model, fitted once more as it was: to the training data, under the search's seed."""
        return self._again(self.best)

    def to_frame(self) -> pandas.DataFrame:
        """A row for each trial: its parameters by name, and what it gave."""
        import pandas

        return pandas.DataFrame([{**t["parameters"], **{name: t[name] for name in _COLUMNS}} for t in self.trials])

    def plot(self, ax: Any = None) -> Any:
        """log p(x) by trial, and the best so far; returns the axes. Needs matplotlib."""
        from probae.export.figures.style import pyplot

        ax = pyplot().subplots()[1] if ax is None else ax
        complete = [(i, t["log_evidence"]) for i, t in enumerate(self.trials) if t["state"] == "complete"]
        places, values = [i for i, _ in complete], [value for _, value in complete]
        ax.plot(places, values, "o", label="complete")
        ax.step(places, [max(values[: i + 1]) for i in range(len(values))], where="post", label="best so far")
        ax.set(xlabel="trial", ylabel="validation log p(x), nats per datum")
        ax.legend()
        return ax

    @property
    def _best(self) -> dict[str, Any]:
        complete = [trial for trial in self.trials if trial["state"] == "complete"]
        if not complete:
            raise ValueError("search: no trial was fitted to its end, so there is no best one")
        return max(complete, key=lambda trial: trial["log_evidence"])

    def __repr__(self) -> str:
        count = {state: sum(t["state"] == state for t in self.trials) for state in ("complete", "pruned", "diverged")}
        told = ", ".join(f"{number} {state}" for state, number in count.items() if number)
        if not count["complete"]:
            return f"<Search of {len(self.trials)} trials: {told}>"
        best = self._best
        shown = ", ".join(f"{name}={value}" for name, value in best["parameters"].items())
        return (
            f"<Search of {len(self.trials)} trials: {told}; best {shown}, with log p(x) {best['log_evidence']:.4f} ± "
            f"{best['stderr']:.4f} nats per datum of validation data>"
        )


def search(
    factory: Callable[..., Any],
    space: Mapping[str, Any],
    x: Any,
    *,
    validation: Any,
    trials: int = 50,
    journal: str | os.PathLike[str] | None = None,
    method: str | Estimator = "auto",
    particles: int | None = None,
    seed: int = 0,
    fit: Mapping[str, Any] | None = None,
    prune: bool = True,
    progress: bool = False,
    **options: Any,
) -> Search:
    """Search for hyper-parameters by log p(x) of validation data, with Optuna's tree-structured Parzen estimator.

    Each trial makes a model, fits it to x, and is scored by the mean log p(x) of the validation data. Test data are no
    argument: evaluate the best model on them once, afterwards. The more trials, the more the best score flatters.

    Args:
        factory: makes a model, ``lambda latents, width: probae.VAE(64, latents, hidden=(width,))`` say.
        space: name -> what to search: ``(low, high)``, whole numbers or, if one has a point, real ones;
            ``(low, high, "log")``, the same on a logarithmic scale; a list or ``range`` of values; or a distribution of
            Optuna's. A name that begins with ``"fit."``, such as ``"fit.lr"``, is an option of ``fit`` and not of the factory.
        x: training data, in memory.
        validation: held-out data; those who are trained by steps keep their best parameters by them.
        trials: how many in all, earlier ones in the journal counted.
        journal: a file that keeps the trials. The same call goes on from it, whenever it was killed, and ends as if it had
            not been; with more ``trials`` it goes further. That of another call is refused.
        method, particles, options: of the evidence, as for `log_evidence`.
        seed: of every fit, of the evidence, and of what is tried.
        fit: options of ``maximum_likelihood`` where the model has it, else of `probae.fit`.
        prune: whether to end a fit whose best validation bound is below the median of earlier fits at the same step.
        progress: whether to show a bar.

    Returns:
        `Search`, with ``.best``, ``.to_frame()``, ``.plot()`` and ``.refit()``.

    Raises:
        ImportError: without Optuna, ``pip install 'probae[search]'``.
        ValueError, TypeError: if the space, the data or the journal do not fit, or a model has no log p(x) to be scored by.

    References: Bergstra et al. (2011), *Algorithms for hyper-parameter optimization*; Akiba et al. (2019), *Optuna*.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> found = search(lambda latents: probae.PPCA(4, latents), {"latents": (1, 3)}, x[:40], validation=x[40:], trials=4)
        >>> len(found.to_frame()), sorted(found.best)
        (4, ['latents'])
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("search needs Optuna: pip install 'probae[search]'") from error
    from tqdm import tqdm

    if not callable(factory):
        raise TypeError(f"factory: expected a function from parameters to a model, got {type(factory).__name__}")
    seed, trials, prune = checked_seed(seed), whole("trials", trials), flag("prune", prune)
    axes = _axes(space, optuna)
    estimator = estimator_of(method, particles, options)
    data, held = isolated(as_batch)(x), isolated(as_batch)(validation)
    settings = dict(fit or {})
    described = {
        **{f"space {name!r}": f"{axis}, {values}" if values else str(axis) for name, (axis, values) in axes.items()},
        **of_data("x", Checksum.of([data])),
        **of_data("validation", Checksum.of([held])),
        **{"seed": seed, "evidence": repr(estimator), "prune": prune},
        **fingerprints([("factory", factory), ("fit", settings)]),
    }

    def model(parameters: dict[str, Any], watch: Callable[[Run], bool]) -> Any:
        of_fit = {name.removeprefix(_FIT): value for name, value in parameters.items() if name.startswith(_FIT)}
        own = {name: value for name, value in parameters.items() if not name.startswith(_FIT)}
        calls = [*settings.get("callbacks", ()), watch]
        merged = {k: v for k, v in {**settings, **of_fit}.items() if k != "callbacks"}
        return fitted(factory, own, x, seed, merged, validation=validation, callbacks=calls)

    path = None if journal is None else as_path("journal", journal)
    with study(optuna, path, described) as found:
        done = _done(found)
        with tqdm(total=trials, initial=min(len(done), trials), disable=not progress, unit="trial") as bar:
            for number in range(len(done), trials):
                # of the trials before alone: one that goes on tries what one that was never stopped would
                found.sampler = optuna.samplers.TPESampler(seed=derived(seed, number) % 2**32)
                trial = found.ask({name: axis for name, (axis, _) in axes.items()})
                _try(
                    optuna,
                    found,
                    trial,
                    axes,
                    model,
                    lambda m: log_evidence(m, validation, estimator, seed=seed),
                    prune,
                )
                bar.update()
        result = [_told(trial, axes) for trial in _done(found)[:trials]]
    return Search(result, lambda parameters: model(parameters, lambda run: False))


def _try(
    optuna: Any,
    found: Any,
    trial: Any,
    axes: dict[str, tuple[Any, list[Any]]],
    model: Callable[[dict[str, Any], Callable[[Run], bool]], Any],
    score: Callable[[Any], Evidence],
    prune: bool,
) -> None:
    """Fit and score one trial, and tell the study."""
    start, pruned, diverged = time.perf_counter(), False, ""

    def watch(run: Run) -> bool:
        nonlocal pruned
        last = run.records[-1]
        if not prune or run.monitor in {None, "objective"}:  # a loss of another weight is no measure
            return False
        trial.report(last["validation"], int(last["step"]))
        pruned = trial.should_prune()
        return pruned

    try:
        fit = model(_parameters(trial.params, axes), watch)
        evidence = None if pruned else score(fit)
    except FloatingPointError as error:  # too large a learning rate, say: the next may be better
        evidence, diverged = None, str(error)
    if evidence is not None and evidence.bound not in {"exact", "lower"}:
        raise ValueError(f"search: expected exact values or lower bounds of log p(x), got {evidence.bound!r} values")
    trial.set_user_attr("seconds", time.perf_counter() - start)
    if diverged:
        trial.set_user_attr("diverged", diverged)
    if evidence is None:
        states = optuna.trial.TrialState
        found.tell(trial, state=states.FAIL if diverged else states.PRUNED)
        return
    trial.set_user_attr("stderr", evidence.mean_stderr)
    trial.set_user_attr("bound", evidence.bound)
    found.tell(trial, evidence.mean)


def _done(found: Any) -> list[Any]:
    """The trials that count: not those that a process was killed in."""
    every = found.get_trials(deepcopy=False)
    return [t for t in every if t.state.name in {"COMPLETE", "PRUNED"} or "diverged" in t.user_attrs]


def _told(trial: Any, axes: dict[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    complete, known = trial.state.name == "COMPLETE", trial.user_attrs
    return {
        "parameters": _parameters(trial.params, axes),
        "log_evidence": trial.value if complete else math.nan,
        "stderr": known["stderr"] if complete else math.nan,
        "bound": known["bound"] if complete else "–",
        "state": "diverged" if "diverged" in known else "complete" if complete else "pruned",
        "seconds": known["seconds"],
    }


def _axes(space: Any, optuna: Any) -> dict[str, tuple[Any, list[Any]]]:
    """Each name's distribution, and the values that its numbers stand for, if any."""
    if not isinstance(space, Mapping) or not space:
        raise TypeError(
            f"space: expected a mapping from names to what to search, with at least one; got {space!r:.200}"
        )
    return {str(name): _axis(f"space {name!r}", values, optuna.distributions) for name, values in space.items()}


def _axis(name: str, values: Any, distributions: Any) -> tuple[Any, list[Any]]:
    if isinstance(values, distributions.BaseDistribution):
        return values, []
    if isinstance(values, list | range):
        if not values:
            raise ValueError(f"{name}: expected at least one value")
        return distributions.CategoricalDistribution(tuple(range(len(values)))), list(values)
    log = isinstance(values, tuple) and values[2:] == ("log",)
    ends = values[:2] if log else values
    numbers = isinstance(ends, tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends)
    if (
        not numbers
        or len(ends) != 2
        or not all(map(math.isfinite, ends))
        or ends[0] > ends[1]
        or (log and ends[0] <= 0)
    ):
        raise ValueError(
            f'{name}: expected (low, high), (low, high, "log") with 0 < low, a list, or a distribution of Optuna\'s; '
            f"got {values!r:.200}"
        )
    if all(isinstance(end, int) for end in ends):
        return distributions.IntDistribution(*ends, log=log), []
    return distributions.FloatDistribution(*map(float, ends), log=log), []


def _parameters(tried: Mapping[str, Any], axes: dict[str, tuple[Any, list[Any]]]) -> dict[str, Any]:
    return {name: values[tried[name]] if values else tried[name] for name, (_, values) in axes.items()}
