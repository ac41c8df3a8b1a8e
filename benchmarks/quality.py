"""Time to quality: seconds of training until the validation ELBO of a VAE on binarized MNIST passes given values.

The clock runs from the start, compilation from nothing included, and stands still while the bound is estimated: by each
way itself, with the same number of draws for the same 2,000 images, the divergence in closed form. Model (784-200-200-50,
tanh, Bernoulli), starting parameters, minibatch (128) and optimizer (Adam, 1e-3) are the same for all. The ways run one
after the other, each in a fresh process with an empty cache. Needs `binarized_mnist/` in the folder that PROBAE_DATA names.

This model passes -102 after some 15,000 steps, and overfits the fixed binarization at -101 (NumPyro's run of 50,000).

    PROBAE_DATA=... python benchmarks/quality.py --steps 20000 --every 250
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import peers
import torch
from torch import Tensor

import probae
from probae.runtime.seeding import seeded

CASE = peers.CASES["mnist"]


class Record(NamedTuple):
    """Where a run stands: steps taken, seconds on the clock, validation ELBO in nats."""

    step: int
    seconds: float
    bound: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How far to train, how often to look, with how many draws for how many images, and when it is enough."""

    steps: int
    every: int
    draws: int
    images: int
    targets: tuple[float, ...]

    def bound(self, loss: Callable[[], float]) -> float:
        """The ELBO, as a mean over draws of the loss."""
        return -peers.mean_of(loss, self.draws)

    def ended(self, bound: float) -> bool:
        """Whether the last target is passed."""
        return bound > max(self.targets)


def data() -> tuple[Tensor, Tensor]:
    """Images for training and for validation."""
    dataset = probae.datasets.load("binarized_mnist")
    return torch.from_numpy(dataset.train).float(), torch.from_numpy(dataset.validation).float()


def by_probae(plan: Plan, compile: bool | str) -> list[Record]:
    """`probae.fit`, with all that it does before the first step."""
    train, validation = data()
    pair, objective, rows = CASE.pair(), CASE.objective(), validation[: plan.images].to(peers.DEVICE)
    loss = partial(peers.evaluated(lambda x: objective(pair, x, len(x), torch.zeros((), device=x.device)), rows), rows)
    records: list[Record] = []
    away = 0.0

    def look(run: probae.Run) -> bool:
        nonlocal away
        begun = time.perf_counter()
        with seeded(len(records), peers.DEVICE):
            records.append(Record(int(run.records[-1]["step"]), begun - start - away, plan.bound(loss)))
        away += time.perf_counter() - begun
        return plan.ended(records[-1].bound)

    options = {"objective": objective, "batch_size": CASE.batch, "lr": peers.LR, "progress": False}
    start = time.perf_counter()
    probae.fit(pair, train, steps=plan.steps, every=plan.every, callbacks=[look], compile=compile, **options)
    return records


def by_peer(plan: Plan, name: str) -> list[Record]:
    """A way of `peers.WAYS`."""
    train, validation = data()
    way = peers.WAYS[name](dataclasses.replace(CASE, source=lambda: train))
    seconds, records = way.built, [Record(0, way.built, -math.inf)]
    loss = partial(way.loss, validation[: plan.images])
    while records[-1].step < plan.steps and not plan.ended(records[-1].bound):
        begun = time.perf_counter()
        way.steps(plan.every)
        seconds += time.perf_counter() - begun
        records.append(Record(records[-1].step + plan.every, seconds, plan.bound(loss)))
    return records[1:]


WAYS: dict[str, Callable[[Plan], list[Record]]] = {
    **{f"probae.fit, compile={mode!r}": partial(by_probae, compile=mode) for mode in (True, "auto", "flat", False)},
    **{name: partial(by_peer, name=name) for name in peers.WAYS if name != "matrix products"},
}
COMPARED = [
    *(f"probae.fit, compile={mode!r}" for mode in (True, "auto", False)),
    "pyro.infer.SVI",
    "NumPyro, jit + scan",
]


def measured(name: str, plan: Plan) -> list[Record]:
    """One way's records, in a process of its own."""
    with peers.cold():
        return WAYS[name](plan)


def row(name: str, records: list[Record], plan: Plan) -> str:
    """A way's line of the table."""
    first = [next((f"{r.seconds:.1f}" for r in records if r.bound > target), "–") for target in plan.targets]
    early, last, best = records[0], records[-1], max(records, key=lambda r: r.bound)
    pace = (last.seconds - early.seconds) / max(1, last.step - early.step) * 1e3
    rest = [f"{early.seconds - early.step * pace / 1e3:.1f}", f"{pace:.2f}", f"{best.bound:.2f} at {best.step:,}"]
    return f"| {' | '.join([name, *first, *rest])} |"


def main() -> None:
    """Run the ways and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="at most so many, fewer once the targets are passed")
    parser.add_argument("--every", type=int, default=250, help="steps between two looks at the validation ELBO")
    parser.add_argument("--draws", type=int, default=10, help="of the latents, per look and image")
    parser.add_argument("--images", type=int, default=2_000, help="for validation")
    parser.add_argument("--targets", type=float, nargs="+", default=[-110.0, -105.0, -102.0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=COMPARED, metavar="WAY", help="; ".join(WAYS))
    options = parser.parse_args()
    plan = Plan(options.steps, options.every, options.draws, options.images, tuple(options.targets))

    print(f"{peers.DEVICE.type}, {torch.get_num_threads()} threads, a look every {plan.every} steps\n")
    targets = [f"s to {target:g}" for target in plan.targets]
    heads = ["way", *targets, "s before the first step", "ms per step", "best validation ELBO"]
    print(f"| {' | '.join(heads)} |\n|{'|'.join(['---'] + ['---:'] * (len(heads) - 1))}|", flush=True)
    for name in options.ways:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                print(row(name, process.submit(measured, name, plan).result(), plan), flush=True)
            except peers.Unavailable as reason:
                print(f"| {name} | {' | '.join(['–'] * (len(heads) - 2))} | skipped: {reason} |", flush=True)


if __name__ == "__main__":
    main()
