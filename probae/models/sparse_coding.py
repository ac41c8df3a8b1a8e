"""Sparse coding: a dictionary, and for each datum the best code under it, found by optimisation."""

from __future__ import annotations

import warnings
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probae.arguments import flag, one_of, size
from probae.heads import likelihoods, priors
from probae.heads.distributions import centred
from probae.heads.sparse_inference import fista, matching_pursuit
from probae.models.dictionary import Dictionary, share_unit
from probae.pair import Pair
from probae.recipe import recorded

METHODS = ("fista", "matching_pursuit")


@recorded
class SparseCoding(Pair):
    r"""The model of `SparseAutoencoder` with another guide: a point at the best code of each datum, not at an encoder's.

    .. math:: z_l \sim \text{Laplace}(0, 1/\lambda), \qquad x \mid z \sim N(D z + b, \sigma^2 I), \qquad \|d_l\| = 1,

    .. math:: z^*(x) = \arg\min_z \frac{\|x - D z - b\|^2}{2 \sigma^2} + \lambda \|z\|_1

    Training alternates in each step: codes by FISTA at the present dictionary, then a gradient step of the dictionary at those
    codes, held fixed. (At the minimum over z the gradient of the minimum is that at fixed z.) The loss is the squared error
    and the penalty with every constant. A point guide gives no bound, but the model has an evidence, which guides of each
    datum's own find. Shapes: z (..., L), x (..., D); L may exceed D.

    Args:
        features, latents: D and L.
        rate: λ > 0, per unit of the data where σ is a number, else per standard deviation of the data.
        likelihood: a Normal with one scale for all features; by default 1, in units of the data.
        method: ``"fista"``, or ``"matching_pursuit"``, scikit-learn's, for codes with at most ``nonzero`` latents on.
        nonzero: that number.
        nonnegative: whether codes and columns are held at >= 0: the prior is then an Exponential, and the model a sparse
            non-negative factorisation of what lies above b.
        iterations: of FISTA in a step of training; elsewhere it runs until a proximal step moves no code by more than 1e-8 of
            its size, or what the dtype resolves.

    Raises:
        ValueError: if the likelihood is no Normal with one scale, if that is to be learned with as many latents as features
            (data copied without error would send it to zero), or if ``nonzero`` does not go with the method.

    References: Olshausen & Field (1997), *Vision Research* 37; Mairal et al. (2010), *JMLR* 11; Hoyer (2004) for non-negative
    factors.

    Example:
        >>> import torch, probae
        >>> model = SparseCoding(features=3, latents=5, rate=4.0)
        >>> _ = probae.fit(model, torch.randn(50, 3), steps=5, progress=False)
        >>> bool((model.encode(torch.randn(20, 3)) == 0).any())
        True
    """

    initialised: Tensor

    def __init__(
        self,
        features: int,
        latents: int,
        *,
        rate: float = 1.0,
        likelihood: likelihoods.Head | None = None,
        method: str = "fista",
        nonzero: int | None = None,
        nonnegative: bool = False,
        iterations: int = 100,
    ):
        super().__init__()
        self.features, self.latents = size("features", features), size("latents", latents)
        self.method, self.iterations = one_of("method", method, METHODS), size("iterations", iterations)
        self.nonnegative = flag("nonnegative", nonnegative)
        pursuit = method == "matching_pursuit"
        if (nonzero is not None) != pursuit or (pursuit and nonnegative):
            raise ValueError(
                "nonzero: goes with method='matching_pursuit', which needs it and has no non-negative form, got "
                f"nonzero={nonzero}, method={method!r}, nonnegative={nonnegative}"
            )
        self.nonzero = None if nonzero is None else size("nonzero", nonzero)
        if nonzero is not None and nonzero > min(features, latents):
            raise ValueError(f"nonzero: expected at most {min(features, latents)}, got {nonzero}")
        self.prior = (priors.Exponential if nonnegative else priors.Laplace)(self.latents, rate=rate)
        self.decoder = Dictionary(self.latents, self.features, positive=nonnegative)
        self.head = _one_scale(likelihood if likelihood is not None else likelihoods.Normal(1.0)).bind(self.features)
        if self.head.learned and latents >= features:
            raise ValueError(
                f"a point guide with a learned scale needs fewer latents than features, got {latents} latents and "
                f"{features} features: fix the scale, likelihoods.Normal(scale=1.0)"
            )
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the likelihood does."""
        return self.head.keeps_precision

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z), around D z + b."""
        return self.head(self.decoder(z))

    def posterior(self, x: Tensor) -> Any:
        """The point at the best code."""
        head, decoder = self.head, self.decoder
        with torch.no_grad():
            away = centred(x, head.origin, head.origin_low) - head.unit * decoder.offset
            code = self._best(away, head.unit[0] * decoder.columns)
        return dist.Delta(code, event_dim=1, validate_args=False)

    def _best(self, away: Tensor, columns: Tensor) -> Tensor:
        """The best codes of data, less their offset."""
        if self.nonzero is not None:
            return matching_pursuit(away, columns, self.nonzero)
        options = (self.prior.rate, self.head.scale, self.nonnegative)
        if self.training:
            return fista(away, columns, *options, iterations=self.iterations, tolerance=None)
        with warnings.catch_warnings():
            if not bool(self.initialised):  # the origin is not the data's yet, and may be far from them
                warnings.simplefilter("ignore", RuntimeWarning)
            return fista(away, columns, *options)

    def initialise(self, x: Tensor) -> None:
        """Take the data's mean and unit from training data, once."""
        if not bool(self.initialised):
            self.head.start(x if x.is_floating_point() else x.to(self.head.origin.dtype))
            share_unit(self.head, self.decoder)
            self.initialised.fill_(True)


def _one_scale(head: likelihoods.Head) -> likelihoods.Normal:
    if not isinstance(head, likelihoods.Normal) or head.kind != "shared":
        raise ValueError(
            f"likelihood: expected a Normal with one scale, Normal(1.0) or Normal('shared'), got {type(head).__name__}"
        )
    return head
