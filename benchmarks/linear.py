"""Fit time and held-out log-likelihood of PPCA and factor analysis, ours beside scikit-learn's.

The fits take turns in one process, so that a busy machine slows all alike; the table has medians and their ratios. On
MNIST (`mnist/` in the folder that PROBAE_DATA names), dequantised and divided by 256, or on synthetic data:

    PROBAE_DATA=... python benchmarks/linear.py --latents 50 --rounds 3
    python benchmarks/linear.py --size 20000 --features 100 --latents 10
"""

import argparse
import gzip
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA, FactorAnalysis

from probae.linear_gaussian.maximum_likelihood import factor_analysis, ppca


def mnist(folder):
    def read(name):
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)

    rng = np.random.default_rng(0)
    return [
        (x + rng.uniform(size=x.shape)) / 256
        for x in map(read, ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"))
    ]


def synthetic(size, features, latents):
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(features, latents)), np.exp(rng.normal(size=features))
    return [
        rng.normal(size=(n, latents)) @ weight.T + scale * rng.normal(size=(n, features)) for n in (size, size // 6)
    ]


def held_out(solution, x):
    noise = solution.scale.square().expand(len(solution.loc))
    marginal = torch.distributions.LowRankMultivariateNormal(solution.loc, solution.weight, noise)
    return marginal.log_prob(x).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, help="synthetic data of this size, even where MNIST is at hand")
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--latents", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    folder = Path(os.environ.get("PROBAE_DATA", "")) / "mnist"
    if options.size is None and folder.is_dir():
        name, (train, test) = "MNIST", mnist(folder)
    else:
        name, (train, test) = "synthetic", synthetic(options.size or 20_000, options.features, options.latents)
    data, unseen, k = torch.from_numpy(train), torch.from_numpy(test), options.latents

    def peer(model):
        return lambda: model.fit(train), lambda fit: (fit.score(train), fit.score(test))

    def mine(function, **arguments):
        return (
            lambda: function(data, k, **arguments),
            lambda fit: (fit.log_likelihood, held_out(fit, unseen)),
        )

    # A row is measured against the last row before it that is scikit-learn's default.
    rows = {
        "PCA, scikit-learn": peer(PCA(k)),
        "PPCA, ours": mine(ppca),
        "FA, scikit-learn": peer(FactorAnalysis(k)),
        "FA, ours": mine(factor_analysis),
        "FA, ours, one start": mine(factor_analysis, starts=1),
    }
    seconds, fits = {row: [] for row in rows}, {}
    for function in (ppca, factor_analysis):  # the first call of a linear algebra routine loads it
        function(torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 2)
    for _ in range(options.rounds):
        for row, (fit, _) in rows.items():
            start = time.perf_counter()
            fits[row] = fit()
            seconds[row].append(time.perf_counter() - start)

    shape, threads = " x ".join(map(str, train.shape)), torch.get_num_threads()
    print(f"{name}: {shape}, {k} latents, {options.rounds} rounds, {threads} threads")
    print(f"{'':22s}{'seconds':>9s}{'ratio':>8s}{'training':>14s}{'held-out':>14s}  nats per datum")
    for row, (_, scores) in rows.items():
        median = statistics.median(seconds[row])
        if "scikit-learn" in row:
            base = median
        train_score, test_score = scores(fits[row])
        print(f"{row:22s}{median:9.3f}{median / base:8.2f}{train_score:14.4f}{test_score:14.4f}")


if __name__ == "__main__":
    main()
