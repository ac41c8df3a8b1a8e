"""What is minimised: modules (pair, batch, size, step) -> one scalar loss, nats per datum, free of host syncs.

Objectives add and scale, ``Reconstruction() + 0.1 * ELBO()``, and may have networks and buffers of their own. A loss is what
training differentiates; a bound on log p(x) is reported by `probae.log_evidence` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probae.arguments import real, whole
from probae.batches import Batch

if TYPE_CHECKING:
    from probae.pair import Pair

Schedule = Callable[[Tensor], Tensor]
#: what early stopping watches: ``"elbo"``, ``"iwae"``, ``"objective"``, or a function (pair, batch) -> number
Monitor = str | Callable[["Pair", Batch], Any]


class Objective(nn.Module):
    r"""One scalar loss; subclasses give ``forward(pair, batch, size, step)``.

    .. math:: \text{loss}(\theta, \phi) \approx -\frac1N \sum_n \text{(what datum } n \text{ earns)}

    Nats per datum. The batch is a tensor, tuple or dict of N rows; ``size`` is the number of data that it stands for, and
    ``step`` a tensor () that counts the optimizer's steps.

    **Networks and buffers of its own** train, move and are checkpointed with the model, and are kept with the best
    parameters. What depends on the pair is made in `bind`. Between steps `after_step` may write to buffers. Objectives
    inside another (terms of a sum, attributes) get both calls too.

    **Gradients at the data.** A batch asks for no gradient. A loss that needs one takes a tensor of its own:

        >>> def slope(pair, batch):
        ...     x = batch.detach().requires_grad_()
        ...     (gradient,) = torch.autograd.grad(pair.log_marginal(x).sum(), x, create_graph=True)
        ...     return gradient

    `torch.func` does as well. Both work in traced and compiled steps, and where early stopping evaluates the loss.

    Attributes:
        lr: the learning rate of its parameters, where `fit` is given none for ``"objective"``; None takes the model's.
        clip: the largest norm of their gradient, in the same way; None leaves them to the clip of all.

    Example:
        >>> import probae
        >>> class Shrunk(Objective):
        ...     def forward(self, pair, batch, size, step):
        ...         return pair.posterior(batch).mean.square().sum(-1).mean()
        >>> loss = probae.objectives.ELBO() + 0.1 * Shrunk()
        >>> loss(probae.VAE(4, 2), torch.zeros(3, 4), 3, torch.tensor(0.0)).shape
        torch.Size([])
    """

    lr: float | None = None
    clip: float | None = None

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        raise NotImplementedError

    def bind(self, pair: Pair, batch: Batch) -> None:
        """Make what depends on the pair: `fit` calls this once, before it makes the optimizer.

        Parameters made here train. Draws follow from the run's seed. An objective that is trained again is bound again: what
        is to be kept is left as it is.

        Args:
            pair: checked, on its device, before it has taken its units from the data.
            batch: some of the training data.
        """

    def after_step(self, pair: Pair, batch: Batch, step: int) -> None:
        """Called after each step of the optimizer, without gradient: refresh buffers here, at every k-th step say.

        Write into tensors (``self.chains.copy_(...)``): steps may run as a graph that holds them. Where a tensor is
        replaced, or a plain attribute changes, steps are eager from then on, with a warning that names it.

        Args:
            batch: the rows of the step.
            step: how many steps have been taken, from 1.
        """

    def monitor(self, pair: Pair) -> Monitor:
        """What early stopping watches; higher is better.

        ``"elbo"`` or ``"iwae"``, a bound on log p(x): that itself where it is known, and minus the loss where there is no
        bound; ``"objective"``, minus the loss; or a function (pair, batch) -> number, under whose name it is recorded.
        """
        return "elbo"

    def __add__(self, other: Any) -> Objective:
        return Sum(self, other) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor: Any) -> Objective:
        return Scaled(self, factor) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__


class Sum(Objective):
    r"""The sum of objectives, :math:`\sum_i \text{loss}_i`, in nats per datum.

    It watches what its terms agree on. Where they do not: the function of the first that has one; ``"iwae"``, if all have
    bounds; else itself.

    Raises:
        TypeError: if a term is no objective, or there is none.

    Example:
        >>> from probae.objectives import ELBO, Reconstruction
        >>> Reconstruction() + 0.1 * ELBO()
        Reconstruction(particles=1) + 0.1 * ELBO(particles=1, analytic_kl=True, gradient='standard')
    """

    def __init__(self, *terms: Objective):
        super().__init__()
        if not terms or not all(isinstance(term, Objective) for term in terms):
            raise TypeError(f"a sum: expected objectives, got {[type(term).__name__ for term in terms]}")
        self.terms = nn.ModuleList(terms)

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        losses = [term(pair, batch, size, step) for term in self.terms]
        return torch.stack(losses).sum()

    def monitor(self, pair: Pair) -> Monitor:
        """What its terms watch, or itself."""
        watched = [term.monitor(pair) for term in self.terms]  # type: ignore[operator]
        own = [one for one in watched if callable(one)]
        if own or len(set(watched)) == 1:
            return own[0] if own else watched[0]
        return "iwae" if set(watched) <= {"elbo", "iwae"} else "objective"

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


class Scaled(Objective):
    r"""A number times an objective, :math:`c \cdot \text{loss}`, in nats per datum.

    Raises:
        TypeError: if the term is no objective.
        ValueError: if the factor is no finite number.

    Example:
        >>> from probae.objectives import IWAE
        >>> 0.5 * IWAE(5)
        0.5 * IWAE(particles=5, gradient='standard')
    """

    factor: Tensor

    def __init__(self, term: Objective, factor: float):
        super().__init__()
        if not isinstance(term, Objective):
            raise TypeError(f"term: expected an objective, got {type(term).__name__}")
        self.term = term
        self.register_buffer("factor", torch.tensor(real("factor", factor), dtype=torch.float64))

    def forward(self, pair: Pair, batch: Batch, size: int, step: Tensor) -> Tensor:
        """The loss, a scalar, in nats per datum."""
        loss = self.term(pair, batch, size, step)
        return self.factor.to(loss.dtype) * loss

    def monitor(self, pair: Pair) -> Monitor:
        """What the term watches."""
        return self.term.monitor(pair)

    def __repr__(self) -> str:
        term = f"({self.term!r})" if isinstance(self.term, Sum) else repr(self.term)
        return f"{float(self.factor):g} * {term}"


class Warmup(nn.Module):
    r"""A schedule that rises in a straight line: :math:`\beta(t) = a + (b - a) \min(t / T, 1)`.

    Args:
        steps: T.
        start, end: a and b.

    Raises:
        ValueError: if the steps are no whole number of at least 1, or an end no finite number.

    Example:
        >>> float(Warmup(10)(torch.tensor(5.0)))
        0.5
    """

    def __init__(self, steps: int, start: float = 0.0, end: float = 1.0):
        super().__init__()
        self.steps, self.start, self.end = whole("steps", steps), real("start", start), real("end", end)

    def forward(self, step: Tensor) -> Tensor:
        """β at a step."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)

    def extra_repr(self) -> str:
        """What torch shows of it."""
        return f"steps={self.steps}, start={self.start:g}, end={self.end:g}"


def within(objective: Objective) -> Iterator[tuple[str, Objective]]:
    """The objective and those inside it, outermost first, each with its path, that of the first empty."""
    yield from ((path, part) for path, part in objective.named_modules() if isinstance(part, Objective))
