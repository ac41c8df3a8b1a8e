"""What is read of an item response model, as a table with a row for each item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas


def item_table(model: Any, errors: Mapping[str, Tensor] | None) -> pandas.DataFrame:
    """Slopes, intercepts or cut points, and difficulties of an `ItemResponse`, with standard errors where they are given."""
    import pandas

    def numbered(name: str, count: int, plain: bool) -> list[str]:
        return [name] if plain else [f"{name} {i + 1}" for i in range(count)]

    weight, ordered, width = model.weight, model.bias is None, model.head.width
    intercept = model.intercept.reshape(len(weight), -1)
    parts = {"weight": numbered("slope", model.latents, model.latents == 1)}
    parts["intercept"] = numbered("cut" if ordered else "intercept", intercept.shape[1], not ordered)
    columns = {}
    for (part, names), values in zip(parts.items(), (weight, intercept), strict=True):
        for i, name in enumerate(names):
            columns[name] = values[:, i]
            if errors is not None:
                columns[f"{name} error"] = errors[part].reshape(values.shape)[:, i]
    if model.latents == 1 and width == 1:
        crossed = (intercept if ordered else -intercept) / weight  # where a z + b = 0, or a z = c
        columns |= dict(zip(numbered("difficulty", crossed.shape[1], not ordered), crossed.T, strict=True))
    items = model.names_of_features(model.named_columns) or range(model.features)
    index = pandas.Index(items, name="item")
    if width > 1:
        index = pandas.MultiIndex.from_product([items, range(width)], names=["item", "class"])
    return pandas.DataFrame({name: part.detach().cpu().numpy() for name, part in columns.items()}, index=index)
