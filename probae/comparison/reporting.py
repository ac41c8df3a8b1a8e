"""A comparison written as one page, `report.html`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probae.arguments import as_path, printable
from probae.export.report import MARK, page
from probae.runtime.fingerprints import versions
from probae.storage.folders import InTheWay, write
from probae.storage.results import checksum_of


def write_report(
    comparison: Any,
    path: Any,
    *,
    title: str,
    unit: str,
    ran: Mapping[str, Any],
    figures: Mapping[str, Any],
    fit_seconds: Mapping[str, float],
) -> Path:
    """Write the page, and say where; see `Comparison.report`."""
    path = as_path("path", path)
    path = path / "report.html" if path.is_dir() else path
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(MARK.encode())):
        raise InTheWay(
            f"{printable(path)} exists and is not a report by probae. It was left as it is. Take another path"
        )
    table, data = comparison.table, comparison.data
    said = {str(name): str(value) for name, value in ran.items() if value is not None}
    shape = " × ".join(f"{size:,}" for size in data.shape if size)
    known = f", checksum {checksum_of([data.cpu().numpy()])}" if data.numel() else ""
    said["held-out data"] = shape + known
    said |= {name: str(value) for name, value in comparison.settings.items() if value is not None and name not in said}
    training = sum(fit_seconds.values())
    evaluation = f"{float(table['seconds'].sum()):,.1f} of evaluation"
    said["seconds"] = f"{training:,.1f} of training, {evaluation}" if training else evaluation
    content = page(
        comparison,
        title=title,
        unit=unit,
        ran=said,
        versions={**versions(), "system": f"{platform.system()} {platform.machine()}"},
        figures=figures,
        fit_seconds=fit_seconds,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content.encode())
    return path
