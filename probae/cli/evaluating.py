"""``probae evaluate``: the held-out log p(x) of a saved model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from probae.arguments import one_of
from probae.cli.console import with_error
from probae.cli.held import Data, Folder, Seed, Source, Which, conditions, indexed, rows_for, saved
from probae.cli.reading import Reading, reads_data
from probae.cli.tables import require_writable, written


@reads_data
def evaluate(
    reading: Reading,
    folder: Folder,
    data: Data,
    rows: Which = None,
    method: Annotated[str, typer.Option(help="The estimator, see probae.log_evidence.")] = "auto",
    particles: Annotated[
        int | None, typer.Option(min=1, help="Particles of a bound.", show_default="1000; of the ELBO 64")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A .csv, .npy or .parquet file for log p(x) of each row.", show_default="none"
        ),
    ] = None,
    model: Source = None,
) -> None:
    """Print the mean log p(x) of a saved model over held-out rows, in nats, with its standard errors."""
    from probae.evidence import log_evidence
    from probae.evidence.evaluation import METHODS
    from probae.evidence.result import BOUNDS

    one_of("--method", method, METHODS)
    require_writable(out)
    screen = reading.screen
    fitted, origin = saved(folder, model)
    held = rows_for(fitted, origin, data, reading, rows)
    found = log_evidence(fitted, held.x, method, particles=particles, seed=seed)
    sign = {"lower": "≥ ", "upper": "≤ "}.get(found.bound, "")
    conditioned = list(conditions(origin) or found.given) if found.given else []
    given = f" given {', '.join(conditioned)}" if conditioned else ""
    screen.say(
        f"{BOUNDS[found.bound]}{given} of {held.what}:\n"
        f"{sign}{with_error(found.mean, found.mean_stderr)} nats per row "
        f"({with_error(found.mean / held_width(held.x), found.mean_stderr / held_width(held.x))} per feature), "
        f"a {found.measure}"
    )
    by = f"method {found.method}" + (f" with {found.particles:,} particles" if found.particles else "")
    draws = f", of which {found.mean_mc_stderr:.3f} comes from the draws" if found.mean_mc_stderr > 0 else ""
    screen.say(f"{by}; ± is the standard error over rows{draws}")
    if found.note:
        screen.say(f"· {found.note}")
    unreliable = 0 if found.reliable is None else int((~found.reliable).sum())
    if unreliable:
        screen.say(f"· the error of the draws cannot be believed for {unreliable:,} of {held.size:,} rows")
    if out is not None:
        screen.say(f"written to {written(indexed(found.to_frame(), held), out)}")
    screen.result({
        "rows": held.what, "count": held.size, "log_evidence": found.mean, "stderr": found.mean_stderr,
        "mc_stderr": found.mean_mc_stderr, "bound": found.bound, "method": found.method, "measure": found.measure,
        "particles": found.particles, "given": conditioned, "unreliable": unreliable, "note": found.note,
    })  # fmt: skip


def held_width(x: Any) -> int:
    """How many features a row has."""
    rows = x[0] if isinstance(x, tuple) else x
    return int(rows.shape[1])
