"""The model card: a page beside a saved model that says what it is, for people; `load` does not read it."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

from probae.batches import as_batch
from probae.evidence import Evidence
from probae.runtime.fingerprints import Checksum, versions
from probae.storage.folders import InTheWay, mark, require_free

NAME = "card.md"


def card(model: Any, module: nn.Module, kind: str, tensors: str, evidence: Any, data: Any) -> bytes:
    """The page, with probae's mark and a checksum of the rest in its first line.

    Args:
        model: what was saved.
        module: its tensors.
        kind: of the mark.
        tensors: the checksum of the file that holds them.
        evidence: an `Evidence` of the model, or None.
        data: what it was fitted to, in memory, or None.

    Raises:
        TypeError: if the evidence is none.
    """
    name = type(model).__name__
    described = (inspect.getdoc(type(model)) or "").split("\n\n")[0].replace("\n", " ")
    rows = [
        ("what", described or name),
        ("as Python shows it", f"`{' '.join(repr(model).split())[:300]}`"),
        ("parameters", f"{sum(p.numel() for p in module.parameters()):,}"),
        ("log p(x)", _of_evidence(evidence)),
        ("training data", "not given" if data is None else _of_data(data)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        ("tensors", f"sha256 {tensors}"),
    ]
    table = "\n".join(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows)
    text = f"# {name}\n\n| | |\n|-|-|\n{table}\n\nIt loads with `probae.load(folder)`.\n"
    first = json.dumps({**mark(kind), "sha256": hashlib.sha256(text.encode()).hexdigest()})
    return f"<!--{first}-->\n{text}".encode()


def require_own(path: Path, kind: str) -> None:
    """Refuse to replace a page that probae has not written, or that has been changed since.

    Raises:
        InTheWay: if it is one.
    """
    require_free(path, kind)
    if not path.exists():
        return
    first, newline, text = path.read_bytes().partition(b"\n")
    torn = not newline or not text.endswith(b"\n")
    if not torn and hashlib.sha256(text).hexdigest().encode() not in first:
        raise InTheWay(
            f"{path} was changed since probae wrote it, and was left as it is. Move it away, or give it another name"
        )


def _of_evidence(evidence: Any) -> str:
    if evidence is None:
        return "not given"
    if not isinstance(evidence, Evidence):
        raise TypeError(
            f"evidence: expected an Evidence, as probae.log_evidence returns, got {type(evidence).__name__}"
        )
    what = {"exact": "exact", "lower": "a lower bound", "upper": "an upper bound"}.get(evidence.bound, evidence.bound)
    told = (
        f"{evidence.mean:.4f} ± {evidence.mean_stderr:.4f} nats per datum (one standard error over {len(evidence)} data; "
        f"Monte-Carlo error {evidence.mean_mc_stderr:.2g}); {what}, by {evidence.method}, of a {evidence.measure}"
    )
    if evidence.reliable is None:
        return told
    return f"{told}; the errors of {float(evidence.reliable.double().mean()):.0%} of the data can be believed"


def _of_data(data: Any) -> str:
    checksum = Checksum.of([as_batch(data)])
    leaves = (
        f"{name}: {shape}, {dtype}, crc32 {checksum.sum(name)}" for name, (shape, dtype) in checksum.kinds.items()
    )
    return f"{checksum.rows:,} rows; " + "; ".join(leaves)
