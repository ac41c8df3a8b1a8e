"""How often ±2 standard errors hold the true log p(x) where `reliable` says that they can be believed.

Each row of an oracle is one datum evaluated many times, every row with draws of its own. Run it by

    python benchmarks/coverage.py [--rows 1000] > benchmarks/results/coverage.md

A cell has the share of the rows that are reliable, and the coverage among these (– below 50 rows).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats

import probae

FEWEST = 50  # reliable rows of a cell from which its coverage says something
PARTICLES = (100, 500, 1_000, 5_000)


class Oracle(NamedTuple):
    name: str
    pair: Any
    x: torch.Tensor
    truth: Any


def number(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def pair(prior: Callable[[], Any], likelihood: Callable[..., Any], guide: Callable[..., Any]) -> probae.Pair:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def approximate(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", guide(x))

    return probae.Pair(model, approximate)


def quadrature(prior: Any, likelihood: Callable[[np.ndarray], np.ndarray], end: float = 60.0) -> float:
    z = np.linspace(-end, end, 4_000_001)
    return math.log(np.trapezoid(prior.pdf(z) * likelihood(z), z))


def gaussian(k: float, rows: int) -> Oracle:
    """A guide around the posterior N(x / 2, 1 / 2) whose weights have the tail index k; below 0 it is too wide."""
    scale = math.sqrt((1 - k) / 2)
    found = pair(
        lambda: dist.Normal(number(0.0), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda x: dist.Normal(x / 2, scale),
    )
    name = f"Gaussian guide, k = {k:g}" if k > 0 else f"Gaussian guide, {math.sqrt(1 - k):.1f} times too wide"
    return Oracle(name, found, torch.full((rows,), 0.5, dtype=torch.float64), stats.norm.logpdf(0.5, 0, math.sqrt(2)))


def bimodal(x: float, noise: float, rows: int) -> Oracle:
    found = pair(
        lambda: dist.Normal(number(0.0), 1.5),
        lambda z: dist.Normal(z.square(), noise),
        lambda x: dist.Normal(0 * x, 1.5),
    )
    truth = quadrature(stats.norm(0, 1.5), lambda z: stats.norm.pdf(x, z * z, noise))
    return Oracle(
        f"two modes, guide = prior, noise {noise:g}", found, torch.full((rows,), x, dtype=torch.float64), truth
    )


def ppca(scale: float, rows: int, latents: int = 5) -> Oracle:
    generator = torch.Generator().manual_seed(0)
    model = probae.PPCA(10, latents).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(10, latents, generator=generator, dtype=torch.float64))
        model.log_scale.fill_(math.log(0.5))

    class Scaled(probae.Pair):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.prior, self.likelihood = model, model.prior, model.likelihood

        def posterior(self, x: torch.Tensor) -> Any:
            exact = model.posterior(x)
            return dist.MultivariateNormal(exact.mean, exact.covariance_matrix * scale**2)

    x = probae.sample(model, 1, seed=3).expand(rows, -1).contiguous()
    truth = float(probae.log_evidence(model, x[:1]).values)
    return Oracle(f"PPCA, 5 latents, the exact guide's scales × {scale:g}", Scaled(), x, truth)


def oracles(rows: int) -> Iterator[Oracle]:
    zeros = torch.zeros(rows, dtype=torch.float64)
    beta = pair(
        lambda: dist.Beta(number(0.1), 0.1),
        lambda z: dist.Binomial(20, z),
        lambda x: dist.Beta(x + 0.4, 20.4 - x),
    )
    yield Oracle("beta-binomial", beta, zeros, stats.betabinom.logpmf(0, 20, 0.1, 0.1))
    gamma = pair(
        lambda: dist.Gamma(number(0.1), 1.0), lambda z: dist.Poisson(z), lambda x: dist.Gamma(x + 0.3, 2.0 + 0 * x)
    )
    yield Oracle("gamma-Poisson", gamma, zeros, stats.nbinom.logpmf(0, 0.1, 0.5))
    for k in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, -1.25, -8.0):
        yield gaussian(k, rows)
    tails = pair(lambda: dist.StudentT(number(3.0)), lambda z: dist.Normal(z, 3.0), lambda x: dist.Normal(0.2 * x, 1.5))
    truth = quadrature(stats.t(3), lambda z: stats.norm.pdf(1.0, z, 3.0))
    yield Oracle("Student-t prior, Gaussian guide", tails, torch.ones(rows, dtype=torch.float64), truth)
    for scale in (0.8, 1.2):
        yield ppca(scale, rows)
    yield bimodal(4.0, 0.1, rows)
    yield bimodal(1.0, 0.5, rows)


def digits(rows: int) -> Oracle:
    """A trained VAE; what is taken for true is a run of 20,000 particles, with an error of its own."""
    data = probae.datasets.load("digits")
    model = probae.VAE(64, 8, (128,), likelihood=probae.likelihoods.Binomial(16))
    probae.fit(model, data.train, steps=1_500, seed=0, progress=False)
    x = torch.as_tensor(data.test)[:rows]
    options = {"covariance": "full", "steps": 300}
    long = probae.log_evidence(model, x, "refined", particles=20_000, seed=99, **options)
    return Oracle("a VAE of digits, against 20,000 particles", model, x, (long.values, long.mc_stderr))


def measured(oracle: Oracle, method: str, particles: int, **options: Any) -> tuple[float, float, int]:
    """The share of reliable rows, the coverage among them, and how many they are."""
    if method != "ais":
        options |= {"particles": particles}
    found = probae.log_evidence(oracle.pair, oracle.x, method, seed=particles, **options)
    truth, error = oracle.truth if isinstance(oracle.truth, tuple) else (oracle.truth, torch.zeros(()))
    within = (found.values - truth).abs() <= 2 * torch.hypot(found.mc_stderr, error)
    believed = found.reliable
    count = int(believed.sum())
    return float(believed.double().mean()), float(within[believed].double().mean()) if count else math.nan, count


def cell(oracle: Oracle, method: str, particles: int, **options: Any) -> str:
    share, coverage, count = measured(oracle, method, particles, **options)
    return f"{share:.0%}, {coverage:.3f}" if count >= FEWEST else f"{share:.0%}, –"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000)
    rows = parser.parse_args().rows
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        "# `coverage.py`\n\nThe share of reliable rows, and the coverage of ±2 standard errors among them (– below 50 rows)."
    )
    print(f"{rows} rows of one datum each; for `auto` and `ais` {rows // 4}. 95.4% is nominal.\n")
    for method in ("iwae", "refined"):
        print(
            f"\n## {method}\n\n| oracle | {' | '.join(f'K = {k}' for k in PARTICLES)} |\n|---{'|---' * 4}|", flush=True
        )
        for oracle in oracles(rows):
            print(f"| {oracle.name} | {' | '.join(cell(oracle, method, k) for k in PARTICLES)} |", flush=True)
    print("\n## auto and ais\n\n| oracle | auto, K = 1000 | ais, 16 chains of 500 |\n|---|---|---|", flush=True)
    for oracle in oracles(rows // 4):
        found = cell(oracle, "auto", 1_000), cell(oracle, "ais", 16, distributions=500)
        print(f"| {oracle.name} | {' | '.join(found)} |", flush=True)
    oracle = digits(rows // 4)
    print(
        f"\n## {oracle.name}\n\n| method | {' | '.join(f'K = {k}' for k in PARTICLES)} |\n|---{'|---' * 4}|", flush=True
    )
    for method, options in (("iwae", {}), ("refined", {"covariance": "full", "steps": 300})):
        print(f"| {method} | {' | '.join(cell(oracle, method, k, **options) for k in PARTICLES)} |", flush=True)
    print(f"\nProcessor time {time.process_time():.0f} s, {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
