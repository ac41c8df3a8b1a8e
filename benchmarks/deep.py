"""Layer-by-layer pretraining against training from scratch, and what the encoder is worth to a classifier of few labels.

Data are scikit-learn's digits, 1,200 to train on. A deep autoencoder, 64-128-64-32-8 and back, under a Binomial likelihood, is
pretrained layer by layer and then trained jointly, or trained jointly from the start for as many steps in all; the score is
log p(x | code) of held-out images, nats. Its encoder then starts a classifier of few labels, beside one whose encoder starts at
random, and logistic regression of the pixels. Ways take turns within a seed; numbers are medians over seeds, with the least and
the largest.

    python benchmarks/deep.py --seeds 3 --steps 500
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import probae
from probae.objectives import Reconstruction

HIDDEN, LATENTS = (128, 64, 32), 8
LABELS = (20, 50, 100, 300)
QUIET: dict[str, Any] = {"progress": False, "compile": "flat", "lr": 2e-3, "scheduler": "cosine"}


def score(model: Any, x: Tensor) -> float:
    """Mean log p(x | code), nats per image."""
    with torch.no_grad():
        return float(model.likelihood(model.encode(x)).log_prob(x).mean())


def shown(values: list[float], digits: int = 2) -> str:
    """Median, least and largest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def trained(train: Tensor, activation: str, steps: int, seed: int) -> dict[str, tuple[Any, float]]:
    """A model by each way, and its seconds."""
    head = probae.likelihoods.Binomial(16)
    found = {}
    for way in ("pretrained", "pretrained, then jointly", "jointly, from scratch"):
        start = time.perf_counter()
        if way == "jointly, from scratch":
            options = {"likelihood": head, "activation": activation, "seed": seed}
            model = probae.Autoencoder(64, LATENTS, HIDDEN, **options)
            probae.fit(model, train, steps=(len(HIDDEN) + 2) * steps, seed=seed, **QUIET)
        elif way == "pretrained":
            options = {"likelihood": head, "activation": activation, "steps": steps, "seed": seed}
            model = probae.pretrain(train, (*HIDDEN, LATENTS), **options, **QUIET)
        else:
            model = copy.deepcopy(found["pretrained"][0])
            probae.fit(model, train, steps=steps, seed=seed, **QUIET)
        before = found["pretrained"][1] if way == "pretrained, then jointly" else 0.0
        found[way] = model, before + time.perf_counter() - start
    return found


def accuracy(encoder: nn.Module, latents: int, x: Tensor, y: Tensor, test: Tensor, labels: Tensor) -> float:
    """Of a classifier that starts at an encoder, all of it trained for 100 steps."""
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(encoder), nn.Linear(latents, 10)).train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(test).argmax(1) == labels).float().mean())


def encoders(x: Tensor, steps: int, seed: int) -> dict[str, nn.Module]:
    """64-128-32 encoders, by how they start."""
    options = {"likelihood": probae.likelihoods.Normal(4.0), "seed": seed}
    denoising = Reconstruction(corruption=probae.corruption.Gaussian(4.8))
    made = {
        "random": probae.Autoencoder(64, 32, (128,), **options),
        "autoencoders": probae.pretrain(x, (128, 32), steps=2 * steps, **options, **QUIET),
        "denoising autoencoders": probae.pretrain(
            x, (128, 32), steps=2 * steps, objective=denoising, **options, **QUIET
        ),
    }
    with torch.no_grad():
        made["random"].initialise(x)
    return {name: model.encoder for name, model in made.items()}


def main() -> None:
    """Print both tables, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of each layer, and of joint training after it")
    options = parser.parse_args()
    digits = probae.datasets.load("digits")
    train, test = (torch.as_tensor(x, dtype=torch.float32) for x in (digits.train, digits.test))

    print("| activation | way | held-out log p(x \\| code), nats | seconds | time / scratch |")
    print("|---|---|---:|---:|---:|")
    for activation in ("relu", "sigmoid"):
        runs = [trained(train, activation, options.steps, seed) for seed in range(options.seeds)]
        for way in runs[0]:
            scores, seconds = [score(run[way][0], test) for run in runs], [run[way][1] for run in runs]
            ratios = [run[way][1] / run["jointly, from scratch"][1] for run in runs]
            print(
                f"| {activation} | {way} | {shown(scores)} | {median(seconds):.1f} | {median(ratios):.2f} |", flush=True
            )

    if digits.labels is None:
        raise RuntimeError("the digits have labels")
    y, _, labels = (torch.as_tensor(part, dtype=torch.long) for part in digits.labels)
    table: dict[str, dict[int, list[float]]] = {}
    for seed in range(options.seeds):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        starts = encoders(train, options.steps, seed)
        for count in LABELS:
            few = order[:count]
            for name, encoder in starts.items():
                value = accuracy(encoder, 32, train[few], y[few], test, labels)
                table.setdefault(name, {}).setdefault(count, []).append(value)
            plain = LogisticRegression(max_iter=1000).fit(train[few] / 16, y[few])
            table.setdefault("logistic regression of pixels", {}).setdefault(count, []).append(
                plain.score(test / 16, labels)
            )
    print("\n| the classifier's encoder starts as | " + " | ".join(f"{count} labels" for count in LABELS) + " |")
    print("|---|" + "---:|" * len(LABELS))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(shown(row[count], 3) for count in LABELS) + " |")


if __name__ == "__main__":
    main()
