"""The ``probae`` command."""

from __future__ import annotations

import functools
import io
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from probae.arguments import as_path, one_of

if TYPE_CHECKING:
    from probae.comparison import Comparison
    from probae.data.datasets import Dataset
    from probae.pair import Pair

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # names and files may hold brackets
    help="Autoencoders as latent variable models, compared by held-out log p(x).",
)


def in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistake into one line on stderr and exit code 2, and Ctrl-C into exit code 130."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            print(f"probae: {in_print(' '.join(str(error).split()))}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("probae: interrupted", file=sys.stderr)
            raise typer.Exit(130) from error

    return run


def in_print(text: str) -> str:
    """A text with escapes for what a terminal would obey: names in files and of files may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


CAPTIONS = {
    "reconstructions": "Test images, and what each model makes of them through its latents.",
    "samples": "Test images, and images that each model draws by itself.",
}
COMPILE: dict[str, bool | str] = {"auto": "auto", "eager": False, "flat": "flat", "compiled": True}


@app.command()
@in_one_line
def compare(
    data: Annotated[
        str, typer.Option(help="A named data set (see `probae list`), or a .npy, .npz or .csv file.")
    ] = "digits",
    models: Annotated[
        str | None,
        typer.Option(
            help="Models, separated by commas: names of `probae list`, or FILE.py:NAME, which runs the file, and takes a "
            "model that it registers, or a class; or all.",
            show_default="those that suit the data",
        ),
    ] = None,
    latents: Annotated[int, typer.Option(min=1, help="Number of latents of each model.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model that is trained by steps.")] = 4000,
    test_rows: Annotated[int, typer.Option(min=2, help="At most so many test rows, drawn at random.")] = 1000,
    particles: Annotated[int, typer.Option(min=1, help="Particles of each bound on log p(x).")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the fits, the draws, and the split of a file.")] = 0,
    compile: Annotated[str, typer.Option(help="How training steps are taken: auto, eager, flat or compiled.")] = "auto",
    missing: Annotated[
        str | None,
        typer.Option(help="'mask' takes rows with missing values, at random.", show_default="they are refused"),
    ] = None,
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
    from probae.comparison import lineup
    from probae.data import datasets
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
    console = Console(markup=False, highlight=False)
    loaded = datasets.load(data, seed=seed, missing=missing)
    folder = as_path("--out", out) if out is not None else Path("probae-compare") / loaded.name
    chosen, files = lineup.named(models)
    chosen = lineup.choose(loaded, chosen)
    test = subset(loaded.test, test_rows, seed)
    held = test if not lineup.conditions(chosen) else (test, subset(lineup.labels_of(loaded), test_rows, seed))
    settings: dict[str, Any] = {"latents": latents, "steps": steps, "test_rows": test_rows, "particles": particles}
    settings |= {"seed": seed, "compile": compile, "missing": missing, "expost_prior": expost_prior}
    whole = checksum_of((loaded.train, loaded.validation, loaded.test))
    run = {"data": loaded.name, "checksum of the data": whole, "models": chosen, **settings}
    with preparing(folder, KIND) as place:
        results = Results(folder, run, loaded.files, force)
        priors = [] if expost_prior is None else [lineup.named_with_prior(name).replace(" ", "_") for name in chosen]
        results.require_free(written_names([*chosen, *priors], loaded.image_shape is not None, report))
        console.print(in_print(f"{loaded.name}: {loaded.description}"))
        console.print(f"{loaded!r}; {len(test)} test rows, {latents} latents\n")

        fitted: dict[str, Pair] = {}
        seconds: dict[str, float] = {}
        how = loaded, latents, steps, seed, COMPILE[compile], processes, files
        for name, model, took in lineup.train_all(chosen, *how, progress=sys.stderr.isatty()):
            fitted[name], seconds[name] = model, took
            console.print(f"  fitted {name:24s} {seconds[name]:6.1f} s")
        if expost_prior is not None:
            for name, model, took in list(lineup.with_priors(fitted, loaded, expost_prior, seed)):
                fitted[name], seconds[name] = model, took
                console.print(f"  fitted {name:24s} {seconds[name]:6.1f} s")
        result = comparison.compare(
            fitted, held, train=loaded.train, particles=particles, seed=seed, progress=sys.stderr.isatty()
        )
        table = result.table.assign(fit_seconds=[seconds.get(name, math.nan) for name in result.table.index])
        console.print()
        console.print(rendered(table, loaded, console.width))
        for note in result.notes:
            console.print(f"· {note}")
        made = place / "results"
        written = write(made, result, table, loaded, held, settings, report)
        results.put(made)
    console.print()
    console.print(in_print(f"written to {folder}: {', '.join(written)}"))


@app.command("list")
@in_one_line
def list_() -> None:
    """List the models and the data sets."""
    from probae.data import datasets
    from probae.models import CATALOGUE

    console = Console(markup=False, highlight=False)
    table = Table(title="models", title_justify="left", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("what it is")
    table.add_column("for")
    for name, model in CATALOGUE.items():
        needs = " with labels" if model.labels else ""
        table.add_row(name, f"{model.title} ({model.paper})", ", ".join(model.kinds) + needs)
    console.print(table)
    console.print()
    table = Table("data set", "values", "train / validation / test × features", "found", title="data sets",
                  title_justify="left", box=None, pad_edge=False)  # fmt: skip
    for row in datasets.describe():
        *splits, features = row.shape
        shape = " / ".join(f"{n:,}" for n in splits) + f" × {features}"
        table.add_row(row.name, row.kind, shape, "yes" if row.present else "no")
    console.print(table)
    console.print("\nNamed sets but digits are read from the folder that the environment variable PROBAE_DATA names.")


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
            {"lower": "≥ ", "upper": "≤ "}.get(row["bound"], "") + _with_error(row["log_evidence"], row["stderr"])
            for _, row in table.iterrows()
        ],
        "to the best": [
            _with_error(a, b) for a, b in zip(table["difference"], table["difference_stderr"], strict=True)
        ],
        "reconstr.": ["–" if math.isnan(v) else f"{v:.2f}" for v in table["reconstruction"]],
        "over indep.": [
            _with_error(a, b, plus=True)
            for a, b in zip(table["over_independent"], table["over_independent_stderr"], strict=True)
        ],
        "k̂": ["–" if math.isnan(v) else f"{v:.2f}" for v in table["pareto_k"]],
        "active": ["–" if math.isnan(v) else f"{v:.0f}" for v in table["active_units"]],
        "parameters": [f"{v:,}" for v in table["parameters"]],
        "seconds": [f"{v:.1f}" for v in table["seconds"] + table["fit_seconds"].fillna(0)],
    }
    shown = Table(
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
    return [*names, "reconstructions.png", "samples.png"] if images else names


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
    from probae.storage.results import checksum_of

    folder.mkdir()
    table.to_csv(folder / "table.csv")
    result.evidence().to_csv(folder / "evidence.csv")
    rows = json.loads(table.reset_index().to_json(orient="records"))
    content = {
        "data": data.name,
        "description": data.description,
        "settings": settings,
        "models": rows,
        "notes": result.notes,
    }
    (folder / "table.json").write_text(json.dumps(content, indent=2) + "\n")
    written = ["table.csv", "table.json", "evidence.csv"]
    for entry in result.entries:
        saving.save(entry.models[0], folder / "models" / entry.name.replace(" ", "_"))
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


def _with_error(value: float, error: float, plus: bool = False) -> str:
    if math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:{'+' if plus else ''}.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ≥ or ± shows a question mark
    app()


if __name__ == "__main__":
    main()
