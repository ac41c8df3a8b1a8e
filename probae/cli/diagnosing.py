"""``probae diagnose``: is the posterior of a saved model good, and are its latents in use?"""

from __future__ import annotations

import math
from typing import Annotated

import typer

from probae.cli.console import table, with_error
from probae.cli.held import Data, Folder, Seed, Source, Which, indexed, rows_for, saved
from probae.cli.reading import Reading, reads_data
from probae.cli.tables import require_writable, written

_LATENTS = 20  # shown in print
_QUANTILES = ("min", "5%", "median", "95%", "max")


@reads_data
def diagnose(
    reading: Reading,
    folder: Folder,
    data: Data,
    rows: Which = None,
    particles: Annotated[int, typer.Option(min=25, help="Draws of each row's latents.")] = 1000,
    seed: Seed = 0,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A .csv, .npy or .parquet file of the diagnostics of each row.", show_default="none"
        ),
    ] = None,
    model: Source = None,
) -> None:
    """Print how good the posterior of a saved model is, and how much each latent is used."""
    from probae.diagnostics import diagnose as judge

    require_writable(out)
    screen = reading.screen
    fitted, origin = saved(folder, model)
    held = rows_for(fitted, origin, data, reading, rows)
    found = judge(fitted, held.x, particles=particles, seed=seed)
    summary, latents = found.summary(), found.latents_frame()
    shown = table(f"{held.what}, {particles:,} draws each; bounds in nats", "quantity", "mean", *_QUANTILES)
    for name, row in summary.iterrows():
        cells = (with_error(row[column], math.nan) for column in _QUANTILES)
        shown.add_row(str(name), with_error(row["mean"], row["stderr"]), *cells)
    screen.show(shown)
    screen.say()
    kept = table(f"latents: {found.active_count:,} of {len(latents):,} are active", "latent", "KL, nats", "activity")
    order = latents.sort_values("kl", ascending=False, kind="stable") if len(latents) else latents
    for place, row in order.head(_LATENTS).iterrows():
        site, number = place if isinstance(place, tuple) else ("z", place)  # type: ignore[misc]
        kept.add_row(f"{site}{int(number) + 1}", f"{row['kl']:.3f}", f"{row['activity']:.3f}")
    screen.show(kept)
    if len(latents) > _LATENTS:
        screen.say(f"… and {len(latents) - _LATENTS:,} more")
    screen.say()
    if found.why_not is not None:
        screen.say(f"no weights: {found.why_not}")
    screen.say(found.advice)
    if out is not None:
        screen.say(f"written to {written(indexed(found.to_frame(), held), out)}")
    screen.result({
        "rows": held.what, "count": held.size, "particles": particles,
        "summary": summary.astype(object).to_dict("index"),
        "latents": latents.reset_index().astype(object).to_dict("records"),
        "active": found.active_count, "why_not": found.why_not, "advice": found.advice,
    })  # fmt: skip
