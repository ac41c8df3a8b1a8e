"""How well autoencoders restore digits as noise and gaps grow, and what their codes are worth to a classifier.

    python benchmarks/robustness.py

scikit-learn's digits, grey values from 0 to 1; every model has 16 latents, one hidden layer of 128, squared error (a Normal
with one learned scale) and the same steps. Restoring: a test image is corrupted, and its reconstruction held against the clean
image, root mean square per pixel, averaged over images, with the standard error over them. Gaps are pixels set to 0 without
a word; the last rows are told where they are, ``missing="mask"``, and were trained with a quarter of the pixels hidden.
Classifying: the accuracy of a logistic regression on the codes of clean training images, at clean and at noisy test images;
the weight of each penalty is chosen on validation images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import probae
from probae.corruption import Gaussian, Masking
from probae.objectives import ELBO, JacobianPenalty, Objective
from probae.posteriors import Sigmoid

NOISE = (0.0, 0.1, 0.2, 0.4, 0.8)
GAPS = (0.0, 0.1, 0.25, 0.5, 0.75)
WEIGHTS = (0.1, 1.0, 10.0)
LATENTS, HIDDEN, DRAWS = 16, (128,), 5


def autoencoder(**options: Any) -> probae.Autoencoder:
    """One hidden layer each way."""
    return probae.Autoencoder(64, LATENTS, HIDDEN, seed=0, **options)


def contractive(**options: Any) -> probae.Autoencoder:
    """A sigmoid code and tied weights."""
    return autoencoder(posterior=Sigmoid(), tied=True, **options)


MODELS: dict[str, Callable[[], probae.Pair]] = {
    "autoencoder": autoencoder,
    "denoising, Gaussian 0.2": lambda: autoencoder(corruption=Gaussian(0.2)),
    "denoising, Gaussian 0.4": lambda: autoencoder(corruption=Gaussian(0.4)),
    "denoising, masking 0.25": lambda: autoencoder(corruption=Masking(0.25)),
    "contractive, 0.1": lambda: contractive(contraction=0.1),
    "contractive, 1": lambda: contractive(contraction=1.0),
    "VAE": lambda: probae.VAE(64, LATENTS, HIDDEN, seed=0),
    "denoising VAE, Gaussian 0.2": lambda: probae.VAE(64, LATENTS, HIDDEN, corruption=Gaussian(0.2), seed=0),
}
TOLD = {
    "autoencoder, told": lambda: autoencoder(missing="mask"),
    "VAE, told": lambda: probae.VAE(64, LATENTS, HIDDEN, missing="mask", seed=0),
}
PENALTIES: dict[str, Callable[[float], Objective]] = {
    "the encoder": lambda weight: ELBO() + weight * JacobianPenalty(),
    "the reconstruction": lambda weight: ELBO() + weight * JacobianPenalty(of="reconstruction", method="hutchinson"),
    "each layer": lambda weight: ELBO() + weight * JacobianPenalty(layers="each"),
}


def trained(model: probae.Pair, x: Tensor, validation: Tensor, steps: int, **options: Any) -> probae.Pair:
    """The model at the best step."""
    fitting = {"compile": "flat", "steps": steps, "lr": 2e-3, "scheduler": "cosine", "progress": False} | options
    probae.fit(model, x, validation=validation, **fitting)
    return model


def restored(model: Callable[[Tensor], Tensor], x: Tensor, corrupted: Callable[[Tensor], Tensor]) -> str:
    """Root mean square error per pixel, with the standard error over images; over several draws of the corruption."""
    with probae.runtime.seeding.seeded(1):
        errors = torch.stack([(model(corrupted(x)) - x).square().mean(1) for _ in range(DRAWS)]).mean(0).sqrt()
    return f"{float(errors.mean()):.3f} ± {float(errors.std()) / math.sqrt(len(x)):.3f}"


def accuracies(model: probae.Pair, data: dict[str, tuple[Tensor, Any]]) -> list[float]:
    """Of a logistic regression on the codes of the first part, at the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), *others = data.values()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(model.encode(x).numpy(), y)
    return [float(classifier.score(model.encode(x).numpy(), y)) for x, y in others]


def table(name: str, columns: tuple[str, ...]) -> None:
    """The head of a table."""
    print(f"\n| {name} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)


def restoring(train: Tensor, validation: Tensor, test: Tensor, steps: int) -> None:
    """The two tables of errors."""
    fitted = {name: trained(make(), train, validation, steps) for name, make in MODELS.items()}
    mean = train.mean(0).expand_as(test)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"the input itself": lambda x: x, "the mean image": lambda x: mean}
    ways |= {name: model.reconstruct for name, model in fitted.items()}
    table("noise", tuple(map(str, NOISE)))
    for name, way in ways.items():
        print(f"| {name} | {' | '.join(restored(way, test, Gaussian(scale)) for scale in NOISE)} |", flush=True)
    table("gaps", tuple(map(str, GAPS)))
    for name, way in ways.items():
        print(f"| {name} | {' | '.join(restored(way, test, Masking(share)) for share in GAPS)} |", flush=True)

    def hidden(x: Tensor, share: float) -> Tensor:
        return x.masked_fill(torch.rand_like(x) < share, torch.nan)

    with probae.runtime.seeding.seeded(0):
        gappy = [hidden(x, 0.25) for x in (train, validation)]
    for name, make in TOLD.items():
        model = trained(make(), *gappy, steps)
        cells = (restored(model.reconstruct, test, lambda x, share=share: hidden(x, share)) for share in GAPS)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def classifying(data: Any, parts: dict[str, Tensor], steps: int) -> None:
    """The table of accuracies."""
    labels = dict(zip(("train", "validation", "test"), data.labels, strict=True))
    with probae.runtime.seeding.seeded(2):
        noisy = Gaussian(0.4)(parts["test"])
    sets = {name: (parts[name], labels[name]) for name in labels} | {"noisy test": (noisy, labels["test"])}
    table("penalty on", ("weight", "validation", "test", "test, noise 0.4"))
    for name in ("none", *PENALTIES):
        found = []
        for weight in WEIGHTS if name != "none" else (0.0,):
            objective = PENALTIES[name](weight) if weight else None
            model = trained(contractive(), parts["train"], parts["validation"], steps, objective=objective)
            found.append((weight, accuracies(model, sets)))
        weight, values = max(found, key=lambda one: one[1][0])
        print(f"| {name} | {weight:g} | {' | '.join(f'{value:.3f}' for value in values)} |", flush=True)


def main() -> None:
    """Fit, corrupt and restore; classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--only", choices=("restoring", "classifying"), help="one half of it")
    options = parser.parse_args()
    data = probae.datasets.load("digits")
    names = ("train", "validation", "test")
    parts = {name: torch.as_tensor(getattr(data, name)).float() / 16 for name in names}
    print(f"{len(parts['train'])} training images, {len(parts['test'])} test images, {options.steps} steps")
    if options.only != "classifying":
        restoring(*parts.values(), options.steps)
    if options.only != "restoring":
        classifying(data, parts, options.steps)


if __name__ == "__main__":
    main()
