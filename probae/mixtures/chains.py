r"""Markov chains of K states over T steps as distributions, and the posterior of a hidden chain by messages in log space.

.. math:: p(z) = \pi_{z_1} \prod_{t=2}^T A^t_{z_{t-1} z_t}, \qquad
          b_t(i) = \log p(x_{t+1 \ldots T} \mid z_t = i) = \log \sum_j A_{ij}\, p(x_{t+1} \mid z_{t+1} = j)\, e^{b_{t+1}(j)}

Given x the states are a Markov chain too, with transitions of each step's own,
:math:`p(z_{t+1} = j \mid z_t = i, x) = A_{ij}\, p(x_{t+1} \mid j)\, e^{b_{t+1}(j) - b_t(i)}`.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import OneHotCategorical, constraints


class Chain(TorchDistribution):
    """A Markov chain, each state a row with a one in its place: event shape (T, K).

    Args:
        log_start: log probabilities of the first state (..., K).
        log_transition: those of each next state (..., T − 1, K, K); rows are the states before.

    Example:
        >>> half = torch.full((3, 2, 2), 0.5).log()
        >>> chain = Chain(half[0, 0], half)
        >>> chain.sample((5,)).shape, chain.mean[0]
        (torch.Size([5, 4, 2]), tensor([0.5000, 0.5000]))
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.one_hot, 1)

    def __init__(self, log_start: Tensor, log_transition: Tensor):
        self.log_start, self.log_transition = log_start, log_transition
        batch = torch.broadcast_shapes(log_start.shape[:-1], log_transition.shape[:-3])
        shape = (log_transition.shape[-3] + 1, log_start.shape[-1])
        super().__init__(batch, torch.Size(shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """The same distribution with another batch shape."""
        start = self.log_start.expand(*batch_shape, *self.log_start.shape[-1:])
        return Chain(start, self.log_transition.expand(*batch_shape, *self.log_transition.shape[-3:]))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) (...), in nats."""
        first = (value[..., 0, :] * self.log_start).sum(-1)
        after = (value[..., :-1, None, :] @ self.log_transition).squeeze(-2)
        return first + (after * value[..., 1:, :]).sum((-2, -1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws (..., T, K)."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]  # (..., T)
        with torch.no_grad():
            state = OneHotCategorical(logits=self.log_start.expand(*shape[:-1], -1), validate_args=False).sample()
            states = [state]
            for t in range(self.event_shape[0] - 1):
                logits = (state.unsqueeze(-2) @ self.log_transition[..., t, :, :]).squeeze(-2)
                state = OneHotCategorical(logits=logits, validate_args=False).sample()
                states.append(state)
        return torch.stack(states, -2)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        """The probability of each state at each step (..., T, K)."""
        now = self.log_start.exp().expand(*self.batch_shape, -1)
        found = [now]
        for t in range(self.event_shape[0] - 1):
            now = (now.unsqueeze(-2) @ self.log_transition[..., t, :, :].exp()).squeeze(-2)
            found.append(now)
        return torch.stack(found, -2)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """p (1 − p) of each state at each step."""
        return self.mean * (1 - self.mean)


def posterior(log_start: Tensor, log_transition: Tensor, log_emission: Tensor) -> tuple[Chain, Tensor]:
    """The states given x, a `Chain`, and log p(x) (...).

    Args:
        log_start: log π (K,).
        log_transition: log A (K, K).
        log_emission: log p(x_t | z_t = k) (..., T, K), 0 for a step that is not observed.
    """
    message = torch.zeros_like(log_emission[..., 0, :])
    transitions: list[Tensor] = []
    for t in range(log_emission.shape[-2] - 1, 0, -1):
        joint = log_transition + (log_emission[..., t, :] + message).unsqueeze(-2)
        message = torch.logsumexp(joint, -1)
        transitions.append(joint - message.unsqueeze(-1))
    first = log_start + log_emission[..., 0, :] + message
    log_marginal = torch.logsumexp(first, -1)
    states = log_start.shape[-1]
    shape = (*log_emission.shape[:-2], 0, states, states)
    stacked = torch.stack(transitions[::-1], -3) if transitions else log_emission.new_zeros(shape)
    return Chain(first - log_marginal.unsqueeze(-1), stacked), log_marginal
