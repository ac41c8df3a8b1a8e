"""The passes as users call them: a DataFrame for a DataFrame, with its index and names, and tensors for arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probae.arguments import size, whole
from probae.batches import column_names, index_of, is_annotated, leaves, rebuilt
from probae.data.streams import blocks_of
from probae.programs.columns import Columns, require_same_names
from probae.runtime.isolation import isolated


class Tables(Columns):
    """The methods ``sample``, ``encode``, ``decode``, ``reconstruct`` and ``impute`` of a pair.

    Where data, or the data that the model was fitted to, are a DataFrame, what comes back is one: with the index of what was
    given, the columns of the features, and latents named ``z1``, ``z2``, ... by their site. Sequences and images stay tensors.
    """

    @isolated
    def sample(self: Any, n: int, like: Any = None, seed: int = 0, *, given: Any = None) -> Any:
        """Draw data from the model: z from the prior, then x given z.

        Args:
            n: how many.
            like: a batch whose form the draws take; needed by programs that have never seen data.
            seed: of the draws.
            given: what the model conditions on, n rows of it or one row for all: an array, or a dict by the names of several.

        Returns:
            x (n, ...); a dict by site where several are observed. DataFrames where ``like`` is one, or where it is not given
            and the model was fitted to a DataFrame.

        Raises:
            ValueError: if the prior is flat, if the programs have never seen data and get no ``like``, or if they condition on
                something that is not given.
        """
        self.warn_unfitted()
        found = self._sample(size("n", n), like, seed, given)
        names = self.named_columns if like is None else self.columns_of(like)
        return alone(found) if not names or is_annotated(like) else self._features(found, names, None)

    @isolated
    def encode(self: Any, x: Any) -> Any:
        """The posterior means of the latents at data x, (N, L); a dict by site where there are several.

        A guide whose means have no closed form, such as a flow, is averaged over 100 draws, which follow from a fixed seed.

        Args:
            x: N data; a sparse matrix or an AnnData is made dense block by block.

        Returns:
            A DataFrame for a DataFrame, with the columns ``z1``, ``z2``, ...; for an AnnData a NumPy array, to put in
            ``.obsm``; else a tensor.

        Raises:
            ValueError: if the pair has no guide.
        """
        self.warn_unfitted()
        self.require_columns(x)
        parts = [self._encode(block) for block in blocks_of(x)]
        found = parts[0] if len(parts) == 1 else {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
        if is_annotated(x):
            return alone({site: code.cpu().numpy() for site, code in found.items()})
        if index_of(x) is None:
            return alone(found)
        return alone({site: as_frame(code, latent_names(site, code), index_of(x)) for site, code in found.items()})

    @isolated
    def decode(self: Any, z: Any, *, given: Any = None, like: Any = None) -> Any:
        """The mean of x given latents z.

        A pair with ``likelihood(z)`` takes z (..., L) and gives (..., D). Any other takes a row of z for each datum, by site in
        a dict where there are several latents; a latent that is left out takes its centre given those before it.

        Args:
            z: the latents; a DataFrame in the order of `encode`.
            given: what the model conditions on, as for `sample`.
            like: a batch whose form the data take, as for `sample`.

        Returns:
            The mean of x; a dict by site where several are observed. A DataFrame for a DataFrame.

        Raises:
            ValueError: if z does not fit the latents, or something is missing, as for `sample`.
        """
        for site, codes in (z if isinstance(z, Mapping) else {"z": z}).items():
            if (names := column_names(codes)) is not None:
                expected = latent_names(str(site), torch.empty(0, len(names)))
                if sorted(names) == sorted(expected):
                    require_same_names(expected, names, "z")
        self.warn_unfitted()
        found = self._decode(z, given, like)
        if (index := index_of(z)) is None:
            return alone(found)
        return self._features(found, self.named_columns, index)

    @isolated
    def reconstruct(self: Any, x: Any) -> Any:
        """The mean of x given the posterior means of its latents, in the shape of x; a dict where several sites are observed.

        Returns:
            A DataFrame for a DataFrame, with its index and columns; else a tensor.

        Raises:
            ValueError: if the pair has no guide.
        """
        self.warn_unfitted()
        found, index = self._reconstruct(x), index_of(x)
        if index is None:
            return alone(found)
        frames = self._features(found, self.columns_of(x), index)
        if isinstance(frames, dict):
            return {site: _as_given(frame, x) for site, frame in frames.items()}
        return _as_given(frames, x)

    @isolated
    def impute(self: Any, x: Any, draws: int = 10, *, particles: int = 500, seed: int = 0) -> Any:
        r"""Draw what is missing given what was observed, in copies of the data without gaps.

        .. math:: x_\text{missing} \sim \int p(x_\text{missing} \mid z)\, p(z \mid x_\text{observed})\, dz

        Latents are drawn from the guide and resampled by their weights, p(x_observed, z) / q(z | x_observed): exact where
        the guide is the posterior (each draw is then a particle of its own), else in the limit of many particles. The
        mean of the copies over draws estimates E[x_missing | x_observed].

        Args:
            x: N data, NaN where a value that the model observes is missing.
            draws: how many copies.
            particles: K, of which the draws are chosen, and no fewer than them.
            seed: of the draws.

        Returns:
            x in its own form, each array (draws, N, ...): as it was where it was observed, a draw where it was not. For a
            DataFrame one with draws × N rows, whose index has the level ``draw`` before its own.

        Raises:
            ValueError: if the pair takes no missing values, or has no guide with a density over latents of each datum.

        References: Rubin (1987), *Multiple imputation for nonresponse in surveys*; Mattei & Frellsen (2019), *MIWAE*.

        Example:
            >>> import probae
            >>> model = probae.PPCA(features=3, latents=1, missing="mask")
            >>> model.impute(torch.tensor([[1.0, torch.nan, 2.0]]), draws=5).shape
            torch.Size([5, 1, 3])
        """
        self.warn_unfitted()
        found = self._impute(x, whole("draws", draws), whole("particles", particles), seed)
        parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, tuple) else [x]
        filled = [_copies(copies, part) for (_, copies), part in zip(leaves(found), parts, strict=True)]
        return rebuilt(found, filled)

    def _features(self: Any, found: dict[str, Tensor], names: Mapping[str, Sequence[str]], index: Any) -> Any:
        """Values of observed sites as tables, under the names of the arrays that the sites observe."""
        known = () if self.remembered is None else self.remembered.variables
        leaf = {variable.name: variable.leaf or variable.name for variable in known}
        first = self.names_of_features(dict(names)) if len(found) == 1 else None
        return alone(
            {
                site: as_frame(value, names.get(leaf.get(site, site)) or first or latent_names(site, value), index)
                for site, value in found.items()
            }
        )


def alone(found: dict[str, Any]) -> Any:
    """The values by site, or that of the only one."""
    return next(iter(found.values())) if len(found) == 1 else found


def latent_names(site: str, values: Tensor) -> list[str]:
    """The columns of values (N, L) of a site: ``z1``, ``z2``, ..., of the site ``"z1"`` ``z1_1``, ...; of (N,) the site itself.

    Example:
        >>> latent_names("z", torch.zeros(5, 2)), latent_names("z1", torch.zeros(5, 1))
        (['z1', 'z2'], ['z1_1'])
    """
    if values.dim() < 2:
        return [site]
    between = "_" if site[-1:].isdigit() else ""
    return [f"{site}{between}{number}" for number in range(1, values.shape[1] + 1)]


def as_frame(values: Tensor, names: Sequence[str], index: Any) -> Any:
    """A tensor (N,) or (N, D) as a DataFrame; as it is where it has other axes, or other columns than there are names."""
    import pandas

    if values.dim() not in (1, 2) or values.reshape(len(values), -1).shape[1] != len(names):
        return values
    return pandas.DataFrame(values.reshape(len(values), -1).cpu().numpy(), index=index, columns=list(names))


def _as_given(frame: Any, data: Any) -> Any:
    """A DataFrame with the columns themselves, numbers or several levels, of the one in data that has these names."""
    names = column_names(frame)
    parts = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else [data]
    given = (part.columns for part in parts if index_of(part) is not None and column_names(part) == names)
    columns = next(given, None) if names is not None else None
    return frame if columns is None else frame.set_axis(columns, axis=1)


def _copies(copies: Tensor, data: Any) -> Any:
    """Copies (draws, N, D) of a DataFrame as one, those of an array as they are."""
    if index_of(data) is None:
        return copies
    import pandas

    frames = {draw: pandas.DataFrame(c.cpu().numpy(), data.index, data.columns) for draw, c in enumerate(copies)}
    return pandas.concat(frames, names=["draw"])
