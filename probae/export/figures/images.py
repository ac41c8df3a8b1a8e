"""Images: of data, of what a model makes of them, and of what it draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probae.arguments import whole
from probae.batches import as_batch
from probae.export.figures.style import PAGE, label, panels

Limits = tuple[float, float] | None


def image_rows(rows: Mapping[str, Any], title: str = "") -> Any:
    """A grid of images: a labelled row (N, H, W) of values in 0..1 for each name; 1 is black.

    Raises:
        ValueError: if there is no row, or one is not of such images.

    Example:
        >>> len(image_rows({"data": torch.rand(6, 4, 4), "model": torch.rand(6, 4, 4)}).axes)
        2
    """
    rows = {str(name): torch.as_tensor(images) for name, images in rows.items()}
    if not rows or any(images.dim() != 3 or not len(images) for images in rows.values()):
        shapes = {name: tuple(images.shape) for name, images in rows.items()}
        raise ValueError(f"rows: expected images (N, H, W) by name, got {shapes}")
    count = max(len(images) for images in rows.values())
    _, height, width = next(iter(rows.values())).shape
    tile = min(0.6, (PAGE - 1.1) / count)
    high = (tile * height / width + 0.06) * len(rows) + (0.3 if title else 0.06)
    with panels(len(rows), 1, tile * count + 1.1, high, grid=None) as (figure, axes):
        for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
            ax.imshow(_strip(images, count), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_ylabel(label(name, 16), rotation=0, ha="right", va="center")
            ax.spines[["left", "bottom"]].set_visible(False)
        if title:
            figure.suptitle(title, fontsize=8)
    return figure


def reconstructions(models: Any, x: Any, shape: tuple[int, int], limits: Limits = None) -> Any:
    """Data, and below them what each model makes of them through its latents.

    Args:
        models: a model with ``reconstruct(x)``, or several by name.
        x: N data of H × W features; a tuple, where the model conditions on something.
        shape: (H, W).
        limits: the values that are white and black; the least and the largest of the data, if they are not said.

    Raises:
        TypeError: if a model has no ``reconstruct``.
        ValueError: if the data are not of that shape.

    Example:
        >>> import probae
        >>> len(reconstructions(probae.PPCA(16, 2), torch.randn(6, 16), (4, 4)).axes)
        2
    """
    data = _images("x", x[0] if isinstance(x, tuple) else x, shape)
    rows = {"data": data}
    for name, model in _by_name(models, "reconstruction").items():
        rows[name] = _images(name, _pass(model, "reconstruct")(x), shape)
    return _scaled_rows(rows, limits or _range({"data": data}))


def samples(
    models: Any,
    shape: tuple[int, int],
    n: int = 10,
    *,
    x: Any = None,
    seed: int = 0,
    given: Any = None,
    limits: Limits = None,
) -> Any:
    """Draws of each model, and above them data to compare, where there are some.

    Args:
        models: a model with ``sample(n)``, or several by name.
        shape: (H, W).
        n: how many draws.
        x: data, of which the first n are shown.
        seed, given: of the draws, see `probae.sample`.
        limits: as for `reconstructions`; of the data, or else of the draws.

    Example:
        >>> import probae
        >>> len(samples({"PPCA": probae.PPCA(16, 2), "VAE": probae.VAE(16, 2)}, (4, 4), n=5).axes)
        2
    """
    rows = {} if x is None else {"data": _images("x", x[:n], shape)}
    data = dict(rows)
    for name, model in _by_name(models, "draws").items():
        rows[name] = _images(name, _pass(model, "sample")(whole("n", n), seed=seed, given=given), shape)
    return _scaled_rows(rows, limits or _range(data or rows))


def traversals(
    model: Any,
    shape: tuple[int, int],
    latents: Any = None,
    *,
    z: Any = None,
    values: Any = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
    given: Any = None,
    limits: Limits = None,
) -> Any:
    """The mean of x as one latent moves and the others stay: a row for each latent.

    Args:
        model: one with ``decode(z)``.
        shape: (H, W).
        latents: those that move, counted from 0; the first ten at most, if they are not said.
        z: (L,) where the others stay; 0 if it is not said, the mean of most priors.
        values: where the moving latent stands.
        given: what the model conditions on, one row for all.
        limits: as for `samples`.

    Raises:
        ValueError: if the number of latents cannot be told, or a latent is not one of them.

    Example:
        >>> import probae
        >>> len(traversals(probae.VAE(16, 2), (4, 4)).axes)
        2
    """
    count = getattr(model, "latents", None) if z is None else None
    if z is None and not isinstance(count, int):
        raise ValueError("z: expected a code (L,) to start at, as the model does not say how many latents it has")
    start = torch.zeros(int(count or 0)) if z is None else torch.as_tensor(z).detach().float().cpu()
    places = torch.as_tensor(values, dtype=torch.float32)
    chosen = list(range(min(len(start), 10))) if latents is None else [int(latent) for latent in latents]
    if start.dim() != 1 or any(not 0 <= latent < len(start) for latent in chosen):
        raise ValueError(f"latents: expected some of 0 to {len(start) - 1}, for a code (L,), got {chosen}")
    rows = {}
    for latent in chosen:
        codes = start.repeat(len(places), 1)
        codes[:, latent] = places
        rows[f"latent {latent}"] = _images("decode(z)", _decoded(model, codes, given), shape)
    ends = f"{float(places[0]):g} to {float(places[-1]):g}".replace("-", "−")
    return _scaled_rows(rows, limits or _range(rows), f"one latent from {ends}")


def interpolations(
    model: Any, x: Any, shape: tuple[int, int], steps: int = 8, *, given: Any = None, limits: Limits = None
) -> Any:
    """Data at both ends, and between them the means of x on the straight line from one code to the other: a row for each pair.

    Args:
        model: one with ``encode(x)`` and ``decode(z)``.
        x: an even number of data, 2M: the first is paired with the second, and so on.
        shape: (H, W).
        steps: images on the line, the two codes included.
        given: what the model conditions on, one row for all.
        limits: as for `reconstructions`.

    Raises:
        ValueError: if the number of data is odd, or the model has several sites of latents.

    Example:
        >>> import probae
        >>> len(interpolations(probae.PPCA(16, 2), torch.randn(6, 16), (4, 4)).axes)
        3
    """
    steps = whole("steps", steps, 2)
    data = _images("x", x[0] if isinstance(x, tuple) else x, shape)
    if len(data) % 2:
        raise ValueError(f"x: expected an even number of data, a pair for each row, got {len(data)}")
    codes = _pass(model, "encode")(x)
    if not isinstance(codes, Tensor):
        raise ValueError(f"interpolations: expected a model with one site of latents, got {sorted(codes)}")
    rows = {}
    for i in range(0, len(data), 2):
        line = torch.stack([torch.lerp(codes[i], codes[i + 1], k / (steps - 1)) for k in range(steps)])
        between = _images("decode(z)", _decoded(model, line, given), shape)
        rows[f"data {i} to {i + 1}"] = torch.cat([data[i : i + 1], between, data[i + 1 : i + 2]])
    return _scaled_rows(rows, limits or _range({"data": data}))


def _by_name(models: Any, otherwise: str) -> dict[str, Any]:
    return {str(k): v for k, v in models.items()} if isinstance(models, Mapping) else {otherwise: models}


def _pass(model: Any, name: str) -> Any:
    """A method of a model, or of what `fit` returned."""
    found = getattr(model.model if hasattr(model, "records") else model, name, None)
    if not callable(found):
        raise TypeError(
            f"expected a model with a method {name!r}, got {type(model).__name__}: of two programs, probae.Pair(model, guide)"
        )
    return found


def _decoded(model: Any, codes: Tensor, given: Any) -> Any:
    return _pass(model, "decode")(codes) if given is None else _pass(model, "decode")(codes, given=given)


def _images(name: str, values: Any, shape: tuple[int, int]) -> Tensor:
    """Rows of H × W numbers as images (N, H, W) on the CPU."""
    found = as_batch(values)
    if not isinstance(found, Tensor) or found[0].numel() != shape[0] * shape[1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name}: expected rows of {shape[0]} × {shape[1]} numbers, got {got}")
    return found.detach().cpu().float().reshape(-1, *shape)


def _range(rows: Mapping[str, Tensor]) -> tuple[float, float]:
    values = torch.cat([images.flatten() for images in rows.values()])
    values = values[values.isfinite()]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _scaled_rows(rows: Mapping[str, Tensor], limits: tuple[float, float], title: str = "") -> Any:
    """Images with their values taken to 0..1; what lies outside the limits is as white or black as they are."""
    low, high = limits
    return image_rows({n: ((v - low) / ((high - low) or 1.0)).clamp(0, 1) for n, v in rows.items()}, title)


def _strip(images: Tensor, count: int) -> Any:
    """Images side by side with a white pixel between them, in the width of so many."""
    padded = torch.nn.functional.pad(1 - images.detach().cpu().float(), (0, 1), value=1.0)
    strip = torch.cat(list(padded), 1)[:, :-1]
    missing = count * padded.shape[-1] - 1 - strip.shape[1]
    return torch.nn.functional.pad(strip, (0, missing), value=1.0).numpy()
