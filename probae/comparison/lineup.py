"""A line-up of models for a data set: what its values are decides the likelihoods; fitted, they are ready to compare."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probae.data.datasets import Dataset
from probae.heads import likelihoods
from probae.heads.likelihoods import Head
from probae.models import PPCA, VAE, Autoencoder, FactorAnalysis, SparseAutoencoder, StochasticAutoencoder
from probae.pair import Pair
from probae.runtime.processes import require_shared_memory
from probae.runtime.seeding import seeded
from probae.storage import saving
from probae.training import Run, fit
from probae.transforms import Dequantised

#: counts up to this number may have a class of their own each
CLASSES = 64


@dataclass(frozen=True)
class Candidate:
    """A model for some kinds of data.

    Attributes:
        title: what it is, in a line.
        build: from a data set and the number of latents.
        kinds: of data that it is for.
        standard: whether it is in the line-up when none is named.
    """

    title: str
    build: Callable[[Dataset, int], Pair]
    kinds: tuple[str, ...] = ("binary", "counts", "real")
    standard: bool = True


def _natural(data: Dataset) -> Head:
    if data.kind == "binary":
        return likelihoods.Bernoulli()
    return likelihoods.Binomial(_maximum(data)) if data.kind == "counts" else _gaussian(data)


def _gaussian(data: Dataset) -> Head:
    """A Normal that is a density of real numbers, and a mass of whole ones."""
    if data.kind == "real":
        return likelihoods.Normal("feature" if _varies(data) else "shared")
    return likelihoods.DiscretisedNormal(_maximum(data), scale="feature")


def _missing(data: Dataset) -> str | None:
    """How models take what is missing in a data set."""
    return "mask" if any(np.isnan(part).any() for part in (data.train, data.validation, data.test)) else None


def _sparse(data: Dataset, latents: int, posterior: str) -> Pair:
    spread = float(np.nanstd(data.train))
    scale = "shared" if posterior != "point" else spread / 4
    # λ is in the units of the data where the scale is: 1 for the digits, whose counts have a standard deviation of 6
    rate = 6 / spread if posterior == "point" and data.kind != "binary" else 1.0
    head = _natural(data)
    if data.kind == "real":
        head = likelihoods.Normal(scale)
    elif data.kind == "counts":
        head = likelihoods.DiscretisedNormal(_maximum(data), scale=scale)
    hidden = (128,)
    return SparseAutoencoder(
        data.features,
        latents,
        hidden,
        posterior=posterior,
        likelihood=head,
        rate=rate,
        learned_rate=posterior != "point",
        missing=_missing(data),
    )


def _linear(model: Callable[..., Pair]) -> Callable[[Dataset, int], Pair]:
    def build(data: Dataset, latents: int) -> Pair:
        pair = model(data.features, latents, missing=_missing(data))
        return pair if data.kind == "real" else Dequantised(pair)

    return build


def _varies(data: Dataset) -> bool:
    """Whether all features vary: one that does not has no scale of its own."""
    return bool((np.nanmax(data.train, 0) > np.nanmin(data.train, 0)).all())


def _maximum(data: Dataset) -> int:
    return data.maximum if data.maximum is not None else 1


CANDIDATES: dict[str, Candidate] = {
    "ppca": Candidate("probabilistic PCA, maximum likelihood", _linear(PPCA)),
    "factor_analysis": Candidate("factor analysis, maximum likelihood", _linear(FactorAnalysis)),
    "sparse_vae": Candidate("sparse VAE: Laplace prior and guide, dictionary", lambda d, n: _sparse(d, n, "laplace")),
    "normal_vae": Candidate(
        "VAE, Normal likelihood (rounded, for counts)",
        lambda d, n: VAE(d.features, n, likelihood=_gaussian(d), missing=_missing(d)),
        kinds=("counts", "real"),
    ),
    "binomial_vae": Candidate(
        "VAE, Binomial likelihood",
        lambda d, n: VAE(d.features, n, likelihood=likelihoods.Binomial(_maximum(d)), missing=_missing(d)),
        kinds=("counts",),
    ),
    "categorical_vae": Candidate(
        f"VAE, a class for each count (up to {CLASSES})",
        lambda d, n: VAE(d.features, n, likelihood=likelihoods.Categorical(_maximum(d) + 1), missing=_missing(d)),
        kinds=("counts",),
    ),
    "ordinal_vae": Candidate(
        f"VAE, ordered levels with cut points of their own (up to {CLASSES})",
        lambda d, n: VAE(
            d.features, n, likelihood=likelihoods.OrderedCategorical(_maximum(d) + 1), missing=_missing(d)
        ),
        kinds=("counts",),
        standard=False,
    ),
    "vae": Candidate(
        "VAE, with the likelihood that suits the values",
        lambda d, n: VAE(d.features, n, hidden=(200, 200), likelihood=_natural(d), missing=_missing(d)),
        standard=False,
    ),
    "linear_vae": Candidate(
        "VAE with an affine encoder and decoder",
        lambda d, n: VAE(d.features, n, hidden=(), likelihood=_natural(d), missing=_missing(d)),
        standard=False,
    ),
    "sparse_autoencoder": Candidate(
        "sparse autoencoder: Laplace prior, point guide", lambda d, n: _sparse(d, n, "point"), standard=False
    ),
    "autoencoder": Candidate(
        "autoencoder: flat prior, point guide",
        lambda d, n: Autoencoder(d.features, n, hidden=(128,), likelihood=_natural(d), missing=_missing(d)),
    ),
    "stochastic_autoencoder": Candidate(
        "stochastic autoencoder: flat prior, noisy code",
        lambda d, n: StochasticAutoencoder(d.features, n, likelihood=_natural(d), missing=_missing(d)),
    ),
}


def choose(data: Dataset, names: Sequence[str] | None) -> list[str]:
    """The line-up for a data set: the names given, or the standard ones that suit its values.

    Raises:
        ValueError: for an unknown name, or one that is not for such values.
    """
    suited = [n for n, c in CANDIDATES.items() if data.kind in c.kinds]
    if data.kind == "counts" and _maximum(data) >= CLASSES:
        suited = [name for name in suited if name not in {"categorical_vae", "ordinal_vae"}]
    if data.kind == "real" and not _varies(data):
        suited.remove("factor_analysis")
    if names is None:
        standard = [name for name in suited if CANDIDATES[name].standard]
        return standard if data.kind != "binary" else [*standard[:3], "vae", *standard[3:]]
    for name in names:
        if name not in CANDIDATES:
            raise ValueError(f"models: expected some of {', '.join(CANDIDATES)}; got {name!r}")
        if name not in suited:
            raise ValueError(f"models: {name!r} is not for {data!r}; these are: {', '.join(suited)}")
    return list(dict.fromkeys(names))


def train(
    name: str,
    data: Dataset,
    latents: int,
    steps: int,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool = True,
) -> tuple[Pair, float]:
    """A fitted model of the line-up, and the seconds that fitting took.

    Linear-Gaussian models are fitted by maximum likelihood, the others by `fit`, with the best validation value kept.
    """
    with seeded(seed):
        pair = CANDIDATES[name].build(data, latents)
    start = time.perf_counter()
    if hasattr(pair, "maximum_likelihood") and hasattr(getattr(pair, "inner", pair), "maximum_likelihood"):
        pair.maximum_likelihood(data.train)
        return pair, time.perf_counter() - start
    run: Run = fit(
        pair,
        data.train,
        validation=data.validation[:2000],
        steps=steps,
        scheduler="cosine",
        lr=2e-3,
        seed=seed,
        compile=compile,
        progress=progress,
    )
    if run.stopped == "interrupted":
        raise KeyboardInterrupt
    return pair.cpu(), run.seconds


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

    They are the same, however many processes there are, while each has as many threads. On GPUs, each process takes the
    next one.

    Raises:
        ChildProcessError: if a process dies.
        OSError: if processes cannot share memory here.
    """
    if processes == 1:
        for name in names:
            yield name, *train(name, data, latents, steps, seed, compile, progress)
        return
    require_shared_memory("processes", "1")
    context = multiprocessing.get_context("spawn")
    count = min(processes, len(names))
    with tempfile.TemporaryDirectory(prefix="probae-") as folder:
        ended, alive = context.Pipe(duplex=False)
        start = context.Value("i", 0), max(1, torch.get_num_threads() // count), ended, folder
        pool = ProcessPoolExecutor(count, context, _start, start)
        try:
            jobs = [pool.submit(_train_into, folder, name, data, latents, steps, seed, compile) for name in names]
            for name, job in zip(names, jobs, strict=True):
                seconds = job.result()
                yield name, saving.load(Path(folder) / name), seconds
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process that fits a model has died (killed, or out of memory): ask for fewer processes"
            ) from error
        finally:
            alive.close()  # fits that are not done end with it
            pool.shutdown(cancel_futures=True)


def _start(started: Any, threads: int, ended: Connection, folder: str) -> None:
    """What a worker takes of the machine: its share of the cores, and a GPU by its number; no longer than it is needed."""
    threading.Thread(target=_follow, args=(ended, folder), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the main process decides
    torch.set_num_threads(threads)
    with started.get_lock():
        os.environ["LOCAL_RANK"] = str(started.value)
        started.value += 1


def _follow(ended: Connection, folder: str) -> None:
    """End this process when the main one closes its end of a pipe, or is killed and cannot tidy up."""
    with contextlib.suppress(OSError, EOFError):
        ended.recv_bytes()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _train_into(
    folder: str, name: str, data: Dataset, latents: int, steps: int, seed: int, compile: bool | str
) -> float:
    pair, seconds = train(name, data, latents, steps, seed, compile, progress=False)
    saving.save(pair, Path(folder) / name)
    return seconds


def images(values: Tensor | Any, data: Dataset) -> Tensor:
    """Rows as images (N, H, W), scaled to 0..1."""
    shape = data.image_shape
    if shape is None:
        raise ValueError(f"{data.name} holds no images")
    top = float(data.maximum or 1)
    return (torch.as_tensor(values).float() / top).clamp(0, 1).reshape(-1, *shape)
