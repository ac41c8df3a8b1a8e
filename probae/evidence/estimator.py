"""What an estimator of log p(x) is: a dataclass of its options, called with a pair and data that were checked."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, Self

from probae.batches import Batch
from probae.evidence.result import Evidence
from probae.pair import Pair
from probae.tracing.signature import Signature


class Estimator:
    """An estimator of log p(x), whose options are its fields; a subclass checks their values when it is made."""

    #: by which `probae.log_evidence` knows it
    name: ClassVar[str]

    def __call__(
        self, pair: Pair, batch: Batch, signature: Signature, seed: int = 0, compile: bool | str = "auto"
    ) -> Evidence:
        """log p(x) of each datum, or a bound on it, nats.

        Args:
            pair, batch, signature: as `probae.evidence.weights.prepare` gives them.
            seed: of the draws.
            compile: how the programs are run, as for `probae.log_weights`.

        Raises:
            ValueError: if the estimator does not apply to the pair, saying why.
        """
        raise NotImplementedError

    @classmethod
    def of(cls, options: dict[str, Any], what: str) -> Self:
        """The estimator with options given by name; ``what`` is whose they are.

        Raises:
            ValueError: naming the options that there are, if one is none of them.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if unknown := [name for name in options if name not in names]:
            raise ValueError(f"{what} has no option {unknown[0]!r}: its options are {names}")
        return cls(**options)
