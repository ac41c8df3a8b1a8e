"""Means of log weights, and of weights, from particles that come chunk by chunk: no more than a chunk is ever held."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probae.evidence.pareto import FEWEST, k_of_largest, tail_size

_GROUPS = 1024  # of particles, by which the error that all data share is told
PARTS = 10  # of the particles, each an estimate by itself


class Accumulator:
    """The mean and spread over K particles of w, relative to its peak, or of log w itself.

    Args:
        particles: K, all that will come.
        logarithms: whether the mean of log w is wanted, rather than that of w.
        shared: whether particles are shared by all data, so that their errors do not average out.
    """

    def __init__(self, particles: int, logarithms: bool = False, shared: bool = False):
        self.particles, self.logarithms, self.count = particles, logarithms, 0
        self.group = math.ceil(particles / _GROUPS) if shared else 0
        self.tail = tail_size(particles) + 1 if particles >= FEWEST and not logarithms else 0
        self.turns = min(particles, PARTS)

    def add(self, log_w: Tensor) -> None:
        """Take a chunk (k, n)."""
        self.dtype, log_w = log_w.dtype, log_w.detach().double()
        if self.count == 0:
            self.shift, self.mean, self.squares, self.cubes = (torch.zeros_like(log_w[0]) for _ in range(4))
            self.largest, self.least = log_w[:0], log_w[0]
            self.by_turns = log_w.new_zeros(self.turns, log_w.shape[1])
            if self.group:
                self.sums = log_w.new_zeros(math.ceil(self.particles / self.group), log_w.shape[1])
        values = log_w if self.logarithms else self._relative(log_w)
        # Chan, Golub & LeVeque (1979): no digits are lost where weights hardly vary
        k, mean = len(values), values.mean(0)
        apart, total = mean - self.mean, self.count + k
        off = values - mean
        squares = off.square().sum(0)
        self.cubes += off.pow(3).sum(0) + apart.pow(3) * (self.count * k * (self.count - k) / total**2)
        self.cubes += 3 * apart * (self.count * squares - k * self.squares) / total
        self.squares += squares + apart.square() * (self.count * k / total)
        self.mean += apart * (k / total)
        number = torch.arange(self.count, total, device=log_w.device)
        self.by_turns.index_add_(0, number % self.turns, values)
        if self.group:
            self.sums.index_add_(0, number // self.group, values)
        if self.tail:
            both = torch.cat([self.largest, log_w])
            self.largest = both.topk(min(self.tail, len(both)), 0).values
        self.least = torch.minimum(self.least, log_w.amin(0))
        self.count = total

    def _relative(self, log_w: Tensor) -> Tensor:
        """The weights of a chunk relative to the largest so far, and what was found before made relative to it too."""
        peak = log_w.amax(0)
        if self.count:
            peak = torch.maximum(torch.where(self.mean > 0, self.shift, -torch.inf), peak)
        shift = torch.where(peak.isfinite(), peak, 0.0)
        before = torch.where(self.mean > 0, (self.shift - shift).exp(), 0.0)
        self.mean *= before
        self.squares *= before.square()
        self.cubes *= before.pow(3)
        self.by_turns *= before
        if self.group:
            self.sums *= before
        self.shift = shift
        return (log_w - shift).exp()

    @property
    def value(self) -> Tensor:
        """The mean of log w, or the log of the mean of w, (N,)."""
        return self.mean if self.logarithms else self.mean.log() + self.shift

    @property
    def parts(self) -> Tensor:
        """That value by each of at most ten parts of the particles alone, (R, N)."""
        sizes = torch.arange(self.turns, device=self.mean.device).neg().add(self.count + self.turns - 1) // self.turns
        means = self.by_turns / sizes[:, None]
        return means if self.logarithms else means.log() + self.shift

    @property
    def variance(self) -> Tensor:
        """Of that value, by the delta method; NaN for a single particle."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        variance = self.squares / (self.count * (self.count - 1))
        return variance if self.logarithms else variance / self.mean.square()

    @property
    def influences(self) -> Tensor:
        """What each group of shared particles adds to the sum over data of the values, about its share: (G,)."""
        sums = (self.sums if self.logarithms else self.sums / self.mean).sum(1)
        sizes = torch.full_like(sums, float(self.group))
        sizes[-1] = self.particles - self.group * (len(sums) - 1)
        return (sums - sizes * (sums.sum() / self.particles)) / self.particles

    @property
    def ess(self) -> Tensor:
        """The effective sample size (Σ w)² / Σ w², (N,); 0 where no particle has any weight."""
        squares = self.squares / self.count + self.mean.square()
        return torch.where(squares > 0, self.count * self.mean.square() / squares, 0.0)

    @property
    def skewness(self) -> Tensor:
        """That of the values (N,); 0 where they do not vary."""
        spread = (self.squares / self.count).sqrt()
        return torch.where(spread > 0, self.cubes / self.count / spread.pow(3), 0.0).nan_to_num(0.0, 0.0, 0.0)

    @property
    def pareto_k(self) -> Tensor:
        """k̂ of the weights (N,), as `probae.evidence.pareto.pareto_k` has it; NaN with too few particles for one."""
        if not self.tail:
            return torch.full_like(self.mean, torch.nan)
        return k_of_largest(self.largest, self.least, self.particles, self.dtype)


def shared_error(influences: Tensor, data: int) -> float:
    """The standard error of a mean over data whose particles are shared, from what each group of them adds."""
    groups = len(influences)
    return float((influences.square().sum() * groups / (groups - 1)).sqrt()) / data if groups > 1 else math.nan
