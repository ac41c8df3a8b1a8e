"""Item response theory: one or two traits behind the answers, with log p(x) by adaptive Gauss-Hermite quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probae.arguments import one_of, positive, size, whole
from probae.heads.likelihoods import Bernoulli, Head, OrderedCategorical
from probae.mixtures.marginal import Marginal
from probae.mixtures.quadrature import Counted, adapted, even, hermite, moments_at
from probae.mixtures.quasi_newton import FAR, minimise, standard_errors, units
from probae.mixtures.weighted_likelihood import require_support
from probae.models.item_table import item_table
from probae.objectives import MarginalLikelihood, Objective
from probae.pair import Pair
from probae.programs.columns import learns_columns
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.tracing.missing import known, masked, moments, observed, require_observed

if TYPE_CHECKING:
    import pandas

SLOPES = ("item", "shared")
_FEW = 64  # values up to which they are counted at nodes that all data share
_REACH, _SIDE = 6.0, 121  # of these nodes: how far they go, and how many there are
_CHECKED, _ACCURATE = 100, 1e-3  # people whose quadrature is checked, and the error that is told, nats


@recorded
class ItemResponse(Pair):
    r"""Answers that depend on one or two traits: Rasch's model, the two-parameter model, graded and nominal responses.

    .. math:: z \sim N(0, I_L), \qquad x_d \mid z \sim p(x_d; a_d^\top z + b_d), \qquad
              p(x) = \int N(z; 0, I) \prod_d p(x_d; a_d^\top z + b_d)\, dz

    Shapes: z (..., L), L = 1 or 2; x (..., D). Nats per datum. What varies is the likelihood:

    - ``Bernoulli()``: the two-parameter model, P(x_d = 1) = sigmoid(a_d z + b_d), of difficulty −b_d / a_d; with
      ``slopes="shared"`` Rasch's, whose one slope is the standard deviation of the trait;
    - ``OrderedCategorical(levels)``: Samejima's graded response model, whose cut points take the place of b;
    - ``Categorical(classes)``: Bock's nominal response model.

    **log p(x)** is an integral over the traits. It is taken by Gauss–Hermite quadrature around each datum's own posterior: four
    passes find its mean and covariance, a fifth sums. `quadrature_error` doubles the nodes and says what that changes, less
    than 1e-10 nats for slopes below 2; steeper ones need more nodes. The guide is the Normal of the posterior's mean and
    covariance, which fall out of the same sum; log p(x) is called exact, as far as the quadrature is.

    Args:
        features: D, the number of items.
        latents: L, the number of traits, 1 or 2.
        likelihood: a head of `probae.likelihoods`; Bernoulli by default.
        slopes: ``"item"``, or ``"shared"`` for one slope (and one trait).
        missing: ``"mask"`` takes NaN for an answer that is missing at random: it is left out, exactly.
        nodes: of the quadrature, in each direction; 41 for one trait and 21 for two unless told.

    Raises:
        ValueError, TypeError: if there are more than two traits, or an argument is none of these.

    References: Rasch (1960); Birnbaum (1968); Samejima (1969); Bock (1972); Bock & Aitkin (1981), *Psychometrika* 46;
    Naylor & Smith (1982), *Applied Statistics* 31, for the quadrature.

    Example:
        >>> draws = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).double()
        >>> x = (draws[:, 1:] + draws[:, :1] > 0).double()
        >>> model = ItemResponse(features=5).double().maximum_likelihood(x)
        >>> model.weight.shape, bool((model.quadrature_error(x) < 1e-8).all())
        (torch.Size([5, 1]), True)
    """

    #: what a run says that took steps all the same
    fit_note = "maximum_likelihood(data) finds the optimum of this model by quasi-Newton steps"
    initialised: Tensor
    zero: Tensor

    def __init__(
        self,
        features: int,
        latents: int = 1,
        likelihood: Head | None = None,
        *,
        slopes: str = "item",
        missing: str | None = None,
        nodes: int | None = None,
    ):
        super().__init__()
        self.missing = known(missing)
        if likelihood is not None and not isinstance(likelihood, Head):
            raise TypeError(f"likelihood: expected a head of probae.likelihoods, got {type(likelihood).__name__}")
        self.features, self.latents = size("features", features), whole("latents", latents, most=2)
        self.head = (likelihood if likelihood is not None else Bernoulli()).bind(self.features)
        self.slopes = one_of("slopes", slopes, SLOPES)
        if slopes == "shared" and (self.latents > 1 or self.head.width > 1):
            raise ValueError(
                "slopes='shared': expected one trait, and a likelihood that takes one number for each item"
            )
        self.nodes = whole("nodes", nodes, 3, 500) if nodes is not None else 41 if self.latents == 1 else 21
        outputs = self.head.width * self.features
        self.slope = nn.Parameter(torch.ones(()) if slopes == "shared" else torch.randn(outputs, self.latents) / 2)
        # cut points have a location of their own
        self.bias = None if isinstance(self.head, OrderedCategorical) else nn.Parameter(torch.zeros(outputs))
        self.register_buffer("zero", torch.zeros(self.latents))
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def keeps_precision(self) -> bool:  # type: ignore[override]
        """Whether the likelihood does."""
        return self.head.keeps_precision

    @property
    def weight(self) -> Tensor:
        """The slopes a (D, L); of a likelihood that takes several numbers for each item, (width · D, L)."""
        return self.slope.expand(self.features, 1) if self.slopes == "shared" else self.slope

    @property
    def intercept(self) -> Tensor:
        """b (width · D,); of ordered answers the cut points (D, levels − 1) instead, of a trait of 0."""
        if self.bias is None:
            return self.head.cutpoints  # type: ignore[union-attr,return-value]
        return self.head.origin + self.bias

    def prior(self) -> Any:
        """p(z) = N(0, I)."""
        return dist.Normal(self.zero, 1.0, validate_args=False).to_event(1)

    def likelihood(self, z: Tensor) -> Any:
        """p(x | z): the head at a · z + b."""
        output = z @ self.weight.mT
        return self.head(output if self.bias is None else output + self.bias)

    def posterior(self, x: Tensor) -> Any:
        """The Normal with the mean and the covariance of p(z | x)."""
        rows = x.reshape(-1, self.features)
        loc, tril = moments_at(*self._summed(rows, self.nodes))
        shape = x.shape[:-1]
        return dist.MultivariateNormal(
            loc.reshape(*shape, -1).to(self.zero),
            scale_tril=tril.reshape(*shape, self.latents, self.latents).to(self.zero),
            validate_args=False,
        )

    def marginal(self) -> Any:
        """p(x), by quadrature."""
        return Marginal(self, (self.features,))

    def log_marginal(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """log p(x) (N,), by quadrature; of what is observed, where values are missing."""
        return self._log_marginal(x if x.is_floating_point() else x.to(self.dtype), self.nodes)

    def _log_marginal(self, x: Tensor, nodes: int) -> Tensor:
        return torch.logsumexp(self._summed(x, nodes)[1], 0)

    def _summed(self, x: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """The nodes of each datum, (Q, N, L), and the logarithms of what each adds to p(x), (Q, N)."""

        def log_joint(z: Tensor) -> Tensor:
            fn, values = self.likelihood(z), x
            if self.missing is not None:
                fn, values = masked(fn, x)
            return fn.log_prob(values) + self.prior().log_prob(z)

        return adapted(log_joint, *hermite(nodes, self.zero, len(x)))

    @isolated
    def quadrature_error(self, x: Any) -> Tensor:
        """How much log p(x) (N,) changes when the nodes in each direction are doubled, nats."""
        x = self.as_data(x)
        with torch.no_grad():
            return (self._log_marginal(x, 2 * self.nodes) - self._log_marginal(x, self.nodes)).abs()

    def default_objective(self) -> Objective:
        """The exact −log p(x)."""
        return MarginalLikelihood()

    def initialise(self, x: Tensor) -> None:
        """Take the likelihood's start from training data, once."""
        x = x if x.is_floating_point() else x.to(self.dtype)
        require_observed(x)
        if not bool(self.initialised):
            self.head.start(x)
            self.initialised.fill_(True)

    @isolated
    @learns_columns
    def maximum_likelihood(self, x: Any, *, tolerance: float = 1e-6, max_iterations: int = 1_000) -> ItemResponse:
        r"""Set the parameters to a maximum of the marginal likelihood of data (N, D), by quasi-Newton steps; returns the model.

        People who gave the same answers are counted, so that a step costs what their number of patterns does. Where answers to
        one trait have few levels, nodes that all people share lead near to the maximum, and the quadrature around each person's
        posterior from there. A level that nobody chose keeps a probability of the order of exp(−25). The
        slopes of one trait have a positive sum. Of two traits the first item loads on the first alone, :math:`a_{12} = 0`, and
        :math:`a_{11}` and :math:`a_{22}` are positive.

        Args:
            x: the data, NaN where an answer is missing.
            tolerance: the largest derivative of the mean log p(x) by a parameter at which it ends.
            max_iterations: the most steps.

        Raises:
            ValueError: if the data's shape is wrong, or a column is empty.

        Warns:
            RuntimeWarning: if it has not converged: slopes may then be unbounded.
        """
        tolerance, max_iterations = positive("tolerance", tolerance), whole("max_iterations", max_iterations)
        x = self.as_data(x).double()
        require_observed(x)
        require_support(self.head, x.new_zeros(1, self.head.width * self.features), x)
        with torch.no_grad():
            self.head.start(x)
            self.initialised.fill_(True)
            self._start(x)
        patterns, count = torch.unique(x.nan_to_num(math.inf), dim=0, return_counts=True)
        patterns = patterns.masked_fill(patterns.isinf(), torch.nan)

        def loss(work: Any) -> Tensor:
            return -(work.log_marginal(patterns) * count).sum() / len(x)

        most, unit = self._most(), None
        if (quick := self._at_shared_nodes(patterns)) is not None:
            unit = units(self, quick, count.double())
            minimise(self, lambda work: -(quick(work) * count).sum() / len(x), tolerance, max_iterations, most, unit)
        gradient = minimise(self, loss, tolerance, max_iterations, most, unit)
        if gradient > 10 * tolerance:
            warnings.warn(
                f"maximum_likelihood: the gradient is {gradient:.3g} at its largest, above tolerance={tolerance:.3g}: are "
                "there slopes that grow without end? Then fewer traits, or slopes='shared', or more data",
                RuntimeWarning,
                stacklevel=3,
            )
        with torch.no_grad():
            self._turn()
        if (error := float(self.quadrature_error(x[:_CHECKED]).max())) > _ACCURATE:
            warnings.warn(
                f"maximum_likelihood: twice the nodes change log p(x) by up to {error:.2g} nats: steep slopes need more, "
                f"nodes={2 * self.nodes} say",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.eval()

    def _at_shared_nodes(self, x: Tensor) -> Callable[[ItemResponse], Tensor] | None:
        """log p(x) of a copy of the model at a fraction of the cost, and nearly exact; None where values are many.

        Nor of two traits: there these nodes lie so far apart that they reward slopes that are too steep.
        """
        values = x[~x.isnan()].unique()
        if self.latents > 1 or len(values) > _FEW:
            return None
        counted = Counted(x, values, *even(self.zero.double(), _SIDE, _REACH))
        return lambda work: counted.log_marginal(work.likelihood)

    def _start(self, x: Tensor) -> None:
        """Slopes along the principal axes of the standardised answers."""
        if self.slopes == "shared":
            self.slope.fill_(1.0)
        else:
            loc, scale = moments(x)
            z = observed((x - loc) / scale.clamp_min(1e-12))[0]
            axes = torch.linalg.svd(z, full_matrices=False).Vh[: self.latents].mT * self.features**0.5
            each = self.slope.unflatten(0, (self.features, self.head.width))
            # of several outputs for an item, spread around their mean
            spread = torch.linspace(0 if self.head.width == 1 else -1, 1, self.head.width + 1)[1:].to(axes)
            each.copy_(axes[:, None] * (spread[:, None] if self.head.width > 1 else 1.0))
        if self.bias is not None:
            self.bias.zero_()
            return
        # a level that nobody chose has no maximum: its cut points start where the likelihood is flat
        counts = self._counts(x)
        cuts = torch.logit(counts.cumsum(-1)[:, :-1] / counts.sum(-1, keepdim=True)).clamp(-FAR / 2, FAR / 2)
        gaps = cuts.diff(dim=-1).clamp_min(math.exp(-FAR)).log()
        self.head.cuts.copy_(torch.cat([cuts[:, :1], gaps], -1))  # type: ignore[union-attr, operator]

    def _counts(self, x: Tensor) -> Tensor:
        """How many people chose each level of an ordered item, (D, levels)."""
        return torch.stack([(x == level).sum(0) for level in range(self.head.levels)], -1).double()  # type: ignore[arg-type]

    def _endless(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which cut points (D, levels − 1) lie beyond all answers, and which of the parameters ``cuts`` do not vary."""
        empty = self._counts(x) == 0
        below, above = empty.cumprod(-1).bool()[:, :-1], empty.flip(-1).cumprod(-1).flip(-1).bool()[:, 1:]
        return below | above, empty[:, :-1] | above

    def _most(self) -> dict[str, Tensor]:
        """Bounds of the gaps between cut points: a level that nobody chose would have no probability at all, without end."""
        if self.bias is not None:
            return {}
        most = torch.full_like(self.head.cuts, FAR)  # type: ignore[arg-type]
        most[:, 1:] = math.log(FAR)
        return {"head.cuts": most}

    def _turn(self) -> None:
        """Turn the traits: the slopes of one add up to more than 0; of two the first item loads on the first alone."""
        if self.latents == 1:
            self.slope.mul_(-1.0 if self.slope.sum() < 0 else 1.0)
            return
        rotation, triangle = torch.linalg.qr(self.slope[: self.latents].mT.double())
        rotation = rotation * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(rotation)
        self.slope.copy_(self.slope.double() @ rotation)

    @isolated
    def standard_errors(self, x: Any) -> dict[str, Tensor]:
        """Standard errors of ``weight`` and ``intercept`` at a maximum, from the observed information of data (N, D).

        The slope of the first item on a second trait is fixed at 0, so its error is 0. A cut point that lies beyond all
        answers, since nobody chose a level there, has no error: NaN.

        Raises:
            ValueError: if the information is not positive definite: the parameters are at no maximum, or not identified.
        """
        x = self.as_data(x).double()
        patterns, count = torch.unique(x.nan_to_num(math.inf), dim=0, return_counts=True)
        patterns = patterns.masked_fill(patterns.isinf(), torch.nan)
        fixed = {"slope": [1]} if self.latents == 2 else {}
        if self.bias is None:
            beyond, held = self._endless(x)
            fixed["head.cuts"] = held.flatten().nonzero().flatten().tolist()
        found = standard_errors(
            self, lambda work: -(work.log_marginal(patterns) * count).sum(), ("weight", "intercept"), fixed
        )
        if self.bias is None:
            found["intercept"][beyond] = math.nan
        return found

    def item_parameters(self, x: Any = None) -> pandas.DataFrame:
        """The parameters of the items as a table: a row per item, under its name.

        The columns are ``slope`` and ``intercept``. Two traits have ``slope 1`` and ``slope 2``. Ordered answers have cut
        points, ``cut 1``, ``cut 2``, ..., and no intercept. With one trait a ``difficulty`` follows: the trait at which
        P(x = 1) is 1/2, or for ``difficulty k`` of ordered answers P(x ≥ k). Nominal answers have a row for each class.

        Args:
            x: the data that the model was fitted to: then a column ``... error`` follows each slope, intercept and cut point.

        Raises:
            ValueError: as `standard_errors`.

        Example:
            >>> x = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0], [1, 1]]).repeat(20, 1)
            >>> model = ItemResponse(features=2, slopes="shared").double().maximum_likelihood(x)
            >>> list(model.item_parameters())
            ['slope', 'intercept', 'difficulty']
        """
        return item_table(self, None if x is None else self.standard_errors(x))
