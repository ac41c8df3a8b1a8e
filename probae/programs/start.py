"""Whether a model that maximum likelihood fits was ever fitted: its numbers are compared with those of its constructor."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

from torch.nn.parameter import is_lazy


class Start:
    """The part of a `Pair` that knows the values that it started from.

    A model with a ``maximum_likelihood`` is made to be fitted by it. Asked before that, it answers from its initial values and
    warns. It counts as fitted once any of its numbers is another: after maximum likelihood, `probae.fit`, an assignment, or
    once it was loaded. A network with random weights is a model too, and no such warning is given for it.
    """

    _initial: int | None = None

    def constructed(self: Any) -> None:
        """Keep a checksum of the initial values; called at the end of a recorded class's constructor."""
        if self.has("maximum_likelihood") and not hasattr(self, "inner"):
            self._initial = self._checksum()

    def warn_unfitted(self: Any) -> None:
        """Warn if the model has its initial values still."""
        inner = getattr(self, "inner", None)
        if isinstance(inner, Start):
            inner.warn_unfitted()
        elif self._initial is not None and self._initial == self._checksum():
            warnings.warn(
                f"{type(self).__name__}: this model was never fitted, so it answers from its initial values: call "
                "model.maximum_likelihood(x) or probae.fit(model, x) first, or set its parameters",
                RuntimeWarning,
                stacklevel=3,
            )
        else:
            self._initial = None  # no need to look again

    def _checksum(self: Any) -> int | None:
        """Of all parameters and buffers, whatever their dtype and device; None where they have no values."""
        found = 0
        for tensor in self.state_dict().values():
            if is_lazy(tensor) or tensor.is_meta:
                return None
            found = zlib.crc32(tensor.detach().cpu().float().contiguous().numpy(), found)
        return found
