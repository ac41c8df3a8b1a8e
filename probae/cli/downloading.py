"""``probae data``: the named data sets, where they come from, and their download."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from probae.cli.completion import set_names
from probae.cli.console import Screen
from probae.cli.listing import sets_table


def data(
    name: Annotated[
        str | None, typer.Argument(help="A named data set; all are listed without.", autocompletion=set_names)
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download its files, and check them by their SHA-256.")
    ] = False,
    to: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for them.", show_default="that of PROBAE_DATA")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """List the named data sets, tell what one is and where it comes from, or download it."""
    from probae.data import datasets
    from probae.data.datasets.loading import VARIABLE, entry_of

    screen = Screen(as_json)
    if name is None:
        if download:
            raise ValueError("--download: expected the name of a data set, as in: probae data nltcs --download")
        screen.show(sets_table())
        screen.say("\nOne of them in full: probae data NAME. Its files: probae data NAME --download")
        screen.result([vars(row) for row in datasets.describe()])
        return
    known = about(name, entry_of(name))
    if download:
        print(f"downloading {name} …", file=sys.stderr, flush=True)
        paths = datasets.download(name, root=to)
        screen.say(f"{name}: {', '.join(map(str, paths))}", whole=True)
        if to is not None:
            screen.say(f"to use it: export {VARIABLE}={shlex.quote(to)}", whole=True)
        screen.result({**known, "paths": [str(path) for path in paths]})
        return
    screen.say(f"{name}: {known['description']}\nfrom: {known['origin'] or 'scikit-learn'}")
    for file in known["files"]:
        screen.say(f"{file['file']}: {file['form']}")
        for published in file["published"]:
            screen.say(f"  {published['url']}\n  SHA-256 {published['sha256']}", whole=True)
    screen.result(known)


def about(name: str, entry: Any) -> dict[str, Any]:
    """What is known of a set, as plain data."""
    from probae.data.datasets.downloads import DOWNLOADS

    files = []
    for file in entry.files:
        source = DOWNLOADS.get(file)
        published = [] if source is None else [vars(each) for each in source.published]
        form = f"{entry.signature}; not fetched by probae" if source is None else source.form
        files.append({"file": file, "form": form, "published": published})
    description = getattr(entry, "description", "") or f"a correlation matrix of {getattr(entry, 'size', 0)} variables"
    return {"name": name, "description": description, "origin": entry.origin, "files": files}
