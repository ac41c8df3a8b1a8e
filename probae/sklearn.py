"""A scikit-learn estimator around any model of the catalogue: for pipelines, grids and cross-validation.

>>> import numpy as np
>>> from sklearn.model_selection import GridSearchCV
>>> from probae.sklearn import LatentVariableModel
>>> x = np.random.default_rng(0).normal(size=(60, 1)) + 0.3 * np.random.default_rng(1).normal(size=(60, 4))
>>> GridSearchCV(LatentVariableModel(), {"latents": [1, 2]}, cv=3).fit(x).best_params_
{'latents': 1}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("probae.sklearn needs scikit-learn: pip install 'probae[compare]'") from error

from probae.adapter import as_pair
from probae.arguments import one_of
from probae.batches import checksums, column_names, held, is_annotated, rows_at, rows_of
from probae.data.datasets.dataset import Schema
from probae.data.streams import blocks_of
from probae.evidence import ELBO, IWAE, Estimator
from probae.evidence.evaluation import estimator_of
from probae.evidence.weights import prepare
from probae.models import make
from probae.programs.columns import require_same_names
from probae.runtime.seeding import checked_seed, derived, seeded, with_seed
from probae.training import fit

_ROWS = 64  # of a block in which log p(x) is exact


class LatentVariableModel(ClassNamePrefixFeaturesOutMixin, TransformerMixin, DensityMixin, BaseEstimator):  # type: ignore[misc]
    r"""A model of the catalogue as a scikit-learn estimator: codes to go on with, and the held-out log p(x) as its score.

    `transform` gives the posterior means of the latents, `inverse_transform` the mean of x given latents, `score_samples`
    log p(x_n) in nats, exact or a lower bound, and `score` its mean: what `GridSearchCV` chooses by. Data are arrays,
    DataFrames, matrices of ``scipy.sparse`` or AnnData.

    Args:
        model: a name of `probae.models.names`.
        latents: L.
        kind: of the data: ``"real"``, ``"counts"`` or ``"binary"``.
        maximum: the largest possible count; that of the training data unless told.
        options: of the model's constructor, a dictionary.
        fit_options: of the model's ``maximum_likelihood``, or of `probae.fit` where it is trained by steps.
        method: of `probae.log_evidence`; where log p(x) is not exact, ``"iwae"`` is the quickest.
        evidence_options: of that, a dictionary.
        random_state: a whole number, from which all draws follow; None is 0.

    Attributes:
        model_: the fitted model.
        n_features_in_, feature_names_in_: the features, and their names where the data were a DataFrame.

    Raises:
        ValueError: if the data are not finite numbers, or do not suit the model; as scikit-learn's estimators do.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(50, 3))
        >>> estimator = LatentVariableModel(latents=2).fit(x)
        >>> estimator.transform(x).shape, estimator.score_samples(x).shape
        ((50, 2), (50,))
    """

    def __init__(
        self,
        model: str = "ppca",
        latents: int = 1,
        *,
        kind: str = "real",
        maximum: int | None = None,
        options: Mapping[str, Any] | None = None,
        fit_options: Mapping[str, Any] | None = None,
        method: str = "auto",
        evidence_options: Mapping[str, Any] | None = None,
        random_state: int | None = None,
    ):
        self.model = model
        self.latents = latents
        self.kind = kind
        self.maximum = maximum
        self.options = options
        self.fit_options = fit_options
        self.method = method
        self.evidence_options = evidence_options
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> LatentVariableModel:
        """Fit to data (N, D): by maximum likelihood where the model has it, else by `probae.fit`; y is not used.

        Sparse rows are made dense a minibatch at a time by `probae.fit`; maximum likelihood needs all of them.
        """
        one_of("kind", self.kind, ("real", "counts", "binary"))
        x = self._validated(X, ensure_min_samples=2)
        seed = self._seed
        try:
            with seeded(derived(seed, 0)):
                model = as_pair(make(self.model, self._schema(x), self.latents, **dict(self.options or {}))).double()
            options = dict(self.fit_options or {})
            if callable(getattr(model, "maximum_likelihood", None)):
                model.maximum_likelihood(x, **with_seed(model.maximum_likelihood, derived(seed, 1), options))
            else:
                fit(model, x, **{"progress": False, "seed": derived(seed, 1), **options})
        except ValueError as error:
            raise ValueError(f"{error} (X has n_samples={x.shape[0]}, n_features={x.shape[1]})") from error
        self.model_ = model
        codes = model.encode(x[:1])
        self._sites = {name: code.shape[1:] for name, code in codes.items()} if isinstance(codes, dict) else None
        self._n_features_out = _rows(codes).shape[1]
        if (names := getattr(self, "feature_names_in_", None)) is not None:
            model.named_columns = {"x": names}
        return self

    def transform(self, X: Any) -> Any:
        """The posterior means of the latents, (N, L); of several sites, one after another."""
        return _rows(self.model_.encode(self._checked(X)))

    def inverse_transform(self, X: Any) -> Any:
        """The mean of x given latents (N, L), (N, D)."""
        check_is_fitted(self)
        z = check_array(X, dtype=np.float64)
        if z.shape[1] != self._n_features_out:
            raise ValueError(f"X has {z.shape[1]} latents, but the model has {self._n_features_out}")
        if self._sites is None:
            return _rows(self.model_.decode(z))
        shapes = self._sites.values()
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts = (part.reshape(len(z), *shape) for part, shape in zip(np.split(z, ends, 1), shapes, strict=True))
        return _rows(self.model_.decode(dict(zip(self._sites, parts, strict=True))))

    def score_samples(self, X: Any) -> Any:
        """log p(x_n), in nats, (N,): exact, or a lower bound.

        The draws for a bound follow from the random state and the row's own numbers, so that its value does not depend on the
        rows beside it, nor on their order; each row is estimated by itself, which takes time: see ``method``.
        """
        estimator = estimator_of(self.method, None, dict(self.evidence_options or {}))
        x, seed = self._checked(X), derived(self._seed, 2)
        return np.concatenate([_row_by_row(self.model_, block, estimator, seed) for block in blocks_of(x)])

    def score(self, X: Any, y: Any = None) -> float:
        """The mean of log p(x_n), in nats per datum; higher is better."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1, random_state: int | None = None) -> Any:
        """Data drawn from the model, (n, D)."""
        check_is_fitted(self)
        seed = self._seed if random_state is None else checked_seed(random_state)
        return _rows(self.model_.sample(n_samples, seed=derived(seed, 3)))

    @property
    def _seed(self) -> int:
        return 0 if self.random_state is None else checked_seed(self.random_state)

    def _checked(self, x: Any) -> Any:
        check_is_fitted(self)
        return self._validated(x, reset=False)

    def _validated(self, x: Any, reset: bool = True, **options: Any) -> Any:
        """Finite numbers (N, D), dense or sparse by rows; an AnnData gives its matrix, and the names of its variables."""
        kind = {"dtype": np.float64, "accept_sparse": "csr", **options}
        if not is_annotated(x):
            return validate_data(self, x, reset=reset, **kind)
        found, names = check_array(held(x), **kind), column_names(x)
        if reset:
            self.n_features_in_, self.feature_names_in_ = found.shape[1], np.array(names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            require_same_names(list(self.feature_names_in_), names or (), "X")
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _schema(self, x: Any) -> Schema:
        sparse = hasattr(x, "tocsr")
        highest, lowest = (each.toarray() if sparse else each for each in (x.max(0), x.min(0)))
        square = (x.multiply(x) if sparse else np.square(x)).mean()
        spread = float(np.sqrt(square - x.mean() ** 2)) if sparse else float(x.std())
        maximum = int(highest.max()) if self.maximum is None else self.maximum
        return Schema(
            (x.shape[1],),
            self.kind,  # type: ignore[arg-type]
            maximum if self.kind == "counts" else None,
            varies=bool((highest > lowest).all()),
            spread=spread if spread > 0 else 1.0,
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")


def _row_by_row(model: Any, x: Any, estimator: Estimator, seed: int) -> Any:
    """log p(x_n) (N,): block by block where it is exact, else of each alone, from draws that its own numbers decide."""
    pair, batch, signature = prepare(model, x)
    rows = list(rows_of(batch, 1))
    if estimator(pair, rows[0], signature, seed).bound == "exact":
        # products of matrices sum in another order for another number of rows, so all have the same
        at = torch.arange(-(-len(rows) // _ROWS) * _ROWS).clamp(max=len(rows) - 1)
        blocks = rows_of(rows_at(batch, at), _ROWS)
        return torch.cat([estimator(pair, block, signature, seed).values for block in blocks])[: len(rows)].numpy()
    seeds = (derived(seed, key % 2**63) for key in checksums(batch).tolist())
    compile = False if isinstance(estimator, ELBO | IWAE) else "auto"  # a few runs for a row are not worth tracing
    found = [estimator(pair, row, signature, own, compile).values for row, own in zip(rows, seeds, strict=True)]
    return torch.cat(found).numpy()


def _rows(values: Any) -> Any:
    """Tensors, by site where there are several, as one array (N, ...)."""
    parts = list(values.values()) if isinstance(values, dict) else [values]
    return np.concatenate([np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in parts], 1)
