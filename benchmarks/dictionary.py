"""A known dictionary: does held-out log p(x) pick the sparsity that recovers it, with no labels?

    python benchmarks/dictionary.py --quick          # some minutes on two cores
    python benchmarks/dictionary.py                  # half an hour
    python benchmarks/dictionary.py --full --device cuda

Data are x = D z + noise with incoherent columns of unit length, and codes z that are Laplace (the model of three of the
methods), spike-and-slab, or misspecified: gates whose probability falls as 1 / rank, every second one drawn together with the
one before it, and positive magnitudes. Each method is fitted over a grid of its sparsity, and scored on held-out data: log
p(x), by guides refined for each datum where the prior is a density, by the sum over supports of a spike-and-slab where that
is exact and by its own guide else; under a flat prior with a hurdle prior fitted to the codes. Beside it what a user does not
know: the matched cosine with the true columns, the F1 of the supports, the error of codes, and their slope on the true ones.

A summary says, for each method: the recovery at the sparsity that log p(x) picks, the best of the grid, and the rank
correlation between the two.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import probae
from probae.diagnostics import compare_dictionaries, measure_sparsity, support_f1
from probae.diagnostics.sparsity import shrinkage_slope
from probae.objectives import ELBO, L0

FULL = 64  # latents up to which a refined guide has a full covariance: a diagonal one is loose by nats at little noise
ACTIVE = 0.1  # the share of latents that are on, under spike-and-slab codes


@dataclass(frozen=True)
class Size:
    """How large a run is."""

    shapes: tuple[tuple[int, int], ...]
    snr: tuple[float, ...]
    kinds: tuple[str, ...]
    seeds: int
    train: int
    test: int
    steps: int


SIZES = {
    "quick": Size(((8, 12),), (15.0,), ("laplace", "spike_and_slab"), 1, 2000, 60, 400),
    "default": Size(((16, 32),), (15.0,), ("laplace", "spike_and_slab", "zipf"), 1, 10_000, 100, 1500),
    "full": Size(
        ((32, 64), (128, 512)), (5.0, 10.0, 20.0), ("laplace", "spike_and_slab", "zipf"), 5, 100_000, 10_000, 20_000
    ),
}


@dataclass(frozen=True)
class Problem:
    """Data of a known dictionary: train and test (N, D), columns (D, L), codes of the test data (N, L), the noise's scale."""

    kind: str
    train: Tensor
    test: Tensor
    columns: Tensor
    codes: Tensor
    scale: float


def incoherent(features: int, latents: int, generator: torch.Generator) -> Tensor:
    """Unit columns whose largest cosines are pushed apart."""
    columns = torch.randn(features, latents, generator=generator).requires_grad_()
    adam = torch.optim.Adam([columns], 0.02)
    for _ in range(300):
        unit = normalize(columns, dim=0)
        gram = unit.mT @ unit - torch.eye(latents)
        adam.zero_grad()
        gram.pow(8).mean().pow(1 / 8).backward()
        adam.step()
    return normalize(columns.detach(), dim=0)


def drawn_codes(kind: str, n: int, latents: int, generator: torch.Generator) -> Tensor:
    """Codes (n, latents) with a mean square of 2 ACTIVE."""
    uniform = torch.rand(n, latents, generator=generator)
    if kind == "laplace":
        z = -(uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs().clamp(max=0.4999999))
    elif kind == "spike_and_slab":
        z = (uniform < ACTIVE) * torch.randn(n, latents, generator=generator)
    else:
        rank = torch.arange(1, latents + 1)
        on = uniform < (ACTIVE * latents / rank / (1 / rank).sum()).clamp(max=0.8)
        on[:, 1::2] &= on[:, : 2 * (latents // 2) : 2] | (torch.rand(n, latents // 2, generator=generator) < 0.5)
        z = on * -torch.log(torch.rand(n, latents, generator=generator).clamp_min(1e-12))
    return z * (2 * ACTIVE / z.square().mean()).sqrt()


def problem(kind: str, shape: tuple[int, int], snr: float, seed: int, size: Size) -> Problem:
    """Data of one kind of code."""
    generator = torch.Generator().manual_seed(seed)
    columns = incoherent(*shape, generator)
    z = drawn_codes(kind, size.train + size.test, shape[1], generator)
    clean = z @ columns.mT
    scale = float(clean.square().mean().sqrt()) * 10 ** (-snr / 20)
    x = clean + scale * torch.randn(clean.shape, generator=generator)
    return Problem(kind, x[: size.train], x[size.train :], columns, z[size.train :], scale)


# -- methods: from a problem and a sparsity to a model, its objective, and the grid of the sparsity --------------------

Built = tuple[Any, Any]


def rates(data: Problem) -> list[float]:
    """Penalties around that of Laplace codes of the data's own size."""
    own = math.sqrt(2 / float(data.codes.square().mean()))
    return [own * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]


def counts(data: Problem) -> list[float]:
    """Numbers of latents."""
    latents = data.columns.shape[1]
    return sorted({max(1, round(latents * share)) for share in (0.05, 0.1, 0.2, 0.35, 0.5)})


def autoencoder(data: Problem, **options: Any) -> Any:
    """A sparse autoencoder whose noise is known."""
    options = {"likelihood": probae.likelihoods.Normal(data.scale), "hidden": (64,), "seed": 0, **options}
    return probae.SparseAutoencoder(*data.columns.shape, **options)


def fista(data: Problem, rate: float) -> Built:
    """Sparse coding."""
    head = probae.likelihoods.Normal(data.scale)
    return probae.SparseCoding(*data.columns.shape, rate=rate, likelihood=head, iterations=30, seed=0), ELBO()


def l1(data: Problem, rate: float) -> Built:
    """An encoder's point under a Laplace prior."""
    return autoencoder(data, rate=rate), ELBO()


def laplace_vi(data: Problem, rate: float) -> Built:
    """A Laplace guide, with the noise learned."""
    return autoencoder(data, rate=rate, posterior="laplace", likelihood=None), ELBO(particles=2)


def spike_and_slab(data: Problem, active: float) -> Built:
    """Gates in the guide; π is held, the slab is as wide as gives the codes their mean square, as near as that is known."""
    slab = math.sqrt(float(data.codes.square().mean()) / active)
    head = probae.likelihoods.Normal(data.scale)
    options = {"active": active, "slab": slab, "learned": False, "likelihood": head, "hidden": (64,), "seed": 0}
    return probae.SpikeAndSlab(*data.columns.shape, **options), ELBO(particles=8)


def topk(data: Problem, k: float) -> Built:
    """The k largest latents of a ReLU code."""
    return autoencoder(data, prior="flat", posterior=probae.posteriors.TopK(int(k))), ELBO()


def jump(data: Problem, weight: float) -> Built:
    """A JumpReLU with so many nats for each latent that is on."""
    return autoencoder(data, prior="flat", posterior=probae.posteriors.JumpReLU()), ELBO() + weight * L0()


METHODS: dict[str, tuple[Callable[[Problem, float], Built], Callable[[Problem], list[float]]]] = {
    "FISTA": (fista, rates),
    "L1 encoder": (l1, rates),
    "Laplace guide": (laplace_vi, rates),
    "spike-and-slab": (spike_and_slab, lambda data: [0.025, 0.05, 0.1, 0.2, 0.4]),
    "TopK": (topk, counts),
    "JumpReLU": (jump, lambda data: [0.3, 1.0, 3.0, 10.0, 30.0]),
}


# -- scores ------------------------------------------------------------------------------------------------------------


def refined(latents: int) -> probae.evidence.Refined:
    """Guides of each datum's own."""
    return probae.evidence.Refined(steps=200, particles=500, covariance="full" if latents <= FULL else "diagonal")


def evidence(model: Any, data: Problem) -> tuple[float, str]:
    """Held-out log p(x), nats per datum, and how it was found."""
    if isinstance(model, probae.SpikeAndSlab):
        method = "exact" if model.tractable else "iwae"
        options = {} if model.tractable else {"particles": 1000}
        return probae.log_evidence(model, data.test, method, seed=1, **options).mean, method
    how = "refined"
    if isinstance(model.prior, probae.priors.Flat):
        model, how = probae.expost_prior(model, data.train, kind="hurdle"), "refined, hurdle prior"
    return probae.log_evidence(model, data.test, refined(data.columns.shape[1]), seed=1).mean, how


def scored(model: Any, data: Problem) -> dict[str, Any]:
    """What a fit is worth, with and without the truth."""
    value, how = evidence(model, data)
    recovery = compare_dictionaries(model.decoder.columns, data.columns)
    with torch.no_grad():
        codes = recovery.aligned(model.posterior(data.test).mean)
    threshold = 0.25 * float(data.codes.square().mean().sqrt())
    truth = data.codes * (data.codes.abs() > threshold)
    return {
        "log p": value,
        "by": how,
        "L0": float(measure_sparsity(model, data.test, threshold=threshold).l0.mean()),
        "matched": recovery.mean_matched_cosine,
        "MMCS": recovery.mean_max_cosine,
        "F1": support_f1(codes, truth, threshold),
        "NMSE": float((codes - data.codes).square().sum() / data.codes.square().sum()),
        "slope": shrinkage_slope(codes, data.codes),
    }


def own_evidence(data: Problem) -> float:
    """Log p(x) under the model that drew the data, where there is one; else NaN."""
    features, latents = data.columns.shape
    head = probae.likelihoods.Normal(data.scale)
    if data.kind == "laplace":
        model: Any = probae.SparseCoding(features, latents, rate=rates(data)[2], likelihood=head)
    elif data.kind == "spike_and_slab":
        slab = math.sqrt(float(data.codes.square().mean()) / ACTIVE)
        model = probae.SpikeAndSlab(features, latents, active=ACTIVE, slab=slab, likelihood=head)
    else:
        return math.nan
    with torch.no_grad():
        model.decoder.weight.copy_(data.columns)
    if data.kind == "spike_and_slab" and not model.tractable:
        return math.nan
    method = refined(latents) if data.kind == "laplace" else "exact"
    return probae.log_evidence(model, data.test, method, seed=1).mean


def fits(size: Size, methods: list[str], device: str) -> Iterator[dict[str, Any]]:
    """Every fit of the grid, a row each."""
    for shape, snr, kind, seed in itertools.product(size.shapes, size.snr, size.kinds, range(size.seeds)):
        data = problem(kind, shape, snr, seed, size)
        where = {"shape": f"{shape[0]} × {shape[1]}", "SNR": snr, "codes": kind, "seed": seed}
        print(f"\n{where}: log p of the model that drew the data {own_evidence(data):.3f}\n", flush=True)
        for name in methods:
            build, grid = METHODS[name]
            for sparsity in grid(data):
                begun = time.perf_counter()
                model, objective = build(data, sparsity)
                options = {"lr": 0.01, "scheduler": "cosine", "batch_size": 256, "compile": "flat", "device": device}
                probae.fit(
                    model, data.train, objective=objective, steps=size.steps, seed=seed, progress=False, **options
                )
                row = {**where, "method": name, "sparsity": sparsity, **scored(model.cpu(), data)}
                row["seconds"] = time.perf_counter() - begun
                print(" | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
                yield row


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """For each grid, what log p(x) picks, beside the best."""
    rows = []
    keys = ["shape", "SNR", "codes", "seed", "method"]
    for where, grid in table.groupby(keys, sort=False):
        picked, best = grid.loc[grid["log p"].idxmax()], grid.loc[grid["matched"].idxmax()]
        rank = grid["log p"].rank().corr(grid["matched"].rank())
        rows.append(
            dict(zip(keys, where, strict=True))
            | {"picked": picked["sparsity"], "log p there": picked["log p"], "matched there": picked["matched"]}
            | {
                "F1 there": picked["F1"],
                "best": best["sparsity"],
                "matched at best": best["matched"],
                "rank correlation": rank,
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """A table of Markdown."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in table.to_numpy(object)]
    lines = [list(table.columns), ["---"] * len(table.columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Fit and score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="size")
    size.add_argument("--full", action="store_const", const="full", dest="size")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    table = pd.DataFrame(fits(SIZES[options.size or "default"], options.methods, options.device))
    print(f"\n{markdown(table.drop(columns=['shape', 'SNR', 'seed']))}\n\n{markdown(summary(table))}")


if __name__ == "__main__":
    main()
