"""``probae compare``: a line-up of models, one table."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from probae.arguments import as_path, one_of
from probae.cli import completion
from probae.cli.console import Plain, with_error
from probae.cli.fitting import COMPILE
from probae.cli.reading import Reading, reads_data, say_columns, say_unused
from probae.export.tabular import MARK, MOSTLY_RELIABLE

if TYPE_CHECKING:
    from probae.comparison import Comparison
    from probae.data.datasets import Dataset
    from probae.pair import Pair


CAPTIONS = {
    "reconstructions": "Test images, and what each model makes of them through its latents.",
    "samples": "Test images, and images that each model draws by itself.",
}


@reads_data
def compare(
    reading: Reading,
    ctx: typer.Context,
    data: Annotated[
        str, typer.Option(help="A named data set (see `probae list`), or a file.", autocompletion=completion.sets)
    ] = "digits",
    models: Annotated[
        str | None,
        typer.Option(
            help="Models, separated by commas: names of `probae list`, or FILE.py:NAME or MODULE:NAME, which runs the file, "
            "and takes a model that it registers, or a class; or all.",
            show_default="those that suit the data",
            autocompletion=completion.models,
        ),
    ] = None,
    latents: Annotated[
        int, typer.Option(min=1, help="Number of latents of each model; by default half of 16 features or fewer.")
    ] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model that is trained by steps.")] = 4000,
    test_rows: Annotated[int, typer.Option(min=2, help="At most so many test rows, drawn at random.")] = 1000,
    particles: Annotated[int, typer.Option(min=1, help="Particles of each bound on log p(x).")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the fits, the draws, and the split of a file.")] = 0,
    compile: Annotated[str, typer.Option(help="How training steps are taken: auto, eager, flat or compiled.")] = "auto",
    standardise: Annotated[
        bool,
        typer.Option(
            "--standardise", help="Fit to columns of mean 0 and variance 1; log p(x) stays that of the values."
        ),
    ] = False,
    expost_prior: Annotated[
        str | None,
        typer.Option(
            help="Evaluate a model whose prior is flat with a prior fitted to its codes too: normal, mixture, flow or hurdle.",
            show_default="no",
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that fit models at the same time.")] = 1,
    report: Annotated[
        bool,
        typer.Option("--report", help="Write report.html too: the table, the figures and what was run, on one page."),
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Folder for the results.", metavar="PATH", show_default="probae-compare/DATA")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the results of a run with other options or data; nothing else.")
    ] = False,
) -> None:
    """Fit a line-up of models to data, and print one table of held-out log p(x).

    The table, the figures and the fitted models are written to a folder, in which nothing is replaced but unchanged
    results of the same run. Without an option: scikit-learn's 1,797 handwritten digits, in a few minutes.
    """
    from probae import comparison
    from probae.comparison import lineup, own_models
    from probae.export.report import require_report
    from probae.storage.folders import preparing
    from probae.storage.results import KIND, Results, checksum_of
    from probae.transforms.expost import KINDS

    if compile not in COMPILE:
        raise ValueError(f"--compile: expected one of {', '.join(COMPILE)}, got {compile!r}")
    if report:
        require_report()
    if expost_prior is not None:
        one_of("--expost-prior", expost_prior, KINDS)
    screen = reading.screen
    loaded = reading.load(data, seed, standardise)
    if loaded.features <= latents and not was_said(ctx, "latents"):
        latents = max(1, loaded.features // 2)
    folder = as_path("--out", out) if out is not None else Path("probae-compare") / loaded.name
    chosen = own_models.named(models)
    chosen = lineup.choose(loaded, chosen if chosen is not None else lineup.conditional(loaded))
    test = subset(loaded.test, test_rows, seed)
    held = test if not lineup.conditions(chosen) else (test, subset(lineup.labels_of(loaded), test_rows, seed))
    settings: dict[str, Any] = {"latents": latents, "steps": steps, "test_rows": test_rows, "particles": particles}
    settings |= {"seed": seed, "compile": compile, "missing": reading.missing, "expost_prior": expost_prior}
    settings |= {"standardise": standardise}
    whole = checksum_of((loaded.train, loaded.validation, loaded.test))
    run = {"data": loaded.name, "checksum of the data": whole, "models": chosen, **settings}
    with preparing(folder, KIND) as place:
        results = Results(folder, run, loaded.files, force)
        priors = [] if expost_prior is None else [lineup.named_with_prior(name).replace(" ", "_") for name in chosen]
        results.require_free(written_names([*chosen, *priors], loaded.image_shape is not None, report))
        screen.say(f"{loaded.name}: {loaded.description}\n{loaded!r}; {len(test)} test rows, {latents} latents\n")
        if not reading.quiet:
            say_columns(screen, loaded.described, standardise)
        say_unused(screen, lineup.unused(loaded, chosen))

        fitted: dict[str, Pair] = {}
        seconds: dict[str, float] = {}
        how = loaded, latents, steps, seed, COMPILE[compile], processes
        for name, model, took in lineup.train_all(chosen, *how, progress=sys.stderr.isatty()):
            fitted[name], seconds[name] = model, took
            screen.say(f"  fitted {name:24s} {seconds[name]:6.1f} s")
        if expost_prior is not None:
            for name, model, took in list(lineup.with_priors(fitted, loaded, expost_prior, seed)):
                fitted[name], seconds[name] = model, took
                screen.say(f"  fitted {name:24s} {seconds[name]:6.1f} s")
        result = comparison.compare(
            fitted, held, train=loaded.train, particles=particles, seed=seed, progress=sys.stderr.isatty()
        )
        table = result.table.assign(fit_seconds=[seconds.get(name, math.nan) for name in result.table.index])
        screen.say()
        screen.show(rendered(table, loaded, screen.width))
        for note in result.notes:
            screen.say(f"· {note}")
        made = place / "results"
        written = write(made, result, table, loaded, held, settings, report)
        results.put(made)
    screen.say()
    screen.say(f"written to {folder}: {', '.join(written)}")
    screen.result({**described(result, table, loaded, settings), "folder": str(folder), "files": written})


def was_said(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, and is not the default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def subset(x: Any, most: int, seed: int) -> Any:
    """At most so many rows, by a seeded permutation: some test sets are sorted by class."""
    import numpy as np

    return x if len(x) <= most else x[np.sort(np.random.default_rng(seed).permutation(len(x))[:most])]


def rendered(table: Any, data: Dataset, width: int) -> Table:
    """The table for a terminal, with as many columns as its width has room for."""
    unit = "image" if data.image_shape else "row"
    of = "the original counts" if data.kind == "counts" else "the original values"
    cells = {
        "model": [str(name) for name in table.index],
        "log p(x)": [
            {"lower": "≥ ", "upper": "≤ "}.get(row["bound"], "")
            + with_error(row["log_evidence"], row["stderr"])
            + MARK * bool(row["reliable"] < MOSTLY_RELIABLE)
            for _, row in table.iterrows()
        ],
        "to the best": [with_error(a, b) for a, b in zip(table["difference"], table["difference_stderr"], strict=True)],
        "reconstr.": ["–" if math.isnan(v) else f"{v:.2f}" for v in table["reconstruction"]],
        "over indep.": [
            with_error(a, b, plus=True)
            for a, b in zip(table["over_independent"], table["over_independent_stderr"], strict=True)
        ],
        "k̂": ["–" if math.isnan(v) else f"{v:.2f}" for v in table["pareto_k"]],
        "active": ["–" if math.isnan(v) else f"{v:.0f}" for v in table["active_units"]],
        "parameters": [f"{v:,}" for v in table["parameters"]],
        "seconds": [f"{v:.1f}" for v in table["seconds"] + table["fit_seconds"].fillna(0)],
    }
    shown = Plain(
        title=f"held-out log p(x), nats per {unit} of {of}; higher is better",
        caption="± one standard error over all data, Monte Carlo included; differences are paired by datum",
        title_justify="left",
        caption_justify="left",
    )
    used = 1
    chosen: list[str] = []
    for name, column in cells.items():
        used += max(map(len, [name, *column])) + 3
        if used > width and len(chosen) > 2:
            break
        chosen.append(name)
        shown.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model", overflow="fold")
    for i, role in enumerate(table["role"]):
        shown.add_row(
            *(cells[name][i] for name in chosen), style={"baseline": "dim", "no evidence": "italic"}.get(role)
        )
    return shown


def written_names(chosen: Sequence[str], images: bool, report: bool = False) -> list[str]:
    """The files that `write` makes; names of baselines have an asterisk where there are numbers in them."""
    names = ["table.csv", "table.json", "evidence.csv", "evidence.png"]
    models = [*chosen, "independent_features", "full_Gaussian", "mixture_of_*"]
    names += [f"models/{name}/{file}" for name in models for file in ("model.json", "model.safetensors")]
    names += ["report.html"] if report else []
    names += [f"models/{name}/{file}" for name in models for file in ("model.json", "model.safetensors", "data.json")]
    names += [f"models/{name}/{file}" for name in models for file in ("model.json", "model.safetensors", "card.md")]
    return [*names, "reconstructions.png", "samples.png"] if images else names


def described(result: Comparison, table: Any, data: Dataset, settings: dict[str, Any]) -> dict[str, Any]:
    """The table for machines, with how it came about."""
    return {
        "data": data.name,
        "description": data.description,
        "settings": settings,
        "models": json.loads(table.reset_index().to_json(orient="records")),
        "notes": result.notes,
    }


def write(
    folder: Path,
    result: Comparison,
    table: Any,
    data: Dataset,
    held: Any,
    settings: dict[str, Any],
    report: bool = False,
) -> list[str]:
    """Write table, per-datum evidence, figures, models and a report; returns the names of what was written."""
    import torch

    from probae.comparison import lineup
    from probae.comparison.entry import data_for
    from probae.export.figures.images import image_rows
    from probae.export.figures.style import pyplot
    from probae.storage import saving
    from probae.storage.origin import Origin
    from probae.storage.results import checksum_of

    folder.mkdir()
    table.to_csv(folder / "table.csv")
    result.evidence().to_csv(folder / "evidence.csv")
    (folder / "table.json").write_text(json.dumps(described(result, table, data, settings), indent=2) + "\n")
    written = ["table.csv", "table.json", "evidence.csv"]
    for entry in result.entries:
        place = saving.save(entry.models[0], folder / "models" / entry.name.replace(" ", "_"))
        Origin.of(data, entry.name, settings["latents"], settings["seed"], settings["missing"]).write(place)
    written.append("models/")

    result.plot().figure.savefig(folder / "evidence.png", dpi=150)
    written.append("evidence.png")
    shown: dict[str, Any] = {}
    if data.image_shape is not None:
        x = torch.as_tensor((held[0] if isinstance(held, tuple) else held)[:12])
        reconstructions, samples = {"test images": lineup.images(x, data)}, {"test images": lineup.images(x, data)}
        for entry in result.entries:
            pair = entry.models[0]
            if not entry.baseline:
                rows = data_for(pair, held if isinstance(held, tuple) else x)
                rows = tuple(part[:12] for part in rows) if isinstance(rows, tuple) else x
                reconstructions[entry.name] = lineup.images(pair.reconstruct(rows), data)
            if entry.evidence:
                given = held[1][:12] if entry.given else None
                samples[entry.name] = lineup.images(pair.sample(len(x), seed=settings["seed"], given=given), data)
        for name, grid in (("reconstructions", reconstructions), ("samples", samples)):
            shown[name] = image_rows(grid)
            shown[name].savefig(folder / f"{name}.png", dpi=150)
            written.append(f"{name}.png")
    if report:
        parts = data.train, data.validation, data.test
        ran = {"command": shlex.join(["probae", *sys.argv[1:]]), "data": f"{data.name}: {data.description}"}
        rows = " / ".join(f"{len(part):,}" for part in parts)
        ran |= {"training / validation / test": f"{rows} rows, checksum {checksum_of(parts)}"}
        seconds = table["fit_seconds"].dropna().to_dict()
        result.report(
            folder / "report.html",
            title=f"Held-out log p(x): {data.name}",
            unit="image" if data.image_shape else "row",
            ran=ran | {name.replace("_", " "): value for name, value in settings.items()},
            figures={CAPTIONS[name]: figure for name, figure in shown.items()},
            fit_seconds=seconds,
        )
        written.append("report.html")
    pyplot().close("all")
    return written
