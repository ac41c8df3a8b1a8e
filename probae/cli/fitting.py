"""``probae fit``: one model, fitted and saved."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from probae.arguments import as_path, printable
from probae.cli.completion import models, sets
from probae.cli.console import Logged
from probae.cli.reading import Reading, reads_data, say_columns, say_unused

COMPILE: dict[str, bool | str] = {"auto": "auto", "eager": False, "flat": "flat", "compiled": True}


@reads_data
def fit(
    reading: Reading,
    data: Annotated[
        str,
        typer.Option(help="A named data set (see `probae list`), or a file.", autocompletion=sets, show_default=False),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="A name of `probae list`, or FILE.py:CLASS or MODULE:CLASS.",
            autocompletion=models,
            show_default=False,
        ),
    ],
    latents: Annotated[int, typer.Option(min=1, help="Number of latents.")] = 2,
    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bernoulli, binomial, poisson, categorical, ordered, normal or laplace.",
            show_default="that of the model",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a model that is trained by steps.")] = 4000,
    seed: Annotated[int, typer.Option(help="Of the fit, the draws, and the split of a file.")] = 0,
    compile: Annotated[str, typer.Option(help="How training steps are taken: auto, eager, flat or compiled.")] = "auto",
    standardise: Annotated[
        bool,
        typer.Option(
            "--standardise", help="Fit to columns of mean 0 and variance 1; log p(x) stays that of the values."
        ),
    ] = False,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for the model.", show_default="probae-fit/DATA/NAME")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that lies in the folder.")] = False,
) -> None:
    """Fit one model to data, and save it.

    A file is split into 60% training, 20% validation and 20% test rows. The model is fitted to the training rows; the test rows
    are left for `probae evaluate`.
    """
    from probae.arguments import one_of
    from probae.comparison import lineup, own_models
    from probae.comparison.fits import has_maximum_likelihood
    from probae.models.builders import LIKELIHOODS
    from probae.storage import saving
    from probae.storage.origin import Origin

    one_of("--compile", compile, COMPILE)
    if likelihood is not None:
        one_of("--likelihood", likelihood, LIKELIHOODS)
    names = own_models.named(model)
    if names is None or len(names) != 1:
        raise ValueError(f"--model: expected one model, got {model!r}")
    screen = reading.screen
    loaded = reading.load(data, seed, standardise)
    (name,) = lineup.choose(loaded, names)
    folder = as_path("--out", out) if out is not None else Path("probae-fit") / loaded.name / name
    if (folder / "model.json").exists() and not force:
        raise ValueError(f"{printable(folder)} holds a model: take another --out, or replace it by --force")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)  # before the work, and not after it
    try:
        screen.say(f"{loaded.name}: {loaded.description}\n{loaded!r}")
        if not reading.quiet:
            say_columns(screen, loaded.described, standardise)
        say_unused(screen, lineup.unused(loaded, [name]))
        live = sys.stderr.isatty()
        watch = [] if live else [Logged(name, steps)]
        pair, seconds = lineup.train(
            name, loaded, latents, steps, seed, COMPILE[compile], progress=live, callbacks=watch, likelihood=likelihood
        )
        saving.save(pair, folder)
        Origin.of(loaded, name, latents, seed, reading.missing).write(folder)
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()
    stepwise = not has_maximum_likelihood(pair)
    parameters = sum(p.numel() for p in pair.trained())
    how = f"in {steps:,} steps" if stepwise else "by maximum likelihood"
    screen.say(
        f"fitted {name} with {parameters:,} parameters to {len(loaded.train):,} training rows {how}, {seconds:.1f} s"
    )
    own = ["--model", model] if ":" in model else []  # a class of the user's has to be named again
    again = shlex.join(["probae", "evaluate", str(folder), "--data", data, *own])
    screen.say(f"written to {folder}\nnext: {again}", whole=True)
    screen.result({
        "model": name, "latents": latents, "data": loaded.name, "kind": loaded.kind, "features": loaded.features,
        "rows": {"train": len(loaded.train), "validation": len(loaded.validation), "test": len(loaded.test)},
        "parameters": parameters, "steps": steps if stepwise else None, "seconds": seconds, "seed": seed, "folder": str(folder),
    })  # fmt: skip
