"""The contract: a pair of Pyro programs, a model p(x, z) and a guide q(z | x), that share a plate over data."""

from __future__ import annotations

import html
from typing import Any

import pyro
from torch import Tensor, nn

from probae.batches import Batch, as_batch, call
from probae.objectives import ELBO, Objective
from probae.programs.callables import brought
from probae.programs.parameters import Parameters, object_of
from probae.programs.passes import Passes
from probae.programs.placement import Placement
from probae.programs.runs import Program, Runs
from probae.programs.start import Start
from probae.programs.tables import Tables
from probae.recipe import is_ours, to_json
from probae.tracing.leaves import positional
from probae.tracing.missing import masked, require_numbers
from probae.tracing.signature import Signature


class Pair(Runs, Tables, Passes, Start, Parameters, Placement, nn.Module):
    r"""A model p(x, z) and a guide q(z | x), both Pyro programs.

    Two ways to write one. Around two functions, which may use ``pyro.module`` and ``pyro.param`` (their parameters are
    kept here, never in Pyro's global store):

        >>> pair = Pair(model, guide)  # doctest: +SKIP

    or as a subclass with the callables ``prior() -> p(z)``, ``likelihood(z) -> p(x | z)`` and ``posterior(x) -> q(z | x)``
    (and ``marginal() -> p(x)`` where it is tractable), from which the two programs follow:

    .. math:: z \sim \text{prior}(), \quad x \mid z \sim \text{likelihood}(z); \qquad z \mid x \sim \text{posterior}(x).

    An object of any other class brings its ``model`` and ``guide``, and of these callables those that return distributions.

    **What trains.** All networks and parameters that the programs can reach are the pair's: moved, put into training and
    evaluation mode, copied, saved and loaded together. Of these `fit` trains those of the object whose methods the programs
    are, or that is a program itself (a subclass, a class with ``model`` and ``guide``, an autoguide); and, as Pyro does,
    those that ``pyro.module`` and ``pyro.param`` name, wherever they are. What functions merely use is held fixed, and so
    is what is named behind ``poutine.block(hide_types=["param"])`` alone.

    Where ``missing = "mask"`` (an attribute of the class, or of the pair), NaN in x is a value missing at random: the
    standard model observes the rest alone, and a posterior or programs of one's own fill the gaps before they look.

    A model with a ``maximum_likelihood`` that is asked for evidence, codes or draws before it was fitted answers from its
    initial values, and warns.

    Shapes: x (..., N, D), z (..., N, L), the data plate ``"data"`` at dimension −1; particles, K, further to the left.

    Args:
        model, guide: Pyro programs of a batch; a model whose marginal is known, or whose latents can be enumerated,
            needs no guide.
        owner: the object that they belong to, whose parameters train and whose callables the pair takes over; by default
            the one whose methods they are.
    """

    #: the rightmost dimensions of x that make one event
    event_dim = 1
    #: ``"mask"`` where NaN in the data is a value missing at random, whose density the programs leave out
    missing: str | None = None
    #: whether the programs take data in float64 beside float32 parameters, and round them once centred and scaled; other
    #: pairs refuse data that float32 cannot hold
    keeps_precision = False
    # what a class may have; methods or modules, so that p(x | z) is written in one place
    prior: Any
    likelihood: Any
    posterior: Any
    marginal: Any
    initialise: Any
    maximum_likelihood: Any
    _programs: dict[str, Any] | None = None
    _owner: Any = None

    def __init__(self, model: Program | None = None, guide: Program | None = None, owner: Any = None):
        super().__init__()
        self._signatures: dict[Any, Signature] = {}
        self._columns: dict[str, tuple[str, ...]] = {}
        self.remembered: Signature | None = None
        if model is None and type(self) is Pair:
            raise TypeError("Pair(model, guide): expected a model program; without one, write a subclass")
        if model is not None:
            for name, program in (("model", model), ("guide", guide)):
                if not callable(program) and not (name == "guide" and program is None):
                    raise TypeError(f"Pair(model, guide): expected {name} to be callable, got {type(program).__name__}")
            owner = owner if owner is not None else object_of(model)
            object.__setattr__(self, "_programs", {"model": model, "guide": guide})
            object.__setattr__(self, "_owner", owner)
        self._hold_nothing()
        self._find()
        if owner is not None:
            if getattr(owner, "missing", None) == "mask":
                self.missing = owner.missing
            self.keeps_precision = getattr(owner, "keeps_precision", None) is True
            for name, method in brought(self, owner):
                object.__setattr__(self, name, method)

    # -- in print ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [f"{self._title()}: {sum(p.numel() for p in self.trained()):,} parameters"]
        if self.remembered is not None:
            lines += [f"  {line}" for line in str(self.remembered).splitlines()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [] if self.remembered is None else self.remembered.described()
        cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        count = sum(p.numel() for p in self.trained())
        return f"<p><b>{html.escape(self._title())}</b>: {count:,} parameters</p><table>{cells}</table>"

    def _title(self) -> str:
        given: dict[str, Any] = vars(self).get("_arguments", {})
        plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str | tuple)}
        plain.pop("names", None)  # of features: in tables, and too many for a title
        owner = self if self._owner is None else self._owner
        return f"{type(owner).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"

    # -- the two programs --------------------------------------------------------------------------------------------

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The generative program; the standard one draws z from the prior and observes x under the likelihood."""
        if self._programs is not None:
            return self._programs["model"](*args, **kwargs)
        x, given = self._apart(args, kwargs)
        with pyro.plate("data", x.shape[-1 - self.event_dim], dim=-1):
            if self.has("likelihood"):
                likelihood = self.likelihood(pyro.sample("z", self.prior()), *given)
            else:
                likelihood = self.marginal(*given)
            if self.missing is not None:
                likelihood, x = masked(likelihood, x)
            pyro.sample("x", likelihood, obs=x)

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """The recognition program; the standard one draws z from the posterior head."""
        if self._programs is not None:
            return self._programs["guide"](*args, **kwargs)
        x, given = self._apart(args, kwargs)
        if self.has("posterior"):
            with pyro.plate("data", x.shape[-1 - self.event_dim], dim=-1):
                pyro.sample("z", self.posterior(x, *given))

    def _apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """x, as numbers that networks take, and what is given beside it."""
        x, *given = (*args, *(kwargs[name] for name in self.arguments if name in kwargs))
        return (x if x.is_floating_point() else x.to(self.dtype)), given

    @property
    def is_adapted(self) -> bool:
        """Whether the programs are a user's, around which the pair was made."""
        return self._programs is not None

    @property
    def takes_particles(self) -> bool:
        """Whether all of it are classes of probae's, which run with a particle axis; else a trial tells."""
        try:
            return is_ours(to_json(self))
        except TypeError:
            return False

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the arrays of a batch are called that is a tuple."""
        own = self._programs["model"] if self._programs is not None else self.model
        if getattr(own, "__func__", None) is not Pair.model:
            return positional(own)
        return ("x",) if getattr(self, "given", None) is None else ("x", "c")

    @property
    def has_guide(self) -> bool:
        """Whether there is a guide; a model with a marginal, or whose latents can be summed out, needs none."""
        if self._programs is not None:
            return self._programs["guide"] is not None
        return self.has("posterior") or type(self).guide is not Pair.guide

    def has(self, name: str) -> bool:
        """Whether the pair has a callable of that name: prior, likelihood, posterior, marginal."""
        return callable(getattr(self, name, None))

    def own(self, name: str) -> Any:
        """A method of the model's class, ``estimate_log_prob`` or ``draw_data``, or None; see CONTRIBUTING."""
        method = getattr(self if self._owner is None else self._owner, name, None)
        return method if callable(method) else None

    @property
    def tractable(self) -> bool:
        """Whether log p(x) is known in closed form."""
        return self.has("marginal")

    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x) (N,), by the marginal; of what is observed, where values are missing."""
        self.need("marginal")
        x, given = self._apart(args, kwargs)
        with self.own_parameters():
            marginal, shape = self.marginal(*given), x.shape[:1]
        if self.missing is not None:
            marginal, x = masked(marginal, x)
        values = marginal.log_prob(x)
        if values.shape != shape:
            raise ValueError(
                f"marginal(): expected a distribution of x with one log density per datum, {tuple(shape)}, got "
                f"{tuple(values.shape)}: use .to_event(1) for vectors"
            )
        return values

    def need(self, *names: str) -> None:
        """Raise a ValueError that says which of the callables is missing."""
        missing = [name for name in names if not self.has(name)]
        if missing:
            raise ValueError(
                f"this needs the pair's {' and '.join(missing)}(...), a callable that returns a distribution; "
                f"{type(self if self._owner is None else self._owner).__name__} has "
                "none: write the pair as a class with prior(), likelihood(z) and posterior(x)"
            )

    def default_objective(self) -> Objective:
        """What `fit` minimises where no objective is given: the ELBO, unless a class says otherwise."""
        return ELBO()

    # -- its data ----------------------------------------------------------------------------------------------------

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check a batch's shape against the number of features, where the pair has one, and what is given beside it.

        Raises:
            ValueError: with the shape that was expected and the one that came.
        """
        features = getattr(self, "features", None)
        if features is None:
            return
        shape = tuple(getattr(self, "event_shape", (features,)))
        width: int | None = getattr(self, "given", None)
        if kwargs and set(kwargs) != set(self.arguments):
            raise ValueError(f"site 'x': expected a batch with the keys {list(self.arguments)}, got {sorted(kwargs)}")
        x, *given = (*args, *(kwargs[name] for name in self.arguments if name in kwargs))
        if len(given) != (width is not None):
            expected = f"one array (N, {', '.join(map(str, shape))})"
            if width is not None:
                expected = f"data and what the model conditions on, (x, c), with c (N,) classes or (N, {width}) numbers"
            raise ValueError(f"site 'x': expected {expected}, got a batch of {1 + len(given)}")
        if tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"site 'x': expected data of shape (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}"
            )
        if width is not None:
            _require_given(given[0], width)

    def as_batch(self, x: Any) -> Batch:
        """Data as tensors on the pair's device, in its dtype, or in float64 where that loses digits and the pair keeps them.

        Raises:
            TypeError: if they are no arrays of real numbers.
            ValueError: if they are empty, or the pair's dtype loses digits that matter; if a DataFrame has other columns than
                the one that the pair was fitted to.
        """
        self.require_columns(x)
        return as_batch(x, self.dtype, self.device, self.keeps_precision)

    def as_data(self, x: Any) -> Tensor:
        """One array (N, D) as a tensor of the pair's dtype and device; its shape and its numbers, but for gaps, checked."""
        batch = self.as_batch(x)
        call(self.validate, batch)
        if not isinstance(batch, Tensor):
            raise ValueError(f"site 'x': expected one array of finite numbers, got a {type(batch).__name__} of arrays")
        require_numbers(batch, "site 'x'", self.missing)
        return batch


def _require_given(c: Tensor, width: int) -> None:
    """Raise a ValueError unless what is given are classes (N,), whole numbers below ``width``, or numbers (N, width)."""
    if c.dim() == 1:
        good = (c == c.round()) & (c >= 0) & (c < width) if c.is_floating_point() else (c >= 0) & (c < width)
        if not bool(good.all()):
            raise ValueError(
                f"given: expected classes, whole numbers from 0 to {width - 1}, got {c[~good][0].item():g}"
            )
    elif tuple(c.shape[1:]) != (width,):
        raise ValueError(f"given: expected classes (N,) or covariates (N, {width}), got {tuple(c.shape)}")
