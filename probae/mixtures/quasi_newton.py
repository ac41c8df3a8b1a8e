"""Quasi-Newton maxima of a marginal likelihood, and standard errors from its curvature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

_LEAST = 1e-4  # of the mean square of a gradient
FAR = 50.0  #: no parameter goes beyond: a likelihood that is flat out there has no maximum


def minimise(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    tolerance: float,
    max_iterations: int,
    most: Mapping[str, Tensor] | None = None,
    unit: Tensor | None = None,
) -> float:
    """Set a model's parameters to a minimum of a loss by L-BFGS, in float64; gives the largest derivative that is left.

    Args:
        model: a module whose parameters are free of constraints, of the order of 1.
        loss: of a copy of the model, a scalar.
        tolerance: the largest derivative at which it ends.
        max_iterations: the most steps.
        most: upper bounds, by parameter, that are not `FAR`.
        unit: in which parameters, in a row, are moved, as `units` gives them; 1 unless told.
    """
    from scipy.optimize import minimize

    work = copy.deepcopy(model).double()
    parameters = list(work.parameters())
    start = parameters_to_vector(parameters).detach()
    unit = torch.ones_like(start) if unit is None else unit
    slope = torch.zeros_like(start)

    def value(vector: Any) -> tuple[float, Any]:
        vector_to_parameters(torch.as_tensor(vector).to(unit) * unit, parameters)
        with torch.enable_grad():
            found = loss(work)
            slope.copy_(parameters_to_vector(torch.autograd.grad(found, parameters)))
        return float(found.detach()), (slope * unit).cpu().numpy()

    def stop(_: Any) -> None:
        if float(slope.abs().max()) <= tolerance / 2:
            raise StopIteration

    far = parameters_to_vector([(most or {}).get(name, torch.full_like(p, FAR)) for name, p in work.named_parameters()])
    bounds = list(zip((-FAR / unit).tolist(), (far / unit).tolist(), strict=True))
    options = {
        "maxiter": max_iterations,
        "gtol": float(tolerance / 2 * unit.min()),
        "ftol": 0.0,
        "maxfun": 4 * max_iterations,
        "maxcor": 30,
    }
    first = (start / unit).cpu().numpy()
    done = minimize(value, first, jac=True, method="L-BFGS-B", bounds=bounds, callback=stop, options=options)
    value(done.x)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), parameters, strict=True):
            mine.copy_(theirs)
    return float(slope.abs().max())


def units(model: nn.Module, log_prob: Callable[[Any], Tensor], count: Tensor, draws: int = 16) -> Tensor:
    r"""Units in which the likelihood curves alike by each parameter: :math:`E[g_n^2]^{-1/2}`, g_n a datum's own gradient.

    Signs drawn at random tell it without the gradient of each datum: on average the square of :math:`\sum_n \pm g_n` is
    :math:`\sum_n g_n^2`.

    Args:
        model: a module whose parameters are free of constraints.
        log_prob: of a copy of the model, of data (N,).
        count: how many data there are of each (N,).
        draws: of the signs.
    """
    work = copy.deepcopy(model).double()
    parameters = list(work.parameters())
    generator, squares = torch.Generator().manual_seed(0), torch.zeros_like(parameters_to_vector(parameters).detach())
    for _ in range(draws):
        signs = 2.0 * torch.randint(0, 2, (len(count),), generator=generator) - 1
        with torch.enable_grad():
            total = (log_prob(work) * count.sqrt() * signs.to(count.device)).sum()
            squares += parameters_to_vector(torch.autograd.grad(total, parameters)).square() / draws
    return (squares / count.sum() + _LEAST).rsqrt()


def standard_errors(
    model: nn.Module, loss: Callable[[Any], Tensor], names: Sequence[str], fixed: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    r"""Standard errors of what a model says of its parameters, :math:`\sqrt{\operatorname{diag}(J H^{-1} J^\top)}`.

    Args:
        model: at a minimum of the loss.
        loss: the negative log-likelihood of all data; H is its Hessian.
        names: attributes of the model, functions of its parameters whose Jacobian is J.
        fixed: by parameter, the entries (of it, flattened) that do not vary.

    Raises:
        ValueError: if the Hessian is not positive definite.
    """
    work = copy.deepcopy(model).double()
    parameters = {name: p.detach() for name, p in work.named_parameters()}
    shapes = {name: p.shape for name, p in parameters.items()}
    free = torch.cat([_free(p, fixed.get(name, ())) for name, p in parameters.items()])

    def at(vector: Tensor, read: Callable[[Any], Tensor]) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        given = {f"model.{name}": part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        return functional_call(_Reads(work, read), given, ())

    vector = torch.cat([p.flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(lambda v: at(v, loss), vector)[free][:, free]
    factor, info = torch.linalg.cholesky_ex((hessian + hessian.mT) / 2)
    if int(info):
        raise ValueError("standard_errors: expected parameters at a maximum of the likelihood, and identified there")
    found = {}
    for name in names:
        jacobian = torch.autograd.functional.jacobian(lambda v, name=name: at(v, lambda m: getattr(m, name)), vector)
        rows = jacobian.flatten(0, -2)[:, free]
        variance = (rows.mT * torch.cholesky_solve(rows.mT, factor)).sum(0)
        found[name] = variance.sqrt().reshape(jacobian.shape[:-1])
    return found


def _free(parameter: Tensor, fixed: Sequence[int]) -> Tensor:
    free = torch.ones(parameter.numel(), dtype=torch.bool)
    free[list(fixed)] = False
    return free


class _Reads(nn.Module):
    def __init__(self, model: nn.Module, read: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.read = model, read

    def forward(self) -> Tensor:
        """What is read of the model."""
        return self.read(self.model)
