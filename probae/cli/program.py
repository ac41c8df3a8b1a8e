"""The program: its commands, its version, and how it is run."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from probae import __version__
from probae.cli.comparing import compare
from probae.cli.diagnosing import diagnose
from probae.cli.downloading import data
from probae.cli.encoding import encode
from probae.cli.errors import in_one_line
from probae.cli.evaluating import evaluate
from probae.cli.fitting import fit
from probae.cli.listing import list_
from probae.cli.sampling import sample

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # names and files may hold brackets
    help="Autoencoders as latent variable models, compared by held-out log p(x).",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"probae {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Autoencoders as latent variable models, compared by held-out log p(x)."""


COMMANDS: dict[str, Callable[..., None]] = {
    "compare": compare,
    "fit": fit,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "sample": sample,
    "encode": encode,
    "list": list_,
    "data": data,
}
for name, command in COMMANDS.items():
    app.command(name)(in_one_line(command))


def main() -> None:
    """Run the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ≥ or ± shows a question mark
    app(prog_name="probae")
