"""Models on disk: a folder with ``model.json``, how it was built, and ``model.safetensors``, its tensors. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import nn
from torch.nn.parameter import is_lazy

import probae.models
import probae.transforms.expost  # noqa: F401 - all classes that can be rebuilt are known only once they are imported
from probae.adapter import as_pair
from probae.arguments import as_path
from probae.evidence import Evidence
from probae.pair import Pair
from probae.programs.parameters import FLOATS, fill, fill_known
from probae.recipe import from_json, is_ours, to_json
from probae.runtime.isolation import isolated
from probae.storage import reading
from probae.storage.card import NAME as CARD
from probae.storage.card import card, require_own
from probae.storage.folders import mark, place_of, preparing, require_free, write
from probae.tracing.signature import Signature

FORMAT = 1
KIND = "model"
_JSON, _TENSORS = "model.json", "model.safetensors"
_MOST = 1000  # objects that a recipe builds


@isolated
def save(model: Any, folder: str | os.PathLike[str], *, evidence: Evidence | None = None, data: Any = None) -> Path:
    """Write a model to a folder, ``model.json`` and ``model.safetensors``, which `load` reads, and a card for people.

    The names of the columns that it was fitted to are kept, `probae.Pair.feature_names_in_`.

    A model of probae is rebuilt from its arguments, and so is one of a class that `probae.savable` has made known, with
    networks of such classes. Of any other, the tensors alone are kept, and loading needs ``into=``. Layers
    that share a tensor share it again once it is loaded.

    Args:
        model: a torch module with the tensors (a model of ours, a class of the user's, a `Pair`), or a `Run`.
        folder: made if it is not there; an earlier model in it is replaced. Whenever the process is killed, the old one or
            the new one loads.
        evidence: log p(x) of held-out data, which the card, ``card.md``, then tells with its errors.
        data: what the model was fitted to, in memory: the card then has a checksum, by which the data are known again.

    Returns:
        The folder's path.

    Raises:
        TypeError: if the model is no torch module, the folder no path, or the evidence none.
        ValueError: if a tensor of the model has no values, or a parameter values that are no numbers (NaN); if a file has the
            name of one of these and was not written by `save`, or is a card that was changed since: it stays as it is.
        OSError: if the folder cannot be made or written to.

    Example:
        >>> import tempfile, probae
        >>> folder = save(probae.PPCA(features=4, latents=2), tempfile.mkdtemp())
        >>> load(folder).latents
        2
    """

    module, folder = _module(model), as_path("folder", folder)
    for name, tensor in module.state_dict().items():
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(
                f"model: expected tensors with values, and {name!r} has none (it is lazy, or on the meta device)"
            )
    try:
        recipe = to_json(_source(model))
    except TypeError:
        recipe = None
    found, made = _tensors_of(module)
    _require_numbers(module, found, "model", recipe is not None)
    tensors = serialise({name: t.detach().cpu().contiguous().clone() for name, t in sorted(found.items())}, mark(KIND))
    described = {
        **mark(KIND),
        "format": FORMAT,
        "class": type(model).__name__,
        "recipe": recipe,
        "recipe_sha256": _recipe_checksum(recipe),
        "made": made,
        "shared": _shared(module),
        "columns": getattr(module, "named_columns", {}),
        "signature": None if (form := getattr(module, "remembered", None)) is None else form.to_json(),
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    page = card(_source(model), module, KIND, described["sha256"], evidence, data)
    with preparing(folder, KIND, partial(_finish, folder)) as place:
        require_own(folder / CARD, KIND)
        for name in (_JSON, _TENSORS):
            require_free(folder / name, KIND)
        write(place / _TENSORS, tensors)
        write(place / CARD, page)
        write(place / _JSON, (json.dumps(described, indent=2) + "\n").encode())
        os.replace(place / _JSON, folder / _JSON)  # from here on `load` gives the new one
        os.replace(place / CARD, folder / CARD)
        os.replace(place / _TENSORS, folder / _TENSORS)
    return folder


@isolated
def load(folder: str | os.PathLike[str], into: Any = None) -> Any:
    """Read a model that `save` wrote; its evidence is then bit-equal at the same seed.

    Args:
        folder: what `save` was given.
        into: a model of the same class and sizes to read the tensors into: needed for classes that are not probae's.

    Returns:
        The model, in eval mode: ``into`` itself where it was given.

    Raises:
        FileNotFoundError: if the folder or a file is not there.
        ValueError: if a file is damaged, truncated or foreign, or the tensors do not fit ``into``, naming the first.
    """

    folder = as_path("folder", folder)
    described, raw = _whole(folder)
    try:
        tensors = deserialise(raw)
    except SafetensorError as error:
        raise ValueError(f"{folder / _TENSORS} is no safetensors file: {error}") from error

    if into is not None:
        module = _module(into)
    elif described["recipe"] is None:
        raise ValueError(
            f"{folder} holds the tensors of a {described.get('class', 'class')!r:.100}, which was not savable: make the model "
            "yourself and give it as into=, or make its class savable (probae.savable) and save it again"
        )
    else:
        source = _built(described["recipe"], folder)
        module = _module(source)
        _share(module, described["shared"], folder)
    _require_numbers(module, tensors, str(folder), described["recipe"] is not None)
    _read_into(module, tensors, set(described["made"]) if into is not None else set(), folder)
    if described["signature"] is not None and isinstance(module, Pair):
        module.remembered = Signature.from_json(described["signature"])
    if isinstance(module, Pair):
        module.named_columns = described["columns"]
    module.eval()
    return into if into is not None else source


def _whole(folder: Path) -> tuple[dict[str, Any], bytes]:
    """What ``model.json`` says, and the tensors that belong to it, also while another process saves, or after it was killed."""
    pending = place_of(folder, KIND) / _TENSORS
    for name, places in ((_JSON, [folder / _JSON]), (_TENSORS, [folder / _TENSORS, pending])):
        if not any(path.is_file() for path in places):
            raise FileNotFoundError(
                f"no model in {folder}: expected the files {_JSON} and {_TENSORS}, {name} is missing or no file"
            )
    trouble = f"or belongs to another {_JSON}: its checksum differs"
    for _ in range(3):
        described = _described(folder / _JSON)
        for path in (folder / _TENSORS, pending):
            try:
                if hashlib.sha256(raw := reading.tensors(path)).hexdigest() == described["sha256"]:
                    return described, raw
            except FileNotFoundError:
                continue
            except ValueError as error:
                trouble = str(error)
    raise ValueError(f"{folder / _TENSORS} is damaged, {trouble}")


def _finish(folder: Path) -> None:
    """Move the tensors to ``model.json`` that a `save` has put there."""
    pending = place_of(folder, KIND) / _TENSORS
    try:
        unfinished = hashlib.sha256(reading.tensors(pending)).hexdigest() == _described(folder / _JSON)["sha256"]
    except (OSError, ValueError):  # there is nothing to finish
        return
    if unfinished:
        with suppress(FileNotFoundError):  # it has moved already
            os.replace(place_of(folder, KIND) / CARD, folder / CARD)
        os.replace(pending, folder / _TENSORS)


def _described(path: Path) -> dict[str, Any]:
    """The content of ``model.json``, its form and checksum checked."""
    try:
        described = reading.parsed(reading.text(path))
        if not isinstance(described, dict) or not {"format", "recipe", "recipe_sha256", "sha256"} <= set(described):
            raise ValueError("expected the keys 'format', 'recipe', 'recipe_sha256' and 'sha256'")
        made = described.setdefault("made", [])
        if described.setdefault("signature", None) is not None:
            Signature.from_json(described["signature"])
        if not _are_names(made):
            raise ValueError("expected a list of names under 'made'")
        shared = described.setdefault("shared", [])
        if not isinstance(shared, list) or not all(_are_names(names) and len(names) > 1 for names in shared):
            raise ValueError("expected lists of two names or more under 'shared'")
        columns = described.setdefault("columns", {})
        if not isinstance(columns, dict) or not all(map(_are_names, columns.values())):
            raise ValueError("expected lists of names under 'columns'")
        checksum = _recipe_checksum(described["recipe"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or no model of probae's: {error}") from error
    if described["format"] != FORMAT:
        raise ValueError(f"{path} has format {described['format']!r:.40}; this version of probae reads {FORMAT}")
    if checksum != described["recipe_sha256"]:
        raise ValueError(f"{path} is damaged: the checksum of its recipe differs")
    return described


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


def _recipe_checksum(recipe: Any) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _built(recipe: Any, folder: Path) -> Any:
    """The model of a recipe; tensors of ours take no memory until the file's are put in their place."""
    try:
        if (count := _builds(recipe)) > _MOST:
            raise ValueError(f"expected at most {_MOST} things to build, got {count}")
        # constructors of other classes may compute with numbers, which tensors on the meta device have not
        with torch.device("meta") if is_ours(recipe) else nullcontext():
            built = from_json(recipe)
    except (ValueError, TypeError, RuntimeError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{folder / _JSON}: its recipe does not build a model: {error!s:.500}") from error
    if not callable(getattr(built, "model", None)):
        raise ValueError(f"{folder / _JSON}: its recipe builds a {type(built).__name__}, which is not a model")
    return built


def _shared(module: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several: of layers that share their weights."""
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _share(module: nn.Module, shared: list[list[str]], folder: Path) -> None:
    """Let the layers of a model that was built share the tensors that they shared when it was saved."""
    own = module.state_dict(keep_vars=True)
    for first, *others in shared:
        for name in others:
            a, b = own.get(first), own.get(name)
            if a is None or b is None or type(a) is not type(b) or a.shape != b.shape:
                raise ValueError(
                    f"{folder / _JSON}: the model has no tensors {first!r} and {name!r} that could share memory"
                )
            path, _, attribute = name.rpartition(".")
            part = module.get_submodule(path)
            held: Any = part._parameters if isinstance(a, nn.Parameter) else part._buffers
            held[attribute] = a


def _builds(recipe: Any) -> int:
    """How many objects a recipe builds."""
    queue, count = [recipe], 0
    while queue:
        part = queue.pop()
        if isinstance(part, dict):
            count += "build" in part
            queue += [value for key, value in part.items() if key != "tensor"]
        elif isinstance(part, list):
            queue += [value for value in part if isinstance(value, dict | list)]
    return count


def _require_numbers(module: nn.Module, tensors: dict[str, torch.Tensor], source: str, ours: bool) -> None:
    """Raise a ValueError if a parameter holds NaN; of a model of ours, no tensor may."""
    held = {name for name, _ in module.named_buffers(remove_duplicate=False)} if not ours else set()
    for name, tensor in tensors.items():
        if name not in held and tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(f"{source}: expected numbers, and {name!r} has NaN")


def _read_into(module: nn.Module, tensors: dict[str, torch.Tensor], made: set[str], folder: Path) -> None:
    """Fill a module; what its programs make or name only as they run waits for the first run."""
    keeper, prefix = _keeper(module)
    own = {name.removeprefix(prefix) for name in module.state_dict() if name.startswith(prefix)}
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    pending = keeper is not None and not keeper._surveyed and (made & (inside.keys() - own) or keeper.named_by_programs)
    if keeper is None or not pending:
        fill(module, tensors, str(folder))
        return
    for name in sorted(name for name in made & inside.keys() - own if name.startswith("stored.")):
        if "." in name.removeprefix("stored.") or inside[name].dtype not in FLOATS:
            raise ValueError(f"{folder}: {name!r}, {inside[name].dtype}, cannot come from pyro.param")
    if extra := sorted(inside.keys() - own - made):
        raise ValueError(f"{folder}: the file has a tensor {extra[0]!r} that the model lacks ({len(extra)} in all)")
    outside = {name for name in module.state_dict() if not name.startswith(prefix)}
    if differing := sorted(outside ^ {name for name in tensors if not name.startswith(prefix)}):
        raise ValueError(f"{folder}: the tensor {differing[0]!r} is in one of model and file alone")
    fill_known(module, tensors, str(folder))
    keeper._pending = inside, str(folder)


def _keeper(module: nn.Module) -> tuple[Any, str]:
    """The pair inside a module that keeps what programs make, and what precedes the names of its tensors."""
    if not isinstance(module, Pair):
        return None, ""
    keeper = module.keeper
    name = next(name for name, part in module.named_modules() if part is keeper)
    return keeper, f"{name}." if name else ""


def _tensors_of(module: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of a module by name, and which of the names its programs make as they run."""
    found, (keeper, prefix) = module.state_dict(), _keeper(module)
    if keeper is None:
        return found, []
    made = keeper._made
    if keeper._pending is not None:  # loaded, and not run since
        pending = {f"{prefix}{name}": tensor for name, tensor in keeper._pending[0].items()}
        made = {name.removeprefix(prefix) for name in pending.keys() - found.keys()}
        outside = {name: tensor for name, tensor in found.items() if not name.startswith(prefix)}
        found = outside | {name: found.get(name, tensor) for name, tensor in pending.items()}
    return found, sorted(made)


def _module(model: Any) -> nn.Module:
    """What holds the tensors: a pair, also of a module with programs, which may make some as they run."""
    if isinstance(model, nn.Module) and not callable(getattr(model, "model", None)):
        return model
    return as_pair(model)


def _source(model: Any) -> Any:
    """What a recipe builds: the model itself, not what `fit` returned of it, nor the pair that was made around its programs."""
    model = model.model if hasattr(type(model), "history") else model
    return model._owner if isinstance(model, Pair) and model._owner is not None else model
