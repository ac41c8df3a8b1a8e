"""What `probae.compare` returns: the table, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probae.arguments import flag
from probae.comparison.baselines import INDEPENDENT
from probae.comparison.entry import Entry, paired
from probae.comparison.reporting import write_report
from probae.evidence import Evidence
from probae.evidence.result import BOUNDS
from probae.export.datatree import comparison_tree
from probae.export.figures.evidence import evidence_forest, paired_differences
from probae.export.tabular import MARK, MOSTLY_RELIABLE, Tabular, in_text, number

if TYPE_CHECKING:
    import pandas


@dataclass(repr=False)
class Comparison(Tabular):
    """What `compare` returns: ``entries``, the ``table``, and ``notes``, sentences on how to read it.

    ``settings`` are those of the evaluation: its ``estimator``, ``seed`` and ``folds``.
    """

    entries: list[Entry]
    data: Tensor
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> pandas.DataFrame:
        """A row per model, best first; nats per datum, higher is better.

        Columns: ``log_evidence``, its ``bound``; ``stderr``, over all data (sampling and Monte Carlo); ``mc_stderr``, for
        these data; ``difference`` to the best, paired by datum, with ``difference_stderr`` over all data and
        ``difference_mc_stderr`` for these; ``over_independent``, the paired difference to independent features, and its
        error; ``fits`` and ``fit_stderr``, between the fits of one name; ``reconstruction``, E_q log p(x | z);
        ``active_units``, the latents that the data move; ``pareto_k``, the median k̂ of the guide's own weights; ``estimators``,
        the estimators that gave the values, and ``reliable``, the share of the data whose Monte-Carlo error can be believed;
        ``parameters``; ``seconds`` of evaluation; ``method``; ``role``.
        """
        import pandas

        ranked = sorted(self.entries, key=self._place)
        best = next((e for e in ranked if self.ranks(e)), None)
        independent = next((e for e in ranked if e.name == INDEPENDENT and e.baseline), None)
        rows = [self._row(entry, best, independent) for entry in ranked]
        return pandas.DataFrame(rows).set_index("model")

    def ranks(self, entry: Entry) -> bool:
        """Whether an entry's values are ranked: exact values and lower bounds, conditioned on the same as the others."""
        given = [e.given for e in self.entries if e.ranked]
        return entry.ranked and entry.given == (() if () in given else given[0])

    def _place(self, entry: Entry) -> tuple[int, float]:
        """Where an entry stands: values that are ranked, best first, then those that are not, then models without any."""
        group = 0 if self.ranks(entry) else 1 if entry.evidence else 2
        return group, -float(entry.values.mean()) if entry.evidence else 0.0

    def _row(self, entry: Entry, best: Entry | None, independent: Entry | None) -> dict[str, Any]:
        row: dict[str, Any] = {"model": entry.name, "log_evidence": math.nan, "bound": "–"}
        numbers = "stderr mc_stderr difference difference_stderr difference_mc_stderr"
        numbers += " over_independent over_independent_stderr fit_stderr"
        row |= dict.fromkeys(numbers.split(), math.nan)
        if entry.evidence:
            fits = torch.tensor([e.mean for e in entry.evidence], dtype=torch.float64)
            mean = Evidence(entry.values, torch.zeros_like(entry.values), "exact", "", "")
            row |= {
                "log_evidence": mean.mean,
                "bound": entry.bound,
                "stderr": math.hypot(mean.mean_stderr, entry.shared_mc_stderr),
                "mc_stderr": entry.mc_stderr,
                "fit_stderr": float(fits.std()) / math.sqrt(len(fits)) if len(fits) > 1 else math.nan,
            }
            if self.ranks(entry):
                row["difference"], row["difference_stderr"], row["difference_mc_stderr"] = paired(entry, best)
            if self.ranks(entry) and independent is not None:
                row["over_independent"], row["over_independent_stderr"], _ = paired(entry, independent)
        row["fits"] = len(entry.evidence or entry.models)
        for name in ("reconstruction", "active_units", "pareto_k", "estimators", "reliable"):
            row[name] = getattr(entry, name)
        row["parameters"], row["seconds"] = entry.parameters, entry.seconds
        row["method"] = entry.evidence[0].method if entry.evidence else "–"
        row["role"] = "baseline" if entry.baseline else "model" if entry.evidence else "no evidence"
        return row

    def evidence(self) -> pandas.DataFrame:
        """log p(x_n) by datum (rows) and model (columns), averaged over fits."""
        import pandas

        columns = {entry.name: entry.values.numpy() for entry in self.entries if entry.evidence}
        return pandas.DataFrame(columns).rename_axis("datum")

    def plot(self, ax: Any = None, *, differences: bool = False) -> Any:
        """The evidence of each model, or its difference to the best; needs ``probae[plots]``.

        Intervals are of two standard errors. Those of differences are paired by datum: they are the ones to look at.
        """
        draw = paired_differences if flag("differences", differences) else evidence_forest
        return draw(self.table, ax)

    def report(
        self,
        path: Any,
        *,
        title: str = "Held-out log p(x)",
        unit: str = "datum",
        ran: Mapping[str, Any] | None = None,
        figures: Mapping[str, Any] | None = None,
        fit_seconds: Mapping[str, float] | None = None,
    ) -> Path:
        """Write one page of HTML that needs no network, and return its path; needs ``probae[report]``.

        It has the result in a paragraph of words, the table, figures, notes, what was run, and versions.

        Args:
            path: of the file; in a folder that is there, ``report.html``. A report that is there is replaced.
            title: of the page.
            unit: what a value is per: ``"image"`` say.
            ran: what else is to be told of the run, by name: the data, training options.
            figures: caption -> matplotlib's figure, after those of the evidence.
            fit_seconds: of training, by model.

        Raises:
            FileExistsError: if something else than a report is there.
            ImportError: if a library is missing, saying how to install it.

        Example:
            >>> import probae, tempfile
            >>> x = torch.randn(50, 4)
            >>> found = probae.compare({"PPCA": probae.PPCA(4, 1).maximum_likelihood(x)}, x)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     found.report(folder).name
            'report.html'
        """
        parts = {"ran": ran or {}, "figures": figures or {}, "fit_seconds": fit_seconds or {}}
        return write_report(self, path, title=title, unit=unit, **parts)

    def to_datatree(self) -> Any:
        """An ``xarray.DataTree`` for ArviZ, with a group for each model; needs ``probae[arviz]``."""
        return comparison_tree(self)

    def to_frame(self) -> pandas.DataFrame:
        """The table."""
        return self.table

    def __repr__(self) -> str:
        table = self._shown()
        shown = table[["log_evidence", "bound", "stderr", "mc_stderr", "difference", "difference_stderr"]].copy()
        for name in ("over_independent", "reconstruction", "active_units", "pareto_k"):
            if table[name].notna().any():
                shown[name] = table[name]
        notes = (f"· {note}" for note in self.notes)
        return "\n".join([f"log p(x), nats per datum, {len(self.data)} data", in_text(shown), *notes])

    def _shown(self) -> pandas.DataFrame:
        """The table, with a mark at the Monte-Carlo errors that cannot be believed."""
        table = self.table
        unsure = {entry.name for entry in self.entries if is_unsure(entry)}
        marked = [
            "–" if math.isnan(error) else number(error) + MARK * (name in unsure)
            for name, error in table["mc_stderr"].items()
        ]
        return table.assign(mc_stderr=marked)

    def _notes(self) -> list[str]:
        return self.notes


def is_unsure(entry: Entry) -> bool:
    """Whether an entry is ranked by values whose Monte-Carlo errors cannot be believed for a part of the data."""
    return entry.ranked and entry.reliable < MOSTLY_RELIABLE


def notes_on(comparison: Comparison) -> list[str]:
    """How to read the table: what beats what, and which numbers to doubt."""
    table, notes = comparison.table, []
    if (table["bound"] == "lower").any():
        notes.append("a lower bound may sit below log p(x) by more than its error; an exact value does not")
    for entry in comparison.entries:
        if entry.why_not:
            notes.append(f"{entry.name}: no log p(x): {entry.why_not.split(':')[0]}; its reconstruction is no evidence")
    for entry in comparison.entries:
        if entry.evidence and not entry.ranked:
            kind = BOUNDS[entry.bound].replace(" on log p(x)", "").replace(" of log p(x)", "")
            notes.append(
                f"{entry.name}: its value is an {kind}, so it is not ranked against exact values and lower bounds"
            )
        elif entry.ranked and not comparison.ranks(entry):
            on = ", ".join(entry.given)
            notes.append(f"{entry.name}: its value is log p(x | {on}), so it is not ranked against log p(x)")
    if unsure := [entry for entry in comparison.entries if is_unsure(entry)]:
        shares = ", ".join(f"{entry.name} ({1 - entry.reliable:.0%} of the data)" for entry in unsure)
        single = " (one draw tells none)" if any(math.isnan(entry.mc_stderr) for entry in unsure) else ""
        notes.append(
            f"{MARK} the Monte Carlo standard error is unreliable{single} for {shares}. The values are still lower bounds"
        )
    below = table[table["over_independent"] < -2 * table["over_independent_stderr"]].index
    if len(below):
        notes.append(
            f"{', '.join(below)}: worse than independent features, which have no latents at all{_ends(comparison.data)}. Look "
            "whether training has ended, and whether the likelihood suits the data"
        )
    return notes


def _ends(x: Tensor) -> str:
    """How many of the data, where they are counts, lie at the ends of their range: what a likelihood has to suit."""
    if x.numel() == 0 or not bool((x == x.round()).all()):
        return ""
    low, high = x.min(), x.max()
    least, most = (float((x == end).double().mean()) for end in (low, high))
    share = least + most
    if share < 0.2 or high - low < 2:
        return ""
    if most < 0.01:  # a few large counts are no pile
        return f"; {least:.0%} of the counts are {int(low)}"
    return f"; {share:.0%} of the counts are {int(low)} or {int(high)}, the ends of their range"
