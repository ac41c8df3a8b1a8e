"""Every model of the registry on the digits, by every estimator of log p(x): what each finds, with its error and its seconds.

    python benchmarks/registry.py

The counts have noise added once, so that all models have densities of the same real numbers, nats per image, and PPCA and
factor analysis an exact log p(x) to hold the estimators against. Models without one of their own (a flat prior) get an
ex-post prior, a Normal fitted to their codes; a point guide has no weights, and so neither ELBO nor IWAE.
"""

from __future__ import annotations

import argparse
import time

import torch

import probae
from probae.models import make, names

LATENTS, FIXED = 16, 1.5  # the scale of a likelihood that a point guide would send to zero
WAYS = {
    "exact": {},
    "elbo": {"particles": 5000},
    "iwae": {"particles": 5000},
    "refined": {"particles": 5000},
    "ais": {"chains": 16, "distributions": 1000},
    "auto": {"particles": 5000},
}


def built(name: str) -> probae.Pair:
    """A model of the registry for 64 real features."""
    if name in {"ppca", "factor_analysis"}:
        return make(name, 64, LATENTS)
    head = probae.likelihoods.Normal(FIXED) if name == "sparse_autoencoder" else probae.likelihoods.Normal("feature")
    return make(name, 64, LATENTS, likelihood=head)


def fitted(name: str, train: torch.Tensor, validation: torch.Tensor, steps: int) -> tuple[probae.Pair, str]:
    """The model, by maximum likelihood or by steps, under an ex-post prior where its own is flat; and what it then is."""
    torch.manual_seed(0)
    model = built(name)
    if model.has("maximum_likelihood"):
        return model.maximum_likelihood(train), name
    probae.fit(model, train, validation=validation, steps=steps, lr=2e-3, scheduler="cosine", progress=False)
    try:
        probae.log_evidence(model, train[:2], "refined", particles=1, steps=0)
    except ValueError:  # the prior is flat
        return probae.expost_prior(model, train), f"{name}, ex-post prior"
    return model, name


def cell(model: probae.Pair, x: torch.Tensor, method: str, options: dict[str, int]) -> str:
    """An estimate with its Monte-Carlo error and its seconds; a dash where the method does not apply."""
    begun = time.perf_counter()
    try:
        found = probae.log_evidence(model, x, method, seed=1, **options)
    except ValueError:
        return "–"
    chosen = f", {', '.join(sorted(set(found.estimators or ())))}" if method == "auto" and found.estimators else ""
    error = "" if found.bound == "exact" else f" ± {found.mean_mc_stderr:.2f}"
    return f"{found.mean:.2f}{error} ({time.perf_counter() - begun:.0f} s{chosen})"


def main() -> None:
    """Fit and estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=names("real"), default=list(names("real")))
    parser.add_argument("--rows", type=int, default=100, help="of the test images, by a seeded permutation")
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    data = probae.datasets.load("digits")
    noise = torch.Generator().manual_seed(0)
    parts = [torch.from_numpy(part).float() for part in (data.train, data.validation, data.test)]
    train, validation, test = (part + torch.rand(part.shape, generator=noise) for part in parts)
    test = test[torch.randperm(len(test), generator=noise)[: options.rows]]
    print(f"{len(test)} test images, {LATENTS} latents, {torch.get_num_threads()} threads; ± Monte Carlo\n")
    print(f"| model | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}", flush=True)
    for name in options.models:
        model, what = fitted(name, train, validation, options.steps)
        cells = (cell(model, test, method, settings) for method, settings in WAYS.items())
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
