"""Discrete latents that programs ask to be summed out, ``infer={"enumerate": "parallel"}``: their loss and their density."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probae.batches import Batch, call, length
from probae.pair import Pair
from probae.sites import Layout, samples
from probae.traces import Traces


def enumerated_loss(pair: Pair, batch: Batch, particles: int, size: int) -> Tensor:
    """The negative ELBO per datum with the enumerated latents of model and guide summed out, by Pyro's `TraceEnum_ELBO`."""
    layout = pair.layout(batch)
    elbo = TraceEnum_ELBO(
        num_particles=particles,
        vectorize_particles=layout.vectorised and particles > 1,
        max_plate_nesting=layout.nesting,
        strict_enumeration_warning=False,
    )
    weigh = _Weigh(layout, size, length(batch))

    def model() -> None:
        call(pair.model, batch)

    def guide() -> None:
        if pair.has_guide:
            call(pair.guide, batch)

    with pair.own_parameters():
        return elbo.differentiable_loss(weigh(model), weigh(guide)) / size


def log_joint(pair: Pair, batch: Batch, traces: Traces) -> Tensor:
    """log p(x, z) (K, N) of the local sites at the guide's draws; sites that it leaves to the model are summed out.

    Raises:
        ValueError: if a summed site lies in a plate of its own inside the data plate.
    """
    layout, totals = pair.layout(batch), []
    if layout.nesting > 1:
        raise ValueError(
            f"the sites {list(layout.summed)} are summed out, with plates inside the data plate: this is not implemented; "
            "write the sum in the model, or give the guide these sites"
        )
    for guide, _ in traces.runs:
        particles = traces.particles if len(traces.runs) == 1 else 1
        with EnumMessenger(first_available_dim=-2 - layout.nesting):
            model = pair.run(pair.model, batch, particles, layout, poutine.replay, trace=guide)
        total: Any = torch.zeros(particles, traces.size, dtype=pair.dtype, device=pair.device)
        for site in samples(model):
            if layout.is_local(site):
                value = site["fn"].log_prob(site["value"])
                if site["mask"] is not None:
                    kept = torch.as_tensor(site["mask"]).bool()
                    value = torch.where(kept, value, torch.zeros_like(value))
                total = total + value
        while total.dim() > 2:  # each enumerated site has a dimension of its own, to the left of the particles
            total = torch.logsumexp(total, 0)
        totals.append(total)
    return torch.cat(totals)


class _Weigh(Messenger):
    """Scales what lies in the data plate from the rows to the data that they stand for."""

    def __init__(self, layout: Layout, size: int, rows: int):
        super().__init__()
        self.layout, self.size, self.rows = layout, size, rows

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.layout.plates:
                full = frame.full_size if frame.full_size and frame.full_size > 0 else self.rows
                msg["scale"] = msg["scale"] * self.size / full
