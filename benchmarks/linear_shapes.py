"""Maximum likelihood of PPCA and factor analysis at many shapes, ours beside scikit-learn's, and log p(x) of the training data.

Data follow the model: loadings N(0, 1), noise scales log-normal with a spread of ½. The fits take turns in one process, so that
a busy machine slows all alike; the table has ratios of medians, and by how many nats per datum ours is above.

    python benchmarks/linear_shapes.py --rounds 3
    python benchmarks/linear_shapes.py --shapes 500x20000x10 100x50000x5
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from sklearn.decomposition import PCA, FactorAnalysis

import probae
from probae.heads.distributions import LowRankNormal
from probae.linear_gaussian.maximum_likelihood import factor_analysis, ppca

SHAPES = ("1797x64x10", "100000x100x5", "500x2000x10", "2000x1000x10", "500x20000x10", "100x50000x5", "1000000x10x2")


def synthetic(size, features, latents):
    rng = np.random.default_rng(0)
    weight, scale = rng.normal(size=(features, latents)), np.exp(0.5 * rng.normal(size=features))
    return rng.normal(size=(size, latents)) @ weight.T + scale * rng.normal(size=(size, features))


def peers(x, k):
    data = torch.from_numpy(x)
    model = probae.PPCA(x.shape[1], k).double()
    return {
        "FA": (lambda: factor_analysis(data, k), lambda: FactorAnalysis(k).fit(x)),
        "PPCA": (lambda: ppca(data, k), lambda: PCA(k).fit(x)),
        "log p(x)": (lambda: model.log_marginal(data), lambda: data @ model.weight.detach()),
    }


def gain(mine, peer, x):
    """Nats per datum by which our training log-likelihood is above scikit-learn's, both by the same stable form."""
    laws = (
        LowRankNormal(mine.loc, mine.weight, mine.scale),
        LowRankNormal(*map(torch.from_numpy, (peer.mean_, peer.components_.T, peer.noise_variance_**0.5))),
    )
    ours, theirs = (law.log_prob(torch.from_numpy(x)).mean().item() for law in laws)
    return f"{ours - theirs:+.1e}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="N x D x L")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"{torch.get_num_threads()} threads, {options.rounds} rounds; log p(x) is measured against one product with W"
    )
    print("| N × D, L | what | ours, s | peer, s | ratio | nats above |\n|---|---|---:|---:|---:|---:|")
    for shape in options.shapes:
        n, d, k = map(int, shape.split("x"))
        x = synthetic(n, d, k)
        for name, pair in peers(x, k).items():
            seconds, found = ([], []), [None, None]
            long = False
            for _ in range(options.rounds):
                for which, run in enumerate(pair):
                    start = time.perf_counter()
                    with torch.no_grad():
                        found[which] = run()
                    seconds[which].append(time.perf_counter() - start)
                    long = long or seconds[which][-1] > 60
                if long:
                    break
            ours, peer = map(statistics.median, seconds)
            above = gain(*found, x) if name == "FA" else ""
            print(
                f"| {n} × {d}, {k} | {name} | {ours:.3f} | {peer:.3f} | {ours / peer:.2f} | {above} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
