"""Where the parameters of a pair lie, and in what dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Placement:
    """The part of a `Pair` that knows the dtype and the device of its parameters."""

    def require_values(self: Any) -> None:
        """Raise a ValueError if a parameter or buffer is on the meta device, where tensors have no values."""
        if any(tensor.is_meta for tensor in self._tensors()):
            raise ValueError("expected a model with parameters, and they are on the meta device, which keeps no values")

    def require_trainable(self: Any) -> None:
        """Raise a ValueError if a parameter or buffer was made in inference mode, which lets nothing change it."""
        self.require_values()
        if any(tensor.is_inference() for tensor in self._tensors()):
            raise ValueError(
                "expected a model that can be trained, and its parameters were made under torch.inference_mode(): make or "
                "copy the model outside of it"
            )

    def _require_default_dtype(self: Any) -> None:
        default = torch.get_default_dtype()
        if self._programs is None or default is torch.float32 or self.dtype in (None, default):
            return
        raise ValueError(
            f"torch's default dtype is {default}, and the model's parameters are {self.dtype}: tensors that its programs make "
            f"without a dtype would be {default}. Make both the same, by model.to({default}) or "
            f"torch.set_default_dtype({self.dtype})"
        )

    def _tensors(self: Any) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    def _reference(self: Any) -> Tensor | None:
        # what functions merely reach says less than what the pair's own programs and object have
        reached = {id(t) for t in (*self._in_use.parameters(), *self._in_use.buffers())}
        floating = [t for t in self._tensors() if t.is_floating_point()]
        return next((t for t in floating if id(t) not in reached), next(iter(floating), None))

    @property
    def dtype(self: Any) -> torch.dtype | None:
        """The floating dtype of the parameters; None before there are any."""
        reference = self._reference()
        return None if reference is None else reference.dtype

    @property
    def device(self: Any) -> torch.device | None:
        """The device of the parameters; None before there are any.

        Raises:
            ValueError: if they lie on the meta device, where tensors have no values.
        """
        self.require_values()
        reference = self._reference()
        return None if reference is None else reference.device
