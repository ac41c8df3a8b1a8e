"""The runs of a pair: its signature, found once, and traces of guide and model for particles at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from probae.batches import Batch, call, leaves, length
from probae.runtime.isolation import one_at_a_time
from probae.runtime.seeding import derived
from probae.tracing.guides import is_messenger
from probae.tracing.masks import Site
from probae.tracing.particles import Seen, for_particles, takes_particles
from probae.tracing.probing import run_at, signature_of
from probae.tracing.signature import PARTICLES, Signature, rows_in_plate
from probae.tracing.sites import samples
from probae.tracing.terms import Traces

Program = Callable[..., Any]
_FIRST = 22  # a purpose of its own: what programs make at their first run shares no draws with what follows


class Runs:
    """The part of a `Pair` that runs its programs.

    Attributes:
        remembered: the signature for the batches that were seen last, or that a file was saved with; None before.
    """

    remembered: Signature | None
    _signatures: dict[Any, Signature]

    def signature(self: Any, batch: Batch, seed: int = 0) -> Signature:
        """What the programs are; found by runs on a few rows, and kept. Parameters that those make follow from the seed."""
        form = (isinstance(batch, dict), *(name for name, _ in leaves(batch)))
        if form not in self._signatures:  # programs may observe less of another form
            with self.surveyed():
                self._signatures[form] = signature_of(self, batch, derived(seed, _FIRST))
            self.remembered = self._signatures[form]
        return self._signatures[form]

    def keep_signature(self: Any, batch: Batch, signature: Signature | None) -> None:
        """Take what is now known of the programs for batches of a form; None finds it anew at the next run."""
        form = (isinstance(batch, dict), *(name for name, _ in leaves(batch)))
        self._signatures.pop(form, None)
        if signature is not None:
            self._signatures[form] = self.remembered = signature

    def traces(
        self: Any,
        batch: Batch,
        particles: int = 1,
        through: Callable[[Site], Tensor] | None = None,
        seen: Seen | None = None,
    ) -> Traces:
        """Run guide, then model at its draws, for K particles at once.

        Args:
            batch: N data.
            particles: K.
            through: gives, for a site of the guide, the draw that the model and the densities see (equal in value).
            seen: draws what the guide sees of the data, anew for each particle; see `probae.corruption`.

        Returns:
            The `Traces`, with sums over the sites as ``local`` (K, N) and ``global_`` (K,).
        """
        signature = self.signature(batch)
        if not self.has_guide and (
            latents := [n for n in signature.latents + signature.globals_ if n not in signature.summed]
        ):
            raise ValueError(f"the pair has no guide to draw {latents} from: a bound needs one")
        together = signature.vectorised or particles == 1
        if seen is not None and particles > 1 and together:
            if signature.takes_particles is None:
                signature = replace(signature, takes_particles=takes_particles(self, batch, signature))
                self.keep_signature(batch, signature)
            together = bool(signature.takes_particles)
        each = particles if together else 1
        rows = for_particles(batch, each, signature) if seen is not None and each > 1 else batch
        views = [rows if seen is None else seen(rows, signature) for _ in range(1 if together else particles)]
        runs = [self._run(batch, view, signature, each, through) for view in views]
        return Traces(runs, signature, particles, rows_in_plate(runs[0][1], signature, batch), views)

    def replay(self: Any, batch: Batch, values: dict[str, Tensor], particles: int) -> Traces:
        """Run the model alone, at given values (K, N, ...) of its latents."""
        signature = self.signature(batch)
        model = run_at(self, self.model, batch, particles, signature, values)
        return Traces([(poutine.Trace(), model)], signature, particles, length(batch))

    def _run(
        self: Any,
        batch: Batch,
        seen: Batch,
        signature: Signature,
        particles: int,
        through: Callable[[Site], Tensor] | None,
    ) -> tuple[Any, Any]:
        guide = self.run(self.guide, seen, particles, signature) if self.has_guide else poutine.Trace()
        if through is not None:
            for site in samples(guide):
                if not site["is_observed"] and site["value"].requires_grad:
                    site["value"] = through(site)
        return guide, self.run(self.model, batch, particles, signature, poutine.replay, trace=guide)

    def run(
        self: Any,
        program: Program,
        batch: Batch,
        particles: int,
        signature: Signature | None,
        handler: Any = None,
        **options: Any,
    ) -> Any:
        """Trace one program under a particle plate to the left of its own plates; parameters come from this pair."""

        def vectorised() -> None:
            if particles == 1 or signature is None:
                call(program, batch)
            else:
                with pyro.plate(PARTICLES, particles, dim=-1 - signature.nesting):
                    call(program, batch)

        self._require_default_dtype()
        handled = handler(vectorised, **options) if handler is not None else vectorised
        with one_at_a_time(), self.own_parameters():
            trace = poutine.trace(handled).get_trace()
        if program == self.guide and is_messenger(
            self
        ):  # which runs the model: what that observes is none of the guide's
            for name in [site["name"] for site in samples(trace) if site["is_observed"]]:
                trace.remove_node(name)
        return trace
