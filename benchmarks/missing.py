"""Real gaps: what all 2,800 people of bfi are worth beside its complete cases, and how well answers that were hidden come back.

    PROBAE_DATA=... python benchmarks/missing.py

25 items of a personality questionnaire, six ordered answers each, 508 of them missing. Each model is fitted to all training
people, with their gaps, and to the complete cases alone; both have log p of what the same test people answered, so the
difference is paired. Factor analysis is a density of answers taken for real numbers, exact, by EM; the other two are masses,
and stand beside each other: a rounded Normal, and ordered levels with cut points of each item's own. Then a tenth of the test
answers is hidden, and drawn from the model given the rest: the error of the draws' mean, beside that of the items' means.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import probae
from probae.heads.likelihoods import DiscretisedNormal, OrderedCategorical

LATENTS = 5


def factors(x: Tensor, validation: Tensor) -> probae.Pair:
    """Factor analysis, by EM."""
    return probae.FactorAnalysis(x.shape[1], LATENTS, missing="mask").maximum_likelihood(x)


def vae(x: Tensor, validation: Tensor, head: Callable[[], probae.likelihoods.Head], steps: int) -> probae.Pair:
    """A VAE whose encoder sees the answers and which of them are there."""
    torch.manual_seed(0)
    model = probae.VAE(x.shape[1], LATENTS, hidden=(64,), likelihood=head(), missing="mask")
    probae.fit(
        model, x, validation=validation, steps=steps, lr=2e-3, scheduler="cosine", batch_size=256, progress=False
    )
    return model


def hidden(x: Tensor, share: float = 0.1) -> tuple[Tensor, Tensor]:
    """The answers without a share of them, and which those are."""
    drawn = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < share
    gone = drawn & ~x.isnan()
    return x.masked_fill(gone, math.nan), gone


def main() -> None:
    """Fit, evaluate and impute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    data = probae.datasets.load("bfi", missing="mask")
    train, validation, test = (torch.from_numpy(part) for part in (data.train, data.validation, data.test))
    complete = train[~train.isnan().any(1)]
    ways = {
        "factor analysis (density)": factors,
        "VAE, rounded Normal (mass)": partial(
            vae, head=lambda: DiscretisedNormal(5, scale="feature"), steps=options.steps
        ),
        "VAE, ordered levels (mass)": partial(vae, head=lambda: OrderedCategorical(6), steps=options.steps),
    }
    seen, gone = hidden(test)
    means = train.nanmean(0).expand_as(test)
    plain = float((means - test)[gone].square().mean().sqrt())
    print(
        f"{len(train):,} training people, {len(complete):,} of them complete; {len(test)} test people, nats per person\n"
    )
    print(
        f"Answers that were hidden: {int(gone.sum())}; the items' means miss them by {plain:.3f} (root mean square)\n"
    )
    columns = "model", "all people", "complete cases", "all − complete", "RMS error of hidden answers", "seconds"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name, fit in ways.items():
        begun = time.perf_counter()
        models = [fit(x, validation) for x in (train, complete)]
        everyone, cases = (probae.log_evidence(model, test, seed=1) for model in models)
        difference = everyone.values - cases.values
        error = float(difference.std()) / math.sqrt(len(difference))
        mean = probae.impute(models[0], seen, draws=200, particles=500).mean(0)
        missed = float((mean - test)[gone].square().mean().sqrt())
        cells = [name]
        cells += [f"{'≥ ' if e.bound == 'lower' else ''}{e.mean:.3f} ± {e.mean_stderr:.2f}" for e in (everyone, cases)]
        cells += [
            f"{float(difference.mean()):+.3f} ± {error:.3f}",
            f"{missed:.3f}",
            f"{time.perf_counter() - begun:.0f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
