"""The result of a comparison in plain words: who is best, by how much, and whether the data can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_NAMED = 6  # names in a sentence, before the others are counted
_CLEAR = 2.0  # paired standard errors


def verdict(table: pandas.DataFrame, unit: str = "datum") -> str:
    """A paragraph on the table of a `Comparison`; a difference is clear where it exceeds two paired standard errors.

    Example:
        >>> import probae, torch
        >>> x = torch.randn(50, 4)
        >>> table = probae.compare({"wide": probae.PPCA(4, 2).maximum_likelihood(x), "far": probae.PPCA(4, 1)}, x).table
        >>> verdict(table).startswith("Best: wide, with")
        True
    """
    ranked = table[table["difference"].notna()]
    if not len(ranked):
        return " ".join(["No model here has a log p(x) that can be ranked.", *_unranked(table)])
    best, others = ranked.iloc[0], ranked.iloc[1:]
    return " ".join([*_best(best, others, unit), *_others(others, unit), *_bounds(ranked), *_unranked(table)])


def _best(best: Any, others: pandas.DataFrame, unit: str) -> list[str]:
    value = with_error(best["log_evidence"], best["stderr"])
    bound = ", a lower bound" if best["bound"] == "lower" else ""
    said = [f"Best: {best.name}, with a mean held-out log p(x) of {value} nats per {unit}{bound}."]
    if best["role"] == "baseline":
        said.append("This is a baseline: no model of the line-up is ranked above it.")
    elif best["over_independent"] > 0 and not others["over_independent"].iloc[:1].eq(0).any():  # else they are next
        more = with_error(best["over_independent"], best["over_independent_stderr"])
        said.append(f"That is {more} nats above independent features, which have no latents.")
    return said


def _others(others: pandas.DataFrame, unit: str) -> list[str]:
    if not len(others):
        return []
    below, error = -others["difference"], others["difference_stderr"]
    said = [f"Next is {others.index[0]}, {with_error(below.iloc[0], error.iloc[0])} nats per {unit} below."]
    if math.isnan(error.iloc[0]):
        return [*said, "The error of the difference is unknown, so the data cannot tell whether it is chance."]
    if below.iloc[0] > _CLEAR * error.iloc[0]:
        said.append("That is more than two paired standard errors: it is hardly chance.")
    else:
        said.append("That is within two paired standard errors: these data do not tell the two apart.")
    near = [str(name) for name in others.index[1:][(below <= _CLEAR * error)[1:]]]
    if near:
        said.append(f"Within two paired standard errors of the best {_are(near)} also {listed(near)}.")
    return said


def _bounds(ranked: pandas.DataFrame) -> list[str]:
    names = [str(name) for name in ranked.index[ranked["bound"] == "lower"]]
    if not names:
        return []
    which = "All values are lower bounds" if len(names) == len(ranked) > 1 else (
        f"The values of {listed(names)} are lower bounds" if len(names) > 1 else f"The value of {names[0]} is a lower bound"
    )  # fmt: skip
    doubt = "" if list(names) == [str(ranked.index[0])] else " So a model whose bound is lower may still be better."
    return [f"{which}: log p(x) may be higher; this table does not say by how much.{doubt}"]


def _unranked(table: pandas.DataFrame) -> list[str]:
    said = []
    none = [str(name) for name in table.index[table["log_evidence"].isna()]]
    other = [str(name) for name in table.index[table["log_evidence"].notna() & table["difference"].isna()]]
    if none:
        said.append(f"Without a log p(x), and so without a rank: {listed(none)}.")
    if other:
        said.append(f"With a value of another kind, and so not ranked beside the others: {listed(other)}.")
    return said


def listed(names: Sequence[str]) -> str:
    """Names in a sentence; of many the first few, and how many more.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    shown = list(names[:_NAMED])
    if len(names) > _NAMED:
        shown.append(f"{len(names) - _NAMED} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def with_error(value: float, error: float, plus: bool = False) -> str:
    """A number ± its standard error, two decimals; a dash where there is none.

    Example:
        >>> with_error(-1.5, 0.25)
        '−1.50 ± 0.25'
    """
    if math.isnan(value):
        return "–"
    text = f"{value:{'+' if plus else ''}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
    return text.replace("-", "−")


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
