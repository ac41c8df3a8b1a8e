"""The loop: steps on minibatches, a record of what happened, the best parameters kept."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from probae.data.streams import Minibatch, Source
from probae.pair import Pair
from probae.training.nonfinite import NonFinite
from probae.training.optimizers import step_by_record
from probae.training.patience import Patience, warming
from probae.training.run import Run
from probae.training.steps import Steps
from probae.training.validation import Validation

#: steps between records from which a look at what graphs take as fixed costs little
_OFTEN = 20


#: parameters and buffers by name, of ``"pair"`` and ``"objective"``
State = dict[str, dict[str, Any]]


class Loop:
    """One run under way: what `fit` has made of its arguments, and how far it has come."""

    def __init__(
        self,
        pair: Pair,
        take: Steps,
        stream: Source,
        validator: Validation | None,
        run: Run,
    ):
        self.pair, self.take, self.stream, self.validator, self.run = pair, take, stream, validator, run
        self.processes = take.processes
        self.modules = {"pair": pair, "objective": take.objective}
        self.best: tuple[float, State] = (-math.inf, {})
        self.patience = Patience(self.processes)
        self.keep: Callable[[int], None] = lambda number: None
        self.track: Callable[[], None] = lambda: None
        self.number, self.spent = 0, 0.0
        self.good = self.now()

    def go(
        self,
        steps: int,
        every: int,
        patience: int | None,
        callbacks: Sequence[Callable[[Run], Any]],
        progress: bool,
    ) -> None:
        """Take the steps."""
        if self.run.records and self.out_of(patience):
            self.run.stopped = "patience"  # a run that had ended is asked for again
            return
        start, total, count = time.perf_counter() - self.spent, torch.zeros_like(self.take.step), 0
        self.pair.train()
        with _bar(steps, progress and self.processes.first, self.number) as bar, self._asked() as asked:
            try:
                for number, minibatch in zip(range(self.number + 1, steps + 1), self.stream, strict=False):
                    loss = self.step(minibatch, number)
                    if loss.device.type == "cpu" and not math.isfinite(loss):
                        self.fail(minibatch, float(loss), number)
                    total, count = total + loss, count + 1
                    if number % every == 0 or number == steps:
                        mean = float(total) / count
                        if not math.isfinite(mean):  # a GPU is asked only when it is recorded anyway
                            self.fail(minibatch, mean, number)
                        self.record(number, mean, start, every, steps)
                        self.track()
                        bar.set_postfix(self.shown())
                        total, count = torch.zeros_like(total), 0
                        if (reason := self.ends(patience, callbacks, asked)) is not None:
                            self.run.stopped = reason
                            self.keep(number)
                            break
                        self.pair.train()
                        if callbacks or every >= _OFTEN:
                            self.take.look()
                        self.keep(number)
                    bar.update()
            except KeyboardInterrupt:
                self.run.stopped = "interrupted"
            finally:
                self.take.synchronise()

    def step(self, minibatch: Minibatch, number: int) -> Tensor:
        """One step; it ends if parameters became NaN, as it does if the loss did."""
        try:
            return self.take(minibatch)
        except ValueError:  # from a distribution that validates its arguments
            if self.sound():
                raise
            self.fail(minibatch, math.nan, number, alone=True)

    def fail(self, minibatch: Minibatch, loss: float, number: int, alone: bool = False) -> NoReturn:
        """Go back to the last good parameters, and say where the trouble lies: it may be in another process's rows."""
        nonfinite = NonFinite(self.take, minibatch)
        found = (
            nonfinite.found() if self.sound() else None
        )  # a step that was refused has left the parameters as they were
        self.put_back(self.good)
        found = found or nonfinite.found()
        told = nonfinite.told(found, loss, number)
        seen = [None] if alone else self.processes.gather(None if found is None else told)
        if found is None:
            told = next((f"{text} (rank {rank})" for rank, text in enumerate(seen) if text is not None), told)
        raise FloatingPointError(told)

    def sound(self) -> bool:
        """Whether all parameters are finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.take.parameters)

    def restore_best(self) -> None:
        """Go back to the best parameters and buffers, the objective's too, where there were validation data."""
        self.put_back(self.best[1])

    def now(self) -> State:
        """A copy of parameters and buffers, of the pair and of the objective."""
        return {role: copy.deepcopy(module.state_dict()) for role, module in self.modules.items()}

    def put_back(self, state: State) -> None:
        """Go back to those."""
        for role, tensors in state.items():
            self.modules[role].load_state_dict(tensors)

    def record(self, number: int, loss: float, start: float, every: int, steps: int) -> None:
        """Add a row to the history; keep the parameters if they are the best so far."""
        self.take.synchronise()
        self.run.compile = self.take.why
        row: dict[str, Any] = {"step": number, "loss": loss, "validation": math.nan, "ran": self.take.ran}
        if self.validator is not None:
            value, values = self.validator(self.take.step)
            row["validation"] = value
            if not math.isfinite(value):
                raise FloatingPointError(f"the validation {self.validator.kind} is {value} at step {number}")
            self.patience.see(values, counts=not warming(self.take.objective, number, steps))
            if value > self.best[0]:
                self.best = value, self.now()
                self.run.best_step = number
        self.good = self.now()
        if number % every == 0:  # the last step may come between, and a longer run would not stop there
            step_by_record(self.take.scheduler, -loss if self.validator is None else row["validation"])
        row["seconds"] = time.perf_counter() - start
        self.run.records.append(row)

    def ends(self, patience: int | None, callbacks: Sequence[Callable[[Run], Any]], asked: list[bool]) -> str | None:
        """Why training ends at this record, for all processes alike: no better value for so long, a callback, Ctrl-C."""
        with self.processes.ready():
            stop = True in [callback(self.run) for callback in callbacks]
        if self.out_of(patience):
            return "patience"
        if self.processes.any(stop):
            return "callback"
        return "interrupted" if self.processes.any(bool(asked)) else None

    def out_of(self, patience: int | None) -> bool:
        """Whether so many records have passed without a value that is better by more than its noise."""
        return patience is not None and self.patience.since >= patience

    @contextlib.contextmanager
    def _asked(self) -> Iterator[list[bool]]:
        """With several processes, Ctrl-C is noted for the next record: all have to stop after the same step."""
        asked: list[bool] = []
        if self.processes.count == 1 or threading.current_thread() is not threading.main_thread():
            yield asked
            return
        before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
        try:
            yield asked
        finally:
            signal.signal(signal.SIGINT, before)

    def shown(self) -> dict[str, str]:
        """What the bar shows."""
        last = self.run.records[-1]
        shown = {"loss": f"{last['loss']:.3f}"}
        return shown if self.validator is None else shown | {self.validator.kind: f"{last['validation']:.3f}"}


def _bar(steps: int, progress: bool, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not progress, unit="step", dynamic_ncols=True)
