"""What a training step costs, ways of probae and its peers interleaved in one process: medians and their ratios.

    python benchmarks/steps.py --cases mnist small --threads 1 2

Every way runs a few steps in turn, round after round, so that a slow moment of the machine meets them all. The building
of a way (tracing, compilation, warm-up, with empty caches) is timed apart. Peers are in `peers.py`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from peers import CASES, DEVICE, GPU, LR, WARM_UP, WAYS, Case, Way, built, cold, evaluated, synchronise

from probae.adapter import as_pair
from probae.data.streams import InMemory
from probae.runtime.processes import ALONE
from probae.runtime.seeding import seeded
from probae.training.optimizers import OPTIMIZERS
from probae.training.steps import Steps

COLUMNS = ("matrix products", "pyro.infer.SVI", "hand-written, torch.compile", "NumPyro, jit + scan")
GPU_COLUMNS = ("matrix products", "pyro.infer.SVI", "hand-written, eager", "hand-written, CUDA graph")


def probae_steps(case: Case, compile: bool | str) -> Way:
    """The steps of `probae.fit`, with what its loop does around them."""
    data, pair, objective = case.data().to(DEVICE), as_pair(case.pair()), case.objective()
    with seeded(0), torch.no_grad():
        pair.initialise(data)
    pair.to(DEVICE).train()
    with cold():
        started = time.perf_counter()
        adam = OPTIMIZERS["adam"](list(pair.parameters()), LR)
        options = {"compile": compile, "asked": 10**6, "precision": "float32"}
        step = Steps(pair, objective, adam, None, [], len(data), processes=ALONE, **options)
        stream = iter(InMemory(data, case.batch, 0))

        def steps(n: int) -> None:
            total = torch.zeros((), device=DEVICE)
            for _ in range(n):
                loss = step(next(stream))
                if loss.device.type == "cpu" and not math.isfinite(loss):
                    raise FloatingPointError("the loss is not finite")
                total = total + loss
            synchronise()

        steps(WARM_UP)
        loss = evaluated(lambda x: objective(pair, x, len(x), step.step), data)
        return Way(steps, loss, time.perf_counter() - started)


OURS: dict[str, Callable[[Case], Way]] = {
    "probae, eager": partial(probae_steps, compile=False),
    "probae, flat": partial(probae_steps, compile="flat"),
    "probae, captured" if GPU else "probae, compiled": partial(probae_steps, compile=True),
}


def measured(ways: dict[str, Way], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds a step; each way runs for about so many seconds in each round."""
    counts = {}
    for name, way in ways.items():
        started = time.perf_counter()
        way.steps(20)
        counts[name] = max(5, int(seconds / ((time.perf_counter() - started) / 20)))
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way.steps(counts[name])
            times[name].append((time.perf_counter() - started) / counts[name] * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def table(case: Case, rounds: int, seconds: float, names: list[str]) -> None:
    """Print the table of a case: a row per way, its build, its step, and the ratio to each of the peers."""
    WAYS.update(OURS)
    ways = dict(built(case, [name for name in WAYS if not names or name in names]))
    medians = measured(ways, rounds, seconds)
    columns = [name for name in (GPU_COLUMNS if GPU else COLUMNS) if name in medians]
    sizes = "-".join(map(str, case.sizes))
    threads = f"{torch.get_num_threads()} threads" if not GPU else torch.cuda.get_device_name()
    print(f"\n**{case.name}**: {sizes}, batch {case.batch}, {threads}\n")
    print("| way | build, s | ms a step |" + "".join(f" to {name} |" for name in columns))
    print("|---|---|---|" + "---|" * len(columns))
    for name, median in medians.items():
        ratios = "".join(f" {median / medians[column]:.2f} |" for column in columns)
        print(f"| {name} | {ways[name].built:.1f} | {median:.3f} |{ratios}", flush=True)


def main() -> None:
    """Measure the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *OURS], default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way in each round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.cases:
        table(CASES[name], options.rounds, options.seconds, options.ways)


if __name__ == "__main__":
    main()
