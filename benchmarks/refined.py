"""What refinement costs: guides for 100 data and IWAE-5000 from them, probae and plain PyTorch at equal work, one thread.

    python benchmarks/refined.py

A Bernoulli decoder 50-200-200-784 with tanh layers. By hand it is 300 steps of Adam, of 8 draws each, on the
reparameterised ELBO of a diagonal Gaussian per datum, as tight as PyTorch allows, then 5,000 weights from it; probae takes
as many steps, and its default of 120, whose ELBO is the higher one still. Ways run by turns, in processor time; values are
nats per datum. Compilation is timed apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from evidence import clock, decoder
from torch import Tensor

import probae
from probae.evidence.refined import _WEIGHTS, Refined, Refiner
from probae.evidence.weights import prepare

STEPS, DRAWS, PARTICLES, CHUNK = 300, 8, 5000, 16
Found = tuple[float, float]


def by_hand(model: probae.VAE, x: Tensor) -> Callable[[], Found]:
    """Plain PyTorch: the refined ELBO and IWAE-5000, means over data."""
    layers = [(m.weight.detach(), m.bias.detach()) for m in model.decoder.modules() if hasattr(m, "weight")]
    with torch.no_grad():
        start = model.posterior(x).base_dist

    def log_joint(z: Tensor) -> Tensor:
        h = z
        for weight, bias in layers[:-1]:
            h = torch.tanh(F.linear(h, weight, bias))
        logits = F.linear(h, *layers[-1])
        fit = -F.binary_cross_entropy_with_logits(logits, x.expand(len(z), -1, -1), reduction="none").sum(-1)
        return fit - z.square().sum(-1) / 2

    def run() -> Found:
        torch.manual_seed(1)
        loc, log_scale = start.loc.clone().requires_grad_(), start.scale.log().requires_grad_()
        adam = torch.optim.Adam([loc, log_scale], lr=0.05, fused=True)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        for _ in range(STEPS):
            noise = torch.randn(DRAWS, *loc.shape, device=x.device)
            loss = -log_joint(loc + log_scale.exp() * noise).mean(0).sum() - log_scale.sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            decay.step()
        log_w = []
        with torch.no_grad():
            scale = log_scale.exp()
            for _ in range(0, PARTICLES, CHUNK):
                noise = torch.randn(CHUNK, *loc.shape, device=x.device)
                log_q = -(noise.square() / 2 + log_scale).sum(-1)
                log_w.append(log_joint(loc + scale * noise) - log_q)
        log_w = torch.cat(log_w)[:PARTICLES]
        return float(log_w.mean()), float((log_w.logsumexp(0) - math.log(PARTICLES)).mean())

    return run


def with_probae(
    model: probae.VAE, x: Tensor, compile: bool | str, covariance: str, steps: int = STEPS
) -> Callable[[], Found]:
    """``log_evidence(method="refined")`` over graphs that are kept."""
    pair, batch, signature = prepare(model, x)
    options = Refined(covariance=covariance, steps=steps, draws=DRAWS)
    refiner = Refiner(pair, batch, signature, options, 1, compile, PARTICLES)

    def run() -> Found:
        found = refiner.weighed(batch, refiner.fitted(batch), PARTICLES, _WEIGHTS)
        return found.elbo.mean, found.evidence.mean

    return run


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flat", action="store_true", help="interpreted graphs too, and a full covariance")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = decoder()
    ways = {
        "plain PyTorch": by_hand(model, x),
        "probae, compiled, as many steps": with_probae(model, x, True, "diagonal"),
        "probae, compiled": with_probae(model, x, True, "diagonal", None),
    }
    if options.flat:
        ways["probae, flat"] = with_probae(model, x, "flat", "diagonal")
        ways["probae, compiled, full covariance"] = with_probae(model, x, True, "full")
    values = {}
    for name, way in ways.items():
        started = time.perf_counter()
        values[name] = way()
        print(f"{name}: first run in {time.perf_counter() - started:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            started = clock()
            way()
            times[name].append(clock() - started)
    print("\n| way | seconds | to plain PyTorch | refined ELBO | IWAE-5000 |\n|---|---|---|---|---|")
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(found, times["plain PyTorch"], strict=True))
        elbo, iwae = values[name]
        print(f"| {name} | {statistics.median(found):.1f} | {ratio:.2f} | {elbo:.3f} | {iwae:.3f} |", flush=True)


if __name__ == "__main__":
    main()
