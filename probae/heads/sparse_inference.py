"""The best sparse codes of data under a known dictionary: FISTA for an L1 penalty, and orthogonal matching pursuit."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from probae.arguments import positive as positive_number
from probae.arguments import size
from probae.tracing.missing import require_numbers

_EVERY = 10  # iterations between looks at what still moves
_SQUARINGS = 6  # of DᵀD, after which its norm is known within L^(1 / 64)


def fista(
    x: Tensor,
    dictionary: Tensor,
    rate: float | Tensor,
    scale: float | Tensor = 1.0,
    positive: bool = False,
    *,
    iterations: int = 10_000,
    tolerance: float | None = 1e-8,
) -> Tensor:
    r"""The codes at which the joint density of Laplace codes and Normal data is largest, by accelerated proximal gradients.

    .. math:: z^* = \arg\min_z \frac{\|x - D z\|^2}{2 \sigma^2} + \lambda \|z\|_1, \qquad
              z \leftarrow \text{soft}\big(y - \tfrac1c D^T (D y - x), \tfrac{\lambda \sigma^2}{c}\big),
              \quad c \ge \|D\|_2^2,

    with y ahead of z by momentum, which starts anew for a datum where it leads uphill. All data move at once. With an
    orthonormal dictionary the codes are soft(Dᵀx, λσ²).

    Shapes: x (..., D), less the decoder's offset; dictionary (D, L); codes (..., L). No gradient flows through it.

    Args:
        rate, scale: λ and σ.
        positive: whether codes are held at z >= 0, as under an Exponential prior.
        iterations: the most that are made.
        tolerance: the largest proximal gradient step that may be left, as a share of the largest \|Dᵀx\| of the datum, not
            below what the dtype resolves; None makes all iterations, never starts anew and looks at no value, so that it can
            be traced.

    Raises:
        ValueError: if shapes do not fit, an argument is out of range, or, where there is a tolerance, x is not finite.
        RuntimeWarning: if the iterations end before the tolerance is met.

    References: Beck & Teboulle (2009), *SIAM J. Imaging Sciences* 2; O'Donoghue & Candès (2015) for the restart.

    Example:
        >>> fista(torch.tensor([[3.0, -0.5, 1.0]]), torch.eye(3), rate=1.0).tolist()
        [[2.0, 0.0, 0.0]]
    """
    iterations = size("iterations", iterations)
    if x.shape[-1] != dictionary.shape[0]:
        raise ValueError(f"x: expected (..., {dictionary.shape[0]}), as the dictionary's rows, got {tuple(x.shape)}")
    for name, number in (("rate", rate), ("scale", scale)):
        if not isinstance(number, Tensor):
            positive_number(name, number, zero=name == "rate")
    with torch.no_grad():
        gram, match = dictionary.mT @ dictionary, x @ dictionary
        curvature = _curvature(gram)
        threshold = torch.as_tensor(rate, dtype=x.dtype, device=x.device) * scale**2 / curvature
        towards, keeps = match / curvature, torch.eye(len(gram), dtype=x.dtype, device=x.device) - gram / curvature
        if tolerance is None:
            return _steps(towards, keeps, threshold, positive, iterations)
        require_numbers(x, "x")
        share = max(positive_number("tolerance", tolerance), 8 * torch.finfo(x.dtype).eps)
        least = share * towards.abs().amax(-1, keepdim=True)
        z = ahead = torch.zeros_like(match)
        t = torch.ones_like(match[..., :1])
        for step in range(iterations):
            found = shrink(ahead @ keeps + towards, threshold, positive)
            if step % _EVERY == 0 and bool(((found - ahead).abs() <= least).all()):
                return found
            uphill = ((ahead - found) * (found - z)).sum(-1, keepdim=True) > 0
            t = torch.where(uphill, torch.ones_like(t), t)
            following = (1 + (1 + 4 * t.square()).sqrt()) / 2
            z, ahead, t = found, torch.lerp(z, found, 1 + (t - 1) / following), following
        found = shrink(ahead @ keeps + towards, threshold, positive)
        if not bool(((found - ahead).abs() <= least).all()):
            warnings.warn(f"FISTA has not met its tolerance in {iterations} iterations", RuntimeWarning, stacklevel=2)
        return found


def _steps(towards: Tensor, keeps: Tensor, threshold: Tensor, positive: bool, iterations: int) -> Tensor:
    """A fixed number of steps, whose momentum is the same for all data."""
    z = ahead = torch.zeros_like(towards)
    t = 1.0
    for _ in range(iterations):
        found = shrink(ahead @ keeps + towards, threshold, positive)
        following = (1 + math.sqrt(1 + 4 * t**2)) / 2
        z, ahead, t = found, torch.lerp(z, found, 1 + (t - 1) / following), following
    return z


def _curvature(gram: Tensor) -> Tensor:
    """The largest eigenvalue of DᵀD, or a little more; its powers come near to it, and their row sums bound it from above."""
    power, log_scale = gram, gram.new_zeros(())
    for _ in range(_SQUARINGS):
        size = power.abs().amax().clamp_min(torch.finfo(gram.dtype).tiny)
        power = (power / size) @ (power / size)
        log_scale = 2 * (log_scale + size.log())
    largest = power.abs().sum(-1).amax().clamp_min(torch.finfo(gram.dtype).tiny)
    return ((largest.log() + log_scale) / 2**_SQUARINGS).exp().clamp_min(torch.finfo(gram.dtype).tiny)


def shrink(z: Tensor, threshold: Tensor, positive: bool = False) -> Tensor:
    r"""soft(z, t) = sign(z) max(\|z\| − t, 0), the proximal step of t\|z\|; of t z on z >= 0 where codes are positive."""
    if positive:
        return (z - threshold).clamp_min(0)
    return z - z.clamp(min=-threshold, max=threshold)


def duality_gap(
    codes: Tensor,
    x: Tensor,
    dictionary: Tensor,
    rate: float | Tensor,
    scale: float | Tensor = 1.0,
    positive: bool = False,
) -> Tensor:
    r"""What codes may be above the minimum of ‖x − D z‖² / 2σ² + λ‖z‖₁, at most: (...), nats.

    .. math:: \text{gap} = P(z) - \Big(\theta^T x - \tfrac12 \|\theta\|^2\Big) / \sigma^2, \qquad
              \theta = r \min\big(1, \lambda \sigma^2 / \|D^T r\|_\infty\big), \quad r = x - D z

    Shapes: codes (..., L), x (..., D), dictionary (D, L).

    Example:
        >>> x = torch.tensor([[3.0, -0.5, 1.0]])
        >>> float(duality_gap(fista(x, torch.eye(3), rate=1.0), x, torch.eye(3), rate=1.0))
        0.0
    """
    residual = x - codes @ dictionary.mT
    match = residual @ dictionary
    steepest = (match if positive else match.abs()).amax(-1).clamp_min(torch.finfo(x.dtype).tiny)
    threshold = torch.as_tensor(rate, dtype=x.dtype, device=x.device) * scale**2
    feasible = residual * (threshold / steepest).clamp(max=1.0).unsqueeze(-1)
    primal = residual.square().sum(-1) / 2 + threshold * codes.abs().sum(-1)
    dual = (feasible * x).sum(-1) - feasible.square().sum(-1) / 2
    return (primal - dual) / scale**2


def matching_pursuit(x: Tensor, dictionary: Tensor, nonzero: int) -> Tensor:
    r"""Codes with at most ``nonzero`` numbers other than 0, chosen greedily, by scikit-learn's orthogonal matching pursuit.

    Shapes: x (..., D), less the decoder's offset; dictionary (D, L), columns of length 1; codes (..., L).

    Raises:
        ValueError: if ``nonzero`` is no whole number from 1 to L, or no more than D.
        ImportError: without scikit-learn.

    Reference: Pati, Rezaiifar & Krishnaprasad (1993).

    Example:
        >>> matching_pursuit(torch.tensor([[3.0, -0.5, 1.0]]), torch.eye(3), 2).tolist()
        [[3.0, 0.0, 1.0]]
    """
    if size("nonzero", nonzero) > min(dictionary.shape):
        raise ValueError(
            f"nonzero: expected at most {min(dictionary.shape)}, of {tuple(dictionary.shape)}, got {nonzero}"
        )
    try:
        from sklearn.linear_model import orthogonal_mp
    except ImportError as error:
        raise ImportError("matching pursuit is scikit-learn's: pip install 'probae[compare]'") from error
    rows = x.detach().reshape(-1, x.shape[-1]).double().cpu().numpy()
    with warnings.catch_warnings():  # of a residual that is 0 before all are chosen
        warnings.simplefilter("ignore")
        found = orthogonal_mp(dictionary.detach().double().cpu().numpy(), rows.T, n_nonzero_coefs=nonzero)
    codes = torch.as_tensor(found).reshape(dictionary.shape[1], -1).mT
    return codes.to(x).reshape(*x.shape[:-1], -1)
