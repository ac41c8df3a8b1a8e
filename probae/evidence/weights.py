"""Log importance weights, log w = log p(x, z) − log q(z | x), z ~ q(z | x): the common currency of bounds and diagnostics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import one_of, whole
from probae.batches import Batch, each, leaves, length, rebuilt, rows_of
from probae.graphs import Runner
from probae.graphs.cost import MODES
from probae.pair import Pair
from probae.runtime.isolation import isolated
from probae.runtime.memory import allocated
from probae.runtime.seeding import evaluating, seeded
from probae.tracing.checks import check
from probae.tracing.enumeration import log_joint
from probae.tracing.signature import Signature
from probae.tracing.terms import Traces, scaled_sites

#: bytes that one chunk of particles and data may take in draws and densities: what stays near the cores, and on a GPU
#: what keeps them busy
MEMORY = {"cpu": 2**26, "cuda": 2**31}


@isolated
def log_weights(
    model: Any,
    x: Any,
    particles: int = 64,
    seed: int = 0,
    *,
    compile: bool | str = "auto",
    memory: int | None = None,
) -> Tensor:
    r"""The log importance weights of every particle for every datum.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n), \qquad z_{kn} \sim q(z \mid x_n)

    Their mean over K is the ELBO, their log-mean-exp the importance-weighted bound. With latents outside the data plate,
    each particle takes its own draw of them from the guide, and the weights are those of the local sites given it. What a guide
    adds by `pyro.factor` or observes belongs to log q, as Pyro counts it; `log_evidence` asks for a guide that is a density.

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``.
        x: N data.
        particles: K.
        seed: of the draws; the same seed and memory give the same weights.
        compile: how the programs are run: False each time, ``"flat"`` traced once into a flat graph (the same bits), True
            compiled (the same to rounding), ``"auto"`` what the amount of work is worth.
        memory: bytes that the draws of one chunk may take; the work is cut along K and N to fit.

    Returns:
        Tensor (K, N), nats, without gradient, in the pair's dtype and on its device.

    Raises:
        ValueError: if the guide is a point, or the prior flat: then these are no weights; or if pair and data do not fit.

    Example:
        >>> import probae
        >>> log_weights(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), particles=5).shape
        torch.Size([5, 3])
    """
    pair, batch, signature = prepare(model, x, seed)
    require_weights(pair, signature, normalised=False)
    particles = whole("particles", particles)
    return torch.cat(list(Weights(pair, signature, compile).by_rows(batch, particles, seed, memory)), 1)


def prepare(model: Any, x: Any, seed: int = 0) -> tuple[Pair, Batch, Signature]:
    """A pair, a batch of its dtype and on its device, and its signature, all checked."""
    pair = as_pair(model)
    batch = pair.as_batch(x)
    pair.warn_unfitted()
    return pair, batch, check(pair, batch, seed)


def no_evidence(signature: Signature) -> str | None:
    """Why there is no log p(x) of each datum that any estimator could give, or None."""
    return signature.subsampled or _undefined(signature)


def no_bound(signature: Signature) -> str | None:
    """Why a pair gives no bound on log p(x) by its weights, or None if it does."""
    return _undefined(signature) or _no_weights(signature) or signature.not_normalised


def _undefined(signature: Signature) -> str | None:
    if signature.improper:
        return (
            f"the prior of site {signature.improper[0]!r} is flat: it is no distribution, so log p(x) is not defined, and no "
            "estimator has a bound on it. Give the model a proper prior; probae.expost_prior fits one to its codes"
        )
    return signature.no_evidence


def _no_weights(signature: Signature) -> str | None:
    if signature.no_density is not None:
        return signature.no_density
    if signature.points:
        return (
            f"the guide is a point at site {signature.points[0]!r}: it has no density, so log p(x, z) at the code is no bound "
            "on log p(x) and can even exceed it. Give the model a guide with a density (posterior='normal' or 'laplace')"
        )
    return None


def require_weights(pair: Pair, signature: Signature, normalised: bool = True) -> None:
    """Raise a ValueError unless the pair's weights are ratios of densities.

    Args:
        normalised: whether the guide has to be a density of its draws; if not, its terms are what Pyro counts.
    """
    if reason := no_evidence(signature) or _no_weights(signature) or (signature.not_normalised if normalised else None):
        raise ValueError(reason)
    if not pair.has_guide and (
        drawn := [n for n in signature.latents + signature.globals_ if n not in signature.summed]
    ):
        raise ValueError(f"the pair has no guide to draw {drawn} from")


def require_unscaled(traces: Traces) -> None:
    """Raise a ValueError if the programs scale a density: then their weights are no ratio of densities."""
    if names := scaled_sites(traces):
        raise ValueError(
            f"the programs scale the density of site {names[0]!r} (poutine.scale, or a subsampled plate): its weights are no "
            "ratio of densities. Evaluate the pair without the scale"
        )


class Weights:
    """The log weights of a pair, in chunks of one shape, over one graph where that pays.

    Args:
        pair, signature: as they were checked.
        compile: one of `MODES`.
        times: how often all of the data will be asked for; early stopping keeps the graph from one time to the next.
    """

    def __init__(self, pair: Pair, signature: Signature, compile: bool | str = "auto", times: int = 1):
        one_of("compile", compile, MODES)
        self.pair, self.signature, self.compile, self.times = pair, signature, compile, times
        self.runners: dict[Any, Runner] = {}

    def by_rows(self, batch: Batch, particles: int, seed: int, memory: int | None = None) -> Iterator[Tensor]:
        """The weights (K, n) of one block of data after another."""
        for chunks in self.by_chunks(batch, particles, seed, memory):
            yield torch.cat(list(chunks))

    def by_chunks(
        self, batch: Batch, particles: int, seed: int, memory: int | None = None
    ) -> Iterator[Iterator[Tensor]]:
        """The weights of one block of data after another, each as chunks (k, n) of its K particles, all to be taken in turn."""
        pair, batch = self.pair, each(Tensor.contiguous, batch)  # all chunks lie alike in memory
        device = pair.device or torch.device("cpu")
        memory = MEMORY.get(device.type, MEMORY["cuda"]) if memory is None else whole("memory", memory)
        with evaluating(pair, seed):
            few = batch if self.signature.all_rows else each(lambda leaf: leaf[:2], batch)
            require_unscaled(pair.traces(few))
            cost = _cost(pair, self.signature, few)
            rows, together = _chunks(cost, length(batch), particles, memory)
            if self.signature.all_rows:
                rows, together = length(batch), even(particles, max(1, rows * together // length(batch)))
            if not self.signature.vectorised:
                together = 1
            chunks = math.ceil(length(batch) / rows) * math.ceil(particles / together) * self.times
            run = self._runner(each(lambda leaf: leaf[:rows], batch), together, chunks)
            for block in rows_of(batch, rows):
                count = length(block)
                tensors = [padded(leaf, rows) for _, leaf in leaves(block)]
                parts = (run(*tensors)[0] for _ in range(0, particles, together))
                chunks_ = (part[: particles - k * together, :count] for k, part in enumerate(parts))
                yield (weighable(weights, k * together) for k, weights in enumerate(chunks_))

    def _runner(self, rows: Batch, particles: int, chunks: int) -> Runner:
        """What computes a chunk, given how many there are."""

        def weights(*tensors: Tensor) -> list[Tensor]:
            block = rebuilt(rows, tensors)
            traces = self.pair.traces(block, particles)
            if self.signature.summed:
                return [log_joint(self.pair, block, traces) - traces.proposal().local]
            return [traces.log_weights()]

        key = particles, *((leaf.shape, leaf.dtype) for _, leaf in leaves(rows))
        if key not in self.runners or self.runners[key].outdated() is not None:
            refused = any(runner.refused for runner in self.runners.values())  # which is said once
            compile = False if refused else self.compile
            self.runners[key] = Runner(weights, lambda: {"pair": self.pair}, compile, chunks, "log weights")
        return self.runners[key]


def weighable(weights: Tensor, first: int = 0) -> Tensor:
    """Log weights (k, n) as they are.

    Raises:
        FloatingPointError: if one is NaN or +∞, naming particle and datum; −∞ is a weight of zero.
    """
    if not (weights < torch.inf).all():  # NaN, too, is not below infinity
        particle, datum = (~(weights < torch.inf)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"the log weight of particle {first + particle}, datum {datum} of a block is {weights[particle, datum]}"
        )
    return weights


def padded(leaf: Tensor, rows: int) -> Tensor:
    """The last block made as long as the others by its own last row; what is computed there is dropped."""
    missing = rows - leaf.shape[0]
    return leaf if missing == 0 else torch.cat([leaf, leaf[-1:].expand(missing, *leaf.shape[1:])])


def _cost(pair: Pair, signature: Signature, rows: Batch) -> tuple[float, float]:
    """The bytes that a further datum takes, and a further particle of a datum, by runs on a few rows."""
    few = [1, 3] if signature.vectorised else [1, 1]
    with seeded(0, pair.device):
        one, several = (allocated(lambda k=k: pair.traces(rows, k).log_weights()) for k in few)  # type: ignore[misc]
    cell = max(1.0, (several - one) / (2 * length(rows)) if signature.vectorised else one / length(rows))
    return max(0.0, one / length(rows) - cell), cell


def _chunks(cost: tuple[float, float], size: int, particles: int, memory: int) -> tuple[int, int]:
    """Rows and particles of a chunk; all chunks are alike, so that one graph does for them."""
    datum, cell = cost
    rows = even(size, max(1, int(memory / (datum + cell * min(particles, 64)))))
    return rows, even(particles, max(1, int((memory / rows - datum) / cell)))


def even(total: int, most: int) -> int:
    """The size of equal parts, at most so large."""
    return math.ceil(total / math.ceil(total / most))
