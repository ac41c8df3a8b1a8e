"""Natural image patches: sparse codes against a Gaussian, in nats per direction, and the filters that they learn.

    PROBAE_DATA=... python benchmarks/patches.py --picture filters.png

12 × 12 grey patches of BSDS300, of other images in training than in the test. Uniform noise dequantises the grey values; the
mean of each patch is projected out, which leaves 143 directions; these are whitened on the training patches, and the
logarithm of the determinant is added, so that all numbers are log densities of the same 143 coordinates, in grey levels.
There a Gaussian is N(0, I), exactly; a sparse model has a Laplace or Student-t prior, a dictionary and λ learned, noise
that is given, a Laplace guide, and log p(x) by guides refined for each datum and by annealing, on some of the test patches.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import probae

SIDE = 12
DIRECTIONS = SIDE * SIDE - 1


@dataclass(frozen=True)
class Patches:
    """Whitened patches (N, 143), the map back to pixels (144, 143), and log |du/dy| of whitening, to be added to log p(u)."""

    train: Tensor
    validation: Tensor
    test: Tensor
    to_pixels: Tensor
    log_determinant: float


def patches() -> Patches:
    """BSDS300 without DC, whitened on its training images."""
    data = probae.datasets.load("bsds300")
    noise = torch.Generator().manual_seed(0)
    parts = [torch.as_tensor(part).double() for part in (data.train, data.validation, data.test)]
    parts = [part + torch.rand(part.shape, generator=noise, dtype=torch.float64) for part in parts]
    # orthonormal directions, the first of which is the mean: the others are what is left without it
    first = torch.cat([torch.ones(SIDE * SIDE, 1), torch.eye(SIDE * SIDE)[:, 1:]], 1).double()
    basis = torch.linalg.qr(first).Q[:, 1:]
    parts = [part @ basis for part in parts]
    mean, covariance = parts[0].mean(0), torch.cov(parts[0].mT, correction=0)
    variance, axes = torch.linalg.eigh(covariance)
    train, validation, test = (((part - mean) @ axes / variance.sqrt()).float() for part in parts)
    return Patches(train, validation, test, basis @ axes * variance.sqrt(), -0.5 * float(variance.log().sum()))


def sparse(prior: str, latents: int, scale: float, data: Patches, steps: int) -> probae.SparseAutoencoder:
    """A sparse model of whitened patches, its encoder affine, its noise a number in their unit."""
    model = probae.SparseAutoencoder(
        DIRECTIONS, latents, prior=prior, posterior="laplace", learned_rate=True, rate=1.4, seed=0,
        likelihood=probae.likelihoods.Normal(scale),
    )  # fmt: skip
    probae.fit(
        model, data.train, validation=data.validation[:1000], steps=steps, lr=3e-3, batch_size=256, scheduler="cosine",
        seed=0, progress=False,
    )  # fmt: skip
    return model


def row(name: str, values: Tensor, gaussian: Tensor, note: str, seconds: float, log_determinant: float) -> str:
    """A line of the table: nats per direction, and the paired gain over the Gaussian."""
    each, gain = (values + log_determinant) / DIRECTIONS, (values - gaussian) / DIRECTIONS
    errors = [float(part.std()) / math.sqrt(len(part)) for part in (each, gain)]
    cells = f"{float(each.mean()):.4f} ± {errors[0]:.4f}", f"{float(gain.mean()):+.4f} ± {errors[1]:.4f}"
    return f"| {name} | {cells[0]} | {cells[1]} | {note} | {seconds:.0f} |"


def main() -> None:
    """Fit, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, nargs="+", default=[144, 288])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--scale", type=float, default=0.4, help="of the noise, in the unit of whitened data")
    parser.add_argument("--rows", type=int, default=200, help="test patches on which log p(x) is estimated")
    parser.add_argument("--distributions", type=int, default=500, help="of annealing; 0 leaves it out")
    parser.add_argument("--picture", help="a file for the filters of the first Laplace model")
    options = parser.parse_args()
    data, drawn = patches(), False
    test = data.test[: options.rows]
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(test.double()).sum(-1)
    print(f"{len(data.train):,} training patches; {len(test)} test patches; nats per direction, ± over patches\n")
    print(
        "| model | log p | gain over the Gaussian | λ; gain by the ELBO; Monte-Carlo error | seconds |\n|---|---|---|---|---|"
    )
    print(row("Gaussian, exact", gaussian, gaussian, "", 0, data.log_determinant), flush=True)
    for prior in ("laplace", "student_t"):
        for latents in options.latents:
            begun = time.perf_counter()
            model = sparse(prior, latents, options.scale, data, options.steps)
            elbo = probae.log_evidence(model, test, "elbo", particles=100, seed=1)
            ways = {"refined": probae.evidence.Refined(steps=300, particles=1000)}
            if options.distributions:
                ways["annealed"] = probae.evidence.AIS(chains=4, distributions=options.distributions)
            with torch.no_grad():
                learned = f"λ {float(model.prior.rate):.2f}"
            for way, estimator in ways.items():
                found = probae.log_evidence(model, test, estimator, seed=1)
                gain = float((elbo.values - gaussian).mean()) / DIRECTIONS
                note = f"{learned}; {gain:+.4f}; ± {found.mean_mc_stderr / DIRECTIONS:.4f}"
                name = f"{prior}, {latents} latents, {way}"
                print(
                    row(name, found.values, gaussian, note, time.perf_counter() - begun, data.log_determinant),
                    flush=True,
                )
            if options.picture and not drawn:
                with torch.no_grad():
                    columns = data.to_pixels.float() @ model.decoder.columns
                probae.figures.dictionary_tiles(columns, (SIDE, SIDE)).savefig(options.picture, dpi=100)
                drawn = True


if __name__ == "__main__":
    main()
