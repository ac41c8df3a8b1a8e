"""The notebooks: their texts run at small sizes, and the committed ones show what the texts say."""

import ast
import json
import re
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
TEXTS = sorted(NOTEBOOKS.glob("*.md"))
MACHINE = re.compile(r"/(home|root|tmp|work|mnt|usr|Users|private)/|[A-Z]:\\\\|site-packages")
every = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)


def code(text):
    return [cell for cell in jupytext.read(text).cells if cell.cell_type == "code"]


def assigned(source):
    names = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def committed(text):
    return json.loads(text.with_suffix(".ipynb").read_text())["cells"]


def outputs(text):
    return [output for cell in committed(text) for output in cell.get("outputs", [])]


def test_each_text_has_a_notebook_and_each_notebook_a_text():
    assert TEXTS
    assert [path.with_suffix(".ipynb") for path in TEXTS] == sorted(NOTEBOOKS.glob("*.ipynb"))


@every
def test_the_small_sizes_are_of_names_that_their_cell_sets(text):
    small = {cell.source: cell.metadata["quick"] for cell in code(text) if "quick" in cell.metadata}
    assert len(small) == 1
    for source, quick in small.items():
        assert assigned(quick)
        assert assigned(quick) <= assigned(source)


@every
def test_the_text_runs_at_small_sizes(text):
    scope = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(code(text)):
            for source in (cell.source, cell.metadata.get("quick", "")):
                program = ast.Interactive(ast.parse(source).body)  # its expressions are displayed, as in a notebook
                exec(compile(program, f"{text.name}, cell {number}", "single"), scope)
    finally:
        plt.close("all")


@every
def test_the_committed_notebook_has_the_cells_of_its_text(text):
    cells = [(cell.cell_type, cell.source) for cell in jupytext.read(text).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in committed(text)] == cells


@every
def test_the_committed_notebook_was_run_from_top_to_bottom_without_errors(text):
    counts = [cell["execution_count"] for cell in committed(text) if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    drawing = [cell for cell in committed(text) if "".join(cell["source"]).endswith(";")]
    assert drawing
    assert all(any("image/png" in output.get("data", {}) for output in cell["outputs"]) for cell in drawing)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr" for output in outputs(text))


@every
def test_the_committed_outputs_name_no_path_of_a_machine(text):
    shown = [json.dumps(o.get("data", {}) | {"image/png": "", "text": o.get("text", "")}) for o in outputs(text)]
    assert shown
    assert not [found for found in shown if MACHINE.search(found)]


@every
def test_the_committed_notebook_is_small(text):
    assert text.with_suffix(".ipynb").stat().st_size < 400_000
