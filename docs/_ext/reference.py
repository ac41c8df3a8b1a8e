"""The reference: a page for each public room, and one for each public name, written once however often it is handed on."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.logging import getLogger
from sphinx.util.nodes import make_refnode
from writing import stacked, write_pages

import probae

#: public rooms that are imported by their name
_IMPORTED = ("comparison", "diagnostics", "evidence", "sklearn")
_log = getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Write the pages before Sphinx looks for files; resolve names of the package by what they are."""
    app.connect("config-inited", lambda app, config: write_pages(Path(app.srcdir) / "api", pages()))
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", comment)
    app.connect("autodoc-process-docstring", one_each, priority=501)  # after napoleon
    app.connect("autodoc-skip-member", skip)
    for field in PyObject.doc_field_types:  # names of attributes are no references
        if field.name == "variable":
            field.rolename = ""
    return {"parallel_read_safe": True}


def rooms() -> list[str]:
    """The package, and its public modules."""
    handed = [name for name in probae.__all__ if inspect.ismodule(getattr(probae, name))]
    return ["probae", *(f"probae.{name}" for name in sorted({*handed, *_IMPORTED}))]


def names(room: str) -> list[str]:
    """The public names of a room that are no rooms themselves."""
    module = importlib.import_module(room)
    own = getattr(module, "__all__", None) or [
        n for n, v in vars(module).items() if getattr(v, "__module__", "") == room
    ]
    return sorted(
        (n for n in own if not n.startswith("_") and not inspect.ismodule(getattr(module, n))), key=str.casefold
    )


@cache
def documented() -> dict[str, Any]:
    """The full name under which each public object is documented, the first that hands it on, and the object."""
    found: dict[str, Any] = {}
    for room in rooms():
        module = importlib.import_module(room)
        for name in names(room):
            thing = getattr(module, name)
            if not any(thing is other for other in found.values()):
                found[f"{room}.{name}"] = thing
    return found


def first_name(thing: Any) -> str | None:
    """Where an object is documented."""
    return next((name for name, other in documented().items() if other is thing), None)


def pages() -> dict[str, str]:
    """The index, and a page for each room."""
    lines = [f"- :doc:`{room}`: {_sentence(room)}" for room in rooms()]
    sections = "\n".join(f"   {room}" for room in rooms())
    tree = f".. toctree::\n   :hidden:\n\n{sections}\n"
    index = "\n".join([_title("API"), "Every public name, from its docstring.\n", *lines, "", tree])
    return {"index.rst": index, **{f"{room}.rst": _room(room) for room in rooms()}}


def _room(room: str) -> str:
    module, known = importlib.import_module(room), documented()
    here = [f"{room}.{name}" for name in names(room) if f"{room}.{name}" in known]
    elsewhere = [first_name(getattr(module, name)) for name in names(room) if f"{room}.{name}" not in known]
    parts = [_title(room), f".. automodule:: {room}\n   :no-members:\n", f".. currentmodule:: {room}\n"]
    if here:
        parts.append(_summary([name.removeprefix(f"{room}.") for name in here], ":toctree: generated"))
    if elsewhere:
        parts.append(f"Also found here:\n\n{_summary([f'~{name}' for name in elsewhere])}")
    return "\n".join(parts)


def _sentence(room: str) -> str:
    """The first sentence of a module."""
    text = " ".join((importlib.import_module(room).__doc__ or "").split("\n\n")[0].split())
    return text.removeprefix(f"{room}: ")


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}\n"


def _summary(entries: list[str], *options: str) -> str:
    lines = [".. autosummary::", *(f"   {option}" for option in (":nosignatures:", *options)), ""]
    return "\n".join([*lines, *(f"   {entry}" for entry in entries)]) + "\n"


def comment(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """A constant is described by the comment above it, in the module that defines it."""
    if what != "data":
        return
    short = name.rpartition(".")[2]
    homes = [m for m in list(sys.modules) if m.startswith("probae.") and vars(sys.modules[m]).get(short) is thing]
    texts = (ModuleAnalyzer.for_module(module).find_attr_docs().get(("", short)) for module in homes)
    lines[:] = next((text for text in texts if text), [])


def one_each(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Attributes that share a description get it each; napoleon takes the first of two names for a type."""
    fields = re.split(r"^(?=:ivar )", "\n".join(lines), flags=re.MULTILINE)
    for i, field in enumerate(fields):
        if shared := re.match(r":ivar (\w+(?:, \w+)+):", field):
            rest = field[shared.end() :].rstrip("\n")
            fields[i] = "\n".join(f":ivar {one}:{rest}" for one in shared[1].split(", ")) + "\n"
    lines[:] = stacked("".join(fields)).split("\n")


def skip(app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Of what is inherited from outside the package nothing is shown."""
    member = getattr(thing, "fget", None) or thing
    where = getattr(inspect.unwrap(member), "__module__", None) if callable(member) else None
    return True if isinstance(where, str) and not where.startswith("probae") else None


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Node | None:
    """A link to what a name of the package means, wherever the docstring stands that says it."""
    target, module = node.get("reftarget", ""), node.get("py:module") or "probae"
    if node.get("refdomain") != "py":
        return None
    thing, method = _meant(target, module)
    name = None if thing is None else first_name(thing)
    if name is None:
        if target.startswith("probae.") and node.get("reftype") == "obj":
            _log.warning("no public name: %s", target, location=node, type="ref", subtype="public")
        return None
    domain = env.domains.python_domain
    entry = domain.objects.get(f"{name}.{method}" if method else name) or domain.objects.get(name)
    if entry is None:
        return None
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)


def _meant(target: str, module: str) -> tuple[Any, str]:
    """The object that a dotted name means in a module, or in the package, and the method of it that is meant."""
    for start in (module, "probae"):
        found: Any = importlib.import_module(start)
        method = ""
        for part in target.removeprefix("probae.").split("."):
            if inspect.isclass(found) and hasattr(found, part):
                method = part
                continue
            found = getattr(found, part, None) or _submodule(found, part)
            if found is None:
                break
        if found is not None and not isinstance(found, ModuleType):
            return found, method
    return None, ""


def _submodule(module: Any, name: str) -> ModuleType | None:
    if not isinstance(module, ModuleType) or not name.isidentifier():
        return None
    try:
        return importlib.import_module(f"{module.__name__}.{name}")
    except ImportError:
        return None
