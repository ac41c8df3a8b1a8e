"""``probae encode``: the codes of rows under a saved model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from probae.cli.held import Data, Folder, Source, Which, indexed, rows_for, saved
from probae.cli.reading import Reading, reads_data
from probae.cli.tables import as_rows, as_text, require_writable, written


@reads_data
def encode(
    reading: Reading,
    folder: Folder,
    data: Data,
    rows: Which = "all",
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A .csv, .npy or .parquet file.", show_default="CSV on stdout"),
    ] = None,
    model: Source = None,
) -> None:
    """Write the posterior means of the latents, a row for each row of the data, under its name."""
    from probae.adapter import encode as encode_rows

    require_writable(out)
    if out is None:
        reading = reading.silent
    fitted, origin = saved(folder, model)
    held = rows_for(fitted, origin, data, reading, rows)
    frame = indexed(_frame(encode_rows(fitted, held.x)), held)
    screen = reading.screen
    if out is not None:
        screen.say(f"{frame.shape[1]:,} latents of {held.what}, written to {written(frame, out)}")
        screen.result({"rows": held.what, "count": held.size, "latents": list(frame.columns), "file": out})
    elif reading.as_json:
        screen.result(as_rows(frame))
    else:
        as_text(frame)


def _frame(codes: Any) -> Any:
    """Codes (N, L), or several by site, as a frame."""
    import pandas as pd

    from probae.programs.tables import latent_names

    sites = codes if isinstance(codes, dict) else {"z": codes}
    columns: dict[str, Any] = {}
    for name, values in sites.items():
        flat = values.detach().cpu().reshape(len(values), -1)
        columns |= dict(zip(latent_names(name, flat), flat.numpy().T, strict=True))
    return pd.DataFrame(columns)
