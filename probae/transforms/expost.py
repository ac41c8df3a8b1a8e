"""A proper prior for a trained autoencoder, fitted to its codes: then there is a log p(x) to speak of."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from probae.adapter import as_pair
from probae.arguments import one_of, whole
from probae.batches import Batch
from probae.evidence.refined import Guides, Refined, Refiner
from probae.heads.code_priors import CodePrior, fitted
from probae.heads.distributions import DiscretisedNormal, Translated
from probae.pair import Pair
from probae.recipe import recorded
from probae.runtime.isolation import isolated
from probae.runtime.seeding import derived, evaluating, seeded
from probae.tracing.checks import check
from probae.tracing.missing import masked
from probae.tracing.sites import base

KINDS = ("normal", "mixture", "flow", "hurdle")
SCALES = ("evidence", "codes", None)
_FULL = 64  # latents up to which posteriors get a full covariance
_DRAWS = 200  # of the posterior, for each datum, by which a scale is refitted


@recorded
class ExPost(Pair):
    r"""A trained decoder under another prior, with a factor on the likelihood's scale: what `expost_prior` returns.

    Its codes are the autoencoder's: ``encode`` gives them, and ``decode`` takes them.

    .. math:: z \sim \text{prior}, \qquad x \mid z \sim \text{likelihood}(\text{code}(z)), \quad \text{scale} \times c

    Args:
        model: a pair with ``likelihood(z)`` and ``posterior(x)``.
        prior: a module whose call gives p(z), with ``code(z)`` where z is not the code itself.
        scales: how many factors c there are: 1, or one for each feature.
    """

    label = "decoder + ex-post prior"
    log_factor: Tensor

    def __init__(self, model: Any, prior: CodePrior, scales: int = 1):
        super().__init__()
        self.inner = as_pair(model)
        self.inner.need("likelihood", "posterior")
        self.prior = prior
        self.latents = prior.latents
        self.event_dim, self.missing = self.inner.event_dim, self.inner.missing
        self.keeps_precision = self.inner.keeps_precision
        if (features := getattr(self.inner, "features", None)) is not None:
            self.features, self.event_shape = features, getattr(self.inner, "event_shape", (features,))
        self.given = getattr(self.inner, "given", None)
        self.register_buffer("log_factor", torch.zeros(whole("scales", scales)))

    def likelihood(self, z: Tensor, *given: Tensor) -> Any:
        """p(x | z), the decoder's at the code of z, its scale times c."""
        fn = self.inner.likelihood(self.prior.code(z), *given)
        return _rescaled(fn, self.log_factor.exp()) if _scale(fn) is not None else fn

    def posterior(self, x: Tensor, *given: Tensor) -> Any:
        """The autoencoder's own guide; of a point, the latent of its code."""
        fn = self.inner.posterior(x, *given)
        if isinstance(base(fn), dist.Delta):
            return dist.Delta(self.prior.latent(fn.mean), event_dim=1, validate_args=False)
        return fn

    def _encode(self, x: Any) -> dict[str, Tensor]:
        return self.inner._encode(x)

    def _decode(self, z: Any, given: Any, like: Any) -> dict[str, Tensor]:
        return self.inner._decode(z, given, like)

    def __repr__(self) -> str:
        return f"<{self.label}: {type(self.inner).__name__}, {type(self.prior).__name__} of {self.latents} latents>"


@isolated
def expost_prior(
    model: Any,
    x_train: Any,
    kind: str = "normal",
    *,
    scale: str | None = "evidence",
    components: int | None = None,
    rows: int = 100,
    seed: int = 0,
) -> ExPost:
    r"""A trained autoencoder as a latent variable model: its decoder, with a proper prior fitted to its codes.

    ==============  ========================================================================================
    kind            p(z)
    ==============  ========================================================================================
    ``"normal"``    N(μ, Σ), the codes' mean and full covariance
    ``"mixture"``   Gaussians with full covariances (scikit-learn), as many as held-out codes choose
    ``"flow"``      a neural spline flow (zuko), stopped by held-out codes
    ``"hurdle"``    for codes with exact zeros, as a ReLU gives: 0 with probability 1 − π, else a Weibull
    ==============  ========================================================================================

    The codes of a guide with a density are draws from it, so that the prior is fitted to the aggregate posterior; those of a
    point guide are its points. The result has a log p(x), which is that of *decoder and fitted prior together*, by
    ``"refined"``, ``"ais"`` or ``"auto"``: a poor value may be the prior's fault.

    A likelihood with a scale (Normal, Laplace, discretised Normal) has it multiplied by a factor, or one for each feature
    where the scales are; a scale that is predicted keeps its pattern. With ``"codes"`` the factor has the largest
    likelihood of the training data at their codes. That is too small: reconstructions are taken as if z were known. So by
    default the factor has the largest evidence of training data, by Monte-Carlo EM: posteriors of ``rows`` data by refined
    guides and importance weights, then the factor of the largest expected log likelihood, in turn.

    Args:
        model: a trained pair with ``likelihood(z)`` and ``posterior(x)``; it is copied, and left as it was.
        x_train: N data, those that it was trained on.
        kind: of the prior.
        scale: ``"evidence"``, ``"codes"``, or None to keep the scale.
        components: of a mixture, instead of a choice by held-out codes.
        rows: of the data, at random, by whose evidence the scale is refitted; its relative error is about
            1 / √(2 (D − L) rows).
        seed: of all draws.

    Returns:
        A pair, `ExPost`, labelled "decoder + ex-post prior", in eval mode.

    Raises:
        ValueError: if the pair lacks ``likelihood`` or ``posterior``, has several latent sites or shared ones; if there are
            too few data; if a hurdle meets negative codes.

    Reference: Ghosh, Sajjadi, Vergari, Black & Schölkopf (2020), *From variational to deterministic autoencoders*.

    Example:
        >>> import probae
        >>> x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
        >>> model = expost_prior(probae.Autoencoder(features=6, latents=2), x)
        >>> probae.log_evidence(model, x[:3], method="refined", particles=50).bound
        'lower'
    """
    one_of("kind", kind, KINDS)
    one_of("scale", scale, SCALES)
    if components is not None:
        whole("components", components)
        if kind != "mixture":
            raise ValueError(f"components: they are of kind='mixture', got kind={kind!r}")
    inner = copy.deepcopy(as_pair(model)).eval()
    inner.need("likelihood", "posterior")
    x = inner.as_data(x_train)
    signature = check(inner, x)
    if signature.globals_ or len(signature.latents) != 1:
        found = list(signature.latents + signature.globals_)
        raise ValueError(f"an ex-post prior is for one latent site of each datum, 'z'; this pair has {found}")
    with evaluating(inner, derived(seed, 0)):
        codes = inner.posterior(x).sample()
        if codes.dim() != 2 or len(codes) < 2:
            raise ValueError(f"expected codes (N, L) of at least two data, got {tuple(codes.shape)}")
        if not bool(codes.isfinite().all()):
            raise FloatingPointError(f"the code of datum {int((~codes.isfinite()).nonzero()[0][0])} is NaN or infinite")
        prior = fitted(kind, codes, derived(seed, 1), components)
        scales = _scale(inner.likelihood(codes[:2]))
    per_feature = getattr(getattr(inner, "head", None), "kind", None) == "feature"
    found_pair = ExPost(inner, prior, x.shape[-1] if scales is not None and per_feature else 1)
    found_pair.to(device=x.device, dtype=codes.dtype).eval()
    if scales is not None and scale is not None:
        with seeded(derived(seed, 2)):
            some = x[torch.randperm(len(x))[: whole("rows", rows)].to(x.device)]
        with torch.no_grad():
            _most_likely(found_pair, x, prior.latent(codes)[None], torch.ones_like(codes[None, :, 0]))
        if scale == "evidence":
            _most_evident(found_pair, some, seed)
    return found_pair


def _most_likely(pair: ExPost, x: Tensor, z: Tensor, weights: Tensor) -> float:
    """Set the factor to the largest of Σ w log p(x | z) over latents (K, N, L) with weights (K, N); returns how far it went."""
    before = pair.log_factor.clone()
    with torch.no_grad():
        fn = pair.inner.likelihood(pair.prior.code(z))
    factor = before.clone().requires_grad_()
    search = torch.optim.LBFGS([factor], max_iter=50, line_search_fn="strong_wolfe", tolerance_change=1e-9)
    total = weights.sum() * x.shape[-1]

    def loss() -> Tensor:
        search.zero_grad()
        likelihood, seen = _rescaled(fn, factor.exp()), x
        if pair.missing is not None:
            likelihood, seen = masked(likelihood, x)
        value = -(weights * likelihood.log_prob(seen)).sum() / total
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    if not bool(factor.isfinite().all()):
        raise FloatingPointError(
            "the likelihood's scale goes to zero or infinity: the codes copy the data; keep it, scale=None"
        )
    pair.log_factor.copy_(factor.detach())
    return float((pair.log_factor - before).abs().max())


def _most_evident(pair: ExPost, x: Batch, seed: int, rounds: int = 12) -> None:
    """Set the factor to where the evidence of data is largest, by Monte-Carlo EM with common random numbers."""
    signature = check(pair, x)
    covariance = "full" if pair.latents <= _FULL else "diagonal"
    guides: Guides | None = None
    for number in range(rounds):
        options = Refined(covariance=covariance, steps=200 if number == 0 else 40)
        refiner = Refiner(pair, x, signature, options, derived(seed, 3), compile=False)
        guides = refiner.fitted(x, guides)
        u, log_w = refiner.posterior_draws(x, guides, _DRAWS)
        if _most_likely(pair, x, u, log_w.softmax(0)) < 0.01:  # type: ignore[arg-type]
            return


def _scale(fn: Any) -> Tensor | None:
    """The scale of a likelihood that has one."""
    law = base(fn)
    known = isinstance(law.base if isinstance(law, Translated) else law, dist.Normal | dist.Laplace | DiscretisedNormal)
    return law.scale if known else None


def _rescaled(fn: Any, factor: Tensor) -> Any:
    law = base(fn)
    if isinstance(law, Translated):
        scaled: Any = Translated(_with_scale(law.base, factor), law.origin, law.origin_low)
    else:
        scaled = _with_scale(law, factor)
    return scaled.to_event(fn.event_dim)


def _with_scale(law: Any, factor: Tensor) -> Any:
    if isinstance(law, DiscretisedNormal):
        ends = law.low, law.high
        return DiscretisedNormal(law.loc, law.scale * factor, *ends, validate_args=False, dtype=law.dtype)
    return type(law)(law.loc, law.scale * factor, validate_args=False)
