"""Training from a memory-mapped file: steps per second beside those from memory, and the peak of memory that it takes.

    python benchmarks/streaming.py --gigabytes 8 --folder /where/there/is/room

Writes a float32 .npy in blocks of seeded data (binary, with 8 common factors), or takes the one that is there, and trains a
VAE 784-200-200-50 on minibatches of 128 from ``numpy.load(file, mmap_mode="r")``, and from its first rows as an array in
memory: each run in a fresh process, by turns. A run's steps per second are the median of its records, and leave out the
check of all data before the first step, and compilation. Targets: 0.8 of the speed from memory, a peak below 1.5 GB.

Peak resident memory is the system's count (VmHWM, the peak RSS). Pages of the file that are mapped are in it too, though
the system can take them back at any time; its anonymous part (RssAnon, looked at every 20 ms) stands beside it.

A file that fits into memory is in the page cache (warm) once it is written and checked: the table says what came from the
disk during the steps. ``--cold`` drops the file from the cache at every record (each twentieth of the steps). Needs Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import peers
import torch

import probae

CASE = peers.CASES["mnist"]
FEATURES, ROW = CASE.sizes[0], CASE.sizes[0] * 4  # bytes
MODES: dict[str, bool | str] = {"compiled": True, "flat": "flat", "eager": False}
RECORDS = 20
COLUMNS = {
    "rate": "a second",
    "ratio": "to memory",
    "before": "s before the first",
    "held": "resident at the start, GB",
    "peak": "peak resident, GB",
    "anonymous": "peak anonymous, GB",
    "disk": "from the disk, GB",
}
Found = dict[str, float]


def write(path: Path, rows: int) -> None:
    """Rows of 8 common factors and noise, 1 above a threshold and else 0; they are on the disk when it returns."""
    weight = np.random.default_rng(0).standard_normal((8, FEATURES), np.float32)
    weight *= 0.8 / np.linalg.norm(weight, axis=0)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, 8192):
            g = np.random.default_rng((1, start))
            x = 0.6 * g.standard_normal((min(8192, rows - start), FEATURES), np.float32)
            x += g.standard_normal((len(x), 8), np.float32) @ weight
            file.write((x > 1.1264).astype("<f4").data)
        file.flush()
        os.fsync(file.fileno())


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def system(file: str, name: str) -> float:
    """What the system has counted for this process, in GB."""
    line = next(line for line in Path(f"/proc/self/{file}").read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * (1024 if line.endswith("kB") else 1) / 1e9


@contextmanager
def memory(found: Found) -> Iterator[None]:
    """Add what is resident before the block, and the peaks within."""
    found["held"], seen, ended = system("status", "VmRSS"), [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            seen.append(system("status", "RssAnon"))

    (thread := threading.Thread(target=look)).start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    found["peak"], found["anonymous"] = system("status", "VmHWM"), max(seen)


def trained(path: Path, rows: int | None, options: argparse.Namespace) -> Found:
    """A run of `probae.fit` from the file, or from its first rows in memory."""
    found: Found = {}
    marks: list[tuple[float, float]] = []

    def mark(run: probae.Run) -> None:
        reached = time.perf_counter()
        found.setdefault("disk", system("io", "read_bytes"))
        if options.cold:
            drop(path)
        marks.append((reached, time.perf_counter()))

    every = max(1, options.steps // RECORDS)
    settings = {"compile": MODES[options.mode], "callbacks": [mark], "progress": False}
    with memory(found):
        data = np.load(path, mmap_mode="r")
        data = data if rows is None else np.array(data[:rows])
        started = time.perf_counter()
        run = probae.fit(CASE.pair(), data, steps=every * RECORDS, batch_size=CASE.batch, every=every, **settings)
    found["disk"] = system("io", "read_bytes") - found["disk"]
    found["before"] = marks[0][0] - started - run.records[0]["seconds"]
    return found | {"rate": statistics.median(every / (b[0] - a[1]) for a, b in pairwise(marks))}


def bounded(path: Path, options: argparse.Namespace) -> Found:
    """`probae.log_evidence` of the file's first rows, read block by block, for a model as it starts."""
    if options.cold:
        drop(path)
    found: Found = {"disk": -system("io", "read_bytes")}
    with memory(found):
        x, started = np.load(path, mmap_mode="r")[: options.rows], time.perf_counter()
        probae.log_evidence(CASE.pair(), x, method="iwae", particles=options.particles)
        found["rate"] = len(x) / (time.perf_counter() - started)
    return found | {"disk": found["disk"] + system("io", "read_bytes")}


def apart(function: Callable[..., Found], *arguments: object) -> Found:
    """What the function finds in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measured(path: Path, options: argparse.Namespace) -> None:
    """Run by turns, and print the table: peaks are the largest of all runs, the rest medians."""
    rows = {"training steps, from the file": None, "training steps, from memory": int(options.memory * 1e9 / ROW)}
    runs: dict[str, list[Found]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for name, runs_of in runs.items():
            runs_of.append(apart(trained, path, rows[name], options))
            print(f"{name}: {runs_of[-1]['rate']:.0f} a second", file=sys.stderr, flush=True)
    for one, other in zip(*runs.values(), strict=True):
        one["ratio"] = one["rate"] / other["rate"]
    if options.rows:
        runs[f"data, IWAE-{options.particles} of the first {options.rows:,}"] = [apart(bounded, path, options)]

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cache = "dropped at every record" if options.cold else "as writing and check left it, warm where the file fits"
    print(f"\n{path.stat().st_size / 1e9:.2f} GB of data, {total:.0f} GB of memory, {torch.get_num_threads()} threads,")
    print(f"{options.mode}; page cache: {cache}\n\n| | {' | '.join(COLUMNS.values())} |\n|---|{'---:|' * len(COLUMNS)}")
    for name, found in runs.items():
        summary = {c: max if "peak" in COLUMNS[c] else statistics.median for c in COLUMNS if c in found[0]}
        cells = [f"{summary[c](run[c] for run in found):.3g}" if c in summary else "–" for c in COLUMNS]
        print(f"| {' | '.join([name, *cells])} |")
    print("\nTargets, from the file: 0.8 of the speed from memory, a peak below 1.5 GB")


def main() -> None:
    """Write the file, measure, and remove it; one that was there is taken as it is, and left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--memory", type=float, default=0.2, help="GB of the array in memory")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir(), help="for the file")
    parser.add_argument("--keep", action="store_true", help="leave the file there")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache at every record")
    parser.add_argument("--mode", choices=MODES, default="compiled")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000, help="for the bound; 0 leaves it out")
    parser.add_argument("--particles", type=int, default=100)
    options = parser.parse_args()
    path = options.folder / f"rows-{options.gigabytes:g}GB.npy"
    keep = options.keep or path.exists()
    try:
        if not path.exists():
            write(path, int(options.gigabytes * 1e9 / ROW))
        measured(path, options)
    finally:
        if not keep:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
