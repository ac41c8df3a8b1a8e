"""Latent class analysis: a finite mixture of any likelihood, with exact log p(x) and exact posterior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import positive
from probae.heads.likelihoods import Bernoulli, Head
from probae.heads.nn import event_shape
from probae.mixtures.expectation_maximisation import maximise
from probae.mixtures.weighted_likelihood import most_likely, require_closed_form, require_support, warn_of_floor
from probae.models.finite_mixture import FiniteMixture
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.tracing.missing import known, masked, require_observed

_CELLS = 2**22  # data × classes × features at a time


@recorded
class LatentClass(FiniteMixture):
    r"""A finite mixture whose features are independent within a class: latent class analysis, of any likelihood.

    .. math:: z \sim \text{Categorical}(\pi), \qquad p(x \mid z = k) = \prod_d p(x_d; \theta_{kd}),
    .. math:: p(x) = \sum_k \pi_k \prod_d p(x_d; \theta_{kd}), \qquad
              q(z = k \mid x) = \frac{\pi_k \prod_d p(x_d; \theta_{kd})}{p(x)}

    Shapes: z (..., K), a one in the place of the class and zeros beside it; x (..., D). Nats per datum. The guide is the
    exact posterior, so ELBO = log p(x). With Bernoulli or categorical features it is latent class analysis, with Normal ones
    (``likelihoods.Normal("predicted")``, scales of each class's own) latent profile analysis, a mixture of diagonal Gaussians.

    `maximum_likelihood` fits by EM from several starts where its M step is closed: Bernoulli, Categorical, Binomial, Poisson
    and Normal. `probae.fit` trains any likelihood on the exact −log p(x).

    Args:
        features: D, or the shape of an event.
        classes: K.
        likelihood: a head of `probae.likelihoods`; Bernoulli by default.
        missing: ``"mask"`` takes NaN for what is missing at random: it is summed out, exactly.

    Attributes:
        optima: where each start of `maximum_likelihood` ended, an `Optima`; None before. It is not saved.

    Raises:
        ValueError, TypeError: if a number of features or classes is below 1, or the likelihood is no head.

    References: Lazarsfeld & Henry (1968), *Latent structure analysis*; Goodman (1974), *Biometrika* 61; McLachlan & Peel
    (2000), *Finite mixture models*.

    Example:
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        >>> model = LatentClass(features=3, classes=2).maximum_likelihood(x, restarts=3)
        >>> model.responsibilities(x).shape, model.class_probabilities.shape
        (torch.Size([4, 2]), torch.Size([2]))
    """

    initialised: Tensor

    def __init__(
        self,
        features: int | Sequence[int],
        classes: int,
        likelihood: Head | None = None,
        *,
        missing: str | None = None,
    ):
        super().__init__(classes)
        self.missing = known(missing)
        if likelihood is not None and not isinstance(likelihood, Head):
            raise TypeError(f"likelihood: expected a head of probae.likelihoods, got {type(likelihood).__name__}")
        self.event_shape = event_shape("features", features)
        self.event_dim = len(self.event_shape)
        self.head = (likelihood if likelihood is not None else Bernoulli()).bind(self.event_shape)
        self.features: int = self.head.features  # type: ignore[assignment]
        self.outputs = nn.Parameter(0.5 * torch.randn(self.classes, self.head.width * self.features))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the likelihood does."""
        return self.head.keeps_precision

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z): the head at the class's outputs."""
        return self.head(z @ self.outputs)

    def marginal(self) -> Any:
        """p(x), the sum over classes."""
        return self.mixed(self.head(self.outputs))

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k) (..., K); of what is observed of x, where values are missing."""
        fn, x = self.head(self.outputs), x.unsqueeze(-1 - self.event_dim)
        if self.missing is not None:
            fn, x = masked(fn, x)
        return torch.log_softmax(self.logits, -1) + fn.log_prob(x).to(self.logits)

    def initialise(self, x: Tensor) -> None:
        """Take the likelihood's units from training data, once."""
        x = (x if x.is_floating_point() else x.to(self.dtype)).flatten(1)
        require_observed(x)
        if not bool(self.initialised):
            self.head.start(x)
            self.initialised.fill_(True)

    @isolated
    @learns_columns
    def maximum_likelihood(
        self,
        x: Any,
        *,
        restarts: int = 10,
        seed: int = 0,
        smoothing: float = 0.0,
        tolerance: float = 1e-8,
        max_iterations: int = 1_000,
    ) -> LatentClass:
        r"""Fit to data (N, D) by EM from several starts, of which the best is kept; returns the model.

        .. math:: \sum_n \log p(x_n) + \frac{\alpha}{N} \sum_n \sum_k \log p(x_n; \theta_k)

        is maximised, with α the ``smoothing``: it gives each class so many data more that look like all data together, which
        keeps some probability for answers that none of a class's members gave.

        Args:
            x: the data, NaN where a value is missing.
            restarts: how many starts: each class from a datum drawn at random, mixed with the mean of all data.
            seed: of the starts.
            smoothing: α >= 0; 0 is maximum likelihood.
            tolerance, max_iterations: when a start ends; see ``probae.mixtures.expectation_maximisation.maximise``.

        Raises:
            ValueError: if the data do not fit the likelihood, if there are fewer than classes, or if the likelihood has no
                closed M step.

        Warns:
            RuntimeWarning: if a class's scale shrinks to the likelihood's floor: the density is unbounded but for it.
        """
        require_closed_form(self.head)
        smoothing = positive("smoothing", smoothing, zero=True)
        x = self.as_data(x).double()
        require_observed(x.flatten(1))
        if len(x) < self.classes:
            raise ValueError(f"site 'x': expected at least as many data as classes, {self.classes}, got {len(x)}")
        require_support(self.head, self.outputs, x)
        self.head.start(x.flatten(1))
        self.initialised.fill_(True)
        self.optima = maximise(
            self,
            lambda work, generator: work._start(x, generator),
            lambda work: work._step(x, smoothing),
            len(x),
            restarts=restarts,
            seed=seed,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        warn_of_floor(self.head, self.outputs.detach(), "classes", "use smoothing=, or fewer classes")
        return self.eval()

    def _start(self, x: Tensor, generator: torch.Generator) -> None:
        """Each class half a datum drawn at random, half the mean of all data."""
        weights = torch.full((len(x), self.classes), 1 / len(x), dtype=x.dtype, device=x.device)
        chosen = torch.randperm(len(x), generator=generator)[: self.classes].to(x.device)
        weights[chosen, torch.arange(self.classes, device=x.device)] += 1
        self.logits.zero_()
        self.outputs.copy_(most_likely(self.head, x.flatten(1), weights))

    def _step(self, x: Tensor, smoothing: float) -> Tensor:
        """One EM step; what is maximised, before it, nats per datum."""
        rows = max(1, _CELLS // (self.classes * self.outputs.shape[1]))
        joint = torch.cat([self.log_joint(part) for part in x.split(rows)])
        value = torch.logsumexp(joint, -1).mean()
        share = torch.softmax(joint, -1)
        if smoothing:
            value = value + smoothing / len(x) * (joint - torch.log_softmax(self.logits, -1)).sum() / len(x)
        self.logits.copy_(share.mean(0).clamp_min(1e-300).log())
        self.outputs.copy_(most_likely(self.head, x.flatten(1), share + smoothing / len(x)))
        return value
