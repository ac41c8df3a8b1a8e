"""What importing costs, what is public, and that imports run one way."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import probae

ROOT = Path(probae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "probae."))
HEAVY = ("matplotlib", "sklearn", "arviz", "arviz_base", "arviz_stats", "arviz_plots", "xarray", "zuko", "pandas")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_probae_leaves_heavy_packages_out():
    assert run(f"import sys, probae; print(*[m for m in {HEAVY!r} if m in sys.modules])") == []


def test_training_and_evidence_leave_them_out_too():
    code = f"""
import sys, torch, probae
model = probae.VAE(3, 2)
probae.fit(model, torch.randn(9, 3), steps=1, progress=False)
probae.log_evidence(model, torch.randn(9, 3)), probae.sample(model, 2)
print(*[m for m in {HEAVY!r} if m in sys.modules])
"""
    assert run(code) == []


def test_importing_changes_no_global_switch():
    code = """
import torch, pyro
def state():
    return (torch.distributions.Distribution._validate_args, torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), len(pyro.get_param_store()), torch.initial_seed())
before = state()
import probae
for name in probae.__all__:
    getattr(probae, name, None)
print(before == state())
"""
    assert run(code) == ["True"]


@pytest.mark.parametrize("name", probae.__all__)
def test_public_names_resolve(name):
    assert getattr(probae, name) is not None
    assert name in dir(probae)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="autoencode"):
        _ = probae.autoencode
    assert not hasattr(probae, "arviz")


def test_the_static_names_are_the_lazy_ones():
    """What a type checker reads in `probae.__init__` is what is there."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    imported = {alias.asname or alias.name for n in block.body for alias in n.names}
    assert imported == set(probae.__all__) - {"__version__"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_keeps_its_name(module):
    """None bears the name of a public function, nor is it hidden behind a function of its own."""
    parent, _, name = module.rpartition(".")
    public = {n for n in probae.__all__ if callable(getattr(probae, n, None))}
    assert name not in public
    importlib.import_module(module)
    assert inspect.ismodule(getattr(importlib.import_module(parent), name))


def documented(module):
    """The public functions and classes that a module defines, and their public methods."""
    for name, thing in vars(importlib.import_module(module)).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module:
            continue
        if inspect.isfunction(thing):
            yield f"{module}.{name}", thing
        elif inspect.isclass(thing):
            yield f"{module}.{name}", thing
            if getattr(thing, "_is_protocol", False):  # its members are documented where they are written
                continue
            for key, member in vars(thing).items():
                member = member.fget if isinstance(member, property) else member
                # what overrides is documented where it was first promised
                inherited = any(hasattr(base, key) for base in thing.__mro__[1:])
                if inspect.isfunction(member) and not key.startswith("_") and not inherited:
                    yield f"{module}.{name}.{key}", member


@pytest.mark.parametrize("module", [m for m in MODULES if not m.endswith("__main__")])
def test_every_public_callable_has_a_docstring(module):
    assert importlib.import_module(module).__doc__
    assert [name for name, thing in documented(module) if not (thing.__doc__ or "").strip()] == []


def imports(path):
    """The modules of probae that a file imports, at any depth."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    return {name for name in walk(tree) if name.split(".")[0] == "probae"}


def rooms(path):
    return {name.split(".")[1] for name in imports(path) if "." in name}


# from the ground up: a room imports its own files and those of rooms that stand before it, lazily or not
ROOMS = (
    *("arguments", "batches", "runtime", "recipe", "tracing", "export", "data", "graphs", "heads"),
    *("linear_gaussian", "mixtures"),  # solvers
    *(
        "missing",
        "datasets",
        "likelihoods",
        "priors",
        "posteriors",
        "nn",
        "corruption",
        "figures",
        "trackers",
    ),  # what users know
    *(
        "programs",
        "objectives",
        "pair",
        "adapter",
        "evidence",
        "transforms",
        "geometry",
        "models",
        "storage",
        "training",
    ),
    *("diagnostics", "comparison", "sklearn", "cli"),
)


def test_every_room_has_its_floor():
    found = {path.relative_to(ROOT).with_suffix("").parts[0] for path in FILES} - {"__init__", "__main__"}
    assert found == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    for path in FILES:
        if path.relative_to(ROOT).with_suffix("").parts[0] == room:
            assert not rooms(path) & above, path


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py" and p.parent != ROOT], ids=str)
def test_an_init_file_has_no_logic(path):
    """It says what the room is, and hands names on."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]
        assert names or isinstance(node, ast.Expr | ast.Import | ast.ImportFrom)


def test_no_cycle_among_imports():
    """Those that run late, inside a function, counted too."""
    graph = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("probae", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        graph[name] = imports(path)
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in graph[name]:
            if not name.startswith(f"{other}."):
                visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_arviz_has_one_importer():
    named = [
        path.name
        for path in FILES
        if {"arviz", "arviz_base", "arviz_stats", "arviz_plots", "xarray"} & every_import(path)
    ]
    assert named == ["datatree.py"]


def every_import(path):
    """The packages that a file imports at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}}


def test_there_is_no_room_for_everything():
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "misc", "common", "arviz"}
