"""Quasi-Newton maxima of a marginal likelihood, and standard errors from its curvature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters

FAR = 50.0  #: no parameter goes beyond: a likelihood that is flat out there has no maximum


def minimise(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    tolerance: float,
    max_iterations: int,
    most: Mapping[str, Tensor] | None = None,
) -> float:
    """Set a model's parameters to a minimum of a loss by L-BFGS, in float64; gives the largest derivative that is left.

    Args:
        model: a module whose parameters are free of constraints, of the order of 1.
        loss: of a copy of the model, a scalar.
        tolerance: the largest derivative at which it ends.
        max_iterations: the most steps.
        most: upper bounds, by parameter, that are not `FAR`.
    """
    from scipy.optimize import minimize

    work = copy.deepcopy(model).double()
    parameters = list(work.parameters())
    device = parameters[0].device

    def value(vector: Any) -> tuple[float, Any]:
        vector_to_parameters(torch.as_tensor(vector, device=device).clone(), parameters)
        with torch.enable_grad():
            found = loss(work)
            gradient = torch.autograd.grad(found, parameters)
        return float(found.detach()), parameters_to_vector(gradient).cpu().numpy()

    start = parameters_to_vector(parameters).detach().cpu().numpy().astype(np.float64)
    far = [(most or {}).get(name, torch.full_like(p, FAR)).flatten().tolist() for name, p in model.named_parameters()]
    bounds = [(-FAR, upper) for part in far for upper in part]
    options = {
        "maxiter": max_iterations,
        "gtol": tolerance / 2,
        "ftol": 0.0,
        "maxfun": 4 * max_iterations,
        "maxcor": 30,
    }
    done = minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    _, gradient = value(done.x)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), parameters, strict=True):
            mine.copy_(theirs)
    return float(np.abs(gradient).max())


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
