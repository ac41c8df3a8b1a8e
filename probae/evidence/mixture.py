r"""A Gaussian with a defence: a Student-t around it, and the prior, drawn in fixed shares.

.. math:: q(u) = \alpha_0 N(u; m, T T^\top) + \alpha_1 \prod_l t_\nu\big(T^{-1} (u - m)\big)_l\, / \det T + \alpha_2\, p(u)

With :math:`K \alpha_i` draws of each, the mean of :math:`p(x, u) / q(u)` over all is unbiased (Owen & Zhou 2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import StudentT

from probae.batches import Batch
from probae.evidence.space import Space

_DF = 4.0  # of the Student-t: a variance, and tails above those of any Gaussian or Laplace
SEEN = 32  # draws of the prior, by which its scales are seen
_FAR = 20.0  # prior scales, from where the tails are seen


class Mixture:
    """The components' shares of K draws that come in chunks of one size.

    Args:
        shares: of Gaussian, Student-t and prior.
        particles: K.
        together: the size of a chunk; the last one is cut.
        full: whether T is a lower triangle.
    """

    def __init__(self, shares: Sequence[float], particles: int, together: int, full: bool):
        self.particles, self.full = particles, full
        sizes = [round(share * together) for share in shares[1:]]
        sizes = [
            max(size, 1) if share > 0 and together > 3 else size for size, share in zip(sizes, shares[1:], strict=True)
        ]
        self.sizes = [together - sum(sizes), *sizes]
        # each component evenly over the chunk, so that a cut takes of all
        order = sorted((((i + 0.5) / size, c) for c, size in enumerate(self.sizes) for i in range(size)))
        self.labels = torch.tensor([c for _, c in order])
        whole, rest = divmod(particles, together)
        last = self.labels[:rest].bincount(minlength=3)
        self.counts = [whole * size + int(more) for size, more in zip(self.sizes, last, strict=True)]

    def log_shares(self, like: Tensor) -> Tensor:
        """log α (3,) as they are among all K draws."""
        return torch.tensor(
            [count / self.particles for count in self.counts], dtype=like.dtype, device=like.device
        ).log()

    def draw(self, space: Space, rows: Batch, loc: Tensor, factor: Tensor, given: dict[str, Tensor]) -> Tensor:
        """u (k, N, L) of a chunk, each particle from the component of its label."""
        labels = self.labels.to(loc.device)
        noise = torch.randn(len(labels), *loc.shape, dtype=loc.dtype, device=loc.device)
        if self.sizes[1]:
            heavy = labels == 1
            chi2 = torch._standard_gamma(torch.full_like(noise[heavy], _DF / 2)) * 2
            noise[heavy] = noise[heavy] * (_DF / chi2).sqrt()
        if self.full:
            u = loc + torch.einsum("nlm,snm->snl", factor, noise)
        else:
            u = loc + factor * noise
        if self.sizes[2]:
            wide = labels == 2
            own = {name: value[wide.to(value.device)] for name, value in given.items()}
            u[wide] = space.from_prior(rows, self.sizes[2], own)
        return u.contiguous()

    def log_prob(
        self, u: Tensor, loc: Tensor, factor: Tensor, prior: Tensor, log_shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log q(u) (K, N) of the mixture, given log p(u), and of its Gaussian alone."""
        apart = u - loc
        if self.full:
            unit = torch.linalg.solve_triangular(factor, apart.permute(1, 2, 0), upper=False).permute(2, 0, 1)
            volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            unit, volume = apart / factor, factor.log().sum(-1)
        gaussian = -unit.square().sum(-1) / 2 - u.shape[-1] * math.log(2 * math.pi) / 2 - volume
        parts = [log_shares[0] + gaussian]
        if self.sizes[1]:
            heavy = StudentT(unit.new_tensor(_DF), validate_args=False).log_prob(unit).sum(-1) - volume
            parts.append(log_shares[1] + heavy)
        if self.sizes[2]:
            parts.append(log_shares[2] + prior)
        return (torch.logsumexp(torch.stack(parts), 0) if len(parts) > 1 else parts[0]), gaussian


def heavy_tails(space: Space, rows: Batch, given: dict[str, Tensor]) -> bool:
    r"""Whether log p(u) falls more slowly than a Gaussian's along a coordinate, far out.

    As :math:`r^p` the fall grows by :math:`2^p` from r to 2 r: p is 2 for a Gaussian, 1 for a Laplace or logistic.
    ``given`` holds a draw for each of `SEEN` particles.
    """
    draws = space.from_prior(rows, SEEN, given)
    scale = torch.nan_to_num(draws, 0.0, 0.0, 0.0).std((0, 1)).clamp_min(1e-6)
    at = torch.where(draws[:1].isfinite(), draws[:1], 0.0)
    axes = _FAR * torch.diag(scale)
    moves = torch.cat([torch.zeros_like(axes[:1]), axes, -axes, 2 * axes, -2 * axes])[:, None]
    log_p = torch.cat(
        [
            space.terms(at + move, rows, {n: v[:1].expand(len(move), *v.shape[1:]) for n, v in given.items()}).prior
            for move in moves.split(256)
        ]
    )
    near, far = (log_p[0] - log_p[1:]).chunk(2)
    power = (far / near).log2()
    light = (power > 1.5) | ~far.isfinite() | (near <= 0) & (far > 0)
    return bool((~light).any())
