"""What several processes gain: training steps and bounds by one and by all, what the exchange costs, what it predicts.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 4 --bandwidth 300 --latency 5   # GB/s and us of another link

Starts itself by torchrun: two processes of one thread each, joined by gloo, or one for each GPU, joined by NCCL. In each
round, by turns, the first process works alone (the others wait, asleep), each works for itself, and all work together; a
step is that of `probae.fit`, of a VAE 784-200-200-50. Times are medians over rounds, ratios medians of the rounds' ratios.

The exchange of a step is one all-reduce of all gradients and the loss. The same message is timed alone, beside messages of
other sizes, and latency and bandwidth of the link are fitted to these. A step by P processes is then taken to be

    t(P) = c(rows each) + 2 (P - 1) latency + 2 (P - 1) / P bytes / bandwidth        (a ring; 2 log2(P) hops in a tree)

with c the time of a step of so many rows, measured by one process while the others sleep, with all that a step of many
holds (gradients are packed and unpacked) but the exchange itself. Whatever is printed for more processes than ran is this
formula's extrapolation: to machines with a device like the measured one for each process, and the link measured or given.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peers
import torch
from torch import Tensor

import probae
from probae.adapter import as_pair
from probae.data.streams import InMemory
from probae.runtime.processes import ALONE, Processes, local_device, processes
from probae.runtime.seeding import seeded
from probae.training.optimizers import OPTIMIZERS
from probae.training.steps import Steps

CASE = peers.CASES["mnist"]
MODES: dict[str, bool | str] = {"flat": "flat", "captured" if peers.GPU else "compiled": True}
PREDICTED = (8, 64)
Times = dict[Any, np.ndarray]
Cases = list[tuple[str, int]]


class Turn(NamedTuple):
    """What is timed: work, by the first process or by all at once, and how often it is done before it is as it stays."""

    work: Callable[[], Any]
    all: bool
    warm: int = 5


class Silent(Processes):
    """Processes that hear nothing of each other: all that a step of many holds, but the exchange."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, as if the others' were zero."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """As if the others gave the same."""
        return [value] * self.count


def stepping(data: Tensor, batch: int, mode: str, team: Processes) -> Callable[[], None]:
    """A step of `probae.fit` on a minibatch of which each process has its rows."""
    pair, objective = as_pair(CASE.pair()).to(data.device).train(), CASE.objective()
    with seeded(0), torch.no_grad():
        pair.initialise(data)
    adam = OPTIMIZERS["adam"](list(pair.parameters()), peers.LR)
    options = {"processes": team, "compile": MODES[mode], "asked": 10**6, "precision": "float32"}
    take = Steps(pair, objective, adam, None, [], len(data), **options)
    stream = iter(InMemory(data, batch, 0, team))

    def step() -> None:
        loss = take(next(stream))
        if loss.device.type == "cpu" and not math.isfinite(loss):
            raise FloatingPointError("the loss is not finite")
        if take.ran not in {"eager", mode}:  # the first ones are eager
            raise RuntimeError(f"the steps were to be {mode}, and are {take.ran}: {take.why}")

    return step


def by_turns(turns: dict[Any, Turn], team: Processes, rounds: int, seconds: float) -> Times:
    """Seconds that each work takes in each round, the slowest process's; a turn goes on for about so many."""

    def timed(turn: Turn, n: int) -> float:
        team.gather(None)  # all are here
        started = time.perf_counter()
        for _ in range(n if turn.all or team.first else 0):
            turn.work()
        peers.synchronise()
        return max(team.gather(time.perf_counter() - started)) / n

    counts = {}
    for key, turn in turns.items():
        timed(turn, turn.warm)
        counts[key] = max(1, round(seconds / timed(turn, turn.warm)))
    found = [{key: timed(turn, counts[key]) for key, turn in turns.items()} for _ in range(rounds)]
    return {key: np.array([times[key] for times in found]) for key in turns}


class Link(NamedTuple):
    """What lies between the processes: seconds of latency, and bytes a second."""

    latency: float
    bandwidth: float

    def exchange(self, count: int, size: int, hops: float | None = None) -> float:
        """Seconds of the all-reduce of a message, by the formula; over a ring, unless the hops are given."""
        hops = 2 * (count - 1) if hops is None else hops
        return hops * self.latency + 2 * (count - 1) / count * size / self.bandwidth


def fitted(times: dict[int, float], count: int) -> Link:
    """The link that explains the times of messages of so many bytes, by least squares of the relative errors."""
    terms = [(2 * (count - 1) / t, 2 * (count - 1) / count * size / t) for size, t in times.items()]
    latency, inverse = np.linalg.lstsq(np.array(terms), np.ones(len(terms)), rcond=None)[0]
    return Link(float(latency), float(1 / inverse))


def measured(team: Processes, options: argparse.Namespace) -> None:
    """Time all turns; the first process prints what they say."""
    count, data = team.count, CASE.data().to(team.device)
    silent = Silent(team.rank, max(2, count), team.device)
    model, x = CASE.pair().to(team.device), data[: options.data]
    size = 4 * (sum(p.numel() for p in model.parameters()) + 1)  # bytes of the exchange
    local, fewer = ({max(1, b // p) for b in options.batches for p in ps} for ps in ((1, count), PREDICTED))
    turns: dict[Any, Turn] = {}
    for mode in options.modes:
        for batch in options.batches:
            turns["alone", batch, mode] = Turn(stepping(data, batch, mode, ALONE), False)
        for rows in sorted(local | fewer):
            steps = stepping(data, rows * silent.count, mode, silent)
            turns["rows", rows, mode] = Turn(steps, False)
            if count > 1 and rows in local:
                turns["beside", rows, mode] = Turn(steps, True)
                turns["together", rows, mode] = Turn(stepping(data, rows * count, mode, team), True)
    for number in (4, 4_000, 40_000, 400_000, size, 4 * size) if count > 1 else ():
        turns["message", number] = Turn(partial(team.sum, torch.zeros(number // 4, device=team.device)), True)
    for shard in (False, True):
        settings = {"method": "iwae", "particles": options.particles, "compile": "flat", "shard": shard}
        turns["bound", shard] = Turn(partial(probae.log_evidence, model, x, **settings), shard, warm=1)
    times = by_turns(turns, team, options.rounds, options.seconds)
    if team.first:
        device = torch.cuda.get_device_name() if peers.GPU else "a thread of the CPU each"
        print(f"\n## Processes: {count}, {device}: medians of {options.rounds} rounds, times in ms")
        cases = [(mode, batch) for mode in options.modes for batch in options.batches]
        link = report(times, cases, count, size) if count > 1 else Link(math.nan, math.nan)
        given = {name: value for name in Link._fields if (value := getattr(options, name)) is not None}
        predict(times, cases, count, size, link, given)


def ms(times: np.ndarray) -> float:
    """The median of the rounds."""
    return float(np.median(times)) * 1e3


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """The median of the rounds' ratios."""
    return float(np.median(a / b))


def line(*cells: Any) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def table(*columns: str) -> None:
    """Print the head of a table."""
    print()
    line(*columns)
    line(*["---:"] * len(columns))


def report(times: Times, cases: Cases, count: int, size: int) -> Link:
    """Print what was measured; returns the link."""
    table("mode", "batch", "one process", f"{count} share it", "speed-up", f"{count} have one each", "speed-up")
    for mode, batch in cases:
        one, shared = times["alone", batch, mode], times["together", max(1, batch // count), mode]
        each = times["together", batch, mode]
        line(mode, batch, ms(one), ms(shared), ratio(one, shared), ms(each), count * ratio(one, each))

    table("mode", "rows each", "c", "side by side", "together", "all-reduce alone", "its share", "share by difference")
    reduce = times["message", size]
    for mode, rows in sorted({(mode, max(1, batch // p)) for mode, batch in cases for p in (1, count)}):
        one, beside, together = (times[way, rows, mode] for way in ("rows", "beside", "together"))
        shares = ratio(reduce, together), 1 - ratio(beside, together)
        line(mode, rows, ms(one), ms(beside), ms(together), ms(reduce), *shares)

    messages = {key[1]: ms(found) / 1e3 for key, found in times.items() if key[0] == "message"}
    link = fitted(messages, count)
    table("bytes", "all-reduce", "as fitted")
    for number, seconds in messages.items():
        line(number, seconds * 1e3, link.exchange(count, number) * 1e3)

    table("", "one process", f"{count} processes", "speed-up")
    one, all_ = times["bound", False], times["bound", True]
    line("log_evidence", ms(one), ms(all_), ratio(one, all_))
    return link


def predict(times: Times, cases: Cases, count: int, size: int, found: Link, given: dict[str, float]) -> None:
    """Print what the formula says of more processes, and of as many as ran."""
    link = found._replace(**given)
    if math.isnan(sum(link)):
        return print("\nOne process measures no link: give --latency and --bandwidth for a prediction")
    words = {name: "given" if name in given else "fitted above" for name in Link._fields}
    print("\n**Predicted**, by t(P) = c(rows each) + 2 (P - 1) latency + 2 (P - 1) / P bytes / bandwidth, with")
    print(
        f"latency {link.latency * 1e6:.3g} us ({words['latency']}), bandwidth {link.bandwidth / 1e9:.3g} GB/s", end=" "
    )
    print(f"({words['bandwidth']}), {size:,} bytes, and c as timed by one process. Over a ring (over a tree,")
    print(f"2 log2(P) hops) [measured]; beyond {count} an extrapolation, to a device like this one for each process.")
    table("mode", "batch", "P", "rows each", "c", "exchange", "speed-up, batch shared", "speed-up, a batch each")
    for mode, batch in cases:
        one = times["alone", batch, mode]
        for many in (count, *PREDICTED) if count > 1 else PREDICTED:
            rows = max(1, batch // many)
            ways = [link.exchange(many, size, hops) for hops in (None, 2 * math.log2(many))]
            shared = [ratio(one, times["rows", rows, mode] + way) for way in ways]
            each = [many * ratio(one, times["rows", batch, mode] + way) for way in ways]
            cells = ["{:.2f} ({:.2f})".format(*pair) for pair in ([way * 1e3 for way in ways], shared, each)]
            if many == count:
                cells[1] += f" [{ratio(one, times['together', rows, mode]):.2f}]"
                cells[2] += f" [{many * ratio(one, times['together', batch, mode]):.2f}]"
            line(mode, batch, many, rows, ms(times["rows", rows, mode]), *cells)


def main() -> None:
    """Start the processes; as one of them, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpus = torch.cuda.device_count()
    parser.add_argument("--processes", type=int, nargs="+", default=[gpus or 2], help="a job for each of these counts")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each turn in each round")
    parser.add_argument("--data", type=int, default=2000, help="for the bound")
    parser.add_argument("--particles", type=int, default=100, help="for the bound")
    parser.add_argument("--bandwidth", type=lambda gb: float(gb) * 1e9, help="GB/s, in place of the measured one")
    parser.add_argument("--latency", type=lambda us: float(us) / 1e6, help="us of a hop, in place of the measured one")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        torch.set_num_threads(1)
        return measured(processes(local_device()), options)
    for count in options.processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *torchrun, __file__, *sys.argv[1:]], env=environment, check=True)


if __name__ == "__main__":
    main()
