"""Held-out log p(x) beside published figures: binarized MNIST, the protocol of Burda et al. (2016), four binary data sets.

    PROBAE_DATA=... python benchmarks/published.py mnist --folder runs
    PROBAE_DATA=... python benchmarks/published.py burda --folder runs --stages 8 --objective iwae --k 50
    PROBAE_DATA=... python benchmarks/published.py densities

`mnist` trains one network for minutes on a CPU, on the fixed binarization, and estimates log p(x) of its test images in ever
better ways: what separates them is the estimator alone. `burda` is the published protocol: eight stages, the i-th of 3^(i-1)
passes, MNIST binarised anew at every access, test images too; a stage has a checkpoint folder of its own, so that a run that
was stopped goes on where it was and finished stages are only read (Adam starts afresh in each). `densities` has their
published splits; networks keep the parameters of the best importance-weighted bound on validation data, mixtures their size
and smoothing, and the model that is reported is chosen on the same data.

The network is Burda's in all of it but the posterior's scale, which is a softplus: 784-200-200-50 and back, tanh, weights
Glorot-uniform, output bias at the logit of the training mean. Tables are markdown, nats per datum: "± Monte Carlo" is what
other draws for the same data would change, "± total" the standard error over all data. Small settings to see it run:

    published.py mnist --passes 1 --images 500 --rows 20 --effort 0.02
    published.py burda --folder runs --stages 3 --train 2000 --images 100 --particles 100
    published.py densities --sets nltcs --steps 200 --rows 50 --particles 100
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import probae
from probae.objectives import ELBO, IWAE, Objective

BURDA = {  # one stochastic layer of 50, k = 1, 5, 50; log p(x) by 5,000 samples
    "fixed": {"iwae": {1: -88.71, 5: -87.63, 50: -87.10}},
    "dynamic": {"vae": {1: -86.76, 5: -86.47, 50: -86.35}, "iwae": {1: -86.76, 5: -85.54, 50: -84.78}},
}
BY_HAND = {  # this network and protocol in plain PyTorch, one seed, 544 s on one thread; measured by this project
    "all test images": {"ELBO": -96.26, "IWAE, 500 particles": -91.40},
    "100 test images": {
        "ELBO": -96.61,
        "IWAE, 50 particles": -92.27,
        "IWAE, 500 particles": -91.49,
        "IWAE, 5,000 particles": -91.06,
        "refined, 5,000 particles": -90.36,
        "AIS, 500 distributions, 8 chains": -90.60,
        "AIS, 2,000 distributions, 4 chains": -90.25,
    },
}
WU = {  # Wu et al. (2017), the binary decoder of an IWAE: what the estimator alone makes of one model
    "IWAE, 10,000 particles": -86.90,
    "IWAE, 100,000 particles": -86.46,
    "AIS, 1,000 distributions, 16 chains": -85.68,
    "AIS, 10,000 distributions, 16 chains": -85.62,
}
PUBLISHED = {  # what could be looked up alone: nothing for plants
    "nltcs": ("sum-product network in the tests of RPCircuits.jl: −19,582.0 over 3,236 rows", -6.05),
    "dna": ("Uria, Murray & Larochelle (2014), as listed by wizwand.com, on their splits", -82.31),
    "mushrooms": ("Uria, Murray & Larochelle (2014), as listed by wizwand.com, on their splits", -9.68),
}
SIZES = {"nltcs": (10, 64), "plants": (20, 128), "dna": (10, 64), "mushrooms": (20, 128)}  # latents, hidden units


# -- tables and evidence -------------------------------------------------------------------------------------------------


def line(*cells: Any) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def heading() -> None:
    """Print the machine, and the table's head."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}, torch {torch.__version__}\n")
    line("model and data", "estimator", "log p(x)", "± Monte Carlo", "± total", "seconds")
    line("---", "---", "---:", "---:", "---:", "---:")


def estimated(what: str, how: str, model: probae.Pair, x: Tensor, method: str, **options: Any) -> probae.Evidence:
    """Estimate log p(x), and print the line of it."""
    begun = time.perf_counter()
    found = probae.log_evidence(model, x, method, seed=1, **options)
    seconds = f"{time.perf_counter() - begun:.1f}"
    if found.estimators is not None:
        how += ": " + ", ".join(
            f"{found.estimators.count(estimator):,} by {estimator}" for estimator in sorted(set(found.estimators))
        )
    line(what, how, f"{found.mean:.2f}", f"{found.mean_mc_stderr:.3f}", f"{found.mean_stderr:.2f}", seconds)
    return found


def published(what: str, how: str, value: float) -> None:
    """Print the line of a figure of others."""
    line(f"*{what}*", how, f"{value:.2f}", "", "", "")


def few(x: Tensor, rows: int) -> Tensor:
    """Rows by a seeded permutation."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:rows]]


# -- the network of Burda et al. -----------------------------------------------------------------------------------------


class Burda(probae.VAE):
    """784-200-200-50, started at the data's mean. Grey rows are taken for rounded ones; rows of 0 and 1 stay as they are."""

    def __init__(self, train: Tensor, seed: int = 0):
        torch.manual_seed(seed)
        layers = [nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100)]
        head = probae.likelihoods.Bernoulli()
        super().__init__(784, 50, (200, 200), likelihood=head, activation="tanh", encoder=nn.Sequential(*layers))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.initialise(train)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        super().model(x.round())

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        super().guide(x.round())


class Rebinarised(Objective):
    """An objective of grey values' binarisations, drawn whenever it is asked for."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective

    def forward(self, pair: probae.Pair, batch: Tensor, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        return self.objective(pair, torch.bernoulli(batch), size, step)


# -- the parts -----------------------------------------------------------------------------------------------------------


def mnist(options: argparse.Namespace) -> None:
    """Fixed binarization: minutes of training, and log p(x) of the test images by all estimators."""
    data = probae.datasets.load("binarized_mnist")
    train = torch.from_numpy(data.train).float()
    test = few(torch.from_numpy(data.test).float(), options.images)
    model = Burda(train, options.seed)
    steps = options.passes * len(train) // 100
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.1 ** (1 / steps))
    folder = None if options.folder is None else Path(options.folder) / "mnist"
    run = probae.fit(
        model, train, steps=steps, batch_size=100, lr=1e-3, scheduler=decay, seed=options.seed, checkpoint=folder
    )
    print(f"{options.passes} passes, batches of 100, Adam 1e-3 to 1e-4: {run}")
    print(f"{probae.diagnose(model, few(test, 1000), particles=25).active_count} of 50 latents are active", flush=True)

    def scaled(number: int, least: int) -> int:
        return max(least, round(number * options.effort))

    heading()
    whole = f"{len(test):,} test images"
    estimated(whole, "ELBO", model, test, "elbo", particles=scaled(50, 2))
    k = scaled(500, 10)
    estimated(whole, f"IWAE, {k:,} particles", model, test, "iwae", particles=k)
    rows = few(test, options.rows)
    subset = f"{len(rows):,} of them"
    estimated(subset, "ELBO", model, rows, "elbo", particles=scaled(5000, 50))
    for k in (scaled(50, 10), scaled(500, 25), scaled(5000, 50)):
        bound = estimated(subset, f"IWAE, {k:,} particles", model, rows, "iwae", particles=k)
    refined = estimated(subset, f"refined, {k:,} particles", model, rows, "refined", particles=k)
    best = {"refined": refined}
    for length, chains in ((500, 8), (2000, 4)):
        length = scaled(length, 10)
        how = f"AIS, {length:,} distributions, {chains} chains"
        best[how] = estimated(subset, how, model, rows, "ais", chains=chains, distributions=length)
    for what, values in BY_HAND.items():
        for how, value in values.items():
            published(f"by hand, {what}", how, value)
    for k, value in BURDA["fixed"]["iwae"].items():
        published("Burda et al. (2016), fixed binarization, 1 layer", f"IWAE trained with k = {k}", value)
    for how, value in WU.items():
        published("Wu et al. (2017), binary IWAE decoder", how, value)
    print()
    for how, found in best.items():
        more = found.values - bound.values
        error = float(more.std()) / math.sqrt(len(more))
        print(f"- {how}, less IWAE of {bound.particles:,} particles, paired: {float(more.mean()):+.2f} ± {error:.2f}")


def burda(options: argparse.Namespace) -> None:
    """The published protocol, stage by stage."""
    data = probae.datasets.load("mnist")
    grey = torch.cat([torch.from_numpy(part) for part in (data.train, data.validation)]).float() / 255
    grey = few(grey, options.train)
    test = few(torch.from_numpy(data.test).float() / 255, options.images)
    test = torch.bernoulli(test, generator=torch.Generator().manual_seed(options.seed))
    model = Burda(grey, options.seed)
    inner = ELBO(options.k) if options.objective == "vae" else IWAE(options.k)
    folder = Path(options.folder) / f"burda-{options.objective}-{options.k}"
    adam = partial(torch.optim.Adam, eps=1e-4, fused=True)
    a_pass = len(grey) // 20
    for stage in range(1, options.stages + 1):
        passes, rate = 3 ** (stage - 1), 1e-4 * round(10 ** (1 - (stage - 1) / 7), 1)
        given: dict[str, Any] = {"objective": Rebinarised(inner), "batch_size": 20, "lr": rate, "optimizer": adam}
        given |= {"seed": options.seed + stage, "every": a_pass, "checkpoint": folder / f"stage-{stage}"}
        run = probae.fit(model, grey, steps=passes * a_pass, **given)
        if run.stopped != "steps":
            raise SystemExit(f"stage {stage} was {run.stopped}: the same command goes on with it")
        print(f"stage {stage}, passes: {passes}, rate: {rate:.1e}: {run}", flush=True)

    heading()
    what = f"{options.objective.upper()} trained with k = {options.k}, {options.stages} of 8 stages"
    how = f"IWAE, {options.particles:,} particles"
    estimated(f"{what}, {len(test):,} test images", how, model, test, "iwae", particles=options.particles)
    for objective, values in BURDA["dynamic"].items():
        for k, value in values.items():
            what = f"Burda et al. (2016), {objective.upper()} trained with k = {k}, 1 layer"
            published(what, "IWAE, 5,000 particles", value)


class Best:
    """A callback that keeps the parameters whose bound on validation data is best, and ends training long after them."""

    def __init__(self, validation: Tensor, patience: int):
        self.validation, self.patience = validation, patience
        self.value, self.state, self.since = -math.inf, {}, 0

    def __call__(self, run: probae.Run) -> bool:
        value = probae.log_evidence(run.model, self.validation, "iwae", particles=100).mean
        self.since += 1
        if value > self.value:
            self.value, self.state, self.since = value, copy.deepcopy(run.model.state_dict()), 0
        return self.since >= self.patience


def networks(name: str, data: Any, parts: Sequence[Tensor], options: argparse.Namespace) -> dict[str, probae.Pair]:
    """Models that are trained in steps, each stopped by its importance-weighted bound on validation data."""
    train, validation, _ = parts
    sparse = partial(probae.SparseAutoencoder, posterior="laplace", learned_rate=True)
    vamp = probae.priors.VampPrior(SIZES[name][0], components=50)
    ways: dict[str, tuple[Callable[..., probae.Pair], Objective]] = {
        "VAE": (probae.VAE, ELBO()),
        f"VAE by IWAE, K = {options.k}": (probae.VAE, IWAE(options.k)),
        f"VAE with a VampPrior by IWAE, K = {options.k}": (partial(probae.VAE, prior=vamp), IWAE(options.k)),
        "sparse VAE (Laplace)": (sparse, ELBO()),
    }
    found = {}
    for way, (make, objective) in ways.items():
        torch.manual_seed(options.seed)
        model = make(data.features, *SIZES[name], likelihood=probae.likelihoods.Bernoulli())
        best, every = Best(validation, patience=6), max(1, options.steps // 25)
        given = {"objective": objective, "steps": options.steps, "every": every, "seed": options.seed}
        run = probae.fit(model, train, scheduler="cosine", callbacks=[best], **given)
        model.load_state_dict(best.state)
        found[f"{way}, {run.records[-1]['step']:,} steps"] = model
    return found


def mixtures(data: Any, parts: Sequence[Tensor], options: argparse.Namespace) -> dict[str, probae.Pair]:
    """Mixtures fitted by EM; the number of classes and the smoothing are those of the best log p(x) of validation data."""
    train, validation, _ = parts
    kinds = {"latent classes": probae.models.LatentClass, "mixture of trees": probae.models.MixtureOfTrees}
    found = {}
    for kind, make in kinds.items():
        best, value = None, -math.inf
        fits = [(classes, smoothing, 1) for classes, smoothing in itertools.product(options.classes, options.smoothing)]
        for classes, smoothing, parts in fits:  # which grow while they are gone through
            model = make(data.features, parts * classes, seed=options.seed).double()
            given = {"smoothing": smoothing, "restarts": 1, "seed": options.seed, "tolerance": 1e-3}
            model.maximum_likelihood(
                train, **given, max_iterations=options.iterations, **({} if parts == 1 else {"parts": parts})
            )
            held = probae.log_evidence(model, validation, "exact").mean
            if held > value:
                of = f"{classes}" if parts == 1 else f"{parts} × {classes}"
                best, value, size = (f"{kind}: {of}, smoothing {smoothing:g}", model), held, (classes, smoothing)
            if (classes, smoothing, parts) == fits[-1] and parts == 1 and kind == "mixture of trees":
                fits.append((*size, options.parts))
        assert best is not None
        found[best[0]] = best[1]
    return found


def densities(options: argparse.Namespace) -> None:
    """Four binary data sets: models of the catalogue, and the one of them that validation data choose."""
    heading()
    for name in options.sets:
        data = probae.datasets.load(name)
        parts = [torch.from_numpy(x).float() for x in (data.train, data.validation, data.test)]
        test = few(parts[2], options.rows or len(parts[2]))
        independent = probae.Independent(data.features, classes=2).maximum_likelihood(parts[0])
        models = {"independent Bernoullis": independent, **mixtures(data, parts, options)}
        if not options.exact:
            models |= networks(name, data, parts, options)
        held, chosen = {}, {"particles": options.particles, "estimators": tuple(options.estimators)}
        for what, model in models.items():
            method = "exact" if probae.adapter.as_pair(model).tractable else "iwae"
            few_particles = {} if method == "exact" else {"particles": 100}
            held[what] = probae.log_evidence(model, parts[1], method, seed=2, **few_particles).mean
            if method == "exact":
                estimated(f"{name}, {what}", "exact", model, test, "exact")
            else:
                estimated(f"{name}, {what}", "auto", model, test, "auto", **chosen)
        best = max(held, key=held.__getitem__)
        print(f"| {name}: validation data choose **{best}** ({held[best]:.2f} on them) | | | | | |", flush=True)
        if name in PUBLISHED:
            what, value = PUBLISHED[name]
            published(f"{name}, {what}", "exact", value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = parts.add_parser(run.__name__, help=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--seed", type=int, default=0)
        return added

    fixed = part(mnist)
    fixed.add_argument("--folder", help="for checkpoints: the same command goes on from the last one")
    fixed.add_argument("--passes", type=int, default=139, help="through the 50,000 training images")
    fixed.add_argument("--images", type=int, default=10_000, help="of the test set, for the first two lines")
    fixed.add_argument("--rows", type=int, default=100, help="of these, for the others")
    fixed.add_argument("--effort", type=float, default=1.0, help="a factor of all particles and distributions")

    protocol = part(burda)
    protocol.add_argument("--folder", required=True, help="for checkpoints, a folder for each stage")
    protocol.add_argument("--stages", type=int, default=3, choices=range(1, 9), metavar="1-8", help="of the eight")
    protocol.add_argument("--objective", choices=["vae", "iwae"], default="vae")
    protocol.add_argument("--k", type=int, default=1, help="samples in training: 1, 5 and 50 are published")
    protocol.add_argument("--train", type=int, default=60_000, help="training images")
    protocol.add_argument("--images", type=int, default=10_000, help="test images")
    protocol.add_argument("--particles", type=int, default=5_000)

    binary = part(densities)
    binary.add_argument("--sets", nargs="+", choices=SIZES, default=list(SIZES))
    binary.add_argument("--steps", type=int, default=20_000, help="at most so many, fewer once validation gets worse")
    binary.add_argument("--k", type=int, default=20, help="particles of the IWAE objective")
    binary.add_argument("--exact", action="store_true", help="only models whose log p(x) is exact: minutes")
    binary.add_argument("--classes", nargs="+", type=int, default=[1, 6, 20, 40], help="of the mixtures")
    binary.add_argument("--smoothing", nargs="+", type=float, default=[1.0, 10.0, 100.0], help="of the mixtures")
    binary.add_argument("--parts", type=int, default=8, help="mixtures of trees of the best size that are averaged")
    binary.add_argument("--iterations", type=int, default=30, help="the most EM steps of a mixture")
    binary.add_argument("--rows", type=int, help="of the test set; all by default")
    binary.add_argument("--particles", type=int, default=1_000)
    binary.add_argument(
        "--estimators", nargs="+", default=["iwae", "refined", "ais"], help='what "auto" may choose from'
    )

    options = parser.parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
