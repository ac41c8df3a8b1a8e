"""Mixtures of trees: within a class each feature depends on one other, and log p(x) is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from probae.arguments import positive, size, whole
from probae.heads.trees import Tree, best_tree, pair_counts
from probae.mixtures.expectation_maximisation import maximise
from probae.models.finite_mixture import FiniteMixture
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import checked_seed, derived


@recorded
class MixtureOfTrees(FiniteMixture):
    r"""A mixture of K trees over discrete features: a latent class model whose features depend on one another.

    .. math:: z \sim \text{Categorical}(\pi), \qquad
              p(x \mid z = k) = \prod_d p_k(x_d \mid x_{\text{parent}_k(d)}), \qquad p(x) = \sum_k \pi_k\, p(x \mid z = k)

    Shapes: z (..., K), a one in the place of the class and zeros beside it; x (..., D), whole numbers below C. Nats per
    datum. The guide is the exact posterior, so ELBO = log p(x). One class is the tree of Chow & Liu (1968), the best of all
    trees; `maximum_likelihood` finds it in closed form, and more classes by EM, whose M step is that tree for each class.
    `probae.fit` moves probabilities alone, at the trees that were found (none at first: independent features).

    Args:
        features: D.
        classes: K.
        values: C, how many values a feature can take; 2 for binary data.

    Attributes:
        optima: where each start of `maximum_likelihood` ended, an `Optima`; None before, and of several parts. It is not saved.

    Raises:
        ValueError, TypeError: if a size is below 1, or ``values`` below 2.

    References: Meilă & Jordan (2000), *Learning with mixtures of trees*, JMLR 1; Chow & Liu (1968).

    Example:
        >>> x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        >>> model = MixtureOfTrees(features=3, classes=1).maximum_likelihood(x, smoothing=0.0)
        >>> round(float(model.log_marginal(x).sum()), 4)  # the first two are alike, the third is a coin
        -5.5452
    """

    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the trees too; steps move probabilities alone"
    parents: Tensor
    order: Tensor

    def __init__(self, features: int, classes: int, values: int = 2):
        super().__init__(classes)
        self.features, self.values = size("features", features), size("values", values, 2)
        self.tables = nn.Parameter(
            0.5 * torch.randn(self.classes, self.features, 1, self.values).repeat(1, 1, values, 1)
        )
        self.register_buffer("parents", torch.arange(self.features).repeat(self.classes, 1))
        self.register_buffer("order", torch.arange(self.features).repeat(self.classes, 1))

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z): the tree of the class."""
        k = z.argmax(-1)
        return Tree(self.parents[k], self.order[k], self._log_tables[k])

    def marginal(self) -> Any:
        """p(x), the sum over classes."""
        return self.mixed(self._trees())

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z = k) (..., K)."""
        return torch.log_softmax(self.logits, -1) + self._trees().log_prob(x.unsqueeze(-2))

    @property
    def _log_tables(self) -> Tensor:
        return torch.log_softmax(self.tables, -1)

    def _trees(self) -> Tree:
        return Tree(self.parents, self.order, self._log_tables)

    @isolated
    @learns_columns
    def maximum_likelihood(
        self,
        x: Any,
        *,
        parts: int = 1,
        restarts: int = 3,
        seed: int = 0,
        smoothing: float = 1.0,
        tolerance: float = 1e-6,
        max_iterations: int = 200,
    ) -> MixtureOfTrees:
        r"""Fit to data (N, D) by EM from several starts, of which the best is kept; returns the model.

        .. math:: \sum_n \log p(x_n) + \frac{\alpha}{N + 1} \sum_k
                  \Big(\sum_n \log p(x_n \mid z = k) + E_{u} \log p(u \mid z = k)\Big)

        is maximised, with α the ``smoothing`` and u uniform: each class gets so many data more, which look like all data
        together and one datum of pure chance. Many classes of few data want more of it: choose it on held-out data.

        Args:
            x: the data.
            parts: how many mixtures of K / parts classes are fitted, each from starts of its own. The model is then the mean of
                their densities, which overfits less than one mixture of K classes.
            restarts: how many starts: memberships drawn at random.
            seed: of the starts.
            smoothing: α >= 0; 0 is maximum likelihood.
            tolerance, max_iterations: when a start ends; see ``probae.mixtures.expectation_maximisation.maximise``.

        Raises:
            ValueError: if the data are no whole numbers from 0 to C − 1, or fewer than classes, or if K is no multiple of
                the parts.
        """
        if self.classes % whole("parts", parts):
            raise ValueError(f"parts: expected a divisor of the number of classes, {self.classes}, got {parts}")
        if parts > 1:
            given = {
                "restarts": restarts,
                "smoothing": smoothing,
                "tolerance": tolerance,
                "max_iterations": max_iterations,
            }
            return self._average(x, parts, checked_seed(seed), given)
        smoothing = positive("smoothing", smoothing, zero=True)
        x = self.as_data(x).double()
        if not bool(((x >= 0) & (x < self.values) & (x == x.round())).all()):
            raise ValueError(f"site 'x': expected whole numbers from 0 to {self.values - 1}")
        if len(x) < self.classes:
            raise ValueError(f"site 'x': expected at least as many data as classes, {self.classes}, got {len(x)}")
        counts = pair_counts(x, self.values)
        same = torch.eye(self.values, dtype=x.dtype) / self.values - self.values**-2.0
        chance = torch.eye(self.features, dtype=x.dtype).kron(same).to(x.device) + self.values**-2.0
        prior = smoothing / (len(x) + 1) * (counts(x.new_ones(len(x))) + chance)

        def start(work: MixtureOfTrees, generator: torch.Generator) -> None:
            drawn = torch.rand(len(x), self.classes, generator=generator, dtype=torch.float64).to(x.device)
            work._maximise(counts, torch.softmax(4 * drawn, -1), prior)

        def step(work: MixtureOfTrees) -> Tensor:
            joint = work.log_joint(x)
            value = torch.logsumexp(joint, -1).sum()
            if smoothing:
                value = value + work._penalty(prior)
            work._maximise(counts, torch.softmax(joint, -1), prior)
            return value / len(x)

        self.optima = maximise(
            self,
            start,
            step,
            len(x),
            restarts=restarts if self.classes > 1 else 1,
            seed=seed,
            tolerance=tolerance,
            max_iterations=max_iterations,
            accelerated=False,
        )
        return self.eval()

    def _average(self, x: Any, parts: int, seed: int, given: dict[str, Any]) -> MixtureOfTrees:
        """The mean of several mixtures, as one."""
        found = [
            MixtureOfTrees(self.features, self.classes // parts, self.values, seed=0)  # type: ignore[call-arg]
            .to(self.logits)
            .maximum_likelihood(x, seed=derived(seed, part), **given)
            for part in range(parts)
        ]
        with torch.no_grad():
            self.logits.copy_(torch.cat([torch.log_softmax(one.logits, -1) for one in found]))
            self.tables.copy_(torch.cat([one.tables for one in found]))
            self.parents.copy_(torch.cat([one.parents for one in found]))
            self.order.copy_(torch.cat([one.order for one in found]))
        return self.eval()

    def _maximise(self, counts: Callable[[Tensor], Tensor], share: Tensor, prior: Tensor) -> None:
        """The M step: the weights, and for each class the best tree of its expected pairs."""
        self.logits.copy_(share.mean(0).clamp_min(1e-300).log())
        for k, weight in enumerate(share.unbind(-1)):
            pairs = counts(weight) + prior
            pairs = pairs / (weight.sum() + prior[: self.values, : self.values].sum()).clamp_min(1e-300)
            found = best_tree(pairs.reshape(self.features, self.values, self.features, self.values))
            self.parents[k], self.order[k], self.tables[k] = found

    def _penalty(self, prior: Tensor) -> Tensor:
        """Σ_k of the expected log density of the data that smoothing adds."""
        pairs = prior.reshape(self.features, self.values, self.features, self.values)
        every = torch.arange(self.features, device=prior.device)
        total = torch.zeros((), dtype=prior.dtype, device=prior.device)
        for parents, table in zip(self.parents, self._log_tables, strict=True):
            total = total + (pairs[parents, :, every] * table).sum()
        return total
