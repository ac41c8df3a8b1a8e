"""Predictive sparse decomposition: a dictionary learned at inferred codes, and an encoder that learns to predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import positive
from probae.arguments import size as whole_size
from probae.batches import Batch
from probae.heads.distributions import centred
from probae.heads.likelihoods import Normal
from probae.heads.priors import Exponential, Laplace
from probae.heads.sparse_inference import fista
from probae.objectives.objective import Monitor, Objective
from probae.programs.smooth import code_of
from probae.runtime.seeding import evaluating

if TYPE_CHECKING:
    from probae.pair import Pair


class PredictiveSparse(Objective):
    r"""The joint density at the best codes near the encoder's, and what the encoder is from them.

    .. math:: z_n^* = \arg\min_z -\log p(x_n, z) + \alpha \lVert z - f(x_n) \rVert^2, \qquad
              \text{loss} = \frac1N \sum_n -\log p(x_n, z_n^*) + \alpha \lVert z_n^* - f(x_n) \rVert^2

    with f(x) the encoder's code. Inference is a proximal gradient method (FISTA), without gradient; so the dictionary learns
    from the first term at the codes as they are, and the encoder from the second: alternating steps as one loss. Nats per
    datum; an objective, no bound.

    Args:
        weight: α > 0, in inverse squared units of the codes.
        iterations: of FISTA, at each step.

    Raises:
        ValueError: if an argument is out of range; in use, if the pair is not a linear decoder with a Normal likelihood under
            a Laplace or Exponential prior of a given rate, takes missing values, or has a learned scale and as many latents as
            features.

    Reference: Kavukcuoglu, Ranzato & LeCun (2008), *Fast inference in sparse coding algorithms*, arXiv 1010.3467.

    Example:
        >>> import probae
        >>> PredictiveSparse(0.5)(probae.SparseAutoencoder(4, 8), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    def __init__(self, weight: float = 1.0, iterations: int = 20):
        super().__init__()
        self.weight = positive("weight", weight)
        self.iterations = whole_size("iterations", iterations)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        codes, predicted = self._codes(pair, batch, self.iterations, None)
        joint = pair.likelihood(codes).log_prob(batch) + pair.prior().log_prob(codes)
        return (self.weight * (codes - predicted).square().sum(-1) - joint).mean()

    def infer(self, pair: Pair, x: Any, iterations: int = 10_000, tolerance: float = 1e-13) -> Tensor:
        """The codes z* (N, L) at data x (N, D), to a tolerance; see ``probae.heads.sparse_inference.fista``."""
        with evaluating(pair):
            return self._codes(pair, pair.as_data(x), iterations, tolerance)[0]

    def _codes(self, pair: Any, x: Batch, iterations: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
        """The inferred codes, without gradient, and the predicted ones."""
        require_linear(pair)
        if not isinstance(x, Tensor):
            raise ValueError(f"expected one array of data, got a {type(x).__name__}")
        function, flat = code_of(pair, x)
        predicted = function(flat)
        with torch.no_grad():
            # in units of the noise, and with rows that draw the codes to the predicted ones: a lasso again
            head, near = pair.head, (2 * self.weight) ** 0.5
            unit = head.unit / head.scale
            away = centred(flat, head.origin, head.origin_low) / head.scale - unit * pair.decoder.offset
            columns = unit[:, None] * pair.decoder.columns
            rows = near * torch.eye(pair.latents, dtype=columns.dtype, device=columns.device)
            codes = fista(
                torch.cat([away, near * predicted], -1),
                torch.cat([columns, rows]),
                pair.prior.rate,
                positive=isinstance(pair.prior, Exponential),
                iterations=iterations,
                tolerance=tolerance,
            )
        return codes, predicted

    def monitor(self, pair: Pair) -> Monitor:
        """The loss itself."""
        return "objective"

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"weight={self.weight:g}, iterations={self.iterations}"


def require_linear(pair: Any) -> None:
    """Raise a ValueError unless −log p(x, z) is a square and an L1 penalty, and bounded from below in what is learned."""
    linear = hasattr(getattr(pair, "decoder", None), "columns")
    normal = isinstance(getattr(pair, "head", None), Normal) and pair.head.kind != "predicted"
    laplace = isinstance(getattr(pair, "prior", None), Laplace | Exponential)
    if not (linear and normal and laplace) or pair.missing is not None:
        raise ValueError(
            "predictive sparse decomposition: expected a probae.SparseAutoencoder with prior='laplace' or 'exponential', a "
            f"Normal likelihood and no missing values, whose codes FISTA finds; got {type(pair).__name__}"
        )
    if pair.prior.fixed is None:
        raise ValueError(
            "predictive sparse decomposition: expected a rate that is given: at the best codes the density grows with it "
            "without end"
        )
    if pair.head.learned and pair.latents >= pair.features:
        raise ValueError(
            f"predictive sparse decomposition: with {pair.latents} latents of {pair.features} features data could be copied "
            "and a learned scale shrink to zero: expected a number, likelihoods.Normal(scale=1.0)"
        )
