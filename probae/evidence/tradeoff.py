"""The rate–distortion curve of a model: how many nats about x a code must carry for how good a reconstruction."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import positive
from probae.evidence.ais import AIS, Annealer, Block
from probae.evidence.hmc import Point
from probae.evidence.weights import prepare
from probae.export.figures.evidence import rate_distortion_curve
from probae.runtime.isolation import isolated

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class RateDistortion:
    """A curve of T + 1 points, each a mean over the data, nats per datum.

    Attributes:
        beta: (T + 1,) the power of the likelihood, the slope of the curve: −dR/dD.
        rate: R, an upper bound on KL(q_β(z|x) ‖ p(z)) in expectation.
        distortion: D, the mean of −log p(x|z).
        rate_mc_stderr, distortion_mc_stderr: what other draws for the same data would change.
        rate_stderr, distortion_stderr: as estimates for all data of the kind; NaN for a single datum.
    """

    beta: Tensor
    rate: Tensor
    distortion: Tensor
    rate_mc_stderr: Tensor
    distortion_mc_stderr: Tensor
    rate_stderr: Tensor
    distortion_stderr: Tensor

    def to_frame(self) -> pandas.DataFrame:
        """A row per point, a column per attribute."""
        import pandas

        return pandas.DataFrame({field.name: getattr(self, field.name).numpy() for field in fields(self)})

    def plot(self, ax: Any = None) -> Any:
        """Distortion against rate, with a dot at β = 1; needs ``probae[plots]``."""
        return rate_distortion_curve(self, ax)

    def __repr__(self) -> str:
        return (
            f"<rate–distortion curve of {len(self.beta)} points: rate 0 to {float(self.rate[-1]):.2f}, distortion "
            f"{float(self.distortion[0]):.2f} to {float(self.distortion[-1]):.2f} nats per datum>"
        )


@isolated
def rate_distortion(
    model: Any, x: Any, *, largest: float = 1.0, seed: int = 0, compile: bool | str = "auto", **options: Any
) -> RateDistortion:
    r"""Rate and distortion along the path from the prior to the posterior, from one run of annealed importance sampling.

    .. math:: q_\beta(z \mid x) \propto p(z)\, p(x \mid z)^\beta, \qquad D = -E \log p(x \mid z), \qquad
              R = \mathrm{KL}(q_\beta \,\|\, p) \le -\beta D - E[\log w_\beta]

    q_β minimises R + β D, whatever the guide is. The points are those of the chains themselves: D is what their codes do,
    and the rate an upper bound in expectation, since E[log w_β] ≤ log Z_β; both tighten as ``distributions`` grows. So the
    curve lies on or above the model's own.

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``; a guide is not needed.
        x: N data.
        largest: the last β; 1 ends at the posterior, more goes on to codes that reconstruct better than its draws.
        seed: of the draws.
        compile: how a leapfrog step is run, as for `log_weights`.
        options: ``chains=16``, ``distributions=1000``, …, as for ``log_evidence(method="ais")``; the path starts at the prior.

    Returns:
        `RateDistortion`.

    Raises:
        ValueError: if the prior is flat, or the latents are not continuous or shared by all data.

    Reference: Huang, Makhzani, Cao & Grosse (2020), *Evaluating lossy compression rates of deep generative models*.

    Example:
        >>> import torch, probae
        >>> curve = rate_distortion(probae.PPCA(features=4, latents=2), torch.zeros(3, 4), chains=4, distributions=20)
        >>> curve.rate.shape
        torch.Size([21])
    """
    annealing = AIS.of(options, "rate_distortion")
    if annealing.start != "prior" or annealing.schedule == "adaptive":
        raise ValueError("rate_distortion: the path starts at the prior, and all data share its schedule")
    largest = positive("largest", largest)
    pair, batch, signature = prepare(model, x, seed)
    if signature.globals_:
        raise ValueError(
            f"the data share the latents {list(signature.globals_)}: the rate of a datum's code is not defined"
        )
    annealer = Annealer(pair, batch, signature, annealing, seed, compile, largest=largest)

    def curve(block: Block) -> tuple[Tensor, ...]:
        betas, points = block.tuned.betas[:, 0], []

        def see(t: int, log_w: Tensor, point: Point) -> None:
            ratio = point.ratio.double()
            points.append(_moments(betas[t] * ratio - log_w, -ratio / largest))

        block.forward(see)
        return block.tuned.betas, *(torch.stack(values) for values in zip(*points, strict=True))

    betas, rate, rate_error, distortion, distortion_error = annealer.gathered(curve)
    found = [_summary(rate, rate_error), _summary(distortion, distortion_error)]
    (rate, rate_mc, rate_all), (distortion, distortion_mc, distortion_all) = found
    return RateDistortion(betas[:, 0] * largest, rate, distortion, rate_mc, distortion_mc, rate_all, distortion_all)


def _moments(rate: Tensor, distortion: Tensor) -> list[Tensor]:
    """The means over chains (N,), and the squares of their standard errors."""
    found = []
    for values in (rate, distortion):
        found += [values.mean(0), values.var(0) / len(values)]
    return found


def _summary(values: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means over data (T,), with their Monte-Carlo standard errors and those over data."""
    count = values.shape[1]
    spread = values.std(1) if count > 1 else torch.full_like(values[:, 0], torch.nan)
    return values.mean(1), variance.sum(1).sqrt() / count, spread / math.sqrt(count)
