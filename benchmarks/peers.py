"""The peers of probae's training step, each at its best, for six cases: what `steps.py` and `quality.py` compare with.

A `Case` is a model, its data and the size of a minibatch. A way of `WAYS` builds a case, compilation and a few warm-up
steps included, into a `Way` that trains: every step gathers a minibatch of its own at random from the data, and takes
the loss, its gradients and a step of Adam. All start from the parameters of probae's own pair and minimise the same
function, units of input and output included. "matrix products" trains nothing: it repeats the matrix products and
convolutions of one hand-written step, forward and backward.

    python benchmarks/peers.py --cases small --steps 2000

checks that they do train, and alike: it prints each way's loss before and after, beside probae's.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import probae
from probae.heads.nn import MLP, Flattened
from probae.runtime.seeding import seeded

LR, ROWS, WARM_UP = 1e-3, 20_000, 3
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LOG_TWO_PI = math.log(2 * math.pi)


class Unavailable(Exception):
    """A way that this machine cannot go, and why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data and the size of a minibatch; ``sizes`` run from the features to the latents."""

    name: str
    sizes: tuple[int, ...]
    batch: int
    make: Callable[..., probae.Pair]
    peer: type[Peer]
    binary: bool = True
    particles: int = 1
    source: Callable[[], Tensor] | None = None

    def data(self) -> Tensor:
        """Rows of 8 common factors and noise, of variance 1; binary ones are 1 above a threshold, with p = 0.13."""
        if self.source is not None:
            return self.source()
        g = torch.Generator().manual_seed(0)
        weight = F.normalize(torch.randn(8, self.sizes[0], generator=g), dim=0)
        common = torch.randn(ROWS, 8, generator=g) @ weight
        x = 0.8 * common + 0.6 * torch.randn(ROWS, self.sizes[0], generator=g)
        return (x > 1.1264).float() if self.binary else x

    def pair(self) -> probae.Pair:
        """A fresh pair of probae, with the same parameters each time."""
        with seeded(0):
            return self.make(*self.sizes)

    def objective(self) -> probae.objectives.Objective:
        """What probae minimises."""
        return probae.objectives.IWAE(self.particles) if self.particles > 1 else probae.objectives.ELBO()

    def start(self) -> tuple[Peer, Tensor]:
        """The peer's model, in the units of the data, and the data."""
        data, pair = self.data(), self.pair()
        with torch.no_grad():
            pair.initialise(data)
        return self.peer(pair, self.particles).to(DEVICE), data.to(DEVICE)


@dataclasses.dataclass(frozen=True)
class Way:
    """A training run that goes on as it is asked to.

    Attributes:
        steps: runs n steps and waits until they are done.
        loss: an estimate of the loss, nats per datum, of rows; by default of the first 500 of the data.
        built: seconds that it took to build, compilation and warm-up included, data and start excluded.
    """

    steps: Callable[[int], None]
    loss: Callable[..., float]
    built: float


# -- the models, by hand, in Pyro and in NumPyro -------------------------------------------------------------------------


class Standardised(nn.Module):
    """(x - origin) / unit."""

    def __init__(self, origin: Tensor, unit: Tensor):
        super().__init__()
        self.register_buffer("origin", origin)
        self.register_buffer("unit", unit)

    def forward(self, x: Tensor) -> Tensor:
        """x in its units."""
        return (x - self.origin) / self.unit


class Layers(nn.Sequential):
    """Layers one after the other, without what the call of a module adds."""

    def forward(self, x: Tensor) -> Tensor:
        """The last layer's output."""
        for layer in self:
            x = layer.forward(x)
        return x


def plain(network: nn.Module) -> Layers:
    """A network of probae as layers of PyTorch."""
    if isinstance(network, MLP):
        return Layers(Standardised(network.origin, network.unit), *network.layers)
    if isinstance(network, Flattened):
        return Layers(*([nn.Unflatten(-1, network.shape)] if len(network.shape) > 1 else []), *network.module)
    raise TypeError(f"expected a network of probae.nn, got {type(network).__name__}")


class Peer(nn.Module):
    """One story, told in plain PyTorch (`loss`), as Pyro programs (`model`, `guide`) and as NumPyro ones (`numpyro`)."""

    #: which of the two ELBOs is the faster
    mean_field = True

    def __init__(self, pair: Any, particles: int):
        super().__init__()
        self.particles = particles

    def loss(self, x: Tensor) -> Tensor:
        """The loss, a mean over the data."""
        raise NotImplementedError

    def model(self, x: Tensor) -> None:
        """p(x, z) in Pyro."""
        raise NotImplementedError

    def guide(self, x: Tensor) -> None:
        """q(z | x) in Pyro."""
        raise NotImplementedError

    def numpyro(self) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
        """Model and guide in NumPyro."""
        raise NotImplementedError


class VAE(Peer):
    """A Bernoulli variational autoencoder, by the ELBO or, with several particles, by the importance-weighted bound."""

    def __init__(self, pair: Any, particles: int):
        super().__init__(pair, particles)
        self.latents, self.floor, self.shift = pair.latents, pair.code.floor, math.log(math.e - 1)
        self.encoder, self.decoder = plain(pair.encoder), plain(pair.decoder)
        self.register_buffer("origin", pair.head.origin)
        self.register_buffer("zero", torch.zeros(self.latents))

    def code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale of q(z | x)."""
        loc, raw = self.encoder(x).chunk(2, -1)
        return loc, F.softplus(raw + self.shift) + self.floor

    def loss(self, x: Tensor) -> Tensor:
        """The loss, a mean over the data."""
        loc, scale = self.code(x)
        if self.particles == 1:
            logits = self.origin + self.decoder(loc + scale * torch.randn_like(loc))
            nll = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            return (nll + (0.5 * (loc.square() + scale.square() - 1) - scale.log()).sum()) / len(x)
        noise = torch.randn(self.particles, *loc.shape, device=x.device)
        z = loc + scale * noise
        logits = self.origin + self.decoder(z)
        log_likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        log_w = log_likelihood + (0.5 * (noise.square() - z.square()) + scale.log()).sum(-1)
        return math.log(self.particles) - torch.logsumexp(log_w, 0).mean()

    def model(self, x: Tensor) -> None:
        """p(x, z) in Pyro."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.origin + self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) in Pyro."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(*self.code(x)).to_event(1))

    def numpyro(self) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
        """Model and guide in NumPyro."""
        import jax
        import numpyro
        import numpyro.distributions as dist

        (encoder, encode), (decoder, decode) = in_jax(self.encoder), in_jax(self.decoder)
        origin, zero = array(self.origin), array(self.zero)

        def model(x):
            weights = numpyro.param("decoder", decoder)
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                numpyro.sample("x", dist.Bernoulli(logits=origin + decode(weights, z)).to_event(1), obs=x)

        def guide(x):
            output = encode(numpyro.param("encoder", encoder), x)
            loc, raw = output[..., : self.latents], output[..., self.latents :]
            with numpyro.plate("data", len(x)):
                scale = jax.nn.softplus(raw + self.shift) + self.floor
                numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return model, guide


class PPCA(Peer):
    """Probabilistic principal components, the exact posterior as guide, by a sampled ELBO."""

    mean_field = False

    def __init__(self, pair: Any, particles: int):
        super().__init__(pair, particles)
        self.weight, self.loc, self.log_scale = pair.weight, pair.loc, pair.log_scale
        self.register_buffer("eye", torch.eye(pair.latents))
        self.register_buffer("zero", torch.zeros(pair.latents))

    def loss(self, x: Tensor) -> Tensor:
        """The loss, a mean over the data."""
        (features, latents), variance = self.weight.shape, (2 * self.log_scale).exp()
        centred, weighted = x - self.loc, self.weight / variance
        factor = torch.linalg.cholesky_ex(self.eye + self.weight.mT @ weighted).L
        inverse = torch.linalg.solve_triangular(factor, self.eye, upper=False)
        noise = torch.randn(len(x), latents, device=x.device)
        z = (centred @ weighted @ inverse.mT + noise) @ inverse
        error = (centred - z @ self.weight.mT).square().sum() / variance
        log_ratio = 0.5 * (error + z.square().sum() - noise.square().sum()) / len(x)
        return log_ratio + factor.diagonal().log().sum() + features * (self.log_scale + 0.5 * LOG_TWO_PI)

    def model(self, x: Tensor) -> None:
        """p(x, z) in Pyro."""
        pyro.module("ppca", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.zero, 1.0).to_event(1))
            loc = z @ self.weight.mT + self.loc
            pyro.sample("x", dist.Normal(loc, self.log_scale.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) in Pyro."""
        pyro.module("ppca", self)
        weighted = self.weight / (2 * self.log_scale).exp()
        noise = dist.MultivariateNormal(self.zero, precision_matrix=self.eye + self.weight.mT @ weighted)
        loc = (x - self.loc) @ weighted @ noise.scale_tril @ noise.scale_tril.mT
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=noise.scale_tril))

    def numpyro(self) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
        """Model and guide in NumPyro."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        start = {name: array(value) for name, value in self.named_parameters()}
        eye, zero = array(self.eye), array(self.zero)

        def model(x):
            p = numpyro.param("ppca", start)
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                loc = z @ p["weight"].T + p["loc"]
                numpyro.sample("x", dist.Normal(loc, jnp.exp(p["log_scale"])).to_event(1), obs=x)

        def guide(x):
            p = numpyro.param("ppca", start)
            weighted = p["weight"] / jnp.exp(2 * p["log_scale"])
            noise = dist.MultivariateNormal(zero, precision_matrix=eye + p["weight"].T @ weighted)
            loc = (x - p["loc"]) @ weighted @ noise.scale_tril @ noise.scale_tril.T
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.MultivariateNormal(loc, scale_tril=noise.scale_tril))

        return model, guide


class Sparse(Peer):
    """The sparse autoencoder: a Laplace prior, a point guide, and a dictionary of unit columns under noise of scale 1."""

    mean_field = False

    def __init__(self, pair: Any, particles: int):
        super().__init__(pair, particles)
        self.rate = float(pair.prior.rate)
        self.encoder = plain(pair.encoder)
        self.weight, self.bias = pair.decoder.weight, pair.decoder.bias
        self.register_buffer("origin", pair.head.origin)
        self.register_buffer("zero", torch.zeros(pair.latents))

    def reconstruction(self, z: Tensor) -> Tensor:
        """The mean of x at z."""
        return z @ F.normalize(self.weight, dim=0).mT + (self.origin + self.bias)

    def loss(self, x: Tensor) -> Tensor:
        """The loss, a mean over the data."""
        (features, latents), z = self.weight.shape, self.encoder(x)
        penalised = 0.5 * (x - self.reconstruction(z)).square().sum() + self.rate * z.abs().sum()
        return penalised / len(x) + (0.5 * features * LOG_TWO_PI - latents * math.log(self.rate / 2))

    def model(self, x: Tensor) -> None:
        """p(x, z) in Pyro."""
        pyro.module("sparse", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Laplace(self.zero, 1 / self.rate).to_event(1))
            pyro.sample("x", dist.Normal(self.reconstruction(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) in Pyro."""
        pyro.module("sparse", self)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(self.encoder(x), event_dim=1))

    def numpyro(self) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
        """Model and guide in NumPyro."""
        import jax.numpy as jnp
        import numpyro
        import numpyro.distributions as dist

        encoder, encode = in_jax(self.encoder)
        start, origin, zero = (array(self.weight), array(self.bias)), array(self.origin), array(self.zero)

        def model(x):
            weight, bias = numpyro.param("decoder", start)
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Laplace(zero, 1 / self.rate).to_event(1))
                loc = z @ (weight / jnp.linalg.norm(weight, axis=0)).T + (origin + bias)
                numpyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        def guide(x):
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Delta(encode(numpyro.param("encoder", encoder), x), event_dim=1))

        return model, guide


def array(tensor: Tensor) -> Any:
    """A tensor as an array of JAX."""
    import jax.numpy as jnp

    return jnp.array(tensor.detach().cpu().numpy())


def in_jax(network: Layers) -> tuple[list[tuple[Any, ...]], Callable[[Any, Any], Any]]:
    """A network as its parameters, a tuple per layer, and a function of them and x.

    Convolutions, with 4x4 kernels, stride 2 and padding 1, are matrix products of 2x2 pixels with their neighbours: the
    gradients of XLA's own are several times slower on the CPU, and inside a loop some twenty times. Images are (N, H, W, C).
    """
    import jax
    import jax.numpy as jnp

    def padded(x: Any) -> Any:
        return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def neighbours(x: Any) -> Any:
        h, w = x.shape[1] - 1, x.shape[2] - 1
        return jnp.concatenate([x[:, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)], -1)

    def coarser(x: Any) -> Any:
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)

    def finer(x: Any) -> Any:
        n, h, w, c = x.shape
        return x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)

    def translated(layer: nn.Module) -> tuple[tuple[Any, ...], Callable[[Any, Any], Any]]:
        parameters = tuple(array(p) for p in layer.parameters())
        match layer:
            case Standardised():
                origin, unit = array(layer.origin), array(layer.unit)
                return parameters, lambda p, x: (x - origin) / unit
            case nn.Linear():
                return (parameters[0].T, parameters[1]), lambda p, x: x @ p[0] + p[1]
            case nn.Conv2d(kernel_size=(4, 4), stride=(2, 2), padding=(1, 1)):
                weight, (o, i) = parameters[0], parameters[0].shape[:2]
                weight = weight.reshape(o, i, 2, 2, 2, 2).transpose(2, 4, 3, 5, 1, 0).reshape(16 * i, o)
                return (weight, parameters[1]), lambda p, x: neighbours(coarser(padded(x))) @ p[0] + p[1]
            case nn.ConvTranspose2d(kernel_size=(4, 4), stride=(2, 2), padding=(1, 1)):
                weight, (i, o) = parameters[0], parameters[0].shape[:2]
                weight = weight.reshape(i, o, 2, 2, 2, 2)[:, :, ::-1, :, ::-1]
                weight = weight.transpose(2, 4, 0, 3, 5, 1).reshape(4 * i, 4 * o)
                return (weight, parameters[1]), (lambda p, x: finer(neighbours(padded(x)) @ p[0])[:, 1:-1, 1:-1] + p[1])
            case nn.Tanh():
                return (), lambda p, x: jnp.tanh(x)
            case nn.ReLU():
                return (), lambda p, x: jax.nn.relu(x)
            case nn.Unflatten(unflattened_size=(_, _, _)):
                return (), lambda p, x: x.reshape(len(x), *layer.unflattened_size).transpose(0, 2, 3, 1)
            case nn.Flatten():
                return (), lambda p, x: x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        raise TypeError(f"no such layer in JAX: {layer}")

    parameters, functions = zip(*(translated(layer) for layer in network), strict=True)

    def apply(parameters: Any, x: Any) -> Any:
        for f, p in zip(functions, parameters, strict=True):
            x = f(p, x)
        return x

    return list(parameters), apply


# -- the cases -----------------------------------------------------------------------------------------------------------


def dense(features: int, *sizes: int) -> probae.VAE:
    """A VAE of perceptrons."""
    *hidden, latents = sizes
    return probae.VAE(features, latents, hidden, likelihood=probae.likelihoods.Bernoulli(), activation="tanh")


def convolutional(features: int, first: int, second: int, latents: int) -> probae.VAE:
    """A VAE of convolutions with stride 2, for 28x28 images."""
    encoder = nn.Sequential(
        nn.Conv2d(1, first, 4, 2, 1), nn.ReLU(), nn.Conv2d(first, second, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(49 * second, 2 * latents),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Linear(latents, 49 * second), nn.ReLU(), nn.Unflatten(1, (second, 7, 7)),
        nn.ConvTranspose2d(second, first, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(first, 1, 4, 2, 1), nn.Flatten(),
    )  # fmt: skip
    return probae.VAE(
        features,
        latents,
        likelihood=probae.likelihoods.Bernoulli(),
        encoder=Flattened(encoder, (1, 28, 28)),
        decoder=Flattened(decoder, (latents,)),
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mnist", (784, 200, 200, 50), 128, dense, VAE),
        Case("small", (64, 64, 64, 8), 64, dense, VAE),
        Case("iwae", (784, 200, 200, 50), 20, dense, VAE, particles=50),
        Case("convolutional", (784, 32, 64, 20), 128, convolutional, VAE),
        Case("ppca", (784, 50), 128, probae.PPCA, PPCA, binary=False),
        Case("sparse", (256, 512), 1024, probae.SparseAutoencoder, Sparse, binary=False),
    )
}


# -- the ways ------------------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Records every matrix product and convolution, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if func is aten.addmm.default:
            self.calls.append(partial(torch.mm, *(a.detach() for a in args[1:])))
        elif func in (aten.mm.default, aten.bmm.default, aten.convolution.default, aten.convolution_backward.default):
            kept = [a.detach() if isinstance(a, Tensor) else a for a in args]
            self.calls.append(partial(func, *kept, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def matrix_products(case: Case) -> Way:
    """What no way can do without: the products of one hand-written step, on its own tensors."""
    peer, data = case.start()
    started = time.perf_counter()
    with Products() as products:
        peer.loss(data[: case.batch]).backward()
    calls = products.calls

    @torch.no_grad()
    def steps(n: int) -> None:
        for _ in range(n):
            for call in calls:
                call()
        synchronise()

    steps(WARM_UP)
    return Way(steps, lambda rows=None: math.nan, time.perf_counter() - started)


def by_hand(case: Case, compiled: bool = False, captured: bool = False) -> Way:
    """The loop that one would write: compiled or not, and captured in a CUDA graph or not."""
    if captured and not GPU:
        raise Unavailable("there is no GPU")
    peer, data = case.start()
    with cold():
        started = time.perf_counter()
        adam = torch.optim.Adam(peer.parameters(), LR, fused=True, capturable=captured)
        mode = "reduce-overhead" if GPU and not captured else None
        loss = torch.compile(peer.loss, dynamic=False, mode=mode) if compiled else peer.loss

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            loss(minibatch(data, case.batch)).backward()
            adam.step()

        def steps(n: int) -> None:
            for _ in range(n):
                step()
            synchronise()

        if captured:
            step = capture(step)
        steps(WARM_UP)
        return Way(steps, evaluated(peer.loss, data), time.perf_counter() - started)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A step as one CUDA graph, the draw of its minibatch included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        raise Unavailable(f"its step cannot be captured: {error}") from error
    return graph.replay


def pyro_svi(case: Case) -> Way:
    """Pyro's own loop, in a parameter store of its own, without validation."""
    peer, data = case.start()
    started = time.perf_counter()
    if case.particles > 1:
        elbo: Any = RenyiELBO(alpha=0, num_particles=case.particles, vectorize_particles=True, max_plate_nesting=1)
    else:
        elbo = TraceMeanField_ELBO() if peer.mean_field else Trace_ELBO()
    svi = SVI(peer.model, peer.guide, pyro.optim.Adam({"lr": LR, "fused": True}), elbo)
    store = {"params": {}, "constraints": {}}

    def steps(n: int) -> None:
        with pyro.validation_enabled(False), pyro.get_param_store().scope(store):
            for _ in range(n):
                svi.step(minibatch(data, case.batch))
        synchronise()

    def loss(rows: Tensor) -> float:
        with pyro.validation_enabled(False), pyro.get_param_store().scope(store):
            return svi.evaluate_loss(rows) / len(rows)

    steps(WARM_UP)
    return Way(steps, evaluated(loss, data), time.perf_counter() - started)


def numpyro_svi(case: Case) -> Way:
    """NumPyro's update in a compiled loop, on arrays that it may overwrite.

    The loop is the one that ``lax.scan`` becomes, with its length as an argument, so that no number of steps compiles it
    anew; the rows of at most 100 steps are drawn at once.
    """
    # as many threads as torch has; both variables are read when JAX starts
    os.environ.setdefault("NPROC", str(torch.get_num_threads()))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax, infer, optim = (needed(name) for name in ("jax", "numpyro.infer", "numpyro.optim"))
    if GPU and jax.default_backend() != "gpu":
        raise Unavailable("the JAX that is installed has no GPU")
    peer, tensor = case.start()
    data = array(tensor)
    started = time.perf_counter()
    if case.particles > 1:
        elbo = infer.RenyiELBO(alpha=0, num_particles=case.particles)
    else:
        elbo = infer.TraceMeanField_ELBO() if peer.mean_field else infer.Trace_ELBO()
    svi = infer.SVI(*peer.numpyro(), optim.Adam(LR), elbo)
    state, key = svi.init(jax.random.key(0), data[: case.batch]), jax.random.key(1)
    most = 100

    @partial(jax.jit, donate_argnums=0)
    def train(state: Any, key: Any, data: Any, n: Any) -> Any:
        key, mine = jax.random.split(key)
        index = jax.random.randint(mine, (most, case.batch), 0, len(data))

        def step(i: Any, state: Any) -> Any:
            return svi.update(state, data[index[i]])[0]

        return jax.lax.fori_loop(0, n, step, state), key

    evaluate = jax.jit(lambda state, key, rows: elbo.loss(key, svi.get_params(state), svi.model, svi.guide, rows))

    def steps(n: int) -> None:
        nonlocal state, key
        for done in range(0, n, most):
            state, key = train(state, key, data, min(most, n - done))
        jax.block_until_ready(state)

    def loss(rows: Tensor) -> float:
        nonlocal key
        key, mine = jax.random.split(key)
        return evaluate(state, mine, array(rows)) / len(rows)

    steps(WARM_UP)
    return Way(steps, evaluated(loss, tensor), time.perf_counter() - started)


#: how a case is trained; each raises `Unavailable` where the machine lacks what it needs
WAYS: dict[str, Callable[[Case], Way]] = {
    "matrix products": matrix_products,
    "pyro.infer.SVI": pyro_svi,
    "hand-written, eager": by_hand,
    "hand-written, torch.compile": partial(by_hand, compiled=True),
    "hand-written, CUDA graph": partial(by_hand, captured=True),
    "hand-written, compiled CUDA graph": partial(by_hand, compiled=True, captured=True),
    "NumPyro, jit + scan": numpyro_svi,
}


def minibatch(data: Tensor, size: int) -> Tensor:
    """Rows drawn at random."""
    return data[torch.randint(len(data), (size,), device=data.device)]


def synchronise() -> None:
    """Wait until the device has done all that it was asked."""
    if GPU:
        torch.cuda.synchronize()


def evaluated(loss: Callable[[Tensor], Any], data: Tensor) -> Callable[..., float]:
    """A loss of given rows, or of the first 500, as a number."""

    @torch.no_grad()
    def value(rows: Tensor | None = None) -> float:
        return float(loss(data[:500] if rows is None else rows.to(data.device)))

    return value


def needed(name: str) -> Any:
    """A module that may not be installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{(error.name or name).split('.')[0]} is not installed") from error


@contextmanager
def cold() -> Iterator[None]:
    """Compile as if for the first time: inductor's cache is an empty folder for the while."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def built(case: Case, names: Iterable[str] = ()) -> Iterator[tuple[str, Way]]:
    """The ways of a case by name, all unless some are named; one that the machine cannot go is a line of print."""
    for name in names or WAYS:
        try:
            yield name, WAYS[name](case)
        except Unavailable as reason:
            print(f"{name} is skipped: {reason}", flush=True)


# -- the check -----------------------------------------------------------------------------------------------------------


def mean_of(loss: Callable[[], float], samples: int = 20) -> float:
    """The mean of several estimates."""
    return sum(loss() for _ in range(samples)) / samples


def check(case: Case, names: Sequence[str], steps: int) -> bool:
    """Print every way's loss before and after some steps; whether all fall, and to where probae's does."""
    peer, data = case.start()
    pair, objective = case.pair().to(DEVICE), case.objective().to(DEVICE)
    with torch.no_grad():
        pair.initialise(data)
    by_hand, by_probae = (
        evaluated(f, data) for f in (peer.loss, lambda x: objective(pair, x, len(x), torch.zeros((), device=DEVICE)))
    )
    with seeded(1, DEVICE):
        start = mean_of(by_probae)
    with seeded(1, DEVICE):
        fine = math.isclose(start, mean_of(by_hand), rel_tol=1e-5)
    print(f"\n{case.name}: loss {start:.3f} at the start, per datum; by hand it is {'the same' if fine else 'ANOTHER'}")
    options = {"steps": steps, "batch_size": case.batch, "lr": LR, "compile": False, "progress": False}
    probae.fit(pair, data, objective=objective, **options)
    target = mean_of(by_probae)
    print(f"{'':36s}{'built, s':>10s}{'loss':>10s}\n{'probae.fit':36s}{'':10s}{target:10.3f}", flush=True)
    for name, way in built(case, names):
        way.steps(steps)
        loss = mean_of(way.loss)
        right = math.isnan(loss) or (loss < start and abs(loss - target) < 0.1 * (start - target))
        print(f"{name:36s}{way.built:10.2f}{loss:10.3f}{'' if right else '  WRONG'}", flush=True)
        fine &= right
    return fine


def main() -> None:
    """Check the ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    torch.manual_seed(0)
    results = [check(CASES[name], options.ways, options.steps) for name in options.cases]
    if not all(results):
        sys.exit("a way does not train as the others do")


if __name__ == "__main__":
    main()
