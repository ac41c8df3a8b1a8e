"""Is a learned dictionary the true one, or that of another seed: columns compared up to order and sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probae.arguments import positive
from probae.diagnostics.sparsity import numbers, require_alike
from probae.export.tabular import Tabular

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Recovery(Tabular):
    """What `compare_dictionaries` returns.

    Attributes:
        cosines: (M, L) between true and found columns, with sign.
        match: (M,) the found column that each true one is matched to, each at most once; −1 where there are too few.
    """

    cosines: Tensor
    match: Tensor

    @property
    def max_cosine(self) -> Tensor:
        """(M,) of each true column, the largest absolute cosine with any found one; which may serve several true ones."""
        return self.cosines.abs().max(1).values

    @property
    def matched_cosine(self) -> Tensor:
        """(M,) the absolute cosine with the matched column; 0 where there is none."""
        found = self.cosines.gather(1, self.match.clamp_min(0)[:, None])[:, 0].abs()
        return torch.where(self.match >= 0, found, torch.zeros_like(found))

    @property
    def mean_max_cosine(self) -> float:
        """MMCS."""
        return float(self.max_cosine.mean())

    @property
    def mean_matched_cosine(self) -> float:
        """By Hungarian matching."""
        return float(self.matched_cosine.mean())

    def recovered(self, least: float = 0.9) -> float:
        """The share of the true columns whose matched cosine is at least so large."""
        return float((self.matched_cosine >= positive("least", least)).double().mean())

    def aligned(self, codes: Any) -> Tensor:
        """Codes (N, L) of the found dictionary in the order and with the signs of the true one, (N, M); 0 where unmatched."""
        z = numbers("codes", codes, "(N, L)")
        if z.shape[1] != self.cosines.shape[1]:
            raise ValueError(
                f"codes: expected (N, {self.cosines.shape[1]}), a latent for each found column, got {tuple(z.shape)}"
            )
        index = self.match.clamp_min(0)
        sign = self.cosines.gather(1, index[:, None])[:, 0].sign() * (self.match >= 0)
        return z[:, index] * sign

    def to_frame(self) -> pandas.DataFrame:
        """A row for each true column."""
        import pandas as pd

        columns = {"max_cosine": self.max_cosine, "match": self.match, "matched_cosine": self.matched_cosine}
        return pd.DataFrame({name: value.numpy() for name, value in columns.items()}).rename_axis("column")

    def __repr__(self) -> str:
        return (
            f"<{len(self.match)} columns of a dictionary: mean max cosine {self.mean_max_cosine:.3f}, mean matched cosine "
            f"{self.mean_matched_cosine:.3f}>"
        )


def compare_dictionaries(found: Any, truth: Any) -> Recovery:
    r"""Columns of a dictionary (D, L) against those of another (D, M), up to order, sign and length.

    .. math:: C_{ml} = \frac{t_m^T d_l}{\|t_m\| \|d_l\|}, \qquad
              \text{MMCS} = \frac1M \sum_m \max_l |C_{ml}|, \qquad \text{matched} = \max_\pi \frac1M \sum_m |C_{m \pi(m)}|

    with π one to one, by the Hungarian algorithm. In the mean max cosine one found column may serve
    several true ones, so that too few good columns look better than they are.

    Raises:
        ValueError: if the columns have different lengths, or a number is not finite.
        ImportError: without SciPy.

    References: Sharkey, Braun & Millidge (2022) for MMCS; Kuhn (1955).

    Example:
        >>> compare_dictionaries([[0.0, -2.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]).mean_matched_cosine
        1.0
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("the Hungarian algorithm is SciPy's: pip install 'probae[compare]'") from error
    given = ("found", found), ("truth", truth)
    columns, true = (numbers(name, d, "(D, L)") for name, d in given)
    if len(columns) != len(true):
        raise ValueError(f"found: expected columns of {len(true)} numbers, as truth has, got {len(columns)}")
    cosines = F.normalize(true, dim=0).mT @ F.normalize(columns, dim=0)
    rows, places = linear_sum_assignment(-cosines.abs().numpy())
    match = torch.full((true.shape[1],), -1)
    match[torch.as_tensor(rows)] = torch.as_tensor(places)
    return Recovery(cosines, match)


def dictionary_stability(dictionaries: Sequence[Any]) -> pandas.DataFrame:
    """A row for each pair of dictionaries (D, L), of several seeds say: mean max and mean matched cosine.

    Raises:
        ValueError: if there are fewer than two.

    Example:
        >>> round(float(dictionary_stability([torch.eye(3), torch.eye(3).flip(1)])["matched_cosine"].mean()), 6)
        1.0
    """
    import pandas as pd

    if len(dictionaries) < 2:
        raise ValueError(f"dictionaries: expected at least two, got {len(dictionaries)}")
    rows = []
    for i, j in combinations(range(len(dictionaries)), 2):
        found = compare_dictionaries(dictionaries[i], dictionaries[j])
        means = {"max_cosine": found.mean_max_cosine, "matched_cosine": found.mean_matched_cosine}
        rows.append({"first": i, "second": j, **means})
    return pd.DataFrame(rows)


def support_f1(codes: Any, truth: Any, threshold: float = 0.0) -> float:
    r"""How well the latents that are on, \|z\| > τ, are those that are on in truth: 2 TP / (2 TP + FP + FN), over all (N, L).

    Give codes in the order of the true ones, see `Recovery.aligned`.

    Example:
        >>> support_f1([[1.0, 0.0, 2.0]], [[3.0, 0.0, 0.0]])
        0.6666666666666666
    """
    threshold = positive("threshold", threshold, zero=True)
    found = numbers("codes", codes, "(N, L)").abs() > threshold
    true = numbers("truth", truth, "(N, L)") != 0
    require_alike("codes", found, "truth", true)
    both = int((found & true).sum())
    return 2 * both / max(1, int(found.sum()) + int(true.sum()))
