"""What annealed importance sampling costs: probae, plain PyTorch and BlackJAX's tempered SMC at equal work, one thread.

    python benchmarks/evidence.py

A Bernoulli decoder 50-200-200-784 with tanh layers, 100 data, 8 chains each; a transition is a trajectory of 10 leapfrog
steps for all of them. The plain version is written as tightly as PyTorch allows: the gradients of prior and likelihood are
kept apart, so that a new β needs no new one, and a transition 10 evaluations; BlackJAX needs 11. The matrix products of these
evaluations alone, by torch, stand beside it: they bound what any way of writing it can save. All take the same β and step
sizes, in rounds by turns. On the CPU times are those of the processor, which other load changes least. Then comes
the cost of whole runs, pilot included, as data, chains and distributions double.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import torch
import torch.nn.functional as F
from torch import Tensor

import probae
from probae.evidence.ais import AIS, Annealer
from probae.evidence.weights import prepare
from probae.graphs.graph import unvalidated
from probae.runtime.seeding import evaluating

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DATA, CHAINS, DISTRIBUTIONS, LEAPFROG = 100, 8, 500, 10


def clock() -> float:
    """Seconds, when all that was asked for is done."""
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def decoder() -> tuple[probae.VAE, Tensor]:
    """The model and data that it drew."""
    torch.manual_seed(0)
    head = probae.likelihoods.Bernoulli()
    model = probae.VAE(784, 50, (200, 200), likelihood=head, activation="tanh").to(DEVICE)
    return model, probae.sample(model, DATA, seed=1)


class Plain:
    """Chains written by hand."""

    def __init__(self, model: probae.VAE, x: Tensor):
        self.layers = [(m.weight.detach(), m.bias.detach()) for m in model.decoder.modules() if hasattr(m, "weight")]
        self.x = x.expand(CHAINS, -1, -1)
        self.z = torch.randn(CHAINS, len(x), 50, device=DEVICE)
        self.fit, self.slope = self.likelihood(self.z)
        self.log_w = torch.zeros_like(self.fit)

    def likelihood(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | z) and its gradient."""
        z = z.requires_grad_()
        h = z
        for weight, bias in self.layers[:-1]:
            h = torch.tanh(F.linear(h, weight, bias))
        logits = F.linear(h, *self.layers[-1])
        fit = -F.binary_cross_entropy_with_logits(logits, self.x, reduction="none").sum(-1)
        (slope,) = torch.autograd.grad(fit.sum(), z)
        z.requires_grad_(False)
        return fit.detach(), slope

    def step(self, beta: float, change: float, size: Tensor) -> None:
        """Weigh, then move at β."""
        self.log_w += change * self.fit
        size = size[:, None]
        momentum = torch.randn_like(self.z)
        z, moved, slope = self.z, momentum, self.slope
        for _ in range(LEAPFROG):
            moved = moved + size / 2 * (beta * slope - z)
            z = z + size * moved
            fit, slope = self.likelihood(z)
            moved = moved + size / 2 * (beta * slope - z)
        before = beta * self.fit - (self.z.square() + momentum.square()).sum(-1) / 2
        after = beta * fit - (z.square() + moved.square()).sum(-1) / 2
        accepted = torch.rand_like(before).log() < after - before
        self.z = torch.where(accepted[..., None], z, self.z)
        self.slope = torch.where(accepted[..., None], slope, self.slope)
        self.fit = torch.where(accepted, fit, self.fit)


def by_hand(model: probae.VAE, x: Tensor, betas: Tensor, sizes: Tensor) -> Callable[[int], None]:
    """Plain PyTorch, for so many transitions from the middle of the path on."""
    plain, at = Plain(model, x), betas[:, 0].tolist()

    def run(n: int) -> None:
        for t in range(DISTRIBUTIONS // 2, DISTRIBUTIONS // 2 + n):
            plain.step(at[t], at[t] - at[t - 1], sizes[t])

    return run


def with_probae(
    model: probae.VAE, x: Tensor, betas: Tensor, sizes: Tensor, compile: bool | str
) -> Callable[[int], None]:
    """The transitions of ``log_evidence(method="ais")``; the memory of a block is what it takes by default."""
    options = AIS(chains=CHAINS, distributions=DISTRIBUTIONS, leapfrog=LEAPFROG)
    annealer = Annealer(*prepare(model, x), options, 0, compile)
    rows = x.split(annealer.rows)
    with evaluating(model), unvalidated():
        starts = [annealer.start("prior", part) for part in rows]
        points = [annealer.on("prior", u, part).at(u) for u, part in zip(starts, rows, strict=True)]
    log_w = [torch.zeros_like(point.base, dtype=torch.float64) for point in points]

    def run(n: int) -> None:
        with evaluating(model), unvalidated():
            for i, part in enumerate(rows):
                chains, place = annealer.on("prior", starts[i], part), slice(i * annealer.rows, (i + 1) * annealer.rows)
                for t in range(DISTRIBUTIONS // 2, DISTRIBUTIONS // 2 + n):
                    log_w[i] += (betas[t, place] - betas[t - 1, place]) * points[i].ratio.double()
                    beta = betas[t, place].to(x.dtype)
                    points[i], _ = chains.move(points[i], beta, sizes[t, place].contiguous())

    return run


def with_blackjax(model: probae.VAE, x: Tensor, betas: Tensor, sizes: Tensor) -> Callable[[int], None]:
    """BlackJAX's tempered SMC: a transition is a step of its tempering, resampling included."""
    import blackjax
    import jax
    import jax.numpy as jnp
    from blackjax.smc import extend_params, resampling

    layers = [(m.weight.detach(), m.bias.detach()) for m in model.decoder.modules() if hasattr(m, "weight")]
    params = [(jnp.asarray(w.cpu().numpy().T), jnp.asarray(b.cpu().numpy())) for w, b in layers]
    data = jnp.asarray(x.cpu().numpy())
    path, size = jnp.asarray(betas[:, 0].cpu().numpy(), jnp.float32), jnp.asarray(sizes.mean(1).cpu().numpy())

    def log_prior(z):
        return -(z**2).sum() / 2

    def log_likelihood(x, z):
        h = z
        for weight, bias in params[:-1]:
            h = jnp.tanh(h @ weight + bias)
        logits = h @ params[-1][0] + params[-1][1]
        return (x * logits - jax.nn.softplus(logits)).sum()

    def temper(x, key, state, beta, size):
        parameters = {"step_size": size, "inverse_mass_matrix": jnp.ones(50), "num_integration_steps": LEAPFROG}
        smc = blackjax.tempered_smc(
            log_prior,
            partial(log_likelihood, x),
            blackjax.hmc.build_kernel(),
            blackjax.hmc.init,
            extend_params(parameters),
            resampling.systematic,
            num_mcmc_steps=1,
        )
        return smc.step(key, state, beta)[0]

    @jax.jit
    def steps(state, key, at):
        def one(carry, beta_size):
            state, key = carry
            key, mine = jax.random.split(key)
            keys = jax.random.split(mine, len(data))
            return (jax.vmap(temper, (0, 0, 0, None, None))(data, keys, state, *beta_size), key), None

        return jax.lax.scan(one, (state, key), at)[0]

    z = jax.random.normal(jax.random.key(0), (len(data), CHAINS, 50))
    init = blackjax.tempered_smc(log_prior, log_prior, None, None, {}, resampling.systematic, num_mcmc_steps=1).init
    held = [jax.vmap(init)(z), jax.random.key(1)]

    def run(n: int) -> None:
        middle = slice(DISTRIBUTIONS // 2, DISTRIBUTIONS // 2 + n)
        held[:] = steps(*held, (path[middle], size[middle]))
        jax.block_until_ready(held[0].particles)

    return run


def products(model: probae.VAE, x: Tensor) -> Callable[[int], None]:
    """The matrix products of a transition alone, by torch: what no way of writing it saves."""
    weights = [m.weight.detach() for m in model.decoder.modules() if hasattr(m, "weight")]
    forth = [torch.randn(CHAINS * len(x), w.shape[1], device=DEVICE) for w in weights]
    back = [torch.randn(CHAINS * len(x), w.shape[0], device=DEVICE) for w in weights]

    def run(n: int) -> None:
        for _ in range(n * LEAPFROG):
            for weight, a, b in zip(weights, forth, back, strict=True):
                torch.mm(a, weight.mT)
                torch.mm(b, weight)

    return run


def by_turns(ways: dict[str, Callable[[int], None]], rounds: int, each: int) -> dict[str, list[float]]:
    """Milliseconds of a transition of each way, in rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(each)
    for _ in range(rounds):
        for name, way in ways.items():
            started = clock()
            way(each)
            times[name].append((clock() - started) / each * 1e3)
    return times


def growth(model: probae.VAE, x: Tensor) -> None:
    """Print what whole runs cost as each of their sizes doubles."""
    print("\n| data | chains | distributions | seconds | µs for each of their products |\n|---|---|---|---|---|")
    probae.log_evidence(model, x[:50], "ais", chains=4, distributions=2, pilot=1, compile="flat")
    for data, chains, distributions in ((50, 4, 50), (100, 4, 50), (50, 8, 50), (50, 4, 100), (100, 8, 100)):
        started = clock()
        sizes = {"chains": chains, "distributions": distributions, "pilot": distributions // 2}
        probae.log_evidence(model, x[:data], "ais", **sizes, compile="flat")
        taken = clock() - started
        product = taken / (data * chains * distributions) * 1e6
        print(f"| {data} | {chains} | {distributions} | {taken:.1f} | {product:.0f} |", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", type=int, default=5, help="transitions of each way in each round")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, x = decoder()
    annealer = Annealer(*prepare(model, x), AIS(chains=CHAINS, distributions=DISTRIBUTIONS, pilot=20), 0, "flat")
    path = [block.tuned for block in annealer]
    betas, sizes = (torch.cat([getattr(t, name) for t in path], 1)[:, :DATA] for name in ("betas", "sizes"))
    given = model, x, betas, sizes
    ways = {"matrix products alone": products(model, x), "plain PyTorch": by_hand(*given)}
    ways["BlackJAX, tempered SMC"] = with_blackjax(*given)
    for name, compile in (("probae, eager", False), ("probae, flat", "flat"), ("probae, compiled", True)):
        started = time.perf_counter()
        ways[name] = with_probae(*given, compile)
        print(f"{name}: built in {time.perf_counter() - started:.1f} s", flush=True)
    times = by_turns(ways, options.rounds, options.each)
    print("\n| way | ms a transition | to plain PyTorch | to BlackJAX | to the products |\n|---|---|---|---|---|")
    for name, found in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(found, times[other], strict=True))
            for other in ("plain PyTorch", "BlackJAX, tempered SMC", "matrix products alone")
        ]
        print(f"| {name} | {statistics.median(found):.1f} | {' | '.join(f'{r:.2f}' for r in ratios)} |", flush=True)
    growth(model, x)


if __name__ == "__main__":
    main()
