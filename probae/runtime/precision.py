"""Float64 where digits would be lost, and products in bfloat16, everything else as it was: ``precision="bf16"``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRECISIONS = ("float32", "bf16")


def float64(x: Tensor) -> Tensor:
    """x in float64, on a device that has it."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)  # MPS has no float64


def products(precision: str) -> AbstractContextManager[Any]:
    """A context in which products are computed in a precision; gradients follow the same rule."""
    return _Bfloat16Products() if precision == "bf16" else nullcontext()


class _Bfloat16Products(TorchFunctionMode):
    # unlike autocast, the results are float32 at once: densities, which sum over many features, never see bfloat16
    FUNCTIONS = frozenset(
        {
            *(F.linear, F.bilinear, F.scaled_dot_product_attention),
            *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
            *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum),
            *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
        }
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.FUNCTIONS:
            return func(*args, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _lowered, (args, kwargs))
        result = func(*args, **kwargs)
        return result.float() if result.dtype == torch.bfloat16 else result


def _lowered(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
