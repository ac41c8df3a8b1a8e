"""What the runs on the documentation's model pages print, for the models that the table of the digits does not have.

PYTHONPATH=docs/_ext python benchmarks/model_pages.py > benchmarks/results/model-pages.md
"""

import contextlib
import datetime
import io

import torch
from examples import example
from measured import digits

from probae.models import CATALOGUE


def main():
    print(f"# `model_pages.py`, {datetime.date.today()}\n\nPyTorch {torch.__version__}; log p(x) in nats per datum.")
    kept = digits().rows
    for name in CATALOGUE:
        if not any(row.startswith(name) for row in kept):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(example(name), name, "exec"), {})
            print(f"\n## {name}\n\n```text\n{printed.getvalue().strip()}\n```", flush=True)


if __name__ == "__main__":
    main()
