"""What everything below the contract asks of a pair; `probae.pair.Pair` is what has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from probae.batches import Batch
from probae.tracing.signature import Signature
from probae.tracing.terms import Traces


class Pair(Protocol):
    """A model and a guide, with the parameters that they run on."""

    missing: str | None

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The generative program."""

    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """The recognition program."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What the arrays of a batch are called that is a tuple."""

    @property
    def has_guide(self) -> bool:
        """Whether there is a guide."""

    @property
    def tractable(self) -> bool:
        """Whether log p(x) is known in closed form."""

    @property
    def device(self) -> torch.device | None:
        """That of the parameters."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating dtype of the parameters."""

    @property
    def training(self) -> bool:
        """Whether the networks are in training mode."""

    @property
    def is_adapted(self) -> bool:
        """Whether the programs are a user's, around which the pair was made."""

    @property
    def takes_particles(self) -> bool:
        """Whether the programs are known to run with a particle axis, without a trial."""

    def modules(self) -> Iterator[nn.Module]:
        """The networks, itself among them."""

    def eval(self) -> Any:
        """Put the networks into evaluation mode."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Check the shape of a batch."""

    def signature(self, batch: Batch, seed: int = 0) -> Signature:
        """Where the sites lie."""

    def keep_signature(self, batch: Batch, signature: Signature | None) -> None:
        """Take what is now known of the sites."""

    def traces(self, batch: Batch, particles: int = 1, through: Any = None, seen: Any = None) -> Traces:
        """Guide and model, run for K particles."""

    def run(
        self,
        program: Callable[..., Any],
        batch: Batch,
        particles: int,
        signature: Signature | None,
        handler: Any = None,
        **options: Any,
    ) -> Any:
        """The trace of one program."""

    def trying(self) -> AbstractContextManager[Any]:
        """A run whose parameters are dropped."""

    def own_parameters(self) -> AbstractContextManager[Any]:
        """Where programs find the pair's parameters."""

    def log_marginal(self, *args: Any, **kwargs: Any) -> Tensor:
        """log p(x) in closed form."""
