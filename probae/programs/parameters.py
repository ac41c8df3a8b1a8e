"""Which parameters a pair has, and which of them train.

A pair *has* every network and parameter that its programs can reach: those of the object that they belong to, and what
functions use: closures, globals, partials, containers, attributes of objects. All of these are moved, put into training
and evaluation mode, copied and saved together. *Trained* are, as in Pyro, those that ``pyro.param``, ``pyro.module`` and
attributes of a ``PyroModule`` name as the programs run, unless ``poutine.block`` hides them, and, which Pyro leaves out,
those of the object itself whose methods the programs are. Networks that functions merely use are held fixed.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from probae.runtime.reach import PLAIN, parts
from probae.tracing.guides import forget_plates

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # that torch computes with


class Named(nn.Module):
    """Networks and parameters by any names, also those that attributes of a module may not have."""

    def __getitem__(self, name: str) -> Any:
        return self._modules[name] if name in self._modules else self._parameters[name]

    def __setitem__(self, name: str, found: nn.Module | nn.Parameter) -> None:
        kind: dict[str, Any] = self._modules if isinstance(found, nn.Module) else self._parameters  # type: ignore[assignment]
        kind[name] = found

    def __delitem__(self, name: str) -> None:
        kind: dict[str, Any] = self._modules if name in self._modules else self._parameters  # type: ignore[assignment]
        del kind[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._modules, *self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._parameters

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters)

    def free(self, name: str) -> str:
        """The name, with a number behind it where it is taken."""
        name, count = key(name), 1
        while (numbered := name if count == 1 else f"{name}_{count}") in self:
            count += 1
        return numbered


class _Place:
    """Where functions have a network or parameter: copying leaves that, as it does functions; pickling forgets it."""

    def __init__(self, path: str, thing: Any = None):
        self.path, self.thing = path, thing

    def __deepcopy__(self, memo: Any) -> _Place:
        return self

    def __reduce__(self) -> Any:
        return _Place, (self.path,)


class Parameters:
    """What a `Pair` holds by its programs: the part of that class that knows its parameters.

    Attributes:
        owned: networks and parameters of an object that is no module, or that a module holds in plain containers.
        used: those that functions use.
        stored: those that ``pyro.param`` has made.
    """

    owned: Named
    used: Named
    stored: Named
    _programs: dict[str, Any] | None
    _owner: Any

    def _hold_nothing(self: Any) -> None:
        self.stored = Named()
        if self._programs is not None:
            self.owned, self.used = Named(), Named()
        self._constraints: dict[str, constraints.Constraint] = {}
        self._places: list[tuple[_Place, Any]] = []
        self._guides: list[tuple[AutoGuide, Any]] = []
        # of the last survey: what statements named, what they named behind a block, whether there was one
        self._named: dict[str, nn.Parameter] = {}
        self._blocked: dict[str, nn.Parameter] = {}
        self._surveyed = False
        self._made: set[str] = set()  # names that runs have made
        self._pending: tuple[dict[str, Tensor], str] | None = (
            None  # tensors of a file that the first run takes, and its name
        )
        self._inner: list[Any] | None = None

    # -- what programs reach -----------------------------------------------------------------------------------------

    def _find(self: Any) -> None:
        """Make all that the programs reach the pair's own, unless it is already."""
        if self._programs is None:
            return
        placed = {id(place.thing) for place, _ in self._places}
        known = {id(part) for part in (*self.modules(), *self.parameters())} | placed
        for path, found, own in _held(self._owner, self._programs):
            if id(found) not in known:
                name = path.rpartition(":")[2]
                if path in {"owner", "model_program", "guide_program"}:
                    self.add_module(path, found)
                elif own:
                    self.owned[self.owned.free(name.removeprefix("owner."))] = found
                else:
                    self.used[self.used.free(name)] = found
                inside = (*found.modules(), *found.parameters()) if isinstance(found, nn.Module) else (found,)
                known |= {id(part) for part in inside}
            if ":" in path and id(found) not in placed:
                self._places.append((_Place(path, found), found))
                placed.add(id(found))
        guides = {id(guide) for guide, _ in self._guides}
        for part in self.modules():
            if isinstance(part, AutoGuide) and part._model is not None and id(part) not in guides:
                self._guides.append((part, part.model))

    @property
    def named_by_programs(self: Any) -> bool:
        """Whether names of tensors come to be known only as the programs run."""
        return len(self._in_use) > 0

    @property
    def _in_use(self: Any) -> Named:
        return self.used if self._programs is not None else Named()

    @property
    def _pairs(self: Any) -> list[Any]:
        """This pair and those inside it."""
        if self._inner is None:
            self._inner = [part for part in self.modules() if isinstance(part, Parameters)]
        return self._inner

    @property
    def keeper(self: Any) -> Any:
        """The pair that keeps what ``pyro.param`` makes: the first with programs of a user's, of this and those inside it."""
        return next((pair for pair in self._pairs if pair._programs is not None), self)

    # -- what trains -------------------------------------------------------------------------------------------------

    def trained(self: Any) -> list[nn.Parameter]:
        """The parameters that `fit` trains, by what the last survey saw; see `Pair`."""
        keeper = self.keeper
        homes = [home for pair in self._pairs for home in (pair.stored, pair._in_use)]
        held = {id(p) for home in homes for p in home.parameters()}
        held |= {id(p) for p in keeper._blocked.values()}
        named = {id(p) for p in keeper._named.values()}
        return [p for p in self.parameters() if p.requires_grad and (id(p) in named or id(p) not in held)]

    def unnamed(self: Any, found: list[Tensor]) -> list[str]:
        """The names that functions have for the networks of parameters that no statement names, hidden or not."""
        wanted = {id(p) for p in found} - {id(p) for p in self.keeper._blocked.values()}
        names: dict[str, None] = {}
        for pair in self._pairs:
            for name in pair._in_use:
                held = pair.used[name]
                if any(id(p) in wanted for p in ([held] if isinstance(held, nn.Parameter) else held.parameters())):
                    names[name] = None
        return list(names)

    # -- what statements name ----------------------------------------------------------------------------------------

    def parameter(self: Any, name: str) -> Tensor:
        """The constrained value of a ``pyro.param`` of the programs.

        Raises:
            ValueError: if they have made none of that name yet.
        """
        keeper = self.keeper
        if name not in keeper._constraints:
            raise ValueError(
                f"name: expected a pyro.param that has run, one of {sorted(keeper._constraints)}, got {name!r}"
            )
        return transform_to(keeper._constraints[name])(keeper.stored[key(name)])

    @contextlib.contextmanager
    def own_parameters(self: Any) -> Iterator[None]:
        """Programs that run here find their parameters in this pair: for the while Pyro's store holds these, and no others.

        The functions of a copy are those of the original; here they find the copy's networks in the place of their own.
        """
        store, keeper = pyro.get_param_store(), self.keeper
        kept = {name: pair.stored[key(name)] for pair in self._pairs for name in pair._constraints}
        limits = {name: limit for pair in self._pairs for name, limit in pair._constraints.items()}
        with contextlib.ExitStack() as stack:
            for pair in self._pairs:
                stack.enter_context(pair._in_place())
            stack.enter_context(store.scope({"params": dict(kept), "constraints": limits}))
            statements = stack.enter_context(_Statements(keeper))
            yield
            keeper._named.update({name: kept[name] for name in statements.names if name in kept})
            made = {name: tensor for name, tensor in store._params.items() if name not in kept}
            seen = {name: keeper._named if name in statements.names else keeper._blocked for name in made}
            if any(seen[name].get(name) is not tensor for name, tensor in made.items()):
                keeper._keep(made, store._constraints, statements.names, list(self.parameters()))

    def _keep(self: Any, made: dict[str, Tensor], limits: dict[str, Any], names: set[str], own: list[Any]) -> None:
        """Keep what a run has put into Pyro's store; ``names`` are those of statements that were not hidden."""
        known = {id(p) for p in own}
        for name, tensor in made.items():
            found: Any = tensor
            if "$$$" not in name and id(tensor) not in known:
                if not isinstance(tensor, nn.Parameter):  # of a hidden statement, and the user's own
                    found = nn.Parameter(tensor.detach().clone())
                    tensor.requires_grad_(False)
                self.stored[key(name)], self._constraints[name] = found, limits[name]
            if name not in names:
                self._blocked[name] = found
                continue
            before = self._named.get(name)
            if before is not None and before is not found and {id(before), id(found)} <= known:
                raise ValueError(
                    f"two parameters have the name {name!r}: Pyro would train one of them and leave the other as it is. "
                    "Give each network a name of its own, pyro.module(name, network)"
                )
            self._named[name] = found

    @contextlib.contextmanager
    def _in_place(self: Any) -> Iterator[None]:
        """Where functions have networks, those of this pair: in a copy they are others."""
        for guide, model in self._guides:
            if guide._model is None:  # copying an autoguide takes its model away, from both
                guide._model = (model,)
        if any(place.thing is None for place, _ in self._places):
            self._places = self._found_again()
        others = [(place.thing, vars(place.thing), own) for place, own in self._places if place.thing is not own]
        others = [(thing, before, own) for thing, before, own in others if isinstance(own, nn.Module)]
        for network, _, own in others:
            object.__setattr__(network, "__dict__", vars(own))
        try:
            yield
        finally:
            for network, before, _ in others:
                object.__setattr__(network, "__dict__", before)

    def _found_again(self: Any) -> list[tuple[_Place, Any]]:
        """After unpickling: the networks that the functions have here."""
        found = {path: thing for path, thing, _ in _held(self._owner, self._programs)}
        for place, own in self._places:
            if type(found.get(place.path)) is not type(own):
                raise ValueError(
                    f"the pair was pickled with programs that had a {type(own).__name__} at {place.path!r}, and here there "
                    f"is {type(found.get(place.path)).__name__}: unpickle it where the programs are the same"
                )
        return [(_Place(place.path, found[place.path]), own) for place, own in self._places]

    # -- the first run -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def surveyed(self: Any) -> Iterator[None]:
        """Around a first run: what its statements name is noted, and what it makes takes the values that a file has for it.

        Raises:
            ValueError: if they name a network that the pair cannot reach, or if a file that was loaded lacks a tensor of
                the pair, or has one that it has not.
        """
        self._inner = None
        keeper = self.keeper
        before = set(keeper.state_dict())
        keeper._named, keeper._blocked = {}, {}
        yield
        for pair in self._pairs:
            pair._find()
        self._inner = None
        known = {id(p) for p in self.parameters()}
        for name, parameter in {**keeper._named, **keeper._blocked}.items():
            if id(parameter) not in known:
                raise ValueError(
                    f"the parameter {name!r} belongs to a network that the pair cannot reach through its programs, so that it "
                    "could be neither saved nor put into evaluation mode: let the functions close over the network, or make "
                    "it an attribute of the object that they belong to, probae.Pair(model, guide, owner=object)"
                )
        renamed = keeper._rename()
        names = set(keeper.state_dict())
        keeper._made = (keeper._made | (names - before)) & names
        if keeper._pending is not None:
            moved = {name for name in names if name not in before or (renamed and name.startswith("used."))}
            tensors, source = keeper._pending
            fill(keeper, tensors, source, moved)
            keeper._pending = None
        keeper._surveyed = True

    @contextlib.contextmanager
    def trying(self: Any) -> Iterator[dict[str, torch.Size]]:
        """Around a trial run: parameters that it makes are dropped afterwards, and so are plates that an EasyGuide keeps.

        Yields a dictionary that then has their shapes.
        """
        keeper, declared = self.keeper, dict[str, torch.Size]()
        before = set(keeper._constraints)
        named, blocked = dict(keeper._named), dict(keeper._blocked)
        try:
            yield declared
        finally:
            forget_plates(self)
            for name in set(keeper._constraints) - before:
                declared[name] = keeper.stored[key(name)].shape
                del keeper.stored[key(name)], keeper._constraints[name]
            keeper._named, keeper._blocked = named, blocked

    def _rename(self: Any) -> bool:
        """Call what functions use as their statements do, so that names in files are not those of variables."""
        names = {}
        for old in self._in_use:
            held = self.used[old]
            own = {"": held} if isinstance(held, nn.Parameter) else dict(held.named_parameters(remove_duplicate=False))
            for name, parameter in {**self._blocked, **self._named}.items():
                module, _, rest = name.partition("$$$")
                if own.get(rest) is parameter:
                    names[old] = module
                    break
        taken = {old: self.used[old] for old in names}
        for old in names:
            del self.used[old]
        for old, name in names.items():
            if isinstance(taken[old], nn.Parameter):  # from now on found by name, also where a function has another
                self.stored[key(name)], self._constraints[name] = taken[old], constraints.real
            else:
                self.used[self.used.free(name)] = taken[old]
        return any(old != key(name) for old, name in names.items())


class _Statements(Messenger):
    """Notes the names in ``pyro.param`` statements that are not hidden, and makes what they ask for if it is new."""

    def __init__(self, keeper: Any):
        super().__init__()
        self.keeper, self.names = keeper, set[str]()

    def _pyro_param(self, msg: Any) -> None:
        name, init = (*msg["args"], None)[:2]
        self.names.add(name)
        msg["stop"] = True  # what a caller's own handlers make of it is no matter of the pair's
        store = pyro.get_param_store()
        if name in store:
            return
        constraint = msg["kwargs"].get("constraint", constraints.real)
        tensors: dict[str, Tensor] = self.keeper._pending[0] if self.keeper._pending is not None else {}
        pending = tensors.get(f"stored.{key(name)}")
        if init is None and pending is None:
            raise ValueError(f"pyro.param({name!r}) is read before it was given an initial value")
        start: Any = pending
        if init is not None:
            with torch.no_grad():
                start = transform_to(constraint).inv(torch.as_tensor(init() if callable(init) else init))
        if pending is not None:
            if start.shape != pending.shape:
                raise ValueError(
                    f"{self.keeper._pending[1]}: pyro.param({name!r}): expected shape {tuple(start.shape)}, the file has "
                    f"{tuple(pending.shape)}"
                )
            start = pending.to(device=self.keeper.device)
        else:
            if start is init and isinstance(init, nn.Parameter):  # trained itself, as Pyro does
                return
        store._constraints[name] = constraint
        store._params[name] = made = nn.Parameter(start.detach().clone(memory_format=torch.contiguous_format))
        store._param_to_name[made] = name


def key(name: str) -> str:
    """A name as a module may have it."""
    return name.replace(".", "/")


def fill(module: nn.Module, tensors: dict[str, Tensor], source: str, only: set[str] | None = None) -> None:
    """Read the tensors of a file, all or some, into a module whose names have to be the file's.

    Raises:
        ValueError: naming the first that does not fit; nothing is changed then.
    """
    own = module.state_dict()
    if missing := sorted(set(own) - set(tensors)):
        raise ValueError(
            f"{source}: the model has a tensor {_shown(missing[0])} that the file lacks ({len(missing)} in all)"
        )
    if extra := sorted(set(tensors) - set(own)):
        raise ValueError(
            f"{source}: the file has a tensor {_shown(extra[0])} that the model lacks ({len(extra)} in all)"
        )
    fill_known(module, {name: tensor for name, tensor in tensors.items() if only is None or name in only}, source)


def fill_known(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Read tensors into those of a module that have their names; one that has several is shared still."""
    own = module.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {_shown(name)}: expected shape {tuple(own[name].shape)}, the file has {tuple(tensor.shape)}"
            )
        if tensor.dtype != own[name].dtype and not (own[name].dtype in FLOATS and tensor.dtype in FLOATS):
            raise ValueError(f"{source}: {_shown(name)}: expected {own[name].dtype}, the file has {tensor.dtype}")
    _require_one_dtype(module, tensors, source)
    names = {id(own[name]): name for name in reversed(tensors)}  # of a tensor that has several, the first
    for name, tensor in tensors.items():
        if not _same(tensor, tensors[first := names[id(own[name])]]):
            raise ValueError(f"{source}: the model shares {_shown(first)} and {_shown(name)}, which differ in the file")
    if any(own[name].is_meta for name in tensors):
        assigned = {key: _as(own[name], tensors[name]) for key, name in names.items()}
        module.load_state_dict({name: assigned[id(own[name])] for name in tensors}, strict=False, assign=True)
        return
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    before = [(held, held.data, held.data.clone()) for name, held in named if name in tensors]
    try:
        # each takes the file's dtype, and stays the tensor that programs and optimizers hold
        for name, held in named:
            if name in tensors and held.dtype != tensors[name].dtype:
                held.data = held.data.to(tensors[name].dtype)
        module.load_state_dict(tensors, strict=False)
    except Exception as error:
        for held, data, values in before:
            held.data = data
            if not torch.equal(data, values):
                data.copy_(values)
        raise ValueError(f"{source}: the model does not take its tensors: {error!s:.500}") from error


def _as(held: Tensor, value: Tensor) -> Tensor:
    """A value in the place of a tensor of a module."""
    value = value.to("cpu" if held.is_meta else held.device)
    return nn.Parameter(value, requires_grad=held.requires_grad) if isinstance(held, nn.Parameter) else value


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a file are one; NaN is NaN."""
    return a is b or (a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all()))


def _require_one_dtype(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise a ValueError if parameters that have one dtype in the model have several in the file."""
    parameters = {
        n: p for n, p in module.named_parameters(remove_duplicate=False) if p.dtype in FLOATS and n in tensors
    }
    found = {tensors[name].dtype: name for name in parameters}
    if len({p.dtype for p in parameters.values()}) == 1 and len(found) > 1:
        several = ", ".join(f"{_shown(name)} in {dtype}" for dtype, name in found.items())
        raise ValueError(f"{source}: expected parameters of one dtype, the file has {several}")


def _shown(name: str) -> str:
    return repr(name.removeprefix("owner."))


def object_of(program: Any) -> Any:
    """The object whose method a program is, or the module that it is itself."""
    while isinstance(program, functools.partial):
        program = program.func
    found = getattr(program, "__self__", None)
    return program if isinstance(program, nn.Module) else None if isinstance(found, types.ModuleType) else found


def _held(owner: Any, programs: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """The networks and parameters that programs reach: a path, the thing, and whether it is of the object they belong to.

    A path has a colon where it leads through a function. What is reached with and without one comes twice.
    """
    owners = [("owner", owner), *((f"{role}_program", object_of(program)) for role, program in programs.items())]
    yield from ((path, found, True) for path, found in _walked(owners, functions=False))
    yield from ((path, found, False) for path, found in _walked([owners[0], *programs.items()], functions=True))


def _walked(roots: list[tuple[str, Any]], functions: bool) -> Iterator[tuple[str, Any]]:
    queue, seen = deque(roots), dict[tuple[int, bool], Any]()
    while queue:
        path, value = queue.popleft()
        if (id(value), ":" in path) in seen or isinstance(value, types.ModuleType | type(None)):
            continue
        seen[id(value), ":" in path] = value
        if isinstance(value, nn.Module | nn.Parameter):
            yield path, value
        called = isinstance(value, types.FunctionType | types.MethodType | functools.partial)
        if called and not functions:
            continue
        mark = ":" if isinstance(value, types.FunctionType) else "."
        for name, part in _parts(value):
            if not isinstance(part, PLAIN) and name != "_probae_pair":
                queue.append((f"{path}{mark}{name}", part))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):  # data may be long, and what is plain in them is not wanted
        yield from ((str(name), part) for name, part in value.items() if not isinstance(part, PLAIN))
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from ((str(i), part) for i, part in enumerate(value) if not isinstance(part, PLAIN))
    else:
        yield from parts(value)
