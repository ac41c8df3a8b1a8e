"""What trackers are told of a run; one that fails is told of once, and the run goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from probae.batches import each, length
from probae.runtime.seeding import evaluating
from probae.training.validation import Validation

if TYPE_CHECKING:
    from probae.trackers import Tracker
    from probae.training.loop import Loop

_METHODS = ("log_parameters", "log_metrics", "log_figure", "close")
_ROWS = 1000  # of the validation data, for the terms of the bound


class Tracking:
    """The trackers of one run; of several processes the first alone has any."""

    def __init__(self, trackers: Sequence[Tracker], loop: Loop):
        self.trackers = trackers if loop.processes.first else ()
        self.loop = loop
        self.failed: set[int] = set()

    def start(self, settings: dict[str, Any]) -> None:
        """What the run is, and after which step it goes on."""
        loop = self.loop
        described = {
            "model": type(loop.run.model).__name__,
            "parameters": sum(p.numel() for p in loop.pair.trained()),
            "objective": repr(loop.take.objective),
            "monitor": loop.run.monitor,
            "optimizer": type(loop.take.optimizer).__name__,
            "data rows": loop.stream.size,
            **settings,
        }
        self._tell(lambda tracker: tracker.log_parameters(described, self.loop.number))

    def record(self) -> None:
        """The last record of the history, with learning rates and the terms of the bound."""
        if self.trackers:
            found = metrics_of(self.loop)
            step = self.loop.run.records[-1]["step"]
            self._tell(lambda tracker: tracker.log_metrics(step, found))

    def end(self) -> None:
        """The fit is over, whatever ended it."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, call: Callable[[Tracker], Any]) -> None:
        for number, tracker in enumerate(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # a full disk, a server that is away: the run is worth more
                if number not in self.failed:
                    warnings.warn(
                        f"trackers: {type(tracker).__name__} failed, and the run goes on without what it missed: "
                        f"{type(error).__name__}: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
                self.failed.add(number)


def require_trackers(trackers: Any) -> None:
    """Raise a TypeError if something given is no tracker."""
    if not isinstance(trackers, Sequence):
        raise TypeError(f"trackers: expected a list of trackers, got {trackers!r:.200}")
    for tracker in trackers:
        if isinstance(tracker, type) or not all(callable(getattr(tracker, name, None)) for name in _METHODS):
            raise TypeError(f"trackers: expected objects with the methods {', '.join(_METHODS)}, got {tracker!r:.200}")


def metrics_of(loop: Loop) -> dict[str, float]:
    """The numbers of the last record by name, in nats per datum where they are densities."""
    last, groups = loop.run.records[-1], loop.take.optimizer.param_groups
    found = {"loss": last["loss"]}
    if not math.isnan(last["validation"]):
        found["validation"] = last["validation"]
    for number, group in enumerate(groups):
        name = "learning_rate" if len(groups) == 1 else f"learning_rate/{group.get('name', number)}"
        found[name] = float(group["lr"])
    return found | ({} if loop.validator is None else terms_of(loop.validator))


def terms_of(validation: Validation) -> dict[str, float]:
    r"""The two terms of the ELBO on validation data, ``reconstruction`` − ``divergence``, nats per datum.

    .. math:: E_q \log p(x \mid z), \qquad KL(q(z \mid x) \,\|\, p(z))

    By one draw of each datum's latents, the same at every record; empty for a pair that has no such bound.
    """
    pair, signature = validation.pair, validation.signature
    if not pair.has_guide or not signature.latents or signature.enumerated or signature.improper or signature.summed:
        return {}
    rows = min(_ROWS, length(validation.batch))
    batch = validation.batch if signature.all_rows else each(lambda leaf: leaf[:rows], validation.batch)
    with evaluating(pair, validation.seed):
        traces = pair.traces(batch, 1)
        return {
            "reconstruction": float(traces.likelihood().local.mean()),
            "divergence": float(traces.kl().local.mean()),
        }
