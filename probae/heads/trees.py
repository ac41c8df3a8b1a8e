"""Distributions of discrete features in which each depends on one other: trees, and the tree that fits data best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_MANY = 8  # classes from which their indicators are kept as a sparse matrix


class Tree(TorchDistribution):
    r"""A tree-structured distribution: :math:`p(x) = \prod_d p(x_d \mid x_{\text{parent}(d)})`.

    Shapes: x (..., D), whole numbers from 0 to C − 1. A root is its own parent, and its rows are alike.

    Args:
        parents: (..., D), long.
        order: (..., D), long: the features, each after its parent.
        log_table: log p(x_d = c | parent = b) at [..., d, b, c], normalised over c.

    Example:
        >>> chain = torch.tensor([0, 0, 1])
        >>> table = torch.full((3, 2, 2), 0.5).log()
        >>> Tree(chain, torch.arange(3), table).log_prob(torch.zeros(3)).exp()
        tensor(0.1250)
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, parents: Tensor, order: Tensor, log_table: Tensor):
        self.parents, self.order, self.log_table = parents, order, log_table
        self.classes = log_table.shape[-1]
        super().__init__(parents.shape[:-1], parents.shape[-1:], validate_args=False)

    @property
    def support(self) -> Any:  # type: ignore[override]
        """Whole numbers below C."""
        each = constraints.boolean if self.classes == 2 else constraints.integer_interval(0, self.classes - 1)
        return constraints.independent(each, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Tree:
        """The same, of another batch shape."""
        shape = torch.Size(batch_shape)
        tree = type(self)(
            self.parents.expand(*shape, -1), self.order.expand(*shape, -1), self.log_table.expand(*shape, -1, -1, -1)
        )
        return tree

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), in nats."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        # what is no value is refused by the support; here it must only not be read beyond the table
        x = value.long().clamp(0, self.classes - 1).expand(*shape, -1)
        cell = torch.gather(x, -1, self.parents.expand(*shape, -1)) * self.classes + x
        table = self.log_table.flatten(-2).expand(*shape, -1, -1)
        return table.gather(-1, cell.unsqueeze(-1)).squeeze(-1).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, each feature after its parent."""
        shape = torch.Size(sample_shape) + self.batch_shape
        features = self.event_shape[0]
        x = torch.zeros(*shape, features, dtype=torch.long, device=self.parents.device)
        parents, order = self.parents.expand(*shape, -1), self.order.expand(*shape, -1)
        table = self.log_table.flatten(-3, -2).exp().expand(*shape, -1, -1)
        with torch.no_grad():
            for d in order.unbind(-1):
                d = d.unsqueeze(-1)
                row = d * self.classes + x.gather(-1, parents.gather(-1, d))
                chances = table.gather(-2, row.unsqueeze(-1).expand(*shape, 1, self.classes)).squeeze(-2)
                drawn = torch.multinomial(chances.reshape(-1, self.classes), 1).reshape(*shape, 1)
                x = x.scatter(-1, d, drawn)
        return x.to(self.log_table.dtype)


def pair_counts(x: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """How often each two values occur together in data x (N, D), as a function of their weights (N,): (D C, D C).

    Of many classes the indicators are nearly all 0, and a sparse product is several times as quick.
    """
    indicators = F.one_hot(x.long(), classes).double().flatten(1)
    if classes < _MANY or x.device.type != "cpu":
        return lambda weight: (weight.unsqueeze(-1) * indicators).mT @ indicators
    from scipy.sparse import csr_array

    sparse = csr_array(indicators.numpy())
    columns = sparse.T.tocsr()
    return lambda weight: torch.from_numpy((columns.multiply(weight.numpy()).tocsr() @ sparse).toarray())


def best_tree(pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The tree under which data are most likely (Chow & Liu 1968): the spanning tree of largest mutual information.

    Args:
        pairs: p(x_i = a, x_j = b) at [i, a, j, b], (D, C, D, C); at i = j the marginals stand on the diagonal.

    Returns:
        ``parents``, ``order`` and ``log_table`` of `Tree`.
    """
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    features, classes = pairs.shape[:2]
    single = pairs.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)  # (D, C)
    product = single.reshape(-1, 1) * single.reshape(1, -1)
    joint = pairs.reshape(features * classes, -1)
    terms = torch.where(joint > 0, joint * (joint / product.clamp_min(1e-300)).log(), 0.0)
    information = terms.reshape(features, classes, features, classes).sum((1, 3)).cpu().numpy()
    # an edge of no information is an edge all the same: zeros would be none
    cost = -np.maximum(information, 0) - 1e-9
    np.fill_diagonal(cost, 0)
    if features > 1:
        order, before = breadth_first_order(minimum_spanning_tree(cost), 0, directed=False)
    else:
        order, before = np.zeros(1, int), np.zeros(1, int)
    parents = torch.as_tensor(np.where(before < 0, 0, before), dtype=torch.long, device=pairs.device)
    table = pairs[parents, :, torch.arange(features, device=pairs.device)].clone()  # (D, b, c)
    table[0] = single[0]
    total = table.sum(-1, keepdim=True)
    # a parent's value that no datum has leaves the feature's own frequencies
    table = torch.where(total > 0, table / total.clamp_min(1e-300), single.unsqueeze(-2))
    return parents, torch.as_tensor(order, dtype=torch.long, device=pairs.device), table.clamp_min(1e-12).log()
