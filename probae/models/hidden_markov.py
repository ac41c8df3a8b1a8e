"""Hidden Markov models of sequences, with any likelihood, exact log p(x) and exact posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import size
from probae.heads.likelihoods import Head, Normal
from probae.heads.nn import event_shape
from probae.mixtures.chains import Chain, posterior
from probae.mixtures.expectation_maximisation import Optima, maximise
from probae.mixtures.marginal import Marginal
from probae.mixtures.weighted_likelihood import most_likely, require_closed_form, require_support, warn_of_floor
from probae.objectives import MarginalLikelihood, Objective
from probae.pair import Pair
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.tracing.missing import known, masked, require_observed


@recorded
class HiddenMarkov(Pair):
    r"""Sequences whose steps depend on each other by a hidden chain of K states.

    .. math:: z_1 \sim \text{Categorical}(\pi), \quad z_t \mid z_{t-1} \sim \text{Categorical}(A_{z_{t-1}}), \quad
              x_t \mid z_t = k \sim \prod_d p(x_{td}; \theta_{kd})

    Shapes: z (..., T, K), a one in the place of each step's state; x (..., T, D). Nats per sequence. log p(x) and the
    posterior of the states, a Markov chain again, come from one pass of messages in log space; the guide is that posterior,
    so ELBO = log p(x), and `encode` gives the probability of each state at each step.

    Sequences of different lengths are padded with NaN under ``missing="mask"``: a step that is not observed is summed out,
    exactly, at the end or between.

    Args:
        features: (T, D): steps, and numbers at each.
        states: K.
        likelihood: a head of `probae.likelihoods`; a Normal with one learned scale by default.
        missing: ``"mask"`` takes NaN for what is missing at random.

    Attributes:
        optima: where each start of `maximum_likelihood` ended, an `Optima`; None before. It is not saved.

    Raises:
        ValueError, TypeError: if features are no (T, D), a number is below 1, or the likelihood is no head.

    References: Baum, Petrie, Soules & Weiss (1970), *Ann. Math. Statist.* 41; Rabiner (1989), *Proc. IEEE* 77.

    Example:
        >>> x = torch.randn(20, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> model = HiddenMarkov(features=(7, 2), states=2).double().maximum_likelihood(x, restarts=2, tolerance=1e-4)
        >>> model.encode(x).shape, model.transition_probabilities.shape
        (torch.Size([20, 7, 2]), torch.Size([2, 2]))
    """

    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the optimum of this model by EM, without a learning rate"
    event_dim = 2
    initialised: Tensor

    def __init__(
        self, features: Sequence[int], states: int, likelihood: Head | None = None, *, missing: str | None = None
    ):
        super().__init__()
        self.missing = known(missing)
        if likelihood is not None and not isinstance(likelihood, Head):
            raise TypeError(f"likelihood: expected a head of probae.likelihoods, got {type(likelihood).__name__}")
        self.event_shape = event_shape("features", features)
        if len(self.event_shape) != 2:
            raise ValueError(f"features: expected (T, D), the steps and the numbers at each, got {features!r:.200}")
        self.features = math.prod(self.event_shape)
        self.states = self.latents = size("states", states)
        self.head = (likelihood if likelihood is not None else Normal()).bind(self.event_shape[1])
        self.start_logits = nn.Parameter(torch.zeros(self.states))
        self.transition_logits = nn.Parameter(torch.eye(self.states))
        self.outputs = nn.Parameter(0.5 * torch.randn(self.states, self.head.width * self.event_shape[1]))
        self.register_buffer("initialised", torch.tensor(False))
        self.optima: Optima | None = None

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the likelihood does."""
        return self.head.keeps_precision

    @property
    def start_probabilities(self) -> Tensor:
        """π (K,)."""
        return torch.softmax(self.start_logits, -1).detach()

    @property
    def transition_probabilities(self) -> Tensor:
        """A (K, K); rows are the states before."""
        return torch.softmax(self.transition_logits, -1).detach()

    def prior(self) -> Any:
        """p(z): the Markov chain."""
        start, transition = self._log_probabilities()
        return Chain(start, transition.expand(self.event_shape[0] - 1, -1, -1))

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z): the head at each step's outputs."""
        return self.head(z @ self.outputs).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        """p(z | x), exactly: a Markov chain with transitions of each step's own."""
        return posterior(*self._log_probabilities(), self._log_emission(x))[0]

    def marginal(self) -> Any:
        """p(x), the sum over all paths."""
        return Marginal(self, self.event_shape)

    def log_marginal(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), exactly; of what is observed, where values are missing."""
        x = x if x.is_floating_point() else x.to(self.dtype)
        return posterior(*self._log_probabilities(), self._log_emission(x))[1]

    def _log_probabilities(self) -> tuple[Tensor, Tensor]:
        return torch.log_softmax(self.start_logits, -1), torch.log_softmax(self.transition_logits, -1)

    def _log_emission(self, x: Tensor) -> Tensor:
        """log p(x_t | z_t = k) (..., T, K)."""
        fn, x = self.head(self.outputs), x.unsqueeze(-2)
        if self.missing is not None:
            fn, x = masked(fn, x)
        return fn.log_prob(x).to(self.outputs)

    def default_objective(self) -> Objective:
        """The exact −log p(x)."""
        return MarginalLikelihood()

    def initialise(self, x: Tensor) -> None:
        """Take the likelihood's units from the steps of training data, once."""
        steps = (x if x.is_floating_point() else x.to(self.dtype)).flatten(0, 1)
        require_observed(steps)
        if not bool(self.initialised):
            self.head.start(steps)
            self.initialised.fill_(True)

    @isolated
    @learns_columns
    def maximum_likelihood(
        self, x: Any, *, restarts: int = 10, seed: int = 0, tolerance: float = 1e-8, max_iterations: int = 1_000
    ) -> HiddenMarkov:
        """Fit to sequences (N, T, D) by EM (Baum–Welch) from several starts, of which the best is kept; returns the model.

        Args:
            x: the sequences, NaN where a value is missing or a sequence has ended.
            restarts: how many starts: each state from a step drawn at random, mixed with the mean of all data.
            seed: of the starts.
            tolerance, max_iterations: when a start ends; see ``probae.mixtures.expectation_maximisation.maximise``.

        Raises:
            ValueError: if the data do not fit the likelihood, or that has no closed M step.

        Warns:
            RuntimeWarning: if a state's scale shrinks to the likelihood's floor: the density is unbounded but for it.
        """
        require_closed_form(self.head)
        x = self.as_data(x).double()
        steps = x.flatten(0, 1)
        require_observed(steps)
        require_support(self.head, self.outputs, steps)
        self.head.start(steps)
        self.initialised.fill_(True)
        options = {"restarts": restarts, "seed": seed, "tolerance": tolerance, "max_iterations": max_iterations}
        self.optima = maximise(
            self,
            lambda work, generator: work._start(steps, generator),
            lambda work: work._step(x),
            len(x),
            **options,  # type: ignore[arg-type]
        )
        warn_of_floor(self.head, self.outputs.detach(), "states", "or fewer states")
        return self.eval()

    def _start(self, steps: Tensor, generator: torch.Generator) -> None:
        """Each state half a step drawn at random, half the mean of all; transitions at random, and to itself."""
        there = (~steps.isnan()).any(-1).nonzero().flatten()
        weights = torch.full((len(steps), self.states), 1 / len(steps), dtype=steps.dtype, device=steps.device)
        chosen = there[torch.randint(len(there), (self.states,), generator=generator).to(there.device)]
        weights[chosen, torch.arange(self.states, device=steps.device)] += 1
        random = torch.rand(self.states, self.states, generator=generator, dtype=steps.dtype).to(steps.device)
        self.start_logits.zero_()
        self.transition_logits.copy_((random + torch.eye(self.states).to(random)).log())
        self.outputs.copy_(most_likely(self.head, steps, weights))

    def _step(self, x: Tensor) -> Tensor:
        """One EM step; the mean log p(x) before it, nats per sequence."""
        chain, value = posterior(*self._log_probabilities(), self._log_emission(x))
        share = chain.mean
        # after the last step that is observed a sequence has ended: its states say nothing
        there = (~x.isnan()).any(-1).flip(-1).cummax(-1).values.flip(-1)
        pairs = share[:, :-1, :, None] * chain.log_transition.exp() * there[:, 1:, None, None]
        self.start_logits.copy_(((share[:, 0] * there[:, :1]).sum(0)).clamp_min(1e-300).log())
        self.transition_logits.copy_(pairs.sum((0, 1)).clamp_min(1e-300).log())
        self.outputs.copy_(most_likely(self.head, x.flatten(0, 1), share.flatten(0, 1)))
        return value.mean()
