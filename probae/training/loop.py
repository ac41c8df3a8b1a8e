"""The loop: steps on minibatches, a record of what happened, the best parameters kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from probae.pair import Pair
from probae.streams import Minibatch, Source
from probae.training.blame import blame
from probae.training.run import Run
from probae.training.steps import Steps
from probae.training.watch import Watch

#: steps between records from which a look at what graphs take as fixed costs little
_OFTEN = 20


class Loop:
    """One run under way: what `fit` has made of its arguments, and how far it has come."""

    def __init__(
        self,
        pair: Pair,
        take: Steps,
        stream: Source,
        watch: Watch | None,
        run: Run,
    ):
        self.pair, self.take, self.stream, self.watch, self.run = pair, take, stream, watch, run
        self.best: tuple[float, dict[str, Tensor]] = (-math.inf, {})
        self.keep: Callable[[int], None] = lambda number: None
        self.number, self.spent = 0, 0.0
        self.good = copy.deepcopy(pair.state_dict())

    def go(
        self,
        steps: int,
        every: int,
        patience: int | None,
        callbacks: Sequence[Callable[[Run], Any]],
        progress: bool,
    ) -> None:
        """Take the steps."""
        start, total, count = time.perf_counter() - self.spent, torch.zeros_like(self.take.step), 0
        self.pair.train()
        with _bar(steps, progress, self.number) as bar:
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
                        self.record(number, mean, start)
                        bar.set_postfix(self.shown())
                        total, count = torch.zeros_like(total), 0
                        asked = [callback(self.run) for callback in callbacks]
                        if self.ended(patience) or True in asked:
                            self.run.stopped = "patience" if self.ended(patience) else "callback"
                            break
                        self.pair.train()
                        if callbacks or every >= _OFTEN:
                            self.take.look()
                        self.keep(number)
                    bar.update()
            except KeyboardInterrupt:
                self.run.stopped = "interrupted"
            finally:
                self.take.settle()

    def step(self, minibatch: Minibatch, number: int) -> Tensor:
        """One step; parameters that are no numbers any more end it as a loss does that is none."""
        try:
            return self.take(minibatch)
        except ValueError:  # from a distribution that validates its arguments
            if all(torch.isfinite(p).all() for p in self.take.parameters):
                raise
            self.fail(minibatch, math.nan, number)

    def fail(self, minibatch: Minibatch, loss: float, number: int) -> NoReturn:
        """Go back to the last good parameters, and say where the trouble lies."""
        self.pair.load_state_dict(self.good)
        raise FloatingPointError(blame(self.pair, minibatch.rows(), minibatch.index, loss, number))

    def restore_best(self) -> None:
        """Go back to the best parameters, where there were validation data."""
        if self.best[1]:
            self.pair.load_state_dict(self.best[1])

    def record(self, number: int, loss: float, start: float) -> None:
        """Add a row to the history; keep the parameters if they are the best so far."""
        self.take.settle()
        self.run.compile = self.take.why
        row: dict[str, Any] = {"step": number, "loss": loss, "validation": math.nan, "ran": self.take.ran}
        if self.watch is not None:
            row["validation"] = value = self.watch(self.take.step)
            if not math.isfinite(value):
                raise FloatingPointError(f"the validation {self.watch.kind} is {value} at step {number}")
            if value > self.best[0]:
                self.best = value, copy.deepcopy(self.pair.state_dict())
                self.run.best_step = number
        self.good = copy.deepcopy(self.pair.state_dict())
        row["seconds"] = time.perf_counter() - start
        self.run.records.append(row)

    def ended(self, patience: int | None) -> bool:
        """Whether the validation value has not improved for so many records."""
        since = sum(1 for r in self.run.records if r["step"] > (self.run.best_step or 0))
        return patience is not None and since >= patience

    def shown(self) -> dict[str, str]:
        """What the bar shows."""
        last = self.run.records[-1]
        shown = {"loss": f"{last['loss']:.3f}"}
        return shown if self.watch is None else shown | {self.watch.kind: f"{last['validation']:.3f}"}


def _bar(steps: int, progress: bool, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=done, disable=not progress, unit="step", dynamic_ncols=True)
