"""How sparse codes are, what they keep of the data, and by how much they shrink it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import positive, whole
from probae.batches import as_matrix, rows_of
from probae.export.tabular import Tabular
from probae.runtime.isolation import isolated
from probae.runtime.seeding import evaluating
from probae.tracing.missing import observed, require_numbers

if TYPE_CHECKING:
    import pandas

_CELLS = 2**23  # numbers of draws at a time


@dataclass(frozen=True, repr=False)
class Sparsity(Tabular):
    r"""What `measure_sparsity` returns. L0 and firing density count by Pr(\|z_l\| > τ \| x), which is 0 or 1 at a point.

    Attributes:
        l0: (N,) the expected number of latents that are on.
        hoyer, gini: (N,) of the posterior mean, see `hoyer` and `gini`.
        density: (L,) firing density: over data, how often a latent is on.
        explained_variance: the share of the data's variance that the reconstruction keeps, at most 1; see the function.
        shrinkage: of the reconstruction, see `relative_reconstruction_bias`; below 1 where codes are shrunk.
        threshold: τ.
    """

    l0: Tensor
    hoyer: Tensor
    gini: Tensor
    density: Tensor
    explained_variance: float
    shrinkage: float
    threshold: float

    @property
    def dead(self) -> Tensor:
        """(L,) latents that no datum has on."""
        return self.density == 0

    @property
    def dead_fraction(self) -> float:
        """The share of the latents that are dead."""
        return float(self.dead.double().mean())

    def to_frame(self) -> pandas.DataFrame:
        """One row: means over data."""
        import pandas as pd

        means = {name: float(getattr(self, name).mean()) for name in ("l0", "hoyer", "gini")}
        rest = {name: getattr(self, name) for name in ("dead_fraction", "explained_variance", "shrinkage", "threshold")}
        return pd.DataFrame([{**means, **rest}])

    def __repr__(self) -> str:
        return (
            f"<codes of {len(self.density)} latents: {float(self.l0.mean()):.2f} on, {self.dead_fraction:.0%} dead, "
            f"explained variance {self.explained_variance:.3f}>"
        )

    def latents_frame(self) -> pandas.DataFrame:
        """A row for each latent: its firing density, and whether it is dead."""
        import pandas as pd

        return pd.DataFrame({"density": self.density.numpy(), "dead": self.dead.numpy()}).rename_axis("latent")

    def density_histogram(self, bins: int = 20) -> pandas.DataFrame:
        """How many of the living latents have a log10 firing density between ``low`` and ``high``."""
        import numpy as np
        import pandas as pd

        alive = self.density[~self.dead].log10().numpy()
        counts, edges = np.histogram(alive, whole("bins", bins)) if len(alive) else (np.zeros(0, int), np.zeros(1))
        return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "latents": counts})


@isolated
def measure_sparsity(model: Any, x: Any, *, threshold: float = 0.0, draws: int = 64, seed: int = 0) -> Sparsity:
    r"""How sparse the codes of a model are at data, by its posterior q(z | x).

    .. math:: \text{L0}(x) = \sum_l \Pr(|z_l| > \tau \mid x), \qquad \text{density}_l = \tfrac1N \sum_n \Pr(|z_l| > \tau | x_n)

    A continuous posterior has no exact zeros: give it a τ > 0. Point guides and gates have, and take τ = 0.

    Args:
        model: a model with ``posterior(x)``.
        x: N data.
        threshold: τ, in the units of the codes.
        draws: of q for each datum.
        seed: of the draws.

    Raises:
        ValueError: if the model has no ``posterior(x)``, or an argument is out of range.

    References: Hurley & Rickard (2009), *Comparing measures of sparsity*, IEEE Trans. Inf. Theory 55.

    Example:
        >>> import probae
        >>> model = probae.SparseAutoencoder(4, 8, prior="flat", posterior=probae.posteriors.TopK(2))
        >>> float(measure_sparsity(model, torch.randn(20, 4)).l0.max()) <= 2
        True
    """
    pair = as_pair(model)
    batch = pair.as_data(x)
    probability = active_probability(pair, batch, threshold=threshold, draws=draws, seed=seed)
    with evaluating(pair):
        codes = torch.cat([pair.posterior(rows).mean for rows in rows_of(batch, 4096)]).double().cpu()
    reconstruction = pair.reconstruct(batch).double().cpu().flatten(1)
    data = batch.double().cpu().flatten(1)
    return Sparsity(
        probability.sum(-1),
        hoyer(codes),
        gini(codes),
        probability.mean(0),
        explained_variance(reconstruction, data),
        relative_reconstruction_bias(reconstruction, data),
        threshold,
    )


@isolated
def active_probability(model: Any, x: Any, *, threshold: float = 0.0, draws: int = 64, seed: int = 0) -> Tensor:
    r""":math:`\Pr(|z_l| > \tau \mid x_n)` (N, L), by draws of the model's posterior.

    Raises:
        ValueError: if the model has no ``posterior(x)``, or an argument is out of range.

    Example:
        >>> import probae
        >>> active_probability(probae.VAE(4, 2), torch.zeros(3, 4), threshold=0.5).shape
        torch.Size([3, 2])
    """
    threshold, draws = positive("threshold", threshold, zero=True), whole("draws", draws)
    pair = as_pair(model)
    pair.need("posterior")
    batch, blocks = pair.as_data(x), []
    with evaluating(pair, seed), pair.own_parameters():
        for rows in rows_of(batch, max(1, _CELLS // (draws * pair.posterior(batch[:1]).event_shape.numel()))):
            drawn = pair.posterior(rows).sample((draws,))
            blocks.append((drawn.abs() > threshold).double().mean(0).cpu())
    return torch.cat(blocks)


def hoyer(codes: Any) -> Tensor:
    r""":math:`(\sqrt L - \|z\|_1 / \|z\|_2) / (\sqrt L - 1)` of each code (N, L).

    1 with one latent on (or none), 0 with all alike.

    Reference: Hoyer (2004), *JMLR* 5.

    Example:
        >>> hoyer([[0.0, 3.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]).tolist()
        [1.0, 0.0]
    """
    z = numbers("codes", codes, "(N, L)").abs()
    z = z / z.amax(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    root = z.shape[-1] ** 0.5
    ratio = z.sum(-1) / z.square().sum(-1).sqrt().clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(ratio == 0, torch.ones_like(ratio), (root - ratio) / max(root - 1, torch.finfo(z.dtype).tiny))


def gini(codes: Any) -> Tensor:
    r""":math:`1 - 2 \sum_k \frac{|z|_{(k)}}{\|z\|_1} \frac{L - k + 1/2}{L}` of each code (N, L), magnitudes sorted upwards.

    1 − 1/L with one latent on (or none), 0 with all alike.

    Example:
        >>> gini([[0.0, 3.0], [1.0, 1.0]]).tolist()
        [0.5, 0.0]
    """
    z = numbers("codes", codes, "(N, L)").abs().sort(-1).values
    latents = z.shape[-1]
    total = z.sum(-1)
    weight = (latents - torch.arange(1, latents + 1, dtype=z.dtype) + 0.5) / latents
    found = 1 - 2 * (z @ weight) / total.clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(total == 0, torch.full_like(found, 1 - 1 / latents), found)


def explained_variance(reconstruction: Any, x: Any) -> float:
    r""":math:`1 - \sum_n \|x_n - \hat x_n\|^2 / \sum_n \|x_n - \bar x\|^2`; NaN where no feature varies.

    What is missing of x (NaN) is left out of the sums.

    Raises:
        ValueError: if the shapes differ, or a number of the reconstruction is not finite.

    Example:
        >>> explained_variance([[1.0], [3.0]], [[1.0], [3.0]])
        1.0
    """
    found, data = _centred(reconstruction, x)
    spread = float(data.square().sum())
    return 1 - float((data - found).square().sum()) / spread if spread > 0 else math.nan


def relative_reconstruction_bias(reconstruction: Any, x: Any) -> float:
    r"""By how much reconstructions are too short, seen from the data's mean.

    .. math:: \gamma = \arg\min_\gamma \sum_n \|(\hat x_n - \bar x) / \gamma - (x_n - \bar x)\|^2
              = \sum_n \|\hat x_n - \bar x\|^2 / \sum_n (\hat x_n - \bar x)^T (x_n - \bar x)

    1 where there is no bias; below 1 where a penalty shrinks the codes; NaN where no feature varies, or no reconstruction. What
    is missing of x (NaN) is left out of the sums.

    Raises:
        ValueError: as `explained_variance` does.

    Reference: Rajamanoharan et al. (2024), *Improving dictionary learning with gated sparse autoencoders*.

    Example:
        >>> relative_reconstruction_bias([[-0.5], [0.5]], [[-1.0], [1.0]])
        0.5
    """
    found, data = _centred(reconstruction, x)
    rows = numbers("reconstruction", reconstruction, "(N, D)")
    if not bool(data.any()) or bool((rows == rows[0]).all()):
        return math.nan
    return float(found.square().sum() / (found * data).sum())


def _centred(reconstruction: Any, x: Any) -> tuple[Tensor, Tensor]:
    """Both from the data's mean, 0 where a value of x is missing."""
    found, data = numbers("reconstruction", reconstruction, "(N, D)"), numbers("x", x, "(N, D)", missing="mask")
    require_alike("reconstruction", found, "x", data)
    away, seen = observed(data - data.nanmean(0))
    return (found - data.nanmean(0).nan_to_num(0.0)) * seen, away


def shrinkage_slope(codes: Any, truth: Any) -> float:
    r"""The slope of found codes (N, L) on true ones, where these are on: :math:`\sum \hat z z / \sum z^2`, 1 without shrinkage.

    Raises:
        ValueError: if the shapes differ, a number is not finite, or no true code is on.

    Example:
        >>> shrinkage_slope([[0.5, 0.1]], [[1.0, 0.0]])
        0.5
    """
    found, true = numbers("codes", codes, "(N, L)"), numbers("truth", truth, "(N, L)")
    require_alike("codes", found, "truth", true)
    if not bool(true.any()):
        raise ValueError("truth: expected a code that is on, got zeros alone")
    return float((found * true).sum() / true.square().sum())


def numbers(name: str, data: Any, axes: str, missing: str | None = None) -> Tensor:
    """One array with two axes as float64 on the CPU, its numbers finite; see `probae.batches.as_matrix`."""
    matrix = as_matrix(name, data, axes).detach()
    require_numbers(matrix, name, missing)
    return matrix.double().cpu()


def require_alike(name: str, found: Tensor, other: str, truth: Tensor) -> None:
    """Raise a ValueError unless two arrays have one shape."""
    if found.shape != truth.shape:
        raise ValueError(f"{name}: expected {tuple(truth.shape)}, as {other} has, got {tuple(found.shape)}")
