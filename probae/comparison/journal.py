"""The journal of a search: one file, to which Optuna adds a line for each thing that happens, and which no other call takes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from probae.arguments import printable
from probae.runtime.fingerprints import differing
from probae.storage.folders import InTheWay

_NAME = "probae"  # of the study, and of what it says of the call
_SHOWN = 4


@contextlib.contextmanager
def study(optuna: Any, path: Path | None, described: dict[str, Any]) -> Iterator[Any]:
    """The study of a search, in memory or in a journal; trials that were under way when a process was killed have failed.

    Raises:
        ValueError: if the journal is of another call, naming what differs, or no journal of a search.
        BlockingIOError: if another process is writing to it.
    """
    described = json.loads(json.dumps(described))
    with contextlib.ExitStack() as held:
        if path is None:
            storage = optuna.storages.InMemoryStorage()
        else:
            held.enter_context(_only_here(path))
            _require_journal(path)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        names = [each.study_name for each in storage.get_all_studies()]
        if names not in ([], [_NAME]):
            raise InTheWay(f"journal: {printable(path)} has studies that probae did not write. Take another file")
        with _quiet(optuna):
            found = optuna.create_study(storage=storage, study_name=_NAME, direction="maximize", load_if_exists=True)
        known = found.user_attrs.get(_NAME)
        if known is not None and (names := differing(known, described)):
            told = "; ".join(
                f"its {printable(name)} is {_shown(known, name)}, here it is {_shown(described, name)}"
                for name in names[:_SHOWN]
            )
            raise ValueError(f"journal: {printable(path)} is of another search: {told}. Take another file")
        if known is None:
            found.set_user_attr(_NAME, described)
        for trial in found.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            found.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        yield found


def _require_journal(path: Path) -> None:
    """Take a last line away that was not written to its end, and refuse a file of another kind."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        ours = all(isinstance(row, dict) and "op_code" in row for row in rows)
    except ValueError:
        ours = False
    if not ours or (not whole and content[:1] not in (b"", b"{")):
        raise InTheWay(f"journal: {printable(path)} exists and is not the journal of a search. Take another file")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))


@contextlib.contextmanager
def _only_here(path: Path) -> Iterator[None]:
    """Hold a file, which is made if it is not there, for this process; Windows cannot tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = f"journal: another search is writing to {printable(path)}: take another file"
                raise BlockingIOError(errno.EAGAIN, told) from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _shown(values: dict[str, Any], name: str) -> str:
    return f"{values[name]!r:.100}" if name in values else "not there"
