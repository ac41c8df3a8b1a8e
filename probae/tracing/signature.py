"""What the programs of a pair are: the arrays of a batch, the random variables, and where these lie; plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from probae.batches import Batch, length
from probae.tracing.masks import Site
from probae.tracing.sites import samples

#: the plate of particles, to the left of all others
PARTICLES = "probae.particles"


@dataclass(frozen=True)
class Leaf:
    """An array of a batch.

    Attributes:
        name: the key of a dict, the parameter of the model that it is given to, or ``"x"``.
        shape: of one datum.
        dtype: such as ``"float32"``.
        observed: whether a site of the model observes it; if not, the programs are only given it (labels, covariates).
        fill: a number that may stand in its place, within the support of the site that observes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    observed: bool = True
    fill: float = 0.0

    def filled(self, n: int, device: torch.device | None) -> Tensor:
        """An array of n data that says nothing but its shape."""
        return torch.full((n, *self.shape), self.fill, dtype=getattr(torch, self.dtype), device=device)


@dataclass(frozen=True)
class Variable:
    """A random variable of the model: a site that is no `pyro.factor`.

    Attributes:
        name: of the site.
        observed: whether the model observes it; if not, it is a latent.
        local: whether there is one for each datum.
        shape: of its event.
        support: in words.
        discrete: whether its values can be counted.
        leaf: of the batch, the array that it observes, or None where it observes a function of the batch.
        flat: whether its prior is improper.
        point: whether the guide has no density for it.
        masked: whether its prior or guide has a mask.
        summed: whether the guide leaves it to the model, which sums it out.
        analytic_kl: whether KL(q ‖ p) has a closed form.
    """

    name: str
    observed: bool
    local: bool = True
    shape: tuple[int, ...] = ()
    support: str = ""
    discrete: bool = False
    leaf: str | None = None
    flat: bool = False
    point: bool = False
    masked: bool = False
    summed: bool = False
    analytic_kl: bool = False


@dataclass(frozen=True)
class Signature:
    """What the programs of a pair are, found once by running them on a few rows.

    Attributes:
        data_dims: the plates over the data, which have as many elements as there are rows, and their (negative) dimensions.
        nesting: how many plate dimensions the programs use; the particle plate goes to their left.
        variables: the latents and what is observed, in the order of the model.
        leaves: the arrays of a batch.
        form: of a batch: ``"array"``, ``"tuple"`` or ``"dict"``.
        measure: ``"mass"`` if all that is observed is discrete, ``"density"`` if none is, else ``"mixed"``.
        subsampled: why what is computed is not about all of the data, where the programs take a part of them, or None.
        enumerated: whether the programs ask for the sum over a discrete latent.
        no_evidence: why there is no log p(x) of each datum at all, or None.
        no_density: why the density of the guide's draws is not known, or None.
        not_normalised: why the guide's terms are no density of its draws, or None.
        varies: whether some data have sites that others do not have.
        all_rows: whether the programs run only on all of the data at once.
        vectorised: whether the programs run with a particle axis; if not, particles are run one after another.
        takes_particles: whether the guide takes a batch of its own for each particle; None until that is asked.
        note: what the reader of an estimate should know of the programs.
    """

    data_dims: dict[str, int]
    nesting: int
    variables: tuple[Variable, ...] = ()
    leaves: tuple[Leaf, ...] = ()
    form: str = "array"
    measure: str = "density"
    subsampled: str | None = None
    enumerated: bool = False
    no_evidence: str | None = None
    no_density: str | None = None
    not_normalised: str | None = None
    varies: bool = False
    all_rows: bool = False
    vectorised: bool = True
    takes_particles: bool | None = None
    note: str = ""

    # -- the variables by their kind ---------------------------------------------------------------------------------

    #: the latents of each datum
    latents: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the latents that all data share
    globals_: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: what the model observes
    observed: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the latents of each datum for which the guide has no density
    points: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the latents of each datum whose prior is flat
    improper: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the latents of each datum whose prior or guide has a mask
    masked: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the latents that are summed out
    summed: tuple[str, ...] = field(init=False, repr=False, compare=False)
    #: the arrays of a batch that the programs condition on and do not observe
    given: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        local = [v for v in self.variables if v.local]
        kinds: dict[str, list[Any]] = {
            "latents": [v for v in local if not v.observed],
            "globals_": [v for v in self.variables if not v.observed and not v.local],
            "observed": [v for v in self.variables if v.observed],
            "points": [v for v in local if v.point],
            "improper": [v for v in local if v.flat],
            "masked": [v for v in local if v.masked],
            "summed": [v for v in self.variables if v.summed],
            "given": [leaf for leaf in self.leaves if not leaf.observed],
        }
        for kind, found in kinds.items():
            object.__setattr__(self, kind, tuple(each.name for each in found))

    def variable(self, name: str) -> Variable:
        """The variable of a name.

        Raises:
            KeyError: if there is none.
        """
        return {v.name: v for v in self.variables}[name]

    # -- where sites lie ---------------------------------------------------------------------------------------------

    def data_plate(self, site: Site) -> Any:
        """The plate over the data that a site lies in, or None."""
        return next((frame for frame in site["cond_indep_stack"] if frame.name in self.data_dims), None)

    def is_local(self, site: Site) -> bool:
        """Whether a site lies inside a plate over the data."""
        return self.data_plate(site) is not None

    # -- batches -----------------------------------------------------------------------------------------------------

    def batch(self, tensors: Iterable[Tensor]) -> Batch:
        """Arrays, in the order of the leaves, as a batch of this form."""
        found = tuple(tensors)
        if self.form == "array":
            return found[0]
        return found if self.form == "tuple" else {leaf.name: x for leaf, x in zip(self.leaves, found, strict=True)}

    # -- in words ----------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "\n".join(" · ".join(part for part in row if part) for row in self.described())

    def described(self) -> list[list[str]]:
        """A row for each variable and each array that is given: its role, its name and shape, and what there is to know."""
        rows = []
        for v in self.variables:
            role = ("observed" if v.observed else "latent") + ("" if v.local else ", shared by all data")
            known = [
                "prior is flat" if v.flat else "",
                "guide is a point" if v.point else "",
                "summed out" if v.summed else "",
                "masked" if v.masked else "",
                "KL in closed form" if v.analytic_kl else "",
            ]
            rows.append([role, f"{v.name} {_shape(v.shape)}", v.support, ", ".join(filter(None, known))])
        return rows + [
            ["given", f"{leaf.name} {_shape(leaf.shape)}", leaf.dtype, ""] for leaf in self.leaves if not leaf.observed
        ]

    # -- on disk -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As plain data, which `from_json` reads."""
        data = asdict(self)
        return {f.name: data[f.name] for f in fields(self) if f.init}

    @classmethod
    def from_json(cls, data: Any) -> Signature:
        """The signature that `to_json` wrote.

        Raises:
            ValueError: if the data are not of that form.
        """
        try:
            parts = {name: tuple(_of(kind, each) for each in data[name]) for name, kind in _PARTS.items()}
            found: Signature = _of(cls, {**data, **parts})
            if not all(isinstance(getattr(torch, leaf.dtype, None), torch.dtype) for leaf in found.leaves):
                raise ValueError("a leaf has a dtype that torch does not know")
            return found
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"expected the signature of a model: {error}") from error


_PARTS: dict[str, Any] = {"variables": Variable, "leaves": Leaf}


def _of(kind: Any, data: Any) -> Any:
    """A dataclass from its fields; a list becomes a tuple."""
    names = {f.name for f in fields(kind) if f.init}
    if not isinstance(data, dict) or set(data) - names:
        raise TypeError(f"expected the fields {sorted(names)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})" if shape else "(a number)"


def merged(first: Signature, second: Signature) -> Signature:
    """A signature with the further variables of another run; what holds of a variable in one of them holds."""
    others = {v.name: v for v in second.variables}
    known = []
    for variable in first.variables:
        other = others.pop(variable.name, variable)
        flags = {
            name: getattr(variable, name) or getattr(other, name) for name in ("flat", "point", "masked", "summed")
        }
        known.append(replace(variable, **flags))
    reasons = {
        name: getattr(first, name) or getattr(second, name) for name in ("no_density", "not_normalised", "no_evidence")
    }
    return replace(
        first,
        variables=(*known, *others.values()),
        **reasons,
        nesting=max(first.nesting, second.nesting),
        enumerated=first.enumerated or second.enumerated,
        varies=True,
    )


def rows_in_plate(model: Any, signature: Signature, batch: Batch) -> int:
    """The size of the data plate in a trace, smaller than N where the programs subsample."""
    for site in samples(model):
        frame = signature.data_plate(site)
        if frame is not None:
            return frame.size if frame.size >= 0 else length(batch)  # a plate without a size takes the data's
    return length(batch)
