"""A line-up of models for a data set: what its values are decides the likelihoods; fitted, they are ready to compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import one_of
from probae.comparison.fits import has_maximum_likelihood
from probae.data.datasets import Dataset
from probae.data.datasets.dataset import Schema
from probae.models import CATALOGUE, Model
from probae.models.builders import LIKELIHOODS
from probae.pair import Pair
from probae.runtime.parallel import spread
from probae.runtime.processes import require_shared_memory
from probae.runtime.seeding import seeded, with_seed
from probae.training import Run, fit
from probae.transforms import Affine, Transformed
from probae.transforms.expost import expost_prior

_VALIDATION = 2000  # rows by which the best step is chosen


def conditions(names: Sequence[str]) -> bool:
    """Whether one of some models conditions on labels."""
    return any(CATALOGUE[name].labels for name in names)


def unused(data: Dataset, names: Sequence[str]) -> list[str]:
    """The columns of labels and covariates that were named, and that none of some models conditions on."""
    columns = data.columns
    if columns is None or conditions(names):
        return []
    return [*filter(None, (columns.labels,)), *columns.covariates]


def conditional(data: Dataset) -> list[str] | None:
    """The standard line-up with the models that condition on them, where columns of labels or covariates were named."""
    if data.columns is None or data.given is None:
        return None
    return [
        name
        for name, model in CATALOGUE.items()
        if model.suits(data.schema) and (model.labels or data.kind in model.standard)
    ]


def labels_of(data: Dataset) -> Any:
    """The labels, or what else models may condition on, of the test rows."""
    return None if data.given is None else data.given[2]


def choose(data: Dataset, names: Sequence[str] | None) -> list[str]:
    """The line-up for a data set: the names given, ``["all"]`` that suit its values, or the standard ones of these.

    Raises:
        ValueError: for an unknown name, or one that is not for such values.
    """
    schema = data.schema
    suited = [name for name, model in CATALOGUE.items() if model.suits(schema)]
    if names is None:
        return [name for name in suited if data.kind in CATALOGUE[name].standard]
    if list(names) == ["all"]:
        return suited
    for name in names:
        if name not in CATALOGUE:
            raise ValueError(f"models: expected some of {', '.join(CATALOGUE)}; got {name!r}")
        if name not in suited:
            raise ValueError(f"models: {name!r} is not for {data!r}; these are: {', '.join(suited)}")
    return list(dict.fromkeys(names))


def rows_for(name: str, data: Dataset, split: str) -> Any:
    """The rows of a split as a model takes them: with their labels, where it conditions on them."""
    return _rows(CATALOGUE[name], data, split)


def _rows(model: Model, data: Dataset, split: str) -> Any:
    place = ("train", "validation", "test").index(split)
    rows = getattr(data, split)
    return rows if not model.labels or data.given is None else (rows, data.given[place])


def train(
    name: str,
    data: Dataset,
    latents: int,
    steps: int,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool = True,
    callbacks: Sequence[Callable[[Run], Any]] = (),
    likelihood: str | None = None,
) -> tuple[Pair, float]:
    """A fitted model of the line-up, and the seconds that fitting took.

    Linear-Gaussian models are fitted by maximum likelihood, the others by `fit`, with the best validation value kept.

    Raises:
        ValueError: if a likelihood is named, and is unknown, or the model's own is fixed.
    """
    model = CATALOGUE[name] if likelihood is None else _under(likelihood, name)
    return _train(data, model, latents, steps, seed, compile, progress, callbacks)


def _under(likelihood: str, name: str) -> Model:
    """A model of the catalogue under a likelihood by its name."""
    head = LIKELIHOODS[one_of("likelihood", likelihood, LIKELIHOODS)]

    def build(schema: Schema, latents: int) -> Any:
        try:
            return CATALOGUE[name].build(schema, latents, likelihood=head(schema))
        except TypeError as error:
            raise ValueError(f"likelihood: {name!r} takes no other likelihood than its own") from error

    return replace(CATALOGUE[name], build=build)


def _train(
    data: Dataset,
    model: Model,
    latents: int,
    steps: int,
    seed: int,
    compile: bool | str,
    progress: bool,
    callbacks: Sequence[Callable[[Run], Any]] = (),
) -> tuple[Pair, float]:
    with seeded(seed):
        pair = _built(model, data, latents)
    start = time.perf_counter()
    if has_maximum_likelihood(pair):
        pair.maximum_likelihood(named_columns(data.train, data), **with_seed(pair.maximum_likelihood, seed, {}))
        return pair, time.perf_counter() - start
    rows, held = _rows(model, data, "train"), _rows(model, data, "validation")
    held = tuple(part[:_VALIDATION] for part in held) if isinstance(held, tuple) else held[:_VALIDATION]
    options = {"steps": steps, "seed": seed, "compile": compile, "progress": progress, **model.fit}
    run: Run = fit(pair, named_columns(rows, data), validation=held, callbacks=callbacks, **options)
    if run.stopped == "interrupted":
        raise KeyboardInterrupt
    return pair.cpu(), run.seconds


def named_columns(rows: Any, data: Dataset) -> Any:
    """Rows as a DataFrame, where the features have names, so that the model keeps them."""
    if data.feature_names is None:
        return rows
    import pandas

    x, *given = rows if isinstance(rows, tuple) else (rows,)
    frame = pandas.DataFrame(x, columns=list(data.feature_names))
    return (frame, *given) if given else frame


def _built(model: Model, data: Dataset, latents: int) -> Pair:
    """A model of the catalogue for the data, before it is fitted; around it the map that standardises them, if they say so."""
    if not data.standardise:
        return as_pair(model.build(data.schema, latents))
    if data.kind != "real":
        raise ValueError(f"standardise: expected real values, got {data.kind}, whose log p(x) is that of a mass")
    return Transformed(model.build(replace(data.schema, spread=1.0), latents), Affine.standardising(data.train))


def train_all(
    names: Sequence[str],
    data: Dataset,
    latents: int,
    steps: int,
    seed: int = 0,
    compile: bool | str = "auto",
    processes: int = 1,
    progress: bool = True,
) -> Iterator[tuple[str, Pair, float]]:
    """Each name with its fitted model and the seconds that took, in their order; the fits are spread over processes.

    They are the same, however many processes there are, while each has as many threads. On GPUs, each fit takes the
    next one.

    Raises:
        ChildProcessError: if a process dies.
        OSError: if processes cannot share memory here.
    """
    count = min(processes, len(names))
    if processes > 1:
        require_shared_memory("processes", "1")
    how = latents, steps, seed, compile, progress and processes == 1
    tasks = {name: (CATALOGUE[name], *how) for name in names}
    threads = max(1, torch.get_num_threads() // count)
    for name, (pair, seconds) in zip(names, spread(_train, tasks, data, threads=threads, jobs=count), strict=True):
        yield name, pair, seconds


def with_priors(fitted: Mapping[str, Pair], data: Dataset, kind: str, seed: int) -> Iterator[tuple[str, Pair, float]]:
    """Models whose prior is flat once more, each with a prior fitted to its codes, under a name that says so, and the seconds.

    A model that conditions on labels, or has several latents, has none.
    """
    for name, pair in fitted.items():
        rows = rows_for(name, data, "train")
        signature = pair.remembered or pair.signature(pair.as_batch(rows))
        if signature.improper and not signature.given and len(signature.latents) == 1 and pair.has("posterior"):
            start = time.perf_counter()
            yield named_with_prior(name), expost_prior(pair, rows, kind, seed=seed), time.perf_counter() - start


def named_with_prior(name: str) -> str:
    """The name of a model with an ex-post prior."""
    return f"{name} with ex-post prior"


def images(values: Tensor | Any, data: Dataset) -> Tensor:
    """Rows as images (N, H, W), scaled to 0..1."""
    shape = data.image_shape
    if shape is None:
        raise ValueError(f"{data.name} holds no images")
    top = float(data.maximum or 1)
    return (torch.as_tensor(values).float() / top).clamp(0, 1).reshape(-1, *shape)
