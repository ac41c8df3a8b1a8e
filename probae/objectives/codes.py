"""What objectives of sparse codes ask of a pair: its code with its gates, and log p(x | ·) at a decoder's output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from probae.batches import Batch, call, leaves
from probae.heads.posteriors import Code, thresholds_held
from probae.tracing.missing import masked

if TYPE_CHECKING:
    from probae.pair import Pair


def code_of(pair: Pair, batch: Batch) -> Code:
    """The code of each datum, with its pre-activations and gates, beside that of the loss it is added to.

    Raises:
        ValueError: if the guide of the pair is no point head of `probae.posteriors`.
    """
    pair.need("posterior")
    with thresholds_held(pair):
        code = call(pair.posterior, batch)
    if not isinstance(code, Code):
        raise ValueError(
            f"expected a guide that is a point, a head of probae.posteriors such as TopK(8); got a {type(code).__name__}"
        )
    return code


def log_likelihood(pair: Any, output: Tensor, batch: Batch) -> Tensor:
    """log p(x | output of the decoder) (N,), with the parameters of the likelihood held; of what is observed."""
    likelihood, (_, x) = frozen(pair.head, output), next(leaves(batch))
    if pair.missing is not None:
        likelihood, x = masked(likelihood, x)
    return likelihood.log_prob(x)


def frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """A module's output with no gradient for its parameters, but for its inputs."""
    held = {name: tensor.detach() for name, tensor in module.named_parameters()}
    return functional_call(module, held, inputs)


def decoder_of(pair: Any) -> nn.Module:
    """The decoder of an autoencoder.

    Raises:
        ValueError: if the pair has no decoder under a head.
    """
    decoder = getattr(pair, "decoder", None)
    if not isinstance(decoder, nn.Module) or not isinstance(getattr(pair, "head", None), nn.Module):
        raise ValueError(f"expected an autoencoder with a decoder and a likelihood head, got {type(pair).__name__}")
    return decoder
