"""`fit`: checks its arguments, the pair and the data, and sets the loop going."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from probae.adapter import as_pair
from probae.arguments import as_path, one_of, whole
from probae.batches import Batch, call
from probae.data.streams import InMemory, Source, fetching, source
from probae.graphs.cost import MODES
from probae.objectives import Objective, named
from probae.objectives.objective import within
from probae.pair import Pair
from probae.runtime.fingerprints import Checksum, fingerprint, of_data
from probae.runtime.isolation import isolated
from probae.runtime.precision import PRECISIONS
from probae.runtime.processes import Processes, held, local_device, processes
from probae.runtime.seeding import checked_seed, derived, reseed, seeded
from probae.storage.folders import preparing
from probae.tracing.checks import check
from probae.tracing.signature import Signature
from probae.training.checkpoint import KIND, Checkpoints
from probae.training.identity import identity_of
from probae.training.loop import Loop
from probae.training.optimizers import (
    by_record,
    optimizer_of,
    parameter_groups,
    rates_of,
    scheduler_of,
    trained_by,
)
from probae.training.reduction import limits_of, norms_of
from probae.training.resume import keep
from probae.training.run import Run
from probae.training.steps import Steps
from probae.training.tracking import Tracking, require_trackers
from probae.training.validation import Validation, corruptions_of

if TYPE_CHECKING:
    from probae.trackers import Tracker

_BUILD = 21  # what a run draws for before it starts


@isolated
def fit(
    model: Any,
    data: Any,
    *,
    validation: Any = None,
    objective: Objective | str | None = None,
    steps: int = 5_000,
    batch_size: int = 128,
    lr: float | dict[str, float] = 1e-3,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    scheduler: str | Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | dict[str, float] | None = None,
    precision: str = "float32",
    seed: int = 0,
    device: str | torch.device = "auto",
    compile: bool | str = "auto",
    every: int | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str = "same",
    workers: int | None = None,
    callbacks: Sequence[Callable[[Run], Any]] = (),
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> Run:
    """Train a model in place, by stochastic variational inference.

    Pair and data are checked before the first step; the names of a DataFrame's columns are kept, see
    `probae.Pair.feature_names_in_`. With ``validation``, what ``run.monitor`` names is evaluated at every
    record, and the parameters of the best record are the ones kept, the objective's too. Ctrl-C ends training and returns
    the run.

    Under ``torchrun`` the processes train one model together (gloo on CPUs, NCCL on GPUs): each takes its rows of every
    minibatch, with noise of its own, and their gradients are averaged; ``batch_size`` counts the rows of all. Each returns
    the same parameters. Batch normalisation sees the rows of its own process alone. Ctrl-C ends at the next record. The call
    has to be the same in all, but for the values that parameters start from, which are those of the first: what differs
    is told before the first step, data in memory or mapped down to one value, a Dataset or DataLoader by some of its rows.

    Args:
        model: a model, a pair, or an object with ``model`` and ``guide``; or a function without arguments that makes one,
            ``lambda: probae.VAE(64, 8)``, which then starts by the run's seed: ``run.model`` is what it made.
        data: a tensor, array, DataFrame, tuple or dict of these, a torch ``Dataset``, a ``DataLoader``, or a
            ``numpy.memmap`` (``numpy.load(file, mmap_mode="r")``); the last three are read as training goes. So are a matrix of
            ``scipy.sparse``, an AnnData (its ``X``) and an HDF5 data set, whose rows are made dense a minibatch at a time. A
            Hugging Face data set counts as a Dataset; its columns are the leaves of a batch.
        validation: data of the same form, for early stopping.
        objective: an `Objective` or its name; by default the model's own, mostly `ELBO`.
        steps, batch_size: optimizer steps, and data in each.
        lr: the learning rate of all that declare none of their own (see `Objective`), or ``{"model": ..., "objective": ...}``
            where the objective has parameters too.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"``, or a function of parameter groups.
        scheduler: ``"cosine"`` (from lr to 0 over the steps), or a function optimizer -> scheduler, stepped at each step; a
            `ReduceLROnPlateau` at each record, by the validation value (for ``mode="min"`` its negative), else by the loss.
        clip: the largest norm of the gradient of all that declare none of their own, or ``{"model": ..., "objective": ...}``,
            one for each group by itself.
        precision: ``"float32"`` leaves all in the parameters' own dtype; ``"bf16"`` computes matrix products and
            convolutions in bfloat16, and everything else, parameters and densities too, in float32.
        seed: of the order of the data and of every draw, also of the initial values of what programs make at their first
            run. The same seed gives the same bits on the CPU. What a constructor drew before is its own: ``VAE(..., seed=0)``.
        device: ``"auto"`` takes a GPU where there is one.
        compile: how the steps are taken. False runs the programs each time; ``"flat"`` traces them once into a flat graph
            of tensor operations, with the same bits; True compiles that graph, the optimizer's update and the gather of the
            minibatch inside (5 to 15 s on a CPU; on a GPU it is captured too), the same to rounding; ``"auto"`` takes what the
            number of steps is worth. What cannot be traced runs eagerly, with a warning that names the reason.
        every: steps between records; by default a fiftieth of all.
        patience: records without a better validation value after which training stops. A value is better where the mean of
            the differences, paired by datum, is more than their standard error; what is known only as a whole, where it
            is larger. Records during a warm-up, while the weight β of a divergence still rises, do not count.
        checkpoint: a folder in which all of the run's state is kept, written at every record. The same call with a folder
            that has some goes on from the last, and ends with the bits of a run that was never stopped (to rounding where
            compiled steps take batches of several shapes). Other steps, ``every``, ``patience``, ``workers``, callbacks and
            progress are the same call; anything else that decides the bits is not, down to one row of the data, and a
            checkpoint of another call is refused, each difference named. Nothing else in the folder is replaced or removed;
            one run at a time writes to it.
        resume: ``"same"``, or ``"force"`` to go on from a checkpoint of another call all the same, with a warning: model and
            state of the optimizer are the checkpoint's; the objective's settings, learning rate and schedule are those given.
        workers: processes that fetch a Dataset's rows ahead; by default one where processes are forked (Linux), and none
            elsewhere or under ``torchrun``. The rows are the same, whatever their number.
        callbacks: functions of the run, called at every record; one that returns True ends training.
        trackers: of `probae.trackers`, ``TensorBoard("runs/a")`` say, or any object with the methods of its `Tracker`: they
            are told loss, validation value and its terms, and learning rates at every record. One that fails is told of
            in a warning, and the run goes on.
        progress: whether to show a bar with loss, bound and speed.

    Returns:
        `Run`, with ``run.model`` and ``run.history``.

    Raises:
        ValueError, TypeError: if an argument, the pair or the data do not fit, or differ between processes, before the first
            step.
        FloatingPointError: if the loss or a gradient is not finite, naming the step and, where they show, the site and the
            rows; the parameters are then those of the last record. On a GPU this shows at the next record.
        OSError: if a checkpoint cannot be written; the one before still loads. If another run is writing to the folder.
        ChildProcessError, ConnectionError: if a process that reads data, or that trains too, has died or failed.

    Example:
        >>> import probae
        >>> run = fit(probae.VAE(features=4, latents=2), torch.randn(100, 4), steps=10, progress=False)
        >>> len(run.history)
        10
    """
    steps, batch_size = whole("steps", steps), whole("batch_size", batch_size)
    every = max(1, steps // 50) if every is None else whole("every", every)
    if patience is not None and (whole("patience", patience) and validation is None):
        raise ValueError("patience: early stopping needs validation data")
    if workers is not None:
        workers = whole("workers", workers, 0)
    seed = checked_seed(seed)
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"callbacks: expected functions of the run, got {callbacks!r}")
    require_trackers(trackers)
    make_optimizer, make_scheduler = optimizer_of(optimizer), scheduler_of(scheduler, steps)
    one_of("compile", compile, MODES)
    one_of("precision", precision, PRECISIONS)
    one_of("resume", resume, ("same", "force"))
    rates, norms = rates_of(lr), norms_of(clip)
    folder = None if checkpoint is None else as_path("checkpoint", checkpoint)
    where = _device(device)
    model = _built(model, seed)
    pair = as_pair(model)
    pair.require_trainable()
    pair.require_columns(data)
    pair.require_columns(validation, {**pair.named_columns, **pair.columns_of(data)})
    goal = named(objective, pair)

    pair.to(where)
    if precision == "bf16" and pair.dtype not in (None, torch.float32):
        raise ValueError(f"precision='bf16': expected parameters in float32, got {pair.dtype}")
    team = processes(where)
    modules = {"model": pair, "objective": goal}
    with seeded(seed, where), fetching(), team.together(), ExitStack() as until_the_end:
        place: Path | None = None
        with team.ready():
            if folder is not None and team.first:
                place = until_the_end.enter_context(preparing(folder, KIND))
            elif folder is not None:  # what is no folder is refused in every process
                folder.mkdir(parents=True, exist_ok=True)
            stream = source(data, batch_size, seed, pair.dtype, where, workers, team, pair.keeps_precision)
            rows = Checksum(stream.ordered)
            for batch in stream.passes():
                if folder is not None:
                    rows.add(batch)
                signature = check(pair, batch, seed, training=True, corruptions=corruptions_of(goal))
                _require_rows(pair, stream.smallest(batch))
                _require_whole(signature, batch_size, stream, team)
            if folder is not None:
                stream.require_resumable()
            pair.learn_columns(data)
            goal.to(device=where)
            # from before they learn of the data; what is trained starts as in the first process
            fixed = {name: fingerprint(t) for name, t in held(modules).items() if not t.requires_grad}
            _bind(goal, pair, stream)
            goal.to(device=where)
            trained = trained_by(pair, goal)
            groups = parameter_groups(trained, rates)
            validator = held_out = None
            if validation is not None:
                held_out = _gather(validation, pair, where)
                options: Any = {"particles": 8, "seed": seed, "compile": compile, "times": steps // every}
                validator = Validation(pair, held_out, goal, **options, processes=team)
            chosen = make_optimizer(groups)
            declared = {group.name: group.clip for group in trained if group.clip is not None}
            limits = limits_of(norms, chosen.param_groups, declared)
            if pair.has("initialise"):
                with torch.no_grad():
                    call(pair.initialise, stream.some())
            rate = make_scheduler(chosen)
            if folder is not None and rate is not None and not hasattr(rate, "state_dict"):
                raise TypeError(
                    f"scheduler: checkpoint= needs one with state_dict() and load_state_dict(), got {rate!r}"
                )
        team.agree(modules, fixed)
        note = getattr(getattr(pair, "inner", pair), "fit_note", "")
        run = Run(_unwrapped(model), goal, monitor=validator.kind if validator else None, note=note)
        options = {"processes": team, "compile": compile, "asked": steps, "precision": precision}
        take = Steps(pair, goal, chosen, rate, limits, stream.size, **options)
        loop = Loop(pair, take, stream, validator, run)
        settings = {
            "batch_size": None if isinstance(data, DataLoader) else batch_size,
            "clip": norms,
            "seed": seed,
            "precision": precision,
            "compile": compile or "flat",  # which has the same bits
            "every": every if by_record(rate) else None,
        }
        if folder is not None or team.count > 1:
            seen = Checksum(not isinstance(validation, DataLoader))
            if held_out is not None:
                seen.add(held_out)
            identity = identity_of(loop, seen, settings)
        if team.count > 1:
            asked = {
                "steps": steps,
                "every (steps)": every,
                "patience": patience,
                "checkpoint": folder is not None,
                "resume": resume,
            }
            first = team.require_same({**identity, **asked, **of_data("data", stream.common())})
            identity = {name: first[name] for name in identity}
        if team.rank:
            reseed(team.noise(seed), where)
        if folder is not None:
            checkpoints = Checkpoints(folder, {**identity, **of_data("data", *team.gather(rows))}, place)
            keep(loop, checkpoints, resume == "force")
            with team.ready():
                checkpoints.require_free(loop.number, steps, every)
        tracking = Tracking(trackers, loop)
        loop.track = tracking.record
        tracking.start({
            **settings, "steps": steps, "lr": rates, "patience": patience, "compile": compile, "every": every
        })  # fmt: skip
        try:
            loop.go(steps, every, patience, callbacks, progress)
        finally:
            tracking.end()
            loop.restore_best()
            pair.eval()
        team.agree(modules)  # on what each has gathered from its own rows, as batch normalisation does
    return run


def _built(model: Any, seed: int) -> Any:
    """The model, or what a function without arguments makes under the run's seed."""
    if isinstance(model, nn.Module | type | Run) or not callable(model) or callable(getattr(model, "model", None)):
        return model
    try:
        with seeded(derived(seed, _BUILD), torch.get_default_device()):
            built = model()
    except TypeError as error:
        raise TypeError(f"model: expected a model, or a function without arguments that makes one; {error}") from error
    as_pair(built)
    return built


def _bind(objective: Objective, pair: Pair, stream: Source) -> None:
    """Let the objective, and those inside it, make what depends on the pair."""
    rows: Batch | None = None
    for _, part in within(objective):
        if type(part).bind is not Objective.bind:
            rows = stream.some() if rows is None else rows
            part.bind(pair, rows)


def _require_whole(signature: Signature, batch_size: int, stream: Source, team: Processes) -> None:
    """Raise a ValueError if programs that run on all of the data at once would get less."""
    if signature.all_rows and team.count > 1:
        raise ValueError(
            "the programs run only on all of the data at once (a plate or a parameter has their size), so "
            f"{team.count} processes cannot share them: train in one"
        )
    if signature.all_rows and batch_size < stream.size:
        raise ValueError(
            f"batch_size: expected {stream.size}, all of the data, since the programs need all of them (a plate or "
            f"a parameter has their size); got {batch_size}"
        )


def _require_rows(pair: Pair, rows: int) -> None:
    """Raise a ValueError if a minibatch of one row would meet batch normalisation, which has no variance to divide by."""
    names = [name for name, module in pair.named_modules() if isinstance(module, nn.BatchNorm1d | nn.SyncBatchNorm)]
    if rows == 1 and names:
        raise ValueError(
            f"batch_size: a minibatch has one row, and batch normalisation ({names[0]}) needs two: choose another batch size, "
            "or DataLoader(..., drop_last=True)"
        )


def _gather(data: Any, pair: Pair, device: torch.device) -> Batch:
    stream = source(data, 4096, 0, pair.dtype, device, keeps=pair.keeps_precision)
    if isinstance(stream, InMemory):
        return stream.batch
    blocks = list(stream.passes())
    if isinstance(blocks[0], Tensor):
        return torch.cat(blocks)  # type: ignore[arg-type]
    keys = blocks[0].keys() if isinstance(blocks[0], dict) else range(len(blocks[0]))
    joined: Any = {key: torch.cat([block[key] for block in blocks]) for key in keys}  # type: ignore[call-overload, index]
    return joined if isinstance(blocks[0], dict) else tuple(joined.values())


def _device(given: Any) -> torch.device:
    if isinstance(given, str) and given == "auto":
        return local_device()
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except Exception as error:  # torch has a kind for each kind of device that is not there
        raise ValueError(f"device: expected 'auto' or a device that is here, got {given!r}; {error}") from error
    if device.type == "meta":
        raise ValueError("device: expected one on which tensors have values, got the meta device")
    return device


def _unwrapped(model: Any) -> Any:
    return model.model if isinstance(model, Run) else model
