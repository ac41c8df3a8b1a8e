r"""Hamiltonian Monte Carlo on a geometric path, every chain and datum in one tensor.

.. math:: \log f_\beta(u) = \log f_0(u) + \beta\, r(u)

with f₀ the density that the path starts from and r the log ratio of its two ends. Shapes: u (C, N, L), the rest (C, N),
β and step sizes (N,). A transition leaves f_β invariant and is reversible: momenta are drawn anew, a leapfrog trajectory
proposes, and it is accepted by the change of energy; a trajectory that meets no finite number is rejected.

References: Neal (2011), *MCMC using Hamiltonian dynamics*; Duane et al. (1987).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probae.evidence.slopes import slopes
from probae.graphs import Runner
from probae.graphs.capture import captured
from probae.pair import Pair

#: (u, what the densities depend on) -> log f₀ and r
Energy = Callable[..., tuple[Tensor, Tensor]]

#: the step size of each trajectory is scaled by a factor from 1 − JITTER to 1 + JITTER: none meets its own start for ever
JITTER = 0.2


class Point(NamedTuple):
    """Where the chains are: u, log f₀ and r there, and the gradients of both."""

    u: Tensor
    base: Tensor
    ratio: Tensor
    base_slope: Tensor
    ratio_slope: Tensor


def leapfrog(energy: Energy) -> Callable[..., list[Tensor]]:
    """One leapfrog step as a function of tensors: (u, momentum, slopes of f₀ and r, β, step, data) to the next of these."""

    def step(u: Tensor, momentum: Tensor, base_slope: Tensor, ratio_slope: Tensor, *rest: Tensor) -> list[Tensor]:
        beta, size, *data = rest
        beta, size = beta[:, None], size[..., None]
        momentum = momentum + size / 2 * (base_slope + beta * ratio_slope)
        u = u + size * momentum
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            base, ratio = energy(u, *data)
            base_slope, ratio_slope = slopes([base, ratio], u)
        momentum = momentum + size / 2 * (base_slope + beta * ratio_slope)
        found = [u, momentum, base, ratio, base_slope, ratio_slope]
        return [value.detach().contiguous() for value in found]

    return step


class Chains:
    """Chains that move through one block of data.

    Args:
        pair: whose programs the energy runs.
        energy: log f₀ and r of u and ``data``.
        like: u of the shape (C, N, L) that all blocks have.
        data: what the energy depends on, for the shapes.
        steps: leapfrog steps of a trajectory.
        compile: how a step is run.
        moves: about how many transitions there will be.
    """

    def __init__(
        self,
        pair: Pair,
        energy: Energy,
        like: Tensor,
        data: Sequence[Tensor],
        steps: int,
        compile: bool | str,
        moves: int,
    ):
        self.steps, self.data = steps, list(data)
        step, zero, factors = leapfrog(energy), torch.zeros_like(like), like[..., 0]
        inputs = [like, zero, zero, zero, torch.ones_like(factors[0]), torch.ones_like(factors), *data]

        def between(*tensors: Tensor) -> list[Tensor]:
            """Densities are asked for at the end of a trajectory alone: a graph leaves them out."""
            u, momentum, _, _, *found = step(*tensors)
            return [u, momentum, *found]

        options = (lambda: {"pair": pair}), compile, moves * steps, "leapfrog steps"
        self.last, self.step = Runner(step, *options), Runner(between, *options)
        self._move: Callable[..., Any] = self._moved
        if like.device.type == "cuda" and compile is not False:
            for runner in (self.last, self.step, self.last, self.step):  # what is captured has to be decided
                runner.prepare(*inputs)
            point = [like, factors, factors, zero, zero]
            inputs = [t.contiguous() for t in (*point, factors[0], factors[0], *data)]
            self._move = captured(self._moved, inputs, varying=range(len(inputs)), written=())

    def at(self, u: Tensor) -> Point:
        """The chains at u: a step of size zero."""
        zero, (chains, size) = torch.zeros_like(u), u.shape[:2]
        beta, none = u.new_ones(size), u.new_zeros(chains, size)
        _, _, *found = self.last(u, zero, zero, zero, beta, none, *self.data)
        return Point(u, *found)  # type: ignore[arg-type]

    def move(self, point: Point, beta: Tensor, size: Tensor) -> tuple[Point, Tensor]:
        """One transition at β (N,) with step sizes (N,): the next points, and the probabilities of acceptance (C, N)."""
        *found, probability = self._move(*point, beta, size, *self.data)
        return Point(*found), probability  # type: ignore[arg-type, return-value]

    def _moved(self, *tensors: Tensor) -> list[Tensor]:
        point, (beta, size, *data) = Point(*tensors[:5]), tensors[5:]
        momentum = torch.randn_like(point.u)
        factor = 1 + JITTER * (2 * torch.rand_like(point.base) - 1)
        scaled = (size * factor).contiguous()
        u, _, _, base_slope, ratio_slope = point
        moved = momentum
        for _ in range(self.steps - 1):
            u, moved, base_slope, ratio_slope = self.step(u, moved, base_slope, ratio_slope, beta, scaled, *data)
        u, moved, *found = self.last(u, moved, base_slope, ratio_slope, beta, scaled, *data)
        proposal = Point(u, *found)  # type: ignore[arg-type]
        change = _energy(proposal, moved, beta) - _energy(point, momentum, beta)
        finite = proposal.base.isfinite() & proposal.ratio.isfinite() & ~change.isnan()
        accepted = (torch.rand_like(change).log() < change) & finite
        kept = [
            torch.where(accepted if new.dim() == 2 else accepted[..., None], new, old)
            for new, old in zip(proposal, point, strict=True)
        ]
        probability = torch.where(finite, change.clamp(max=0).exp(), torch.zeros_like(change))
        return [*kept, probability]


def _energy(point: Point, momentum: Tensor, beta: Tensor) -> Tensor:
    return point.base + beta * point.ratio - momentum.square().sum(-1) / 2
