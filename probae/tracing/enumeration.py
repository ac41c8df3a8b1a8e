"""Discrete latents that programs ask to be summed out, ``infer={"enumerate": "parallel"}``: their loss and their density."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from opt_einsum import get_symbol, shared_intermediates
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from probae.batches import Batch, call, length
from probae.tracing.masks import inner_mask, log_density, unmasked
from probae.tracing.particles import Seen
from probae.tracing.protocol import Pair
from probae.tracing.signature import PARTICLES, Signature
from probae.tracing.sites import samples
from probae.tracing.terms import Traces, log_prob


def enumerated_loss(pair: Pair, batch: Batch, particles: int, size: int, seen: Seen | None = None) -> Tensor:
    """The negative ELBO per datum with the enumerated latents of model and guide summed out, by Pyro's `TraceEnum_ELBO`.

    What the guide sees of the batch, ``seen`` draws for each particle.
    """
    signature = pair.signature(batch)
    elbo = TraceEnum_ELBO(
        num_particles=particles,
        vectorize_particles=signature.vectorised and particles > 1 and seen is None,
        max_plate_nesting=signature.nesting,
        strict_enumeration_warning=False,
    )
    weigh = _Weigh(signature, size, length(batch))

    if (shared := [n for n in signature.globals_ if n in signature.summed]) and size != length(batch):
        raise ValueError(
            f"the discrete site {shared[0]!r} is shared by all data and summed out, which needs all of the data at once: "
            f"expected batch_size={size}, got {length(batch)}"
        )

    def model() -> None:
        with _Parallel(signature):
            call(pair.model, batch)

    def guide() -> None:
        if pair.has_guide:
            call(pair.guide, batch if seen is None else seen(batch, signature))

    with pair.own_parameters():
        return elbo.differentiable_loss(weigh(model), weigh(guide)) / size


def log_joint(pair: Pair, batch: Batch, traces: Traces) -> Tensor:
    """log p(x, z) (K, N) of the local sites at the guide's draws; sites that it leaves to the model are summed out."""
    totals = []
    for guide, _ in traces.runs:
        particles = traces.particles if len(traces.runs) == 1 else 1
        model = _enumerated(pair, batch, traces.signature, particles, poutine.replay, trace=guide)
        totals.append(_contracted(model, traces.signature, particles, traces.size))
    return torch.cat(totals)


def log_joint_at(
    pair: Pair, batch: Batch, values: dict[str, Tensor], particles: int, size: int, signature: Signature
) -> tuple[Tensor, Tensor]:
    """log p(z) and log p(x, z) (K, N) at given values of the latents that are not summed out; those are, of both.

    A latent under a mask keeps its own law.
    """
    model = _enumerated(pair, batch, signature, particles, poutine.condition, data=values)
    return tuple(  # type: ignore[return-value]
        _contracted(model, signature, particles, size, proper=True, sites=sites) for sites in (signature.latents, None)
    )


def _enumerated(pair: Pair, batch: Batch, signature: Signature, particles: int, handler: Any, **options: Any) -> Any:
    """A trace of the model in which the sites that are summed out have all of their values, each in a dimension of its own."""

    def handled(program: Any, **given: Any) -> Any:
        # the enumeration sees every site, those that are replayed too: their densities may depend on what is summed
        enumerate_ = EnumMessenger(first_available_dim=-2 - signature.nesting)
        return handler(enumerate_(_Parallel(signature)(program)), **given)

    return pair.run(pair.model, batch, particles, signature, handled, **options)


def _contracted(
    model: Any, signature: Signature, particles: int, size: int, proper: bool = False, sites: Any = None
) -> Tensor:
    """The sum over enumerated values of the density of each particle and datum (K, N), of some of the sites.

    It is Pyro's tensor contraction: `pyro.markov` chains of any length, and plates inside the plate over the data. A state
    under a mask keeps its own law, which sums to one.
    """
    data, one = get_symbol(0), get_symbol(2)
    model.symbolize_dims({**dict.fromkeys(signature.data_dims, data), PARTICLES: one})
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sums: set[str] = set()
    sizes: dict[str, int] = {}
    for site in samples(model):
        if not signature.is_local(site) or (sites is not None and site["name"] not in sites):
            continue
        if "_enumerate_symbol" in site["infer"]:
            sums.add(site["infer"]["_enumerate_symbol"])
            term = log_density(site)
        elif proper and site["name"] in signature.masked:
            term = log_density(site)
        else:
            term = scale_and_mask(log_prob(site), mask=site["mask"])
        term = pack(term, site["infer"]["_dim_to_symbol"])
        sizes.update(zip(term._pyro_dims, term.shape, strict=True))
        plates = frozenset(model.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        factors.setdefault(plates, []).append(term)
    sizes.update({data: size, one: particles})
    with shared_intermediates() as cache:
        ring = LogRing(cache=cache, dim_to_size=sizes)
        total = contract_to_tensor(factors, sums, target_ordinal=frozenset({data, one}), ring=ring)
    return total.permute([total._pyro_dims.index(one), total._pyro_dims.index(data)])


class _Parallel(Messenger):
    """Discrete sites that the guide leaves to the model are summed in parallel, however they are marked; a mask inside their
    distribution becomes one of the site, which leaves a law that sums to one."""

    def __init__(self, signature: Signature):
        super().__init__()
        self.signature = signature

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.signature.summed:
            msg["infer"] = {**msg["infer"], "enumerate": None}
        else:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
            if (fn := unmasked(msg["fn"])) is not msg["fn"]:
                msg["mask"] = inner_mask(msg["fn"]) if msg["mask"] is None else msg["mask"] & inner_mask(msg["fn"])
                msg["fn"] = fn


class _Weigh(Messenger):
    """Scales what lies in the data plate from the rows to the data that they stand for."""

    def __init__(self, signature: Signature, size: int, rows: int):
        super().__init__()
        self.signature, self.size, self.rows = signature, size, rows

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.signature.data_dims:
                full = frame.full_size if frame.full_size and frame.full_size > 0 else self.rows
                msg["scale"] = msg["scale"] * self.size / full
